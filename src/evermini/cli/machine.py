"""Facts about this machine, as `evermini doctor` shows them. Reads, never changes anything."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ISA_FEATURES = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
"""Instruction sets that matter to matrix products, by their Linux names; x86 first, then ARM."""


@dataclass(frozen=True)
class Cpu:
    """The processor; ``usable_cores`` counts physical cores this process may run on."""

    name: str
    architecture: str
    usable_cores: int
    logical_cpus: int
    isa: tuple[str, ...]


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use."""

    name: str
    free_memory: int


def cpu() -> Cpu:
    """Return what processor this is."""
    import psutil

    logical = psutil.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or logical
    allowed = (
        len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else logical
    )
    name, flags = _linux_cpu() if sys.platform == "linux" else _other_cpu()
    return Cpu(
        name=name or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        usable_cores=min(physical, allowed),
        logical_cpus=logical,
        isa=tuple(feature for feature in ISA_FEATURES if feature in flags),
    )


def _linux_cpu() -> tuple[str, set[str]]:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name", ""), set(flags.split())


def _other_cpu() -> tuple[str, set[str]]:
    if sys.platform != "darwin":
        return "", set()
    run = subprocess.run(
        ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
    )
    return run.stdout.strip(), {"asimd"} if platform.machine() == "arm64" else set()


def gpus() -> list[Gpu]:
    """Return the GPUs that torch can use."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        free, _ = torch.cuda.mem_get_info(index)
        found.append(Gpu(torch.cuda.get_device_name(index), free))
    return found


def missing_packages() -> list[str]:
    """Return the required packages that are not installed, or not in a version that will do."""
    from packaging.requirements import Requirement

    missing = []
    for line in importlib.metadata.requires("evermini") or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{requirement} (not installed)")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            missing.append(f"{requirement} (installed: {version})")
    return missing


def torch_version() -> str:
    """Return torch's version and what it was built for."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return f"{torch.__version__} ({build}, {torch.get_num_threads()} threads)"
