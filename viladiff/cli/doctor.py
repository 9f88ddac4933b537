"""The command ``viladiff doctor``: checks of the installation, each with a finding and, for a problem, its fix.

Nothing is rendered, trained or started: a check reads, and at most writes one empty file and removes it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from viladiff.core.checks import Check
from viladiff.core.environment import visible_cpus
from viladiff.core.messages import printable

CACHE_GB = 0.5
"""Room for both built-in data sets and their text, in GB."""
TEMPORARY_GB = 0.05
"""Room for the logs of Ray, in GB."""
RUNS_GB = 1.0
"""Room for some runs on the built-in data sets, in GB; real ones take more."""


def examine(runs_dir: str | Path = "runs") -> list[Check]:
    """All checks; ``runs_dir`` is the directory of runs."""
    checks = [_python(), *_packages()]
    if find_spec("torch") is not None:
        checks += _torch()
    if find_spec("numpy") is not None:
        from viladiff.data.cache import cache_dir

        checks += [_place("cache", cache_dir(), CACHE_GB, "VILADIFF_CACHE"), *_cached(cache_dir())]
    checks += [_place("runs", Path(runs_dir), RUNS_GB, "--runs-dir"), *_temporary(), _ray()]
    return checks


def print_checks(checks: list[Check]) -> None:
    """Print the report."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "check", "found", "fix", box=None, pad_edge=False)
    for check in checks:
        sign = (
            Text("FAIL", "bold red")
            if check.broken
            else Text("note", "yellow")
            if check.remedy
            else Text("ok", "green")
        )
        table.add_row(sign, *(Text(printable(part)) for part in (check.name, check.found, check.remedy)))
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)


def _python() -> Check:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    old = sys.version_info < (3, 11)
    return Check("python", found, "requires 3.11 or newer: make setup PYTHON=/path/to/python3.11" if old else "", old)


def _packages() -> Iterator[Check]:
    needed = ("torch", "torchvision", "timm", "pydantic", "safetensors", "scikit-learn", "scipy", "rich")
    missing = []
    for name in needed:
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Check("packages", f"missing: {', '.join(missing)}", "run make setup", broken=True)
    else:
        yield Check("packages", ", ".join(f"{name} {version(name)}" for name in ("timm", "pydantic", "scikit-learn")))


def _torch() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check("torch", f"does not import: {error}", "remove .venv and run make setup", broken=True)
        return
    new = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)
    yield Check("torch", torch.__version__, "" if new else "requires 2.12 or newer: run make setup", not new)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    built = torch.version.cuda or "none"
    yield Check("devices", f"{', '.join(names) or 'CPU only'} (built for CUDA {built})")
    cores = visible_cpus()
    threads = torch.get_num_threads()
    advice = f"fewer threads than cores are faster: --threads {cores}" if threads > cores else ""
    yield Check("threads", f"{threads} of {cores} cores", advice)


def _place(name: str, directory: Path, need_gb: float, how: str) -> Check:
    """Check that ``directory``, or the first parent of it that exists, has space and is writable."""
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        return Check(name, f"{there}: a file, not a directory", f"remove it, or change {how}", broken=True)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Check(name, f"{there}: cannot be written ({error.strerror})", f"change {how}", broken=True)
    free = shutil.disk_usage(there).free / 1e9
    low = free < need_gb
    return Check(
        name,
        f"{directory}: {free:.1f} GB free",
        f"requires {need_gb:g} GB: free some, or change {how}" if low else "",
        low,
    )


def _temporary() -> Iterator[Check]:
    """Check the folder of temporary files, in which Ray's logs and sockets lie."""
    asked = os.environ.get("TMPDIR", "")
    found = Path(tempfile.gettempdir())
    if asked and Path(asked).absolute() != found.absolute():
        yield Check(
            "TMPDIR", f"{asked}: cannot be used, {found} is instead", "set TMPDIR to a folder to write to", True
        )
    yield _place("temporary", found, TEMPORARY_GB, "TMPDIR")


def _cached(directory: Path) -> Iterator[Check]:
    """Check that every file of the rendered built-in data sets is complete and unaltered."""
    from viladiff.data.cache import open_checked
    from viladiff.data.sources.digits import VARIANTS, variant_fingerprint

    for name in VARIANTS:
        folder = directory / name / variant_fingerprint(name)
        if not folder.exists():
            yield Check(f"data {name}", f"not rendered; rendered at first use, or by: viladiff data render {name}")
            continue
        try:
            open_checked(folder)
        except (ValueError, OSError) as error:
            found, _, remedy = str(error).partition("; ")
            yield Check(f"data {name}", found, remedy or f"delete {folder}", broken=True)
        else:
            yield Check(f"data {name}", f"{folder}: complete, checksums right")


def _ray() -> Check:
    if find_spec("ray") is None:
        return Check("ray", "not installed", "required by table, sweep and caption: run make setup")
    return Check("ray", version("ray"))
