"""A server as its clients see it: one that others wrote, and hostile ones."""

import gzip
import json
import re
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from asking import INFER, ask, wait_for
from dlrm.serve.messages import MESSAGES
from dlrm.version import __version__


@pytest.fixture(scope="module")
def over_http(server: Any) -> Iterator[Any]:
    with tritonclient.http.InferenceServerClient(server.http) as client:
        yield client


@pytest.fixture(scope="module")
def over_grpc(server: Any) -> Iterator[Any]:
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        yield client


@pytest.fixture(params=["http", "grpc"])
def both(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A client of the protocol, and the module that its tensors come from."""
    module = getattr(tritonclient, request.param)
    return request.getfixturevalue(f"over_{request.param}"), module


def refusal(server: Any, body: bytes, status: int = 400, **headers: str) -> str:
    found, _, content = ask(server, "POST", "/v2/models/dlrm/infer", body, **headers)
    assert found == status, content
    return str(json.loads(content)["error"])


UNKNOWN = 0x12345678  # which no feature has


def test_a_client_of_others_gets_the_probabilities_of_predict(both: Any, client: Any) -> None:
    infers, module = both
    rows = slice(0, 300)
    found = infers.infer("dlrm", client.tensors(module, rows), request_id="a7")
    np.testing.assert_allclose(found.as_numpy("probabilities"), client.expected, atol=1e-6)
    response = found.get_response()
    assert (response["id"] if isinstance(response, dict) else response.id) == "a7"
    single = infers.infer("dlrm", client.tensors(module, slice(7, 8)))
    np.testing.assert_allclose(single.as_numpy("probabilities"), client.expected[7:8], atol=1e-6)


def test_the_rows_of_evaluation_get_its_probabilities(
    over_grpc: Any, run: Any, raw_rows: Any, predictor: Any
) -> None:
    """The file's last seventh is the test split and then the validation split."""
    stored = pa.ipc.open_file(run / "predictions/test.arrow").read_all()["probability"].to_numpy()
    lines = (raw_rows / "train.txt").read_text().splitlines()[-len(stored) * 2 :]
    found = []
    for start in range(0, len(lines), 200):
        fields = [line.split("\t")[1:] for line in lines[start : start + 200]]
        wide = len(predictor.schema.dense)
        dense = np.array([[int(each or 0) for each in row[:wide]] for row in fields], np.int32)
        sparse = np.array([[each.encode() for each in row[wide:]] for row in fields], object)
        tensors = []
        for name, array, kind in (("dense", dense, "INT32"), ("sparse", sparse, "BYTES")):
            tensors.append(tritonclient.grpc.InferInput(name, list(array.shape), kind))
            tensors[-1].set_data_from_numpy(array)
        found.append(over_grpc.infer("dlrm", tensors).as_numpy("probabilities"))
    together = np.concatenate(found)
    at = len(together) % 2 if len(together) != 2 * len(stored) else 0
    np.testing.assert_allclose(together[at : at + len(stored)], stored, atol=1e-6)


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
def test_bodies_may_be_packed(over_http: Any, client: Any, packing: str) -> None:
    found = over_http.infer(
        "dlrm",
        client.tensors(tritonclient.http, slice(0, 300)),
        request_compression_algorithm=packing,
        response_compression_algorithm=packing,
    )
    np.testing.assert_allclose(found.as_numpy("probabilities"), client.expected, atol=1e-6)


def test_one_user_is_sent_once_for_many_candidates(both: Any, client: Any, predictor: Any) -> None:
    infers, module = both
    user = set(client.dense[:8] + client.sparse[:13])
    once, many = client.tensors(module, slice(5, 6)), client.tensors(module, slice(0, 40))
    mixed = [
        one if name in user else each
        for name, one, each in zip(client.names, once, many, strict=True)
    ]
    columns = {
        name: values[5:6] * 40 if name in user else values[:40]
        for name, values in client.columns.items()
    }
    found = infers.infer("dlrm", mixed).as_numpy("probabilities")
    np.testing.assert_allclose(found, predictor.predict(columns), atol=1e-6)
    assert len(set(found)) > 20


def test_prepared_rows_are_scored(both: Any, client: Any, predictor: Any) -> None:
    infers, module = both
    dense = np.array([client.columns[name][:9] for name in client.dense], object)
    counts = np.maximum(np.where(dense == None, 0, dense).astype(np.float32), 0)  # noqa: E711
    values = [[int(each or "0", 16) for each in client.columns[name][:9]] for name in client.sparse]
    values[3][5] = values[7][5] = values[7][2] = UNKNOWN
    ids, unknown = predictor.encoder.encode(np.array(values, np.uint32).T)
    expected = predictor.score_encoded(counts.T.astype(np.int32), ids)
    tensors = []
    for name, array, kind in (
        ("dense_features", np.log(counts.T + 1), "FP32"),
        ("sparse_features", ids.astype(np.int64), "INT64"),
    ):
        tensors.append(module.InferInput(name, list(array.shape), kind))
        tensors[-1].set_data_from_numpy(np.ascontiguousarray(array))
    found = infers.infer("dlrm", tensors)
    np.testing.assert_allclose(found.as_numpy("probabilities"), expected, atol=1e-6)
    assert found.as_numpy("unknown_ids").tolist() == [0, 0, 1, 0, 0, 2, 0, 0, 0]
    assert unknown.sum() == 3


@pytest.mark.parametrize("rows", [1, 20, 300])
def test_json_takes_null_and_answers_what_is_asked_for(server: Any, client: Any, rows: int) -> None:
    content = json.loads(client.json(slice(0, rows)))
    content |= {"id": "b", "outputs": [{"name": "probabilities"}]}
    status, headers, answer = ask(server, "POST", INFER, json.dumps(content).encode())
    assert (status, headers["Content-Type"]) == (200, "application/json")
    found = json.loads(answer)
    assert [found["id"], found["model_name"]] == ["b", "dlrm"]
    (output,) = found["outputs"]
    assert (output["datatype"], output["shape"]) == ("FP32", [rows])
    np.testing.assert_allclose(output["data"], client.expected[:rows], atol=1e-6)


def test_typed_contents_are_taken(server: Any, client: Any) -> None:
    request = MESSAGES["ModelInferRequest"](model_name="dlrm")
    for name in client.names:
        tensor = request.inputs.add(name=name, shape=[3])
        if name in client.dense:
            tensor.datatype = "INT64"
            tensor.contents.int64_contents.extend(v or 0 for v in client.columns[name][:3])
        else:
            tensor.datatype = "BYTES"
            tensor.contents.bytes_contents.extend(
                (v or "").encode() for v in client.columns[name][:3]
            )
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=MESSAGES["ModelInferRequest"].SerializeToString,
            response_deserializer=MESSAGES["ModelInferResponse"].FromString,
        )
        answer = call(request, timeout=10)
    found = np.frombuffer(answer.raw_output_contents[0], "<f4")
    np.testing.assert_allclose(found, client.expected[:3], atol=1e-6)


def test_server_and_model_tell_of_themselves(both: Any, client: Any) -> None:
    asks, module = both
    plain = {} if module is tritonclient.http else {"as_json": True}
    assert asks.is_server_live()
    assert asks.is_server_ready()
    assert asks.is_model_ready("dlrm")
    server = asks.get_server_metadata(**plain)
    assert (server["name"], server["version"]) == ("dlrm", __version__)
    assert server["extensions"] == ["binary_tensor_data", "model_repository"]
    model = asks.get_model_metadata("dlrm", **plain)
    (version,) = model["versions"]
    assert asks.is_model_ready("dlrm", version)
    assert [each["name"] for each in model["inputs"][: len(client.names)]] == client.names
    assert [(each["name"], each["datatype"]) for each in model["outputs"]] == [
        ("probabilities", "FP32"),
        ("unknown_ids", "INT32"),
    ]
    index = asks.get_model_repository_index(**plain)
    entry = index[0] if isinstance(index, list) else index["models"][0]
    assert entry == {"name": "dlrm", "version": version, "state": "READY"}
    for wrong in (("other", ""), ("dlrm", "none")):
        with pytest.raises(InferenceServerException, match="there is no"):
            asks.get_model_metadata(*wrong)
        with pytest.raises(InferenceServerException, match="there is no"):
            asks.infer(wrong[0], client.tensors(module, slice(0, 1)), model_version=wrong[1])
    with pytest.raises(InferenceServerException, match="not unloaded"):
        asks.unload_model("dlrm")


def test_wrong_requests_are_told_so_over_grpc(over_grpc: Any, server: Any, client: Any) -> None:
    with pytest.raises(InferenceServerException, match="inputs are missing") as caught:
        over_grpc.infer("dlrm", client.tensors(tritonclient.grpc, slice(0, 1))[1:])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(InferenceServerException) as caught:
        over_grpc.infer("other", client.tensors(tritonclient.grpc, slice(0, 1)))
    assert caught.value.status() == "StatusCode.NOT_FOUND"
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for garbage in (b"\xff" * 50, b"x" * (1 << 19)):
            with pytest.raises(grpc.RpcError) as failed:
                call(garbage, timeout=10)
            assert failed.value.code().name in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")
        with pytest.raises(grpc.RpcError) as failed:
            channel.unary_unary("/inference.GRPCInferenceService/Nothing")(b"", timeout=10)
        assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/nothing", 404, "there is nothing at /nothing"),
        ("GET", "/v2/models/other", 404, "no model 'other'"),
        ("GET", "/v2/models/dlrm/versions/none/ready", 404, "no version 'none'"),
        ("GET", INFER, 405, "takes POST alone"),
        ("POST", "/v2", 405, "takes GET and HEAD alone"),
        ("POST", INFER, 400, "not JSON"),
        ("POST", "/v2/repository/models/other/load", 404, "no model"),
        ("POST", "/v2/repository/models/dlrm/unload", 400, "not unloaded"),
        ("GET", "/" + "x" * 20_000, 400, "more than 8190 bytes"),
        ("GET", "/v2/models/%2e%2e%2fetc", 404, "there is nothing"),
    ],
)
def test_paths_that_do_not_answer_say_why(
    server: Any, method: str, path: str, status: int, message: str
) -> None:
    found, headers, content = ask(server, method, path)
    assert (found, headers["Content-Type"]) == (status, "application/json")
    assert headers.get("Allow") == (
        {"GET": "POST", "POST": "GET, HEAD"}[method] if found == 405 else None
    )
    assert message in json.loads(content)["error"]


def test_hostile_bodies_are_refused(server: Any, client: Any) -> None:
    good = client.json(slice(0, 2))
    assert "truncated" in refusal(server, good[:-1])
    assert "Expected `object`, got `array`" in refusal(server, b'{"inputs":' + b"[" * 50_000)
    assert "must be a number" in refusal(server, good, Inference_Header_Content_Length="-1")
    assert "the body has" in refusal(server, good, Inference_Header_Content_Length="99999999")
    assert "larger than 262144" in refusal(server, b"x" * (1 << 19), 413)
    bomb = gzip.compress(bytes(64 << 20))
    assert "larger than 262144" in refusal(server, bomb, 413, Content_Encoding="gzip")
    assert "it is no gzip" in refusal(server, b"no gzip" * 9, Content_Encoding="gzip")
    packed = gzip.compress(good)
    assert "cut off" in refusal(server, packed[:-4], Content_Encoding="gzip")
    assert "3 bytes behind" in refusal(server, packed + b"???", Content_Encoding="gzip")
    assert "cut off" in refusal(server, zlib.compress(good)[:-9], Content_Encoding="deflate")
    for encoding in ("br", "gzip, gzip", "zstd"):
        message = refusal(server, packed, 415, Content_Encoding=encoding)
        assert f"{encoding!r}; expected gzip, deflate or none" in message
    assert "'foo' of the server" in refusal(server, good, 417, Expect="foo")
    assert "inputs are missing" in refusal(server, b'{"inputs": []}')
    rows = client.json(slice(0, 3)).replace(b'"shape": [3]', b'"shape": [2147483647]')
    assert "2147483647 elements are expected" in refusal(server, rows)
    many = {"name": "dense", "shape": [401, 13], "datatype": "INT32", "data": [0] * 401 * 13}
    sparse = {"name": "sparse", "shape": [1, 26], "datatype": "UINT32", "data": [0] * 26}
    content = json.dumps({"inputs": [many, sparse]}).encode()
    assert "401 rows, at most 400" in refusal(server, content, 413)
    late = json.loads(client.json(slice(0, 50))) | {"parameters": {"timeout": 1}}
    assert "deadline" in refusal(server, json.dumps(late).encode(), 504)


HEAD = f"POST {INFER} HTTP/1.1\r\nHost: x\r\n".encode()
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((b"GET /v2/\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",), ""),
        ((b"\x16\x03\x01\x02\x00" * 50 + b"\r\n\r\n",), "HTTPS traffic"),
        ((b"GET /v2 HTTP/1.1\r\n\r\n",), "Missing 'Host'"),
        ((HEAD + b"Content-Length: -5\r\n\r\n",), "in Content-Length: b'Content-Length: -5'"),
        ((HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",), "Duplicate Content-Length"),
        ((CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n",), "with Transfer-Encoding"),
        ((CHUNKED + b"\r\nzz\r\n",), "in chunk size: b'zz'"),
        ((CHUNKED + b"\r\n2\r\n{}\r\n", b"zz\r\n"), "in chunk size: b'zz'"),
        ((CHUNKED.replace(b"chunked", b"gzip, chunked") + b"\r\n0\r\n\r\n",), "'gzip, chunked'"),
    ],
)  # fmt: skip
def test_what_is_no_http_is_told_at_once(
    server: Any, parts: tuple[bytes, ...], message: str
) -> None:
    with connect(server) as stream:
        stream.settimeout(0.4)  # a body that does not arrive is waited for longer
        for number, part in enumerate(parts):
            time.sleep(0.05 * number)
            stream.sendall(part)
        answer = stream.recv(4096)
    assert re.match(rb"HTTP/1.[01] 4(00|15) ", answer)
    assert message in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_a_header_that_comes_twice_is_no_number(server: Any, client: Any) -> None:
    body = client.json(slice(0, 1))
    lengths = b"".join(b"Inference-Header-Content-Length: %d\r\n" % n for n in (len(body), 2))
    with connect(server) as stream:
        stream.sendall(HEAD + lengths + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert f"got '{len(body)}, 2'".encode() in stream.recv(4096)


def test_requests_are_answered_in_the_order_they_were_sent(server: Any, client: Any) -> None:
    rows = [1, 3, 2]
    with connect(server) as stream:
        for count in rows:
            body = client.json(slice(0, count))
            stream.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        answer = b""
        while answer.count(b"unknown_ids") < len(rows):
            answer += stream.recv(4096)
    found = [json.loads(each) for each in re.findall(rb"\r\n\r\n(\{.*?\})(?=HTTP|$)", answer)]
    for count, content in zip(rows, found, strict=True):
        np.testing.assert_allclose(
            content["outputs"][0]["data"], client.expected[:count], atol=1e-6
        )


def test_what_has_no_probability_is_refused(server: Any, predictor: Any) -> None:
    dense = [3e38] * len(predictor.schema.dense)
    ids = [0] * len(predictor.schema.sparse)
    tensors = (("dense_features", "FP32", dense), ("sparse_features", "INT64", ids))
    inputs = [
        {"name": name, "shape": [1, len(data)], "datatype": kind, "data": data}
        for name, kind, data in tensors
    ]
    assert "gives no number" in refusal(server, json.dumps({"inputs": inputs}).encode())


def test_packed_messages_are_limited_unpacked(server: Any) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for _ in range(10):  # a connection on which nothing has come for a second is closed
            with pytest.raises(grpc.RpcError) as failed:
                call(bytes(64 << 20), timeout=10, compression=grpc.Compression.Gzip)
            if failed.value.code() is not grpc.StatusCode.UNAVAILABLE:
                break
    assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def connect(server: Any) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=10)


def test_hostile_connections_are_ended_and_others_are_served(server: Any, client: Any) -> None:
    slow_body, slow_head, silent = (connect(server) for _ in range(3))
    slow_body.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
    slow_head.sendall(HEAD + b"X-A: ")
    gone = connect(server)
    gone.sendall(HEAD + b"Content-Length: 1000\r\n\r\n" + b"x" * 500)
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    gone.close()  # with a reset
    began = time.monotonic()
    good = client.json(slice(0, 5))
    while time.monotonic() - began < 0.3:
        status, _, content = ask(server, "POST", INFER, good)
        assert status == 200
        found = json.loads(content)["outputs"][0]["data"]
        np.testing.assert_allclose(found, client.expected[:5], atol=1e-6)
    assert slow_body.recv(100).startswith(b"HTTP/1.1 408 ")
    for stream in (slow_head, silent):
        assert stream.recv(100) == b""
    assert time.monotonic() - began < 8
    for stream in (slow_body, slow_head, silent):
        stream.close()


def test_a_large_body_is_asked_for(server: Any, client: Any) -> None:
    """As curl does, which waits for a second otherwise."""
    content = client.json(slice(0, 1))
    with connect(server) as stream:
        stream.sendall(
            f"POST {INFER} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode()
        )
        assert stream.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        stream.sendall(content)
        answer = b""
        while more := stream.recv(4096):
            answer += more
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


def value_of(text: str, name: str) -> float:
    lines = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].split()[-1]) if lines else 0.0


def test_metrics_count_what_was_done(server: Any, client: Any) -> None:
    names = {
        'dlrm_requests_total{code="200",method="infer",protocol="http"}': 2,
        'dlrm_requests_total{code="400",method="infer",protocol="http"}': 1,
        'dlrm_request_seconds_count{protocol="http"}': 3,
        "dlrm_rows_total": 12,
        "dlrm_batch_rows_sum": 12,
        "dlrm_batch_rows_count": 2,
        "dlrm_unknown_ids_total": 2,
    }
    before = ask(server, "GET", "/metrics")[2].decode()
    for rows in (slice(0, 5), slice(0, 7)):
        content = json.loads(client.json(rows))
        content["inputs"][20]["data"][3] = f"{UNKNOWN:08x}"
        status, _, answer = ask(server, "POST", INFER, json.dumps(content).encode())
        unknown = json.loads(answer)["outputs"][1]["data"]
        assert (status, unknown[:5], sum(unknown)) == (200, [0, 0, 0, 1, 0], 1)
    refusal(server, b"{}")
    status, headers, content = ask(server, "GET", "/metrics")
    after = content.decode()
    assert (status, headers["Content-Type"].split(";")[0]) == (200, "text/plain")
    for name, difference in names.items():
        assert value_of(after, name) - value_of(before, name) == difference, name
    assert value_of(after, "dlrm_queue_rows") == 0
    assert 'dlrm_model_info{model="dlrm",version="' in after


def test_requests_are_logged_as_json_without_traces(server: Any) -> None:
    ask(server, "POST", INFER, b"?")
    wait_for(server, '"code":"400"')
    lines = [json.loads(line) for line in server.said().splitlines() if line.startswith("{")]
    line = [each for each in lines if each["code"] == "400"][-1]
    assert (line["protocol"], line["method"], line["client"]) == ("http", "infer", "127.0.0.1")
    assert 0 < line["milliseconds"] < 10_000
    assert abs(line["time"] - time.time()) < 600
    assert "Traceback" not in server.said()
