"""The Open Inference Protocol: requests to tensors, tensors to answers, for HTTP and gRPC alike.

Nothing here knows features or models. Whatever a client may send is either understood or refused
with a ``RefusedError``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from dlrm.serve.messages import MESSAGES

EXTENSIONS = ("binary_tensor_data", "model_repository")
"""Of the protocol, by the names that Triton gives them."""

DTYPES: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {
        "BOOL": "?",
        "UINT8": "<u1",
        "UINT16": "<u2",
        "UINT32": "<u4",
        "UINT64": "<u8",
        "INT8": "<i1",
        "INT16": "<i2",
        "INT32": "<i4",
        "INT64": "<i8",
        "FP16": "<f2",
        "FP32": "<f4",
        "FP64": "<f8",
    }.items()
}
"""The protocol's types of a fixed size; BYTES has none."""


_LONGEST_MESSAGE = 1000  # it repeats what a client sent


class RefusedError(Exception):
    """A request is not answered as it asks.

    Args:
        status: Of HTTP; 400 where the request is wrong.
        message: For the client.
        retry_after: Seconds after which another try makes sense; 0: it does not.
        allow: Methods of HTTP that the path takes, where it does not take that of the request.
    """

    def __init__(
        self, status: int, message: str, retry_after: int = 0, allow: Sequence[str] = ()
    ) -> None:
        # A path that is no UTF-8 could not be answered.
        shown = message[:_LONGEST_MESSAGE].encode("utf-8", "backslashreplace").decode()
        super().__init__(shown)
        self.status = status
        self.retry_after = retry_after
        self.allow = allow


def wrong(message: str) -> RefusedError:
    """Return the refusal of a request that is wrong."""
    return RefusedError(400, message)


class Tensor(msgspec.Struct, frozen=True, eq=False):
    """A tensor as it came.

    Attributes:
        name: As the client calls it.
        datatype: One of ``DTYPES``, or BYTES.
        shape: As many elements as there are.
        numbers: Of a number type, flat; where ``missing``, 0 or NaN stands for null.
        texts: Of BYTES, one after the other; None is null.
        packed: Of BYTES, in place of ``texts``: each with its length before it, in 4 bytes.
        missing: Whether there are nulls among ``numbers``.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    numbers: npt.NDArray[Any] | None = None
    texts: Sequence[str | bytes | None] | None = None
    packed: memoryview | None = None
    missing: bool = False

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class InferRequest:
    """What a client asks for.

    Attributes:
        id: The client's name for it, which the answer repeats.
        inputs: By name.
        outputs: Names of those asked for, each with whether its data is to be binary; empty: all.
        binary: Whether outputs are binary that do not say so themselves.
        timeout: Seconds within which an answer is of use; None: no matter.
    """

    id: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, bool]
    binary: bool = False
    timeout: float | None = None


class _Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = msgspec.field(default_factory=dict)
    data: msgspec.Raw = msgspec.Raw(b"")


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = msgspec.field(default_factory=dict)


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: str = ""
    parameters: dict[str, Any] = msgspec.field(default_factory=dict)
    outputs: list[_Output] = msgspec.field(default_factory=list)


_MOST_TENSORS = 4096
_decode_request = msgspec.json.Decoder(_Request).decode


def read_http(body: bytes, header_length: int | None) -> InferRequest:
    """Understand the body of an infer request.

    Args:
        body: JSON, and behind it binary tensors.
        header_length: Bytes of the JSON; None: all.

    Raises:
        RefusedError: It is malformed.
    """
    if header_length is None:
        header_length = len(body)
    elif not 0 <= header_length <= len(body):
        raise wrong(
            f"Inference-Header-Content-Length is {header_length}, and the body has {len(body)} "
            "bytes."
        )
    view = memoryview(body)
    try:
        request = _decode_request(view[:header_length])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise wrong(f"the request is not JSON of the protocol: {error}.") from error
    except RecursionError as error:
        raise wrong("the request's JSON is nested too deeply.") from error
    _refuse_parameters(request.parameters, "the request")
    inputs: dict[str, Tensor] = {}
    start = header_length
    for each in request.inputs:
        _refuse_parameters(each.parameters, "input", each.name)
        size = each.parameters.get("binary_data_size")
        shape = _shape(each.name, each.shape)
        if size is None:
            tensor = _from_json(each, shape)
        else:
            if type(size) is not int or not 0 <= size <= len(body) - start or each.data:
                raise wrong(
                    f"input {each.name!r} has a binary_data_size of {_shown(size)}"
                    + (" beside data." if each.data else "")
                    + f", and {len(body) - start} bytes are left behind the JSON."
                )
            tensor = _from_bytes(each.name, each.datatype, shape, view[start : start + size])
            start += size
        _add(inputs, tensor)
    if start != len(body):
        raise wrong(
            f"{len(body) - start} bytes are left behind the JSON and the tensors it tells of. Is "
            "Inference-Header-Content-Length right?"
        )
    binary = _flag(request.parameters, "binary_data_output", False, "the request")
    outputs: dict[str, bool] = {}
    for output in request.outputs:
        _refuse_parameters(output.parameters, "output", output.name)
        is_binary = _flag(output.parameters, "binary_data", binary, f"output {output.name!r}")
        _add_output(outputs, output.name, is_binary=is_binary)
    return InferRequest(request.id, inputs, outputs, binary, _timeout(request.parameters))


def _add(inputs: dict[str, Tensor], tensor: Tensor) -> None:
    if tensor.name in inputs:
        raise wrong(f"input {tensor.name!r} is there twice.")
    if len(inputs) == _MOST_TENSORS:
        raise wrong(f"there are more than {_MOST_TENSORS} inputs.")
    inputs[tensor.name] = tensor


def _add_output(outputs: dict[str, bool], name: str, *, is_binary: bool) -> None:
    if name in outputs:
        raise wrong(f"output {name!r} is asked for twice.")
    outputs[name] = is_binary


def _refuse_parameters(parameters: Mapping[str, Any], of: str, name: str = "") -> None:
    """Refuse what would change the meaning of a request and is not offered."""
    if not parameters or (len(parameters) == 1 and "binary_data_size" in parameters):
        return
    where = f"{of} {name!r}" if name else of
    for other in ("shared_memory_region", "classification"):
        if other in parameters:
            raise wrong(f"{where} has the parameter {other}, which this server does not offer.")
    if parameters.get("sequence_id"):
        raise wrong(f"{where} has a sequence_id, and the model knows no sequences.")


def _flag(parameters: Mapping[str, Any], name: str, default: bool, where: str) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise wrong(f"{where} has the parameter {name} {_shown(value)}, expected true or false.")
    return value


def _timeout(parameters: Mapping[str, Any]) -> float | None:
    """Return seconds, of the parameter in microseconds that Triton's clients send."""
    microseconds = parameters.get("timeout")
    if microseconds is None:
        return None
    if isinstance(microseconds, str) and microseconds.isdecimal() and len(microseconds) < 20:
        microseconds = int(microseconds)
    if type(microseconds) is not int or not 0 <= microseconds < 1 << 63:
        raise wrong(f"the timeout is {_shown(microseconds)}, expected microseconds.")
    return microseconds / 1e6 if microseconds else None


def _shown(value: Any) -> str:
    """Return a value that a client chose, as text."""
    try:
        return repr(value)[:100]
    except ValueError:  # Python writes no numbers of thousands of digits
        return "a number of too many digits"


def _shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    if len(shape) > 8 or (shape and not 0 <= min(shape) <= max(shape) < 2**31):
        raise wrong(
            f"input {name!r} has the shape {_shown(list(shape)[:9])}; expected at most 8 sizes, "
            "each in 0 … 2**31-1."
        )
    return tuple(shape)


def _refuse_count(name: str, shape: tuple[int, ...], found: int) -> None:
    if found != math.prod(shape):
        raise wrong(
            f"input {name!r} has the shape {list(shape)}, so {math.prod(shape)} elements are "
            f"expected; got {found}."
        )


def _from_bytes(name: str, datatype: str, shape: tuple[int, ...], data: memoryview) -> Tensor:
    """Return a tensor that came as bytes."""
    if datatype == "BYTES":
        if len(data) < 4 * math.prod(shape):
            raise wrong(
                f"input {name!r} has the shape {list(shape)} and {len(data)} bytes: each text has "
                "its length before it, in 4 bytes."
            )
        return Tensor(name, datatype, shape, packed=data)
    dtype = _dtype(name, datatype)
    if len(data) != dtype.itemsize * math.prod(shape):
        raise wrong(
            f"input {name!r} has the shape {list(shape)} and type {datatype}, so "
            f"{dtype.itemsize * math.prod(shape)} bytes are expected; got {len(data)}."
        )
    return Tensor(name, datatype, shape, np.frombuffer(data, dtype))


def _dtype(name: str, datatype: str) -> np.dtype[Any]:
    if datatype not in DTYPES:
        raise wrong(
            f"input {name!r} has the datatype {datatype[:20]!r}; expected one of "
            f"{', '.join(DTYPES)}, BYTES."
        )
    return DTYPES[datatype]


_FLAT: Mapping[str, Callable[[bytes], list[Any]]] = {
    "b": msgspec.json.Decoder(list[bool | None]).decode,
    "i": msgspec.json.Decoder(list[int | None]).decode,
    "f": msgspec.json.Decoder(list[float | None]).decode,
    "S": msgspec.json.Decoder(list[str | None]).decode,
}
_ROWS: Mapping[str, Callable[[bytes], list[list[Any]]]] = {
    "b": msgspec.json.Decoder(list[list[bool | None]]).decode,
    "i": msgspec.json.Decoder(list[list[int | None]]).decode,
    "f": msgspec.json.Decoder(list[list[float | None]]).decode,
    "S": msgspec.json.Decoder(list[list[str | None]]).decode,
}


def _from_json(tensor: _Input, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor whose elements are JSON, flat or as rows; null is a missing one."""
    name, datatype = tensor.name, tensor.datatype
    kind = "S" if datatype == "BYTES" else _dtype(name, datatype).kind
    kind = "i" if kind == "u" else kind
    if not tensor.data:
        raise wrong(f"input {name!r} has no data.")
    content = bytes(tensor.data)
    try:
        if content[1:].lstrip()[:1] == b"[":
            elements = [each for row in _ROWS[kind](content) for each in row]
        else:
            elements = _FLAT[kind](content)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise wrong(
            f"input {name!r} of type {datatype} has other data: {error}. Expected a list of "
            "elements, or of rows of them."
        ) from error
    _refuse_count(name, shape, len(elements))
    if kind == "S":
        return Tensor(name, datatype, shape, texts=elements)
    missing = None in elements
    if missing:
        null = math.nan if kind == "f" else 0
        elements = [null if element is None else element for element in elements]
    try:
        with np.errstate(over="ignore"):  # beyond FP32 or FP16 is infinity
            numbers = np.array(elements, DTYPES[datatype])
    except OverflowError as error:
        raise wrong(f"input {name!r} has a number beyond {datatype}: {error}.") from error
    return Tensor(name, datatype, shape, numbers, missing=missing)


_CONTENTS: Mapping[str, str] = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def read_grpc(request: Any) -> InferRequest:
    """Understand a ModelInferRequest.

    Raises:
        RefusedError: It is malformed.
    """
    parameters = _grpc_parameters(request.parameters)
    _refuse_parameters(parameters, "the request")
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise wrong(
            f"there are {len(request.inputs)} inputs and {len(raw)} raw_input_contents; expected "
            "one for each, or none."
        )
    inputs: dict[str, Tensor] = {}
    for number, each in enumerate(request.inputs):
        _refuse_parameters(_grpc_parameters(each.parameters), "input", each.name)
        shape = _shape(each.name, each.shape)
        if raw:
            if each.HasField("contents"):
                raise wrong(f"input {each.name!r} has contents beside raw_input_contents.")
            data = memoryview(raw[number])
            tensor = _from_bytes(each.name, each.datatype, shape, data)
        else:
            tensor = _from_contents(each, shape)
        _add(inputs, tensor)
    outputs: dict[str, bool] = {}
    for output in request.outputs:
        _refuse_parameters(_grpc_parameters(output.parameters), "output", output.name)
        _add_output(outputs, output.name, is_binary=True)
    return InferRequest(request.id, inputs, outputs, True, _timeout(parameters))


def _grpc_parameters(parameters: Any) -> dict[str, Any]:
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "bool_param")
        for name, value in parameters.items()
    }


def _from_contents(tensor: Any, shape: tuple[int, ...]) -> Tensor:
    name, datatype = tensor.name, tensor.datatype
    if datatype != "BYTES":
        _dtype(name, datatype)
    if datatype not in _CONTENTS:
        raise wrong(f"input {name!r} of type {datatype} has to come in raw_input_contents.")
    elements = getattr(tensor.contents, _CONTENTS[datatype])
    _refuse_count(name, shape, len(elements))
    if datatype == "BYTES":
        return Tensor(name, datatype, shape, texts=list(elements))
    try:
        numbers = np.array(list(elements), DTYPES[datatype])  # of the list itself NumPy wraps
    except OverflowError as error:
        raise wrong(f"input {name!r} has a number beyond {datatype}: {error}.") from error
    return Tensor(name, datatype, shape, numbers)


@dataclass(frozen=True, eq=False)
class InferAnswer:
    """What is answered.

    Attributes:
        model: Its name.
        version: Of the model.
        request: What was asked for.
        outputs: Each by name: its type and elements, in its shape.
    """

    model: str
    version: str
    request: InferRequest
    outputs: Mapping[str, tuple[str, npt.NDArray[Any]]] = field(repr=False)

    def asked_for(self) -> list[tuple[str, bool, str, npt.NDArray[Any]]]:
        """Return of each output asked for: name, whether binary, type and elements."""
        wanted = self.request.outputs or dict.fromkeys(self.outputs, self.request.binary)
        return [(name, binary, *self.outputs[name]) for name, binary in wanted.items()]


def refuse_outputs(request: InferRequest, known: Sequence[str]) -> None:
    """Refuse a request for an output that there is not.

    Raises:
        RefusedError: Naming it.
    """
    for name in request.outputs:
        if name not in known:
            raise wrong(f"there is no output {name[:100]!r}; the model has {', '.join(known)}.")


def write_http(answer: InferAnswer) -> tuple[bytes, int | None]:
    """Return the body of an answer, and how many bytes of it are JSON where binary data follows."""
    outputs: list[dict[str, Any]] = []
    tail = []
    for name, binary, datatype, data in answer.asked_for():
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": data.shape}
        if binary:
            raw = np.ascontiguousarray(data, DTYPES[datatype]).tobytes()
            output["parameters"] = {"binary_data_size": len(raw)}
            tail.append(raw)
        else:
            output["data"] = data.reshape(-1).tolist()
        outputs.append(output)
    content: dict[str, Any] = {
        "model_name": answer.model,
        "model_version": answer.version,
        "outputs": outputs,
    }
    if answer.request.id:
        content["id"] = answer.request.id
    header = msgspec.json.encode(content)
    if not tail:
        return header, None
    return b"".join([header, *tail]), len(header)


def write_grpc(answer: InferAnswer) -> Any:
    """Return a ModelInferResponse; its outputs are raw."""
    response = MESSAGES["ModelInferResponse"](
        model_name=answer.model, model_version=answer.version, id=answer.request.id
    )
    for name, _, datatype, data in answer.asked_for():
        response.outputs.add(name=name, datatype=datatype, shape=data.shape)
        content = np.ascontiguousarray(data, DTYPES[datatype]).tobytes()
        response.raw_output_contents.append(content)
    return response
