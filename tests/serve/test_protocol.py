import json
import struct
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from dlrm.serve.messages import MESSAGES
from dlrm.serve.protocol import (
    DTYPES,
    InferAnswer,
    InferRequest,
    RefusedError,
    Tensor,
    read_grpc,
    read_http,
    refuse_outputs,
    write_grpc,
    write_http,
)


def body(inputs: list[dict[str, Any]], **more: Any) -> bytes:
    return json.dumps({"inputs": inputs, **more}).encode()


def one(**tensor: Any) -> bytes:
    return body([{"name": "x", **tensor}])


def refused(content: bytes, header_length: int | None = None) -> str:
    with pytest.raises(RefusedError) as caught:
        read_http(content, header_length)
    assert caught.value.status == 400
    return str(caught.value)


def test_json_becomes_tensors_flat_or_as_rows() -> None:
    flat = one(shape=[2, 2], datatype="INT64", data=[1, 2, None, -4])
    rows = one(shape=[2, 2], datatype="INT64", data=[[1, 2], [None, -4]])
    for content in (flat, rows):
        tensor = read_http(content, None).inputs["x"]
        assert tensor.numbers is not None
        assert (tensor.shape, tensor.missing) == ((2, 2), True)
        np.testing.assert_array_equal(tensor.numbers, np.array([1, 2, 0, -4], np.int64))
    texts = read_http(one(shape=[3], datatype="BYTES", data=["a", None, ""]), None).inputs["x"]
    assert texts.texts == ["a", None, ""]
    numbers = read_http(one(shape=[2], datatype="FP32", data=[0.5, None]), None).inputs["x"].numbers
    np.testing.assert_array_equal(numbers, np.array([0.5, np.nan], np.float32))


def test_what_is_asked_for_is_read() -> None:
    tensor = {"name": "x", "shape": [1], "datatype": "BOOL", "data": [True]}
    content = body(
        [tensor],
        id="seven",
        parameters={"binary_data_output": True, "timeout": 250_000, "whatever": 1},
        outputs=[{"name": "a"}, {"name": "b", "parameters": {"binary_data": False}}],
    )
    request = read_http(content, None)
    assert (request.id, request.timeout, request.binary) == ("seven", 0.25, True)
    assert request.outputs == {"a": True, "b": False}


def test_binary_tensors_lie_behind_the_json() -> None:
    first, second = np.array([1, -2], "<i4").tobytes(), b"\x02\0\0\0ab\0\0\0\0"
    header = body(
        [
            {"name": "x", "shape": [2], "datatype": "INT32", "parameters": {"binary_data_size": 8}},
            {"name": "z", "shape": [1], "datatype": "FP64", "data": [0.5]},
            {
                "name": "y",
                "shape": [2],
                "datatype": "BYTES",
                "parameters": {"binary_data_size": 10},
            },
        ]
    )
    inputs = read_http(header + first + second, len(header)).inputs
    numbers = inputs["x"].numbers
    assert numbers is not None
    assert numbers.tolist() == [1, -2]
    assert inputs["y"].packed == second
    assert "2 bytes are left" in refused(header + first + second + b"??", len(header))
    assert "9 bytes are left" in refused(header + first + second[:-1], len(header))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"inputs": 1}', "Expected `array`"),
        (b'{"inputs": [{"name": "x", "shape": [1]}]}', "missing required field `datatype`"),
        (one(shape=[1], datatype="INT3", data=[1]), "expected one of BOOL, UINT8"),
        (
            one(shape=[-1], datatype="INT32", data=[1]),
            "has the shape [-1]; expected at most 8 sizes",
        ),
        (one(shape=[1] * 9, datatype="INT32", data=[1]), "has the shape"),
        (one(shape=[2], datatype="INT32", data=[1]), "2 elements are expected; got 1"),
        (one(shape=[2], datatype="INT32"), "no data"),
        (one(shape=[1], datatype="INT32", data=["a"]), "Expected `int | null`, got `str`"),
        (one(shape=[1], datatype="INT32", data=[[[1]]]), "Expected `int | null`, got `array`"),
        (one(shape=[1], datatype="INT32", data={"a": 1}), "Expected `array`"),
        (one(shape=[1], datatype="INT32", data=[2**31]), "beyond INT32"),
        (one(shape=[1], datatype="UINT32", data=[-1]), "beyond UINT32"),
        (one(shape=[1], datatype="BYTES", data=[1]), "Expected `str | null`, got `int`"),
        (one(shape=[1], datatype="INT32", data=[1], parameters={"binary_data_size": 4}), "beside"),
        (one(shape=[1], datatype="INT32", parameters={"binary_data_size": 4}), "binary_data_size"),
        (one(shape=[1], datatype="INT32", parameters={"binary_data_size": "4"}), "'4'"),
        (one(shape=[1], datatype="INT32", parameters={"binary_data_size": True}), "True"),
        (
            one(shape=[1], datatype="INT32", data=[1], parameters={"shared_memory_region": "a"}),
            "shared_memory_region, which this server does not offer",
        ),
        (
            body([{"name": "x", "shape": [1], "datatype": "INT32", "data": [1]}] * 2),
            "'x' is there twice",
        ),
        (body([], parameters={"sequence_id": 3}), "no sequences"),
        (body([], parameters={"timeout": -3}), "timeout"),
        (body([], parameters={"timeout": 10**4000}), "timeout"),
        (one(shape=[10**4000], datatype="INT64", data=[1]), "has the shape"),
        (b'{"inputs": [], "parameters": {"timeout": 1%s}}' % (b"0" * 5000), "not JSON"),
        (one(shape=[1] * 9, datatype="x" * 9999, data=[]), "has the shape"),
        (body([], parameters={"timeout": 1 << 63}), "timeout"),
        (b'{"inputs": [{"name": "\\ud800"}]}', "not JSON"),
        (one(shape=[1], datatype="INT64", data=[10**30]), "beyond INT64"),
        (body([], parameters={"binary_data_output": 1}), "expected true or false"),
        (body([], outputs=[{"name": "a", "parameters": {"classification": 2}}]), "classification"),
        (body([], outputs=[{"name": "a"}] * 2), "'a' is asked for twice"),
    ],
)
def test_what_is_wrong_is_told(content: bytes, message: str) -> None:
    found = refused(content)
    assert message in found
    assert len(found) <= 1000


def test_the_length_of_the_header_must_fit() -> None:
    assert "is 5, and the body has 2 bytes" in refused(b"{}", 5)
    tensor = {"name": "x", "shape": [2], "datatype": "INT32", "parameters": {"binary_data_size": 7}}
    header = body([tensor])
    assert "8 bytes are expected; got 7" in refused(header + b"1234567", len(header))
    one_byte = {"shape": [1], "datatype": "UINT8", "parameters": {"binary_data_size": True}}
    header = body([tensor | one_byte])
    assert "binary_data_size of True" in refused(header + b"1", len(header))
    tensor |= {"datatype": "BYTES"}
    header = body([tensor])
    assert "its length before it" in refused(header + b"1234567", len(header))


def test_an_answer_is_json_or_binary_as_asked_for() -> None:
    outputs = {
        "p": ("FP32", np.array([0.25, 0.5], np.float32)),
        "u": ("INT32", np.array([3, 4], np.int32)),
    }
    everything = InferAnswer("m", "v", InferRequest("i", {}, {}), outputs)
    content, length = write_http(everything)
    assert length is None
    assert json.loads(content) == {
        "model_name": "m",
        "model_version": "v",
        "id": "i",
        "outputs": [
            {"name": "p", "datatype": "FP32", "shape": [2], "data": [0.25, 0.5]},
            {"name": "u", "datatype": "INT32", "shape": [2], "data": [3, 4]},
        ],
    }
    mixed = InferAnswer("m", "v", InferRequest("", {}, {"u": False, "p": True}), outputs)
    content, length = write_http(mixed)
    assert length is not None
    header = json.loads(content[:length])
    assert "id" not in header
    assert header["outputs"][1]["parameters"] == {"binary_data_size": 8}
    assert header["outputs"][0]["data"] == [3, 4]
    assert content[length:] == struct.pack("<2f", 0.25, 0.5)
    response = service_pb2.ModelInferResponse.FromString(write_grpc(mixed).SerializeToString())
    assert [(each.name, each.shape[:]) for each in response.outputs] == [("u", [2]), ("p", [2])]
    assert response.raw_output_contents[1] == struct.pack("<2f", 0.25, 0.5)
    with pytest.raises(RefusedError, match="no output 'q'; the model has p, u"):
        refuse_outputs(InferRequest("", {}, {"q": True}), ["p", "u"])


_FIELDS = {"INT8": "int", "UINT16": "uint", "INT64": "int64", "UINT64": "uint64", "FP32": "fp32"}


@pytest.mark.parametrize("datatype", [*_FIELDS, "FP64", "BOOL"])
def test_grpc_takes_elements_typed_or_raw(datatype: str) -> None:
    field = f"{_FIELDS.get(datatype, datatype.lower())}_contents"
    elements = np.array([1, 0, 1], DTYPES[datatype])
    typed = service_pb2.ModelInferRequest(id="i")
    tensor = typed.inputs.add(name="x", datatype=datatype, shape=[3])
    getattr(tensor.contents, field).extend(elements.tolist())
    raw = service_pb2.ModelInferRequest(id="i")
    raw.inputs.add(name="x", datatype=datatype, shape=[3])
    raw.raw_input_contents.append(elements.tobytes())
    for request in (typed, raw):
        ours = MESSAGES["ModelInferRequest"].FromString(request.SerializeToString())
        numbers = read_grpc(ours).inputs["x"].numbers
        np.testing.assert_array_equal(numbers, elements)


def test_grpc_refuses_what_does_not_fit() -> None:
    def refused(**fields: Any) -> str:
        tensor = {"name": "x", "datatype": "INT32", "shape": [1], **fields.pop("tensor", {})}
        with pytest.raises(RefusedError) as caught:
            read_grpc(MESSAGES["ModelInferRequest"](inputs=[tensor], **fields))
        return str(caught.value)

    assert "1 inputs and 2 raw" in refused(raw_input_contents=[b"1234", b""])
    contents = {"int_contents": [1, 2]}
    assert "1 elements are expected; got 2" in refused(tensor={"contents": contents})
    assert "beside raw" in refused(tensor={"contents": contents}, raw_input_contents=[b"1234"])
    assert "has to come in raw" in refused(tensor={"datatype": "FP16"})
    assert "datatype 'INT'" in refused(tensor={"datatype": "INT"})
    assert "'a' is asked for twice" in refused(tensor={"shape": [0]}, outputs=[{"name": "a"}] * 2)
    assert "beyond INT8" in refused(
        tensor={"datatype": "INT8", "contents": {"int_contents": [200]}}
    )


numbers = st.sampled_from(sorted(set(DTYPES) - {"BOOL", "FP16"}))


@st.composite
def arrays(draw: st.DrawFn) -> tuple[str, npt.NDArray[Any]]:
    datatype = draw(numbers)
    dtype = np.dtype(DTYPES[datatype])
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    size = int(np.prod(shape))
    if dtype.kind == "f":
        each: st.SearchStrategy[Any] = st.floats(
            width=8 * dtype.itemsize, allow_nan=False, allow_infinity=False
        )
    else:
        limits = np.iinfo(dtype)
        each = st.integers(int(limits.min), int(limits.max))
    return datatype, np.array(draw(st.lists(each, min_size=size, max_size=size)), dtype).reshape(
        shape
    )


@given(tensors=st.lists(st.tuples(arrays(), st.booleans()), max_size=4))
@settings(max_examples=60, deadline=None)
def test_tensors_come_as_they_were_sent(
    tensors: list[tuple[tuple[str, npt.NDArray[Any]], bool]],
) -> None:
    inputs, tail = [], b""
    for place, ((datatype, array), binary) in enumerate(tensors):
        tensor: dict[str, Any] = {
            "name": str(place),
            "datatype": datatype,
            "shape": list(array.shape),
        }
        if binary:
            tensor["parameters"] = {"binary_data_size": array.nbytes}
            tail += array.tobytes()
        else:
            tensor["data"] = array.reshape(-1).tolist()
        inputs.append(tensor)
    header = body(inputs)
    request = read_http(header + tail, len(header))
    for place, ((_, array), _) in enumerate(tensors):
        found: Tensor = request.inputs[str(place)]
        assert found.numbers is not None
        np.testing.assert_array_equal(found.numbers.reshape(found.shape), array)


_VALID = body(
    [
        {"name": "x", "shape": [2], "datatype": "INT32", "parameters": {"binary_data_size": 8}},
        {"name": "y", "shape": [1], "datatype": "BYTES", "data": ["00000001"]},
    ],
    outputs=[{"name": "probabilities"}],
)


@given(
    changes=st.lists(st.tuples(st.integers(0, len(_VALID) + 7), st.integers(0, 255)), max_size=5),
    length=st.none() | st.integers(-1, len(_VALID) + 20),
)
@settings(max_examples=300, deadline=None)
def test_damaged_requests_are_read_or_refused(
    changes: list[tuple[int, int]], length: int | None
) -> None:
    content = bytearray(_VALID + bytes(8))
    for place, value in changes:
        content[place] = value
    with suppress(RefusedError):
        request = read_http(bytes(content), len(_VALID) if length is None else length)
        for tensor in request.inputs.values():
            assert tensor.numbers is None or tensor.numbers.size == tensor.elements
