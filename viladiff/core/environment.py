"""Facts about the machine and the code: versions, processor, commit, peak memory."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pydantic", "scikit-learn", "viladiff")


def versions() -> dict[str, str]:
    """Return the versions of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def visible_cpus() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Return the processor's model by name, with the numbers that distinguish processors of one name."""
    wanted = ("model name", "cpu family", "model", "stepping")
    try:
        block = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
        said = dict(line.replace("\t", "").split(":", 1) for line in block.splitlines() if ":" in line)
        name, family, model, stepping = (said[key].strip() for key in wanted)
    except (OSError, UnicodeDecodeError, KeyError):
        return platform.processor() or platform.machine()
    return f"{name}, family {family}, model {model}, stepping {stepping}"


def git_state() -> dict[str, Any]:
    """Return the commit of the package's checkout, and whether it was modified; empty outside a checkout."""
    here = Path(__file__).parent
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        return {"revision": run("rev-parse", "HEAD"), "dirty": bool(run("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return {}


def reset_peak_memory() -> bool:
    """Reset ``peak_memory``; return False if the kernel does not support or allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Return this process's peak main memory in bytes, since ``reset_peak_memory`` if that works."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
