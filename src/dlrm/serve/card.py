"""What people are told of a served model: its card, and the page that shows it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from dlrm.bundles import Bundle, BundleInfo
from dlrm.errors import UserError
from dlrm.files import read_json
from dlrm.prediction import Predictor
from dlrm.version import __version__

_METRICS = {
    "auc": "AUC",
    "log_loss": "Log loss",
    "normalized_entropy": "Normalized entropy",
    "calibration": "Calibration",
    "accuracy": "Accuracy",
}
_CHECKPOINTS = {"best": "the best on validation rows", "newest": "the newest"}
_STYLE_PLACE = "/* the style of reports */\n"


@dataclass(frozen=True)
class CardFeature:
    """A field of the page's form."""

    name: str
    kind: Literal["dense", "sparse"]


@dataclass(frozen=True)
class CardExample:
    """A row to begin with."""

    values: Mapping[str, Any]
    """Raw, by feature; sparse ones as 8 hexadecimal digits, null is missing."""
    label: float | None
    """None: not known."""


@dataclass(frozen=True)
class CardTable:
    """Of texts."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Card:
    """What the page shows."""

    name: str
    """What clients call the model."""
    version: str
    headline: str
    dlrm_version: str
    takes_raw_rows: bool
    most_rows: int
    """Of a request."""
    features: Sequence[CardFeature]
    examples: Sequence[CardExample]
    facts: Sequence[tuple[str, str]]
    metrics: CardTable


def read_card(predictor: Predictor, name: str, version: str, most_rows: int) -> Card:
    """Read the card of what is served.

    Args:
        predictor: What was loaded.
        name: What clients call it.
        version: Its version.
        most_rows: Of a request.

    Raises:
        UserError: A file of it is damaged.
    """
    schema, config = predictor.schema, predictor.config.model
    facts = [
        ("Version", version),
        ("Features", f"{len(schema.dense)} numbers, {len(schema.sparse)} categories"),
        ("Embedding tables", f"{sum(schema.num_embeddings):,} rows of {config.embedding_dim}"),
        ("Bottom MLP", _sizes(config.dense_arch_layer_sizes)),
        ("Top MLP", _sizes(config.over_arch_layer_sizes)),
        ("Interaction", config.interaction),
        ("Loss", predictor.config.loss.loss),
        ("Rows were split", schema.split_rule),
    ]
    examples: list[CardExample] = []
    opened = predictor.opened
    path = opened.path
    if isinstance(opened, Bundle):
        result = opened.info.trained.result
        facts += _facts_of_bundle(opened.info)
        stored = opened.examples()
        if stored.raw:
            examples = [CardExample(each.features, each.label) for each in stored.rows]
    else:
        result = read_json(path / "result.json", dict, "run") if _has_ended(path) else {}
    try:
        if result:
            passes = f"{result['epochs']:g} {'pass' if result['epochs'] == 1 else 'passes'}"
            facts.append(("Trained on", f"{result['train_samples']:,} rows, {passes}"))
            facts.append(("Checkpoint", _CHECKPOINTS[result["checkpoint"]]))
        metrics = result.get("metrics", {})
        auc = metrics.get("test", {}).get("auc")
        headline = "" if auc is None else f"AUC {auc:.4f} on test rows"
        lines = [
            [split, *(_rounded(each[name]) for name in _METRICS), f"{each['samples']:,}"]
            for split, each in metrics.items()
        ]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged: the result of its training is not as `dlrm train` writes it "
            f"({error!r}). Train the run or export the bundle again."
        ) from error
    return Card(
        name=name,
        version=version,
        headline=headline,
        dlrm_version=__version__,
        takes_raw_rows=schema.takes_raw_rows,
        most_rows=most_rows,
        features=[
            *(CardFeature(each.name, "dense") for each in schema.dense),
            *(CardFeature(each.name, "sparse") for each in schema.sparse),
        ],
        examples=examples,
        facts=facts,
        metrics=CardTable(["Split", *_METRICS.values(), "Rows"], lines),
    )


def _facts_of_bundle(info: BundleInfo) -> list[tuple[str, str]]:
    trained = info.trained
    facts = []
    if info.quantize != "none":
        facts.append(("Table numbers", f"{info.quantize}, with a scale and a bias a row"))
    if trained.sources:
        facts.append(("Made from", ", ".join(trained.sources)))
    for split, rows in trained.rows.items():
        clicks = trained.clicks.get(split)
        share = f", {clicks / rows:.1%} of them clicked" if clicks is not None and rows else ""
        facts.append((f"Rows of {split}", f"{rows:,}{share}"))
    if compared := info.compared:
        facts.append(
            (
                "Compared at export",
                f"{compared.rows:,} rows ({compared.origin}): probabilities differ from the "
                f"trained model's by at most {compared.largest_difference:.2g}",
            )
        )
    facts.append(("Exported by", f"dlrm {info.dlrm}"))
    return facts


def _has_ended(path: Path) -> bool:
    return (path / "result.json").exists()


def _sizes(sizes: Sequence[int]) -> str:
    return "-".join(map(str, sizes))


def _rounded(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


@dataclass(frozen=True)
class Page:
    """A page and its Content-Security-Policy, by which a browser runs nothing else."""

    content: bytes
    policy: str


@cache
def page() -> Page:
    """Return the page, which asks its server for the card and for predictions, and nobody else."""
    style = files("dlrm.report").joinpath("page.css").read_text(encoding="utf-8")
    text = files("dlrm.serve").joinpath("page.html").read_text(encoding="utf-8")
    assert _STYLE_PLACE in text
    text = text.replace(_STYLE_PLACE, style)
    digests = {}
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        digests[tag] = f"'sha256-{digest}'"
    policy = (
        f"default-src 'none'; style-src {digests['style']}; script-src {digests['script']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return Page(text.encode(), policy)
