from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from dlrm import cli
from dlrm.config import (
    ConvertConfig,
    GenerateConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PrepareConfig,
    QuantizationConfig,
    TrackingConfig,
    TrainConfig,
)
from dlrm.errors import UserError
from dlrm.reference import Request, parse

RECIPE = (
    "--arch-sparse-feature-size=16 --arch-mlp-bot=13-512-256-64-16 --arch-mlp-top=512-256-1 "
    "--data-generation=dataset --data-set=kaggle --raw-data-file=data/train.txt "
    "--loss-function=bce --round-targets=True --learning-rate=0.1 --mini-batch-size=128 "
    "--print-freq=100 --print-time --test-freq=10240 --test-mini-batch-size=16384 "
    "--test-num-workers=16 --mlperf-logging"
)


def request(flags: str = "") -> Request:
    return parse([*RECIPE.split(), *flags.split()])


def changed(flags: str) -> dict[str, Any]:
    """What flags change in the training configuration, nested names joined."""

    def flat(config: Any, prefix: str = "") -> dict[str, Any]:
        found = {}
        for name, value in vars(config).items():
            nested = hasattr(value, "__dataclass_fields__")
            found |= flat(value, f"{name}.") if nested else {f"{prefix}{name}": value}
        return found

    before, after = flat(request().train), flat(request(flags).train)
    return {name: value for name, value in after.items() if before[name] != value}


def test_the_published_recipe() -> None:
    asked = request()
    assert asked.prepare == PrepareConfig(shuffle="reference", seed=123)
    assert asked.train == TrainConfig(
        model=ModelConfig(),
        loss=LossConfig(),
        optimizer=OptimizerConfig(learning_rate=0.1),
        epochs=1,
        mini_batch_size=128,
        evaluation_batch_size=16384,
        test_freq=10240,
        print_freq=100,
        selection_split="test",
        report_checkpoint="newest",
        initial_draws="total",
        tracking=TrackingConfig(mlperf_logging=True),
    )
    assert asked.source == Path("data/train.txt")
    assert asked.dataset == Path("data/kaggleAdDisplayChallenge_processed.dataset")
    assert (asked.print_time, asked.mlperf_logging, asked.print_wall_time) == (True, True, False)
    assert (asked.debug_mode, asked.plot_compute_graph, asked.profile) == (False, False, None)


def test_the_references_defaults_apply() -> None:
    asked = parse(
        "--data-generation=dataset --raw-data-file=t --arch-mlp-bot=13-3-2 --arch-mlp-top=1".split()
    )
    assert asked.train == TrainConfig(
        model=ModelConfig(
            embedding_dim=2, dense_arch_layer_sizes=(3, 2), over_arch_layer_sizes=(1,)
        ),
        loss=LossConfig(loss="mse"),
        optimizer=OptimizerConfig(learning_rate=0.01),
        mini_batch_size=1,
        evaluation_batch_size=1,
        test_freq=-1,
        print_freq=1,
        selection_split="test",
        report_checkpoint="newest",
        initial_draws="total",
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--arch-interaction-op=cat", {"model.interaction": "cat"}),
        ("--arch-interaction-itself", {"model.interaction_itself": True}),
        ("--loss-function=mse", {"loss.loss": "mse"}),
        (
            "--loss-function=wbce --loss-weights=0.4-1.6",
            {"loss.loss": "wbce", "loss.loss_weights": (0.4, 1.6)},
        ),
        ("--loss-threshold=0.01", {"loss.loss_threshold": 0.01}),
        ("--optimizer=adagrad", {"optimizer.optimizer": "adagrad"}),
        ("--optimizer=rwsadagrad", {"optimizer.optimizer": "rowwise_adagrad"}),
        ("--lr-num-warmup-steps=5", {"optimizer.warmup_steps": 5}),
        (
            "--lr-decay-start-step=6 --lr-num-decay-steps=7",
            {"optimizer.decay_start_step": 6, "optimizer.decay_steps": 7},
        ),
        ("--data-randomize=none", {"initial_draws": "none"}),
        ("--data-randomize=day", {"initial_draws": "day"}),
        ("--max-ind-range=100", {"max_ind_range": 100}),
        ("--max-ind-range=-1", {}),
        ("--num-batches=9", {"num_batches": 9}),
        ("--num-batches=-1", {}),
        ("--nepochs=3", {"epochs": 3}),
        ("--step=1000", {"max_steps": 1000}),
        ("--step=-1", {}),
        ("--numpy-rand-seed=7", {"seed": 7}),
        ("--use-gpu --local_rank=1", {"device": "cuda", "local_rank": 1}),
        ("--use-npu --local_rank=-1", {"device": "npu"}),
        ("--test-freq=0", {"test_freq": -1}),
        ("--test-freq=-5", {"test_freq": -1}),
        ("--test-mini-batch-size=-1", {"evaluation_batch_size": 128}),
        ("--mlperf-auc-threshold=0.8", {"target_auc": 0.8}),
        ("--mlperf-acc-threshold=0.7", {"target_accuracy": 0.7}),
        ("--tensor-board-filename=run_kaggle_pt", {"tracking.tensorboard": True}),
        (
            "--mlperf-submission-org=us --mlperf-submission-division=open",
            {
                "tracking.mlperf_submission_org": "us",
                "tracking.mlperf_submission_division": "open",
            },
        ),
        (
            "--mlperf-grad-accum-iter=4 --print-freq=102 --step=7",
            # 26 steps are the least that take 102 mini-batches; 10240 are 2560.
            {"accumulate_batches": 4, "print_freq": 26, "test_freq": 2560, "max_steps": 2},
        ),
        ("--load-model=m.pt --run=r", {"continue_from": "r/initial.safetensors"}),
        ("--round-targets=False --num-workers=4 --dataset-multiprocessing", {}),
        ("--print-wall-time --save-model=m.pt", {}),
    ],
)
def test_what_a_flag_sets(flags: str, expected: dict[str, Any]) -> None:
    assert changed(flags) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--data-randomize=none", PrepareConfig(shuffle="none")),
        ("--data-randomize=none --numpy-rand-seed=7", PrepareConfig(shuffle="none", seed=7)),
        ("--data-randomize=day", PrepareConfig(shuffle="reference-day")),
        ("--numpy-rand-seed=7", PrepareConfig(shuffle="reference", seed=7)),
        ("--max-ind-range=100", PrepareConfig(shuffle="reference", max_ind_range=100)),
        ("--memory-map", PrepareConfig(shuffle="total")),
        ("--memory-map --data-randomize=day", PrepareConfig(shuffle="day")),
        ("--memory-map --data-randomize=none", PrepareConfig(shuffle="none")),
        (
            "--data-sub-sample-rate=0.5",
            PrepareConfig(shuffle="reference", data_sub_sample_rate=0.5),
        ),
    ],
)
def test_what_preparation_is_asked_for(flags: str, expected: PrepareConfig) -> None:
    assert request(flags).prepare == expected


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--arch-interaction-itself --optimizer=rwsadagrad --numpy-rand-seed=5 --nepochs=2",
        "--loss-function=wbce --loss-weights=0.4-1.6 --loss-threshold=0.001 --step=7",
        "--arch-interaction-op=cat --max-ind-range=50 --data-randomize=day --num-batches=3",
        "--mlperf-auc-threshold=0.8 --mlperf-acc-threshold=0.79 --test-freq=7 --use-npu",
        "--tensor-board-filename=x --mlperf-submission-platform='a' --mlperf-submission-org=us",
        "--lr-num-warmup-steps=5 --lr-decay-start-step=6 --lr-num-decay-steps=7 --run=/a/'b'",
        "--learning-rate=1e-07 --load-model=m.pt --data-randomize=none --use-gpu --local_rank=3",
    ],
)
def test_the_commands_mean_the_same(flags: str) -> None:
    asked = request(flags)
    prepare, train = (cli.parse(shlex.split(line)[1:]) for line in asked.commands())
    assert isinstance(prepare, cli.Prepare)
    assert isinstance(train, cli.Train)
    assert (prepare.source, prepare.dataset) == (asked.source, asked.dataset)
    assert prepare.options == asked.prepare
    assert (train.dataset, train.run) == (asked.dataset, asked.run)
    assert train.options == asked.train


def test_the_command_of_quantized_inference() -> None:
    flags = "--quantize-mlp-with-bit=8 --quantize-emb-with-bit=4"
    asked = request(f"--inference-only --load-model=m.pt --run=r {flags}")
    assert asked.quantization == QuantizationConfig(8, 4)
    assert cli.parse(shlex.split(asked.commands()[2])[1:]) == cli.Evaluate(
        Path("r"),
        "test",
        checkpoint="newest",
        quantize_mlp_with_bit=8,
        quantize_emb_with_bit=4,
    )
    asked = request(flags)
    assert asked.quantization == QuantizationConfig()
    assert "--quantize-emb-with-bit has no effect without --inference-only" in asked.notes


def test_the_command_of_an_export() -> None:
    asked = request("--save-onnx --run=r")
    assert cli.parse(shlex.split(asked.commands()[2])[1:]) == cli.Export(
        Path("r"), Path("r/bundle"), format="onnx", checkpoint="newest"
    )


def test_the_command_of_inference() -> None:
    asked = request("--inference-only --load-model=m.pt --run=r --use-npu --local_rank=2")
    convert, evaluate = (cli.parse(shlex.split(line)[1:]) for line in asked.commands()[1:])
    assert convert == cli.Convert(Path("m.pt"), Path("r"), ConvertConfig(), asked.dataset)
    assert evaluate == cli.Evaluate(
        Path("r"), "test", checkpoint="newest", device="npu", local_rank=2
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {}),
        ("--data-size=50 --mini-batch-size=7", {"data_size": 50, "mini_batch_size": 7}),
        (
            "--num-batches=3 --data-size=50",
            {"num_batches": 3, "data_size": GenerateConfig.data_size},
        ),
        ("--arch-mlp-bot=9-3-2", {"dense_features": 9}),
        ("--arch-embedding-size=100-20", {"num_embeddings": (100, 20)}),
        ("--num-indices-per-lookup=2", {"num_indices_per_lookup": 2}),
        ("--num-indices-per-lookup-fixed=True", {"num_indices_per_lookup_fixed": True}),
        ("--round-targets=True", {"soft_labels": False}),
        ("--numpy-rand-seed=5", {"seed": 5}),
        (
            "--rand-data-dist=gaussian --rand-data-min=0.5 --rand-data-mu=0.7 --rand-data-sigma=2",
            {
                "rand_data_dist": "gaussian",
                "rand_data_min": 0.5,
                "rand_data_mu": 0.7,
                "rand_data_sigma": 2.0,
            },
        ),
        (
            "--data-generation=synthetic --data-trace-file=t_j.log --data-trace-enable-padding=1",
            {
                "data_generation": "synthetic",
                "data_trace_file": "t_j.log",
                "data_trace_enable_padding": True,
            },
        ),
        (
            "--data-generation=synthetic",
            {"data_generation": "synthetic", "data_trace_file": "./input/dist_emb_j.log"},
        ),
    ],
)
def test_what_rows_are_made_up(flags: str, expected: dict[str, Any]) -> None:
    asked = parse(flags.split())
    defaults = {
        "data_size": 1,
        "mini_batch_size": 1,
        "dense_features": 4,
        "num_embeddings": (4, 3, 2),
        "num_indices_per_lookup": 10,
        "soft_labels": True,
    }
    assert asked.prepare == GenerateConfig(**{**defaults, **expected})
    assert asked.source is None
    assert (asked.train.num_batches, asked.train.initial_draws) == (0, "none")
    generate, train = (cli.parse(shlex.split(line)[1:]) for line in asked.commands())
    assert isinstance(generate, cli.Generate)
    assert isinstance(train, cli.Train)
    assert (generate.dataset, generate.options) == (asked.dataset, asked.prepare)
    assert (train.dataset, train.run, train.options) == (asked.dataset, asked.run, asked.train)


def test_made_up_rows_lie_beside_the_run_under_a_name_of_their_own() -> None:
    one, same, other = (
        parse([f"--nepochs={epochs}", f"--data-size={size}", "--run=a/run"])
        for epochs, size in ((1, 5), (2, 5), (1, 6))
    )
    assert one.dataset.parent == Path("a")
    assert one.dataset.name.startswith("random-")
    assert one.dataset == same.dataset != other.dataset
    assert parse([]).dataset.parent == Path("runs")


def test_a_finished_npz_is_the_source(tmp_path: Path) -> None:
    npz = tmp_path / "my.npz"
    flags = f"--processed-data-file={npz} --max-ind-range=10"
    assert request(flags).source == Path("data/train.txt")
    assert request(flags).prepare.max_ind_range == 10
    npz.touch()
    asked = request(flags)
    assert (asked.source, asked.dataset) == (npz, tmp_path / "my.dataset")
    assert (asked.prepare.max_ind_range, asked.train.max_ind_range) == (0, 10)


def test_a_finished_npz_beside_the_raw_file_is_found(tmp_path: Path) -> None:
    npz = tmp_path / "kaggleAdDisplayChallenge_processed.npz"
    npz.touch()
    assert request(f"--raw-data-file={tmp_path}/train.txt").source == npz


def test_the_run_is_the_first_free_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert request().run == Path("runs/reference-001")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "reference-001").mkdir(parents=True)
    assert request().run == Path("runs/reference-002")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--use-gpu --use-npu", "--use-gpu and --use-npu name two devices"),
        ("--inference-only", "--inference-only needs a model to test"),
        ("--raw-data-file=", "there are no data: name Criteo's train.txt with --raw-data-file"),
        (
            "--data-generation=random --arch-embedding-size=4-0",
            "Here --num-embeddings is set by --arch-embedding-size.",
        ),
        (
            "--data-generation=random --rand-data-dist=gaussian --rand-data-max=4",
            "--rand-data-min … --rand-data-max must be ids of every table, 0 … 1; got 0.0 … 4.0",
        ),
        ("--processed-data-file=x.txt", "--processed-data-file must end in .npz; got x.txt"),
        ("--raw-data-file= --processed-data-file=no.npz", "no.npz does not exist"),
        ("--mini-batch-size=0", "--mini-batch-size must be at least 1; got 0"),
        (
            "--nepochs=-1",
            "--epochs must be at least 1; got -1. Here --epochs is set by --nepochs.",
        ),
        (
            "--arch-sparse-feature-size=8",
            "--dense-arch-layer-sizes is set by --arch-mlp-bot",
        ),
        (
            "--mlperf-grad-accum-iter=4 --num-batches=10",
            "got 10 and 4. Here --accumulate-batches is set by --mlperf-grad-accum-iter",
        ),
        (
            "--data-set=terabyte --raw-data-file=input/train.txt",
            "it is expected to end in /day, which the names day_0, day_1 … of the files begin",
        ),
        (
            "--lr-num-warmup-steps=9 --lr-num-decay-steps=1",
            "--warmup-steps is set by --lr-num-warmup-steps",
        ),
    ],
)
def test_what_cannot_be(flags: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        request(flags)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        ("--loss-weights=1-2", "--loss-weights has no effect without --loss-function=wbce"),
        (
            "--arch-interaction-op=cat --arch-interaction-itself",
            "--arch-interaction-itself has no effect without --arch-interaction-op=dot",
        ),
        ("--qr-threshold=9", "--qr-threshold has no effect without --qr-flag"),
        ("--qr-operation=add", "--qr-operation has no effect without --qr-flag"),
        ("--md-flag --qr-collisions=9", "--qr-collisions has no effect without --qr-flag"),
        ("--md-threshold=9", "--md-threshold has no effect without --md-flag"),
        ("--md-temperature=0.1", "--md-temperature has no effect without --md-flag"),
        ("--qr-flag --md-round-dims", "--md-round-dims has no effect without --md-flag"),
        ("--local_rank=1", "--local_rank has no effect on the CPU"),
        ("--save-model=m.pt --test-freq=-1", "--save-model has no effect unless training is"),
        ("--num-workers=2", "--num-workers changes nothing: one background thread reads here"),
        ("--dataset-multiprocessing", "--dataset-multiprocessing changes nothing: preparation"),
        ("--data-size=9", "--data-size has no effect with --data-generation=dataset"),
        (
            "--data-generation=random --data-size=9 --num-batches=2",
            "--data-size has no effect beside --num-batches",
        ),
        ("--data-trace-file=x", "--data-trace-file has no effect without --data-generation=synth"),
        ("--rand-data-max=2", "--rand-data-max has no effect without --rand-data-dist=gaussian"),
        (
            "--data-generation=random --data-randomize=day",
            "--data-randomize has no effect on made-up rows",
        ),
        (
            "--data-generation=synthetic --rand-data-dist=gaussian --rand-data-mu=3",
            "--rand-data-mu has no effect without --rand-data-dist=gaussian",
        ),
        ("--tensor-board-filename=x", "--tensor-board-filename=x: event files are in RUN/"),
        (
            "--inference-only --load-model=m.pt --tensor-board-filename=x",
            "--tensor-board-filename has no effect with --inference-only",
        ),
        ("--memory-map", "--memory-map: preparation takes limited memory in any case; the train"),
        ("--print-precision=3", "--print-precision has no effect without --debug-mode"),
        (
            "--mlperf-bin-loader --memory-map",
            "--mlperf-bin-loader has no effect without --memory-map, --mlperf-logging and --data",
        ),
        (
            "--mlperf-bin-shuffle --data-set=terabyte --raw-data-file=input/day",
            "--mlperf-bin-shuffle has no effect without --memory-map, --mlperf-logging and --data",
        ),
        (
            "--mlperf-grad-accum-iter=3",
            "--test-freq=10240 is taken as 10242, whole steps of 3 mini-batches",
        ),
        (
            "--inference-only --load-model=m.pt --enable-profiling",
            "--enable-profiling has no effect with --inference-only: nothing is trained",
        ),
        ("", "--round-targets changes nothing: the labels are 0 and 1 already"),
    ],
)
def test_what_has_no_effect_is_noted(flags: str, note: str) -> None:
    assert any(line.startswith(note) for line in request(flags).notes)


def test_what_acts_with_mlperf_logging_alone() -> None:
    flags = [flag for flag in RECIPE.split() if flag != "--mlperf-logging"]
    thresholds = ["--mlperf-auc-threshold=0.5", "--mlperf-acc-threshold=0.5"]
    asked = parse([*flags, *thresholds, "--mlperf-grad-accum-iter=4"])
    assert (asked.train.target_auc, asked.train.target_accuracy) == (0, 0)
    assert asked.train.accumulate_batches == 1
    idle = [note for note in asked.notes if "has no effect without --mlperf-logging" in note]
    assert len(idle) == 3
    asked = request(" ".join(thresholds) + " --test-freq=-1")
    assert (asked.train.target_auc, asked.train.target_accuracy) == (0, 0)
    for flag in thresholds:
        name = flag.split("=")[0]
        assert f"{name} has no effect without --mlperf-logging and --test-freq" in asked.notes


LARGE = "--data-set=terabyte --memory-map --mlperf-logging --max-ind-range=40"


def test_where_the_terabyte_rows_are(tmp_path: Path) -> None:
    def asked(flags: str = LARGE) -> Request:
        return request(f"{flags} --raw-data-file={tmp_path}/day --run=r")

    assert asked().dataset == tmp_path / "terabyte_processed.dataset"
    assert asked("--data-set=terabyte").source == tmp_path  # the message names what is missing
    assert asked("--data-set=terabyte").prepare.shuffle == "reference"

    (tmp_path / "day_0_reordered.npz").touch()
    of_days = asked()
    assert of_days.source == tmp_path / "day"
    assert of_days.prepare == PrepareConfig(shuffle="none")
    assert (of_days.train.max_ind_range, of_days.train.initial_draws) == (40, "none")

    (tmp_path / "day_0.gz").touch()
    assert asked().source == tmp_path
    assert asked().prepare == PrepareConfig(shuffle="total", max_ind_range=40)

    (tmp_path / "terabyte_processed_train.bin").touch()
    assert asked().source == tmp_path
    numbers = asked(f"{LARGE} --mlperf-bin-loader")
    assert numbers.source == tmp_path / "terabyte_processed_train.bin"
    assert numbers.prepare == PrepareConfig(shuffle="none")
    shuffled = asked(f"{LARGE} --mlperf-bin-loader --mlperf-bin-shuffle")
    assert shuffled.prepare == PrepareConfig(shuffle="total")
    assert any(note.startswith("--mlperf-bin-shuffle: rows are") for note in shuffled.notes)


def test_what_is_printed_and_drawn_beside() -> None:
    asked = request("--debug-mode --print-precision=3 --plot-compute-graph --run=r")
    assert (asked.debug_mode, asked.print_precision, asked.plot_compute_graph) == (True, 3, True)
    assert asked.profile is None
    profiled = request("--enable-profiling --run=r")
    assert profiled.profile == Path("r/trace.json")
    command = cli.parse(shlex.split(profiled.commands()[1])[1:])
    assert isinstance(command, cli.Train)
    assert command.profile == Path("r/trace.json")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--qr-flag", {"embedding_variant": "qr", "qr_initial_values": "reference"}),
        (
            "--qr-flag --qr-threshold=9 --qr-operation=add --qr-collisions=7",
            {
                "embedding_variant": "qr",
                "qr_threshold": 9,
                "qr_operation": "add",
                "qr_collisions": 7,
                "qr_initial_values": "reference",
            },
        ),
        (
            "--qr-flag --qr-operation=concat --arch-sparse-feature-size=8",
            {  # 8 of each: together 16
                "embedding_variant": "qr",
                "qr_operation": "concat",
                "qr_initial_values": "reference",
            },
        ),
        (
            "--md-flag --md-threshold=9 --md-temperature=0.5 --md-round-dims",
            {
                "embedding_variant": "md",
                "md_threshold": 9,
                "md_temperature": 0.5,
                "md_round_dims": True,
            },
        ),
        ("--weighted-pooling=fixed", {"weighted_pooling": "fixed"}),
        (
            "--md-flag --weighted-pooling=learned",
            {"embedding_variant": "md", "weighted_pooling": "learned"},
        ),
        ("--qr-threshold=9 --md-temperature=0.1", {}),
    ],
)
def test_embedding_variants(flags: str, expected: dict[str, Any]) -> None:
    assert changed(flags) == {f"model.{name}": value for name, value in expected.items()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--qr-flag --md-flag", "--qr-flag and --md-flag store the same tables in two ways"),
        (
            "--qr-flag --weighted-pooling=fixed",
            "--weighted-pooling fixed does not go with --embedding-variant qr",
        ),
        ("--qr-flag --qr-collisions=0", "--qr-collisions must be in 1 … 2**31-1; got 0"),
        (
            "--qr-flag --qr-operation=concat",
            "got 16 and 32. Here --embedding-dim is set by --arch-sparse-feature-size",
        ),
    ],
)
def test_embedding_variants_that_do_not_fit_are_refused(flags: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        request(flags)
    assert message in str(error.value)
