"""Model files give in their runtimes what the model gives in PyTorch, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dlrm.bundle.export import model_inputs
from dlrm.bundle.graph import _floats, _Graph, onnx_model, write_onnx
from dlrm.bundle.program import (
    compile_program,
    exported_program,
    open_compiled,
    open_program,
    write_program,
)
from dlrm.bundles import write_weights
from dlrm.config import LossConfig, QuantizationConfig
from dlrm.data.batch import Batch
from dlrm.model.dlrm import DLRM
from dlrm.model.loss import probabilities
from dlrm.model.quantized import quantize
from small_models import CHANGES, EVERY_KIND, ROWS, SCHEMA, make_batch, make_model

Runtime = Callable[..., np.ndarray]
"""Takes a model file's inputs by name."""


def in_onnxruntime(model: DLRM, folder: Path, loss: LossConfig, *, one_id: bool) -> Runtime:
    path = folder / "model.onnx"
    write_onnx(path, onnx_model(model, loss, folder / "model.safetensors", one_id=one_id))
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(**inputs: Tensor) -> np.ndarray:
        (found,) = session.run(None, {name: each.numpy() for name, each in inputs.items()})
        return np.asarray(found)

    return run


def in_torch(model: DLRM, folder: Path, loss: LossConfig, *, one_id: bool) -> Runtime:
    path = folder / "model.pt2"
    write_program(path, exported_program(model, loss, one_id=one_id))
    program = open_program(path, folder / "model.safetensors")

    def run(**inputs: Tensor) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = program(**inputs).numpy()
        return found

    return run


RUNTIMES = {"onnx": in_onnxruntime, "torch": in_torch}


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Runtime]:
    """Writes a model as a file and opens it."""

    def opened(model: DLRM, *, one_id: bool = False, **loss: Any) -> Runtime:
        write_weights(tmp_path / "model.safetensors", model)
        return RUNTIMES[request.param](model, tmp_path, LossConfig(**loss), one_id=one_id)

    return opened


def expected(model: DLRM, batch: Batch, **loss: Any) -> np.ndarray:
    with torch.no_grad():
        return probabilities(model(batch), LossConfig(**loss)).numpy()


def with_bits(bits: int, **changes: Any) -> DLRM:
    model = make_model(**changes)
    quantize(model, QuantizationConfig(quantize_emb_with_bit=bits))
    return model


KINDS: dict[str, Callable[[], DLRM]] = {
    name: lambda changes=changes: make_model(**changes) for name, changes in CHANGES.items()
} | {
    f"{name}, {bits} bits": lambda changes=changes, bits=bits: with_bits(bits, **changes)
    for bits in (8, 4)
    for name, changes in CHANGES.items()
    if name in ("dot", "every kind")
}


CASES: list[Any] = [("onnx", kind, ()) for kind in KINDS]
# A program takes seconds to trace: these few have every branch of it.
CASES += [
    ("torch", kind, () if kind in ("every kind", "every kind, 4 bits") else pytest.mark.long)
    for kind in KINDS
]
every_kind = pytest.mark.parametrize(
    ("runtime", "kind"),
    [pytest.param(runtime, kind, marks=marks) for runtime, kind, marks in CASES],
    indirect=["runtime"],
)


@every_kind
def test_bags_of_any_length_give_the_models_probabilities(
    kind: str, runtime: Callable[..., Runtime]
) -> None:
    model = KINDS[kind]()
    run = runtime(model)
    for rows, longest in ((300, 1), (1, 5), (64, 5), (7, 0)):
        batch = make_batch(rows, longest)
        found = run(**model_inputs(batch, one_id=False))
        assert found.shape == (rows,)
        np.testing.assert_allclose(found, expected(model, batch), rtol=0, atol=1e-6)
        if longest:
            assert np.ptp(found) > 0.1 or rows == 1


@every_kind
def test_one_id_a_feature_or_none_gives_the_same(
    kind: str, runtime: Callable[..., Runtime]
) -> None:
    model = KINDS[kind]()
    run = runtime(model, one_id=True)
    for rows in (1, 200):
        batch = make_batch(rows, 1)
        inputs = model_inputs(batch, one_id=True)
        assert inputs["sparse_features"].shape == (rows, len(ROWS))
        np.testing.assert_allclose(run(**inputs), expected(model, batch), atol=1e-6)


def test_a_negative_id_counts_as_none(runtime: Callable[..., Runtime]) -> None:
    run, dense = runtime(make_model()), torch.ones(1, len(SCHEMA.dense))
    with_unknown = run(
        dense_features=dense,
        sparse_features=torch.tensor([3, -1, 4, 2, -1, 0]),
        offsets=torch.tensor([0, 2, 3, 3, 5, 6]),
    )
    without = run(
        dense_features=dense,
        sparse_features=torch.tensor([3, 4, 2, 0]),
        offsets=torch.tensor([0, 1, 2, 2, 3, 4]),
    )
    assert with_unknown == without


def test_an_id_beyond_its_table_is_refused_by_the_runtime(
    runtime: Callable[..., Runtime],
) -> None:
    run = runtime(make_model(), one_id=True)
    ids = torch.zeros((1, len(ROWS)), dtype=torch.int64)
    ids[0, 1] = ROWS[1]
    with pytest.raises(Exception, match=r"out of (data )?bounds|out of range"):
        run(dense_features=torch.ones(1, 3), sparse_features=ids)


def test_probabilities_are_clamped_as_in_training(runtime: Callable[..., Runtime]) -> None:
    model, batch = make_model(), make_batch(200, 2)
    found = runtime(model, loss_threshold=0.4)(**model_inputs(batch, one_id=False))
    assert (found.min(), found.max()) == (np.float32(0.4), np.float32(0.6))
    np.testing.assert_allclose(found, expected(model, batch, loss_threshold=0.4), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        pytest.param({"tables": EVERY_KIND}, 32, id="every kind"),
        pytest.param({}, 4, id="whole, 4 bits"),
        pytest.param({}, 32, id="whole", marks=pytest.mark.long),
        pytest.param({"tables": EVERY_KIND}, 8, id="every kind, 8 bits", marks=pytest.mark.long),
    ],
)
def test_weights_lie_in_one_file_under_their_names(
    changes: dict[str, Any], bits: int, tmp_path: Path
) -> None:
    model, path = with_bits(bits, **changes), tmp_path / "model.safetensors"
    write_weights(path, model)
    stored, state = load_file(path), model.state_dict()
    assert stored.keys() == state.keys()
    for name, weight in state.items():
        assert torch.equal(stored[name], weight)
    write_onnx(tmp_path / "model.onnx", onnx_model(model, LossConfig(), path))
    graph = onnx.load(tmp_path / "model.onnx").graph
    of_graph = {each.name: each for each in graph.initializer}
    for name, weight in state.items():
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(of_graph[name]), weight)
    write_program(tmp_path / "model.pt2", exported_program(model, LossConfig()))
    of_program = torch.export.load(tmp_path / "model.pt2").state_dict
    assert {name: (each.shape, each.dtype) for name, each in of_program.items()} == {
        name: (each.shape, each.dtype) for name, each in state.items()
    }
    assert all(each.is_meta for each in of_program.values())


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_numbers_of_their_bytes_in_onnx(kind: type[np.floating[Any]], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    width = np.dtype(kind).itemsize
    numbers = random.integers(0, 256, (5000, 2 * width), np.uint8).view(kind)
    special = [0.0, -0.0, 1.0, -1.5, np.finfo(kind).tiny, np.finfo(kind).max]
    special += [np.finfo(kind).smallest_subnormal, -np.finfo(kind).smallest_subnormal]
    numbers = np.concatenate([numbers, np.array(special, kind).reshape(-1, 2)])
    numbers = np.where(np.isfinite(numbers), numbers, kind(1))
    write_weights(tmp_path / "model.safetensors", make_model())
    graph = _Graph(tmp_path / "model.safetensors")
    found = _floats(graph, "bytes", width)
    made = onnx.helper.make_graph(
        graph.nodes,
        "numbers",
        [onnx.helper.make_tensor_value_info("bytes", onnx.TensorProto.INT32, ("rows", 2 * width))],
        [onnx.helper.make_tensor_value_info(found, onnx.TensorProto.FLOAT, ("rows", 2))],
        graph.initializers,
    )
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(made, opset_imports=[opset], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    stored = np.ascontiguousarray(numbers).view(np.uint8).astype(np.int32)
    (values,) = session.run(None, {"bytes": stored})
    np.testing.assert_array_equal(values, numbers.astype(np.float32))


@pytest.mark.long
@pytest.mark.parametrize(("bits", "one_id"), [(32, False), (4, True)])
def test_what_is_compiled_gives_the_models_probabilities(
    bits: int, one_id: bool, tmp_path: Path
) -> None:
    model, weights = with_bits(bits, tables=EVERY_KIND), tmp_path / "model.safetensors"
    write_weights(weights, model)
    path = tmp_path / "compiled.pt2"
    compile_program(path, exported_program(model, LossConfig(), one_id=one_id))
    run = open_compiled(path, weights)
    for rows, longest in ((300, 1), (1, 1), (64, 1 if one_id else 5), (7, 0)):
        batch = make_batch(rows, longest)
        found = run(**model_inputs(batch, one_id=one_id)).numpy()
        np.testing.assert_allclose(found, expected(model, batch), rtol=0, atol=1e-6)
