"""Where the numbers of a run come from: versions, hardware, and the state of the code.

No host name and no time: what is recorded here helps to explain a number, not to find a machine.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "mlbfgs",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "hydra-core",
    "omegaconf",
    "pyarrow",
)
CODE_FOLDERS = ("mlbfgs", "experiments", "configs")
_REPOSITORY = Path(__file__).resolve().parents[2]


def describe_origin(device: torch.device) -> dict[str, Any]:
    """Describe what a run is made with.

    Args:
        device: where it trains.

    Returns:
        `versions`, `hardware` and `git` (None outside a git checkout), ready for JSON.
    """
    return {
        "versions": describe_versions(),
        "hardware": describe_hardware(device),
        "git": describe_git(_REPOSITORY),
    }


def describe_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that can change a number; None where absent."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Processor, memory and, where one is used, the GPU."""
    hardware: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "gpu": None,
        "gpu_memory_bytes": None,
        "cuda": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware["gpu"] = properties.name
        hardware["gpu_memory_bytes"] = properties.total_memory
        hardware["cuda"] = torch.version.cuda
    return hardware


def describe_git(folder: Path) -> dict[str, Any] | None:
    """Commit of a checkout and whether the code in it differs; None outside a checkout.

    Files outside `CODE_FOLDERS`, such as the results of other runs, do not count.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    # A copy of the project inside another repository has that one's commits, which say nothing.
    if top is None or not os.path.samefile(top, folder):
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--", *CODE_FOLDERS)
    return {"commit": commit, "dirty": changes != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
