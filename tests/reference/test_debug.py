"""--debug-mode, --plot-compute-graph and --enable-profiling, and gradient accumulation's log."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch

from dlrm.data.dataset import Dataset
from dlrm.errors import UserError
from dlrm.reference.conversion import export_checkpoint
from dlrm.runs import Run

DEBUG = ["--debug-mode", "--step=2", "--arch-mlp-top=8-1", "--arch-sparse-feature-size=4"]


def between(lines: list[str], first: str, last: str) -> list[str]:
    return lines[lines.index(first) + 1 : lines.index(last)]


def test_debug_mode_prints_what_the_reference_does(run: Any) -> None:
    lines = run(*DEBUG, "--print-precision=3", "--max-ind-range=50")
    data = Dataset.open(Run.open(run.run_path).dataset)
    sizes = data.schema.with_max_ind_range(50).num_embeddings
    start = lines.index("model arch:")
    assert lines[start : start + 16] == [
        "model arch:",
        "mlp top arch 2 layers, with input to output dimensions:",
        "[355   8   1]",
        "# of interactions",
        "355",
        "mlp bot arch 2 layers, with input to output dimensions:",
        "[13  8  4]",
        "# of features (sparse and dense)",
        "27",
        "dense feature size",
        "13",
        "sparse feature size",
        "4",
        "# of embeddings (= # of sparse features) 26, with dimensions 4x:",
        *str(np.array(sizes)).splitlines(),
    ]
    # The mini-batches, of which 3 are printed though 18 are there.
    assert [line for line in lines if line.startswith("mini-batch: ")] == [
        f"mini-batch: {number}" for number in range(3)
    ]
    batch = next(iter(data.batches("train", 100, schema=data.schema.with_max_ind_range(50))))
    assert batch.labels is not None
    printed = "\n".join(between(lines, "mini-batch: 0", "mini-batch: 1"))
    for expected in (
        str(batch.dense_features),
        str(torch.ones(26, 100, dtype=torch.int32)),
        str(batch.labels.view(-1, 1)),
        str(batch.sparse_features[:, 25]),
    ):
        assert expected in printed

    # Weights in the reference's order: the first of 30 is a table, the last the logit's bias.
    begin, end = "initial parameters (weights and bias):", "updated parameters (weights and bias):"
    weights = Run.open(run.run_path).load_model("newest", torch.device("cpu")).state_dict()
    with np.printoptions(precision=3):
        table = str(weights["sparse_arch.embedding_bags.t_cat_0.weight"].numpy()).splitlines()
        bias = str(weights["over_arch.layers.2.bias"].numpy())
    after = lines[lines.index(end) + 1 :]
    assert after[: len(table)] == table
    assert bias in after
    assert bias not in between(lines, begin, end)  # it has moved
    assert len(lines) < 2500


def test_bags_are_printed_with_their_lengths(run: Any) -> None:
    lines = run(
        "--data-generation=random", "--data-size=4", "--mini-batch-size=2", "--debug-mode",
        "--num-indices-per-lookup=3", "--arch-embedding-size=9-5", "--arch-mlp-bot=2-4",
        "--md-flag", "--md-threshold=6", "--num-batches=0",
    )  # fmt: skip
    data = Dataset.open(Run.open(run.run_path).dataset)
    batch = next(iter(data.batches("train", 2)))
    assert batch.offsets is not None
    lengths = batch.offsets.diff().tolist()
    printed = between(lines, "mini-batch: 0", "mini-batch: 1")
    assert f"tensor([[{lengths[0]}, {lengths[2]}]," in printed
    assert f"        [{lengths[1]}, {lengths[3]}]], dtype=torch.int32)" in printed
    first = [*batch.sparse_features[: lengths[0]].tolist()]
    first += batch.sparse_features[sum(lengths[:2]) : sum(lengths[:3])].tolist()
    assert any(line.startswith(f"[tensor({first}), tensor(") for line in printed)
    # The larger table has shorter vectors.
    assert "[3, 4]" in lines


def test_the_graph_names_every_weight(run: Any) -> None:
    run("--plot-compute-graph", "--step=1")
    text = (run.run_path / "graph.dot").read_text()
    labels = dict(re.findall(r'^  (n\d+) \[label="([^"]+)"', text, re.MULTILINE))
    edges = re.findall(r"^  (n\d+) -> (n\d+);$", text, re.MULTILINE)
    assert text.startswith("digraph {")
    assert text.endswith("}\n")
    assert {node for edge in edges for node in edge} == labels.keys()
    model = Run.open(run.run_path).load_model("newest", torch.device("cpu"))
    for name, parameter in model.named_parameters():
        assert f"{name}\\n{tuple(parameter.shape)}" in labels.values()
    # One node is the loss: everything leads to it, and it leads nowhere.
    (end,) = labels.keys() - {before for before, _ in edges}
    assert "Mean" in labels[end] or "BinaryCrossEntropy" in labels[end]


def test_a_model_that_is_tested_alone_is_printed_and_drawn(run: Any) -> None:
    saved = run.folder / "saved.pt"
    run("--test-freq=9", f"--save-model={saved}", *DEBUG)
    trained = torch.load(saved, weights_only=True)["state_dict"]
    lines = run(*DEBUG, "--plot-compute-graph", "--inference-only", f"--load-model={saved}")
    assert not [line for line in lines if "has no effect" in line]
    printed = between(
        lines, "initial parameters (weights and bias):", "time/loss/accuracy (if enabled):"
    )
    with np.printoptions(precision=5):
        expected = [line for each in trained.values() for line in str(each.numpy()).splitlines()]
    assert printed == expected
    assert "mini-batch: 2" in lines
    assert "mini-batch: 3" not in lines
    assert "dense_arch.layers.0.weight" in (run.run_path / "graph.dot").read_text()


def test_a_profile_lies_in_the_run(run: Any) -> None:
    lines = run("--enable-profiling", "--optimizer=adagrad")
    assert any(f"--profile {run.run_path}/trace.json" in line for line in lines)
    events = json.loads((run.run_path / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "step" for event in events)


def test_accumulated_mini_batches_are_counted_as_the_references(run: Any) -> None:
    saved = run.folder / "saved.pt"
    lines = run(
        "--mlperf-logging", "--mlperf-grad-accum-iter=4", "--print-freq=4", "--test-freq=8",
        f"--save-model={saved}", "--step=8",
    )  # fmt: skip
    finished = [line.split(",")[0] for line in lines if line.startswith("Finished")]
    assert finished == [f"Finished training it {n}/18 of epoch 0" for n in (4, 8)]
    content = torch.load(saved, weights_only=True)
    assert (content["iter"], content["nbatches"]) == (8, 18)

    # From there on: 8 + 4 · 2, and the last step of what is left.
    flags = ["--mlperf-logging", "--mlperf-grad-accum-iter=4", "--print-freq=4", "--test-freq=8"]
    whole = [line for line in run(*flags) if line.startswith("Finished")]
    rest = [line for line in run(*flags, f"--load-model={saved}") if line.startswith("Finished")]
    assert [line.split()[3] for line in whole] == ["4/18", "8/18", "12/18", "16/18", "18/18"]
    assert rest == whole[2:]


def test_a_pt_counts_mini_batches_and_a_step_is_several(run: Any) -> None:
    saved, written = run.folder / "saved.pt", run.folder / "written.pt"
    flags = ["--mlperf-logging", "--mlperf-grad-accum-iter=4", "--test-freq=100"]
    run(*flags, f"--save-model={saved}")
    export_checkpoint(run.run_path, written, "newest")
    expected, found = (torch.load(path, weights_only=True) for path in (saved, written))
    for name in ("epoch", "iter", "nbatches", "nbatches_test", "train_loss", "test_auc"):
        assert found[name] == expected[name], name
    assert (found["iter"], found["nbatches"]) == (18, 18)  # 5 steps, the last of 2
    # Whole steps of 5 mini-batches never end at 8 of 18.
    found["iter"] = 8
    torch.save(found, written)
    with pytest.raises(UserError, match="after mini-batch 8, within a step of 5"):
        run("--mlperf-logging", "--mlperf-grad-accum-iter=5", f"--load-model={written}")
