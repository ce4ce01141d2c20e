"""What the native kernels were built from, so that a stale library is noticed before it is loaded.

``setup.py`` runs this file too, before the package can be imported.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path


def make_stamp(sources: Path) -> dict[str, str]:
    """Return what a library built now, from the files in a folder, would be made of.

    Args:
        sources: The repository's ``native/``, beside the ``setup.py`` that says how it is compiled.
            Where it is not there, as in an installed wheel, the sources cannot have changed, and
            only the version of torch is told.
    """
    stamp = {"torch": version("torch")}
    if sources.is_dir():
        digest = hashlib.sha256()
        files = sorted([*sources.glob("*.cpp"), *sources.glob("*.h")])
        for path in [*sources.parent.glob("setup.py"), *files]:
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)}\n".encode() + content)
        stamp["sources"] = digest.hexdigest()
    return stamp
