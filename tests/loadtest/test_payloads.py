from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dlrm.config import PrepareConfig, SynthesizeConfig
from dlrm.data.criteo import schema as criteo_schema
from dlrm.data.dataset import Dataset
from dlrm.data.prepare import prepare
from dlrm.data.synthetic import synthesize
from dlrm.data.vocabulary import Encoder, Vocabulary
from dlrm.loadtest.payloads import (
    PayloadRows,
    Tensor,
    grpc_request,
    http_request,
    made_up_rows,
    sample_sizes,
    stored_rows,
    tensors,
    with_one_user,
)

SCHEMA = criteo_schema(tuple([10] * 26), "a test")
ROWS = PayloadRows(
    np.arange(39, dtype=np.int32).reshape(3, 13),
    np.arange(78, dtype=np.uint32).reshape(3, 26) + 0xABCDEF00,
)


def test_a_sample_has_100_to_700_pairs_and_270_on_average() -> None:
    sizes = sample_sizes(20_000, np.random.default_rng(1))
    assert set(sizes) == {100, 200, 300, 400, 500, 600, 700}
    assert sizes.mean() == pytest.approx(270, abs=4)
    assert (sizes == 200).mean() == pytest.approx(0.6, abs=0.02)


def test_missing_values_are_empty_texts() -> None:
    tensor = Tensor("c", "BYTES", np.array([[0xABC], [0], [0xFFFFFFFF]], np.uint32))
    assert tensor.binary() == (
        b"\x08\0\0\0" + b"00000abc" + b"\0\0\0\0" + b"\x08\0\0\0" + b"ffffffff"
    )
    assert tensor.texts() == ["00000abc", None, "ffffffff"]
    assert Tensor("i", "INT32", np.array([[7]], np.int32)).binary() == b"\x07\0\0\0"


def test_what_is_the_users_is_sent_once() -> None:
    inputs = tensors(SCHEMA, ROWS, 0.5)
    names = [feature.name for feature in (*SCHEMA.dense, *SCHEMA.sparse)]
    assert [each.name for each in inputs] == names
    # Half of 13 is 6 (to even), half of 26 is 13.
    lengths = [len(each.elements) for each in inputs]
    assert lengths == [1] * 6 + [3] * 7 + [1] * 13 + [3] * 13
    whole = with_one_user(ROWS, 0.5)
    for column, tensor in enumerate(inputs):
        expected = np.hstack([whole.dense, whole.values.astype(np.int64)])[:, column]
        assert np.array_equal(np.broadcast_to(tensor.elements[:, 0], 3), expected)
    matrices = tensors(SCHEMA, ROWS, 0.0)
    assert [(each.name, each.elements.shape) for each in matrices] == [
        ("dense", (3, 13)),
        ("sparse", (3, 26)),
    ]
    assert np.array_equal(with_one_user(ROWS, 0.0).values, ROWS.values)


def test_http_requests_are_what_tritonclient_sends() -> None:
    client = pytest.importorskip("tritonclient.http")
    inputs = tensors(SCHEMA, ROWS, 0.5)
    theirs = []
    for tensor in inputs:
        elements = tensor.elements
        if tensor.datatype == "BYTES":
            elements = np.array([text.encode() for text in tensor.texts()], object)[:, None]
        theirs.append(client.InferInput(tensor.name, elements.shape, tensor.datatype))
        theirs[-1].set_data_from_numpy(elements)
    asked = client.InferRequestedOutput("probabilities", binary_data=True)
    body, length = client.InferenceServerClient.generate_request_body(theirs, outputs=[asked])
    head, _, ours = http_request(inputs, "m", "h:1", "binary").partition(b"\r\n\r\n")
    headers = dict(line.split(": ") for line in head.decode().split("\r\n")[1:])
    assert head.startswith(b"POST /v2/models/m/infer HTTP/1.1\r\nHost: h:1\r\n")
    own_length = int(headers["Inference-Header-Content-Length"])
    assert int(headers["Content-Length"]) == len(ours)
    assert json.loads(ours[:own_length]) == json.loads(body[:length])
    assert ours[own_length:] == body[length:]


def test_grpc_requests_are_read_by_tritonclients_messages() -> None:
    service = pytest.importorskip("tritonclient.grpc.service_pb2")
    inputs = tensors(SCHEMA, ROWS, 0.5)
    raw = service.ModelInferRequest.FromString(grpc_request(inputs, "m", "binary"))
    assert (raw.model_name, [output.name for output in raw.outputs]) == ("m", ["probabilities"])
    assert list(raw.raw_input_contents) == [tensor.binary() for tensor in inputs]
    typed = service.ModelInferRequest.FromString(grpc_request(inputs, "m", "json"))
    for tensor, sent in zip(inputs, typed.inputs, strict=True):
        assert tuple(sent.shape) == tensor.elements.shape
        if tensor.datatype == "BYTES":
            found = [text.decode() for text in sent.contents.bytes_contents]
        else:
            found = list(sent.contents.int_contents)
        assert found == tensor.texts()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("rows")
    synthesize(folder / "raw", SynthesizeConfig(rows=4000, test_rows=0, scale=0.0005))
    return prepare(folder / "raw", folder / "dataset", PrepareConfig(vocabulary="train"))


def test_stored_rows_are_what_they_were_before_preparation(dataset: Dataset) -> None:
    generator = np.random.default_rng(2)
    rows = stored_rows(dataset, dataset.path, 500, generator)
    raw = {
        tuple(line.split("\t"))
        for line in (dataset.path.parent / "raw" / "train.txt").read_text().splitlines()
    }
    known = {
        (
            *(max(0, int(text or 0)) for text in line[1:14]),
            *(int(text or "0", 16) for text in line[14:]),
        )
        for line in raw
    }
    vocabularies = [
        set(Vocabulary.read(dataset.path / "vocabulary" / feature.vocabulary).values.tolist())
        for feature in dataset.schema.sparse
    ]
    found = 0
    for dense, values in zip(rows.dense.tolist(), rows.values.tolist(), strict=True):
        if all(value in own for value, own in zip(values, vocabularies, strict=True)):
            assert (*dense, *values) in known
            found += 1
    assert found > 100  # the others have values that were never seen, which nobody knows any more
    _, unknown = Encoder.open(dataset.path, dataset.schema).encode(rows.values)
    stored = next(dataset.stored_rows("test", 0, dataset.rows("test"))).sparse
    other = [feature.other_id for feature in dataset.schema.sparse]
    assert unknown.sum() / rows.values.size == pytest.approx((stored == other).mean(), rel=0.2)


def test_made_up_values_are_as_frequent_as_in_training(dataset: Dataset) -> None:
    rows = made_up_rows(dataset.schema, dataset.path, 20_000, np.random.default_rng(3))
    _, unknown = Encoder.open(dataset.path, dataset.schema).encode(rows.values)
    assert not unknown.any()
    for column in (0, 5, 25):
        feature = dataset.schema.sparse[column]
        vocabulary = Vocabulary.read(dataset.path / "vocabulary" / feature.vocabulary)
        commonest = np.argmax(vocabulary.counts)
        share = vocabulary.counts[commonest] / vocabulary.counts.sum()
        drawn = (rows.values[:, column] == vocabulary.values[commonest]).mean()
        assert drawn == pytest.approx(share, abs=4 * np.sqrt(share / 20_000) + 1e-3)
    assert rows.dense.min() >= 0
    assert 10 < rows.dense.mean() < 30


def test_requests_in_json_hold_the_same(tmp_path: Path) -> None:
    inputs = tensors(SCHEMA, ROWS, 0.0)
    _, _, body = http_request(inputs, "m", "h", "json").partition(b"\r\n\r\n")
    content = json.loads(body)
    assert [each["name"] for each in content["inputs"]] == ["dense", "sparse"]
    assert content["inputs"][0]["data"] == list(range(39))
    assert content["inputs"][1]["data"][0] == "abcdef00"
    assert content["outputs"] == [{"name": "probabilities", "parameters": {"binary_data": False}}]
