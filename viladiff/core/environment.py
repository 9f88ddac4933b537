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
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def visible_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Model of this machine's processor, by name and by the numbers that tell apart those of one name."""
    wanted = ("model name", "cpu family", "model", "stepping")
    try:
        block = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
        said = dict(line.replace("\t", "").split(":", 1) for line in block.splitlines() if ":" in line)
        name, family, model, stepping = (said[key].strip() for key in wanted)
    except (OSError, UnicodeDecodeError, KeyError):
        return platform.processor() or platform.machine()
    return f"{name}, family {family}, model {model}, stepping {stepping}"


def git_state() -> dict[str, Any]:
    """Revision of the checkout that the package is imported from, and whether it was changed; empty outside of one."""
    here = Path(__file__).parent
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        return {"revision": run("rev-parse", "HEAD"), "dirty": bool(run("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return {}


def reset_peak_memory() -> bool:
    """Lets ``peak_memory`` begin anew; False where the kernel has no such thing or does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Most bytes of main memory that this process has held, since ``reset_peak_memory`` where that works."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
