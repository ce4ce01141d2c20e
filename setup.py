"""Builds the native kernels in native/; everything else about the package is in pyproject.toml.

One shared library of PyTorch operators, ``dlrm/ops/_native.so``, with a stamp beside it that tells
what it was made of (``dlrm.ops.stamp``). Where it cannot be built, as without a C++ compiler, the
package is installed without it: then everything takes its plain path, and says so.
"""

from __future__ import annotations

import json
import os
import platform
import runpy
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

ROOT = Path(__file__).parent.resolve()
SOURCES = sorted((ROOT / "native").glob("*.cpp"))
# A file whose name ends so is compiled for that instruction set, and runs only where it is there.
INSTRUCTION_SETS = {
    "_avx2": ["-mavx2", "-mfma"],
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}


class BuildNative(build_ext):
    """Compiles each file with the flags of its instruction set, and links them."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return a name without a Python version, which the library does not depend on."""
        return os.path.join(*fullname.split(".")) + ".so"

    def copy_extensions_to_source(self) -> None:
        """Put what was built beside the sources, for an editable installation."""
        for extension in self.extensions:
            built = ROOT / "src" / self.get_ext_filename(extension.name)
            made = Path(self.build_lib).resolve() / self.get_ext_filename(extension.name)
            for suffix in (".json", ".so"):
                if made.with_suffix(suffix).exists():
                    self.copy_file(str(made.with_suffix(suffix)), str(built.with_suffix(suffix)))
                else:
                    built.with_suffix(suffix).unlink(missing_ok=True)

    def build_extension(self, extension: Extension) -> None:
        """Build the library and its stamp, or say why there is none."""
        library = Path(self.build_lib).resolve() / self.get_ext_filename(extension.name)
        stamp = library.with_suffix(".json")
        for made in (stamp, library):
            made.unlink(missing_ok=True)
        try:
            self._build(library)
        except (BaseError, OSError, ImportError) as error:
            sys.stderr.write(f"dlrm: built without native kernels: {error}\n")
            library.unlink(missing_ok=True)
            reason = f"the native kernels could not be built: {error}"
            stamp.write_text(json.dumps({"failure": " ".join(reason.split())}))
            return
        make_stamp = runpy.run_path(str(ROOT / "src/dlrm/ops/stamp.py"))["make_stamp"]
        stamp.write_text(json.dumps(make_stamp(ROOT / "native")))

    def _build(self, library: Path) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        flags = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        # A product and a sum in one instruction, where there is one; nothing else is reordered.
        flags += ["-ffp-contract=fast"]
        # The headers of torch are not ours to warn about. Threads come from PyTorch's own pool.
        flags += [f"-isystem{path}" for path in include_paths()] + ["-fopenmp"]
        objects = Path(self.build_temp).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        compiler = shlex.split(os.environ.get("CXX") or self.compiler.compiler_cxx[0])

        def compile_one(source: Path) -> str:
            output = str(objects / f"{source.stem}.o")
            chosen = INSTRUCTION_SETS.get("_" + source.stem.rpartition("_")[2], [])
            self.spawn([*compiler, *flags, *chosen, "-c", str(source), "-o", output])
            return output

        sources = [
            source
            for source in SOURCES
            if platform.machine() == "x86_64" or not source.stem.endswith(tuple(INSTRUCTION_SETS))
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_one, sources))
        folders = [f"-L{path}" for path in library_paths()]
        libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
        self.spawn(
            [*compiler, "-shared", *compiled, *folders, *libraries, "-fopenmp", "-o", str(library)]
        )


setup(
    ext_modules=[Extension("dlrm.ops._native", [str(path.relative_to(ROOT)) for path in SOURCES])],
    cmdclass={"build_ext": BuildNative},
)
