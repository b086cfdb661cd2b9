"""What numbers were made with: the commit of the code, the versions of the libraries, the hardware.

No name of a machine, a person or a folder is among it, so that it can be published with every figure.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from prunelab import paths

LIBRARIES = ("torch", "torchvision", "numpy", "pandas", "pyarrow", "safetensors", "scipy", "scikit-learn", "matplotlib")
UNKNOWN = "unknown"


def collect(device: str, threads: int) -> dict[str, Any]:
    """Everything, as plain values, for ``Writer.finish`` and beside a figure.

    Args:
        device: What trained, in words, as the compute side knows it: "cpu" or "NVIDIA H100 80GB HBM3".
        threads: Threads that the computation used.

    Returns:
        prunelab, git_commit, python, versions (library -> version, of those installed), device, threads, hardware,
        system and created (UTC).
    """
    return {
        "prunelab": version("prunelab"),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := version(name)) != UNKNOWN},
        "device": device,
        "threads": threads,
        "hardware": hardware(),
        "system": f"{platform.system()} {platform.machine()}",
        "created": now(),
    }


def row(device: str, threads: int) -> dict[str, Any]:
    """The part that stands in every row of rounds: device, threads, git_commit, torch_version and finished (now)."""
    return {
        "device": device,
        "threads": threads,
        "git_commit": git_commit(),
        "torch_version": version("torch"),
        "finished": now(),
    }


def now() -> str:
    """The time in UTC, to the second, as ``2026-11-20T14:03:09Z``."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@functools.cache
def version(package: str) -> str:
    """The installed version, without importing the package; "unknown" where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN


@functools.cache
def git_commit() -> str:
    """The commit of the checkout that prunelab runs from, with "+" where tracked files were changed since.

    It is asked for once, since later commits do not change the code that is loaded. "unknown" for an installed package,
    also where that lies inside a repository of the user's.
    """
    checkout = paths.PACKAGE.parent
    if not (checkout / ".git").exists():
        return UNKNOWN
    git = ("git", "-C", str(checkout))
    commit = _output(*git, "rev-parse", "--short=12", "HEAD")
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no", "--", "prunelab")
    return f"{commit}{'+' if changed else ''}" if commit else UNKNOWN


def _output(*command: str) -> str:
    """What a command prints; nothing where it fails or is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@functools.cache
def hardware() -> str:
    """The processor and its cores that this process may use, as ``AMD EPYC 7763, 4 cores``."""
    usable = cores()
    return f"{_processor()}, {usable} core{'' if usable == 1 else 's'}"


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """Its name: /proc/cpuinfo on Linux, sysctl on macOS, what Python knows elsewhere."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()
