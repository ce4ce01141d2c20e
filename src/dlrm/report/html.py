"""What the pages share: their frame, their tables and figures, and where they go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from dlrm.errors import UserError
from dlrm.report.figures import Drawing
from dlrm.version import __version__


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    highlighted: int | None = None
    """The row that the page is about."""


@dataclass(frozen=True)
class Shown:
    """A figure, the table of what it shows, and a sentence about it."""

    drawing: Drawing
    table: Table
    note: str = ""


def render(template: str, **values: Any) -> bytes:
    """Fill a template of this folder, which extends ``frame.html.jinja``, into a whole page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dlrm.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(dlrm_version=__version__, **values)
    return page.encode()


def output_path(output: Path | str | None, default: Path) -> Path:
    """Return where a page goes.

    Raises:
        UserError: Its folder does not exist.
    """
    path = Path(output) if output else default
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path.parent} is not a folder, so {path} cannot be written. Make it.")
    return path


def rounded(value: float, digits: int = 4) -> str:
    """Return a number as text; "-" where there is none."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
