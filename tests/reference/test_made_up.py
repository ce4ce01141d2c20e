"""Training on made-up rows: what the reference printed, run with the same flags."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import dlrm
from dlrm import reference
from dlrm.data.dataset import Dataset
from dlrm.data.stack_distance import measure
from dlrm.errors import UserError
from dlrm.runs import Run

# Of facebookresearch/dlrm at 090956ee2319ddd349a42232958aefccfe3f7b0a, PyTorch 2.13 on a CPU.
LOSSES = {
    "--mini-batch-size=2 --data-size=6": "0.025266 0.180494 0.083240",
    "--mini-batch-size=16 --data-size=100 --nepochs=2 --loss-function=bce --learning-rate=0.5 "
    "--round-targets=True": (
        "1.252434 0.562089 0.833890 0.679558 0.775802 0.809090 0.588140 0.825368 0.597703 "
        "0.732922 0.663521 0.724138 0.744482 0.620274"
    ),
    "--mini-batch-size=16 --num-batches=7 --arch-embedding-size=100-20-3 --learning-rate=0.1 "
    "--num-indices-per-lookup=5 --num-indices-per-lookup-fixed=True --optimizer=adagrad": (
        "0.169352 0.124805 0.085518 0.161579 0.102279 0.124102 0.095809"
    ),
    "--mini-batch-size=16 --data-size=90 --arch-embedding-size=100-200-300 --loss-function=bce "
    "--num-indices-per-lookup=20 --rand-data-dist=gaussian --rand-data-min=5 --rand-data-max=95 "
    "--rand-data-sigma=30 --numpy-rand-seed=9 --learning-rate=0.3": (
        "0.856532 0.783736 0.716181 0.706404 0.694941 0.701203"
    ),
    "--mini-batch-size=32 --data-size=320 --num-indices-per-lookup=1 --round-targets=True "
    "--loss-function=bce --learning-rate=0.3": (
        "0.976043 0.799596 0.769084 0.997540 0.910233 0.696249 0.836163 0.768832 0.738953 0.751803"
    ),
}


def run(flags: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    reference.main([*flags.split(), f"--run={folder / 'run'}"])
    return capsys.readouterr().out.splitlines()


def losses(lines: list[str]) -> list[float]:
    return [float(found[1]) for line in lines if (found := re.search(r"loss (\d\.\d+)$", line))]


@pytest.mark.parametrize("flags", LOSSES)
def test_losses_are_the_references(
    flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], kernels: str
) -> None:
    printed = losses(run(flags, tmp_path, capsys))
    # Within a unit of the last digit that is printed.
    assert printed == pytest.approx([float(loss) for loss in LOSSES[flags].split()], abs=1.01e-6)
    assert len(printed) == len(LOSSES[flags].split())


def test_the_training_rows_are_tested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the reference does, which printed these metrics."""
    lines = run(
        "--mini-batch-size=32 --data-size=320 --num-indices-per-lookup=1 --round-targets=True "
        "--loss-function=bce --learning-rate=0.3 --test-freq=10 --mlperf-logging",
        tmp_path,
        capsys,
    )
    assert "Testing at - 10/10 of epoch 0," in lines
    assert lines[-1] == (
        "recall 0.0000, precision 0.0000, f1 0.0000, ap 0.5134, auc 0.5079, best auc 0.5079, "
        "accuracy 49.062 %, best accuracy 49.062 %"
    )


def test_a_model_is_saved_and_tested_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--mini-batch-size=10 --data-size=95 --num-indices-per-lookup=3"
    saved = f"{tmp_path / 'model.pt'}"
    trained = run(f"{flags} --nepochs=2 --test-freq=10 --save-model={saved}", tmp_path, capsys)
    (tmp_path / "run").rename(tmp_path / "first")
    again = run(
        f"{flags} --load-model={saved} --inference-only --quantize-emb-with-bit=8", tmp_path, capsys
    )
    # Soft labels: above 0.5 they count as clicks.
    tests = [line for line in trained if line.startswith(" accuracy")]
    best = re.search(r"best ([\d.]+) %", tests[-1])
    assert best
    assert f" accuracy {best[1]} %, best {best[1]} %" in again
    assert re.fullmatch(
        # Vectors of 2 float32 become 2 codes beside scale and bias: tables this narrow grow.
        r"# quantized: tables 90 of 72 bytes, MLPs 288 of 288; AUC [+-]0\.\d{6} \(95% .*\)",
        again[-1],
    )


@pytest.mark.parametrize(
    "kind", ["--qr-flag --qr-threshold=4", "--md-flag --md-threshold=3", "--weighted-pooling=fixed"]
)
def test_the_final_model_is_written_as_onnx(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"--mini-batch-size=10 --data-size=95 --num-indices-per-lookup=3 {kind} --save-onnx"
    lines = run(flags, tmp_path, capsys)
    bundle = tmp_path / "run" / "bundle"
    assert f"dlrm export {bundle.parent} {bundle} --format onnx --checkpoint newest" in lines
    assert re.fullmatch(
        rf"# {bundle / 'model.onnx'}: in onnxruntime, probabilities of 95 rows differ by up to "
        r"\d\.\de-\d\d",
        lines[-1],
    )
    session = onnxruntime.InferenceSession(bundle / "model.onnx")
    assert [each.name for each in session.get_outputs()] == ["probabilities"]
    assert dlrm.load(bundle).schema == Run.open(bundle.parent).schema


def test_synthetic_rows_follow_the_traces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    for table, size in enumerate((40, 9)):
        items = (generator.pareto(1, 300) % size).astype(np.int32)
        measure([items], size).write(tmp_path / f"dist_emb_{table}.log")
    flags = (
        "--data-generation=synthetic --arch-embedding-size=40-9 --num-indices-per-lookup=3 "
        f"--data-trace-file={tmp_path / 'dist_emb_j.log'} --data-size=200 --mini-batch-size=20"
    )
    lines = run(flags, tmp_path, capsys)
    assert len(losses(lines)) == 10
    (path,) = tmp_path.glob("synthetic-*.dataset")
    data = Dataset.open(path)
    assert data.schema.num_embeddings == (40, 9)
    assert [source.name for source in data.manifest.sources] == [
        "dist_emb_0.log",
        "dist_emb_1.log",
    ]
    # Another trace under the same name: the rows are made anew, and it is said.
    measure([np.arange(9, dtype=np.int32)], 9).write(tmp_path / "dist_emb_1.log")
    (tmp_path / "run").rename(tmp_path / "first")
    lines = run(flags, tmp_path, capsys)
    assert f"# {path} is made anew, as with --overwrite" in lines
    (tmp_path / "dist_emb_1.log").unlink()
    with pytest.raises(UserError, match=r"dist_emb_1\.log is not a file"):
        reference.main([*flags.split(), f"--run={tmp_path / 'other'}"])
