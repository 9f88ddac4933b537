"""How much faster ``viladiff data check`` reads 10,000 files in two processes than in one.

OMP_NUM_THREADS=1 python benchmarks/data_check.py [--files 10000] [--rounds 3]

Half of the files are photographs of about 500 x 375 as JPEG, half their masks as index PNG: a hundred distinct pairs,
each under many names. The sides take turns within a round, after one reading that brings the files into memory. Beside
wall time stands the processor time of all processes, which other work on the machine changes less: two processes can at
best be twice as fast as one if together they compute as long.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from viladiff.core.environment import visible_cpus
from viladiff.data.files.validate import DatasetReport, validate_dataset

AIM = 1.7
DISTINCT = 100
SIZES = (330, 500)


def photographs() -> ModuleType:
    """The module of test photographs, which is in no package."""
    path = Path(__file__).resolve().parent.parent / "tests" / "photographs.py"
    spec = importlib.util.spec_from_file_location("photographs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generate(root: Path, files: int) -> None:
    """``files`` / 2 images with as many masks, in the layout of ``folder``."""
    photographs().write(root, DISTINCT, sizes=SIZES, unlabelled_masks=True)
    for folder in (root / "images", root / "masks"):
        originals = sorted(folder.iterdir())
        contents = [path.read_bytes() for path in originals]
        for number in range(DISTINCT, files // 2):
            original = originals[number % DISTINCT]
            (folder / f"{original.stem}_{number}{original.suffix}").write_bytes(contents[number % DISTINCT])


def timed(root: Path, processes: int) -> tuple[float, float, DatasetReport]:
    """Seconds on the wall, seconds of all processors, and what was found."""
    before = os.times()
    report = validate_dataset(root, processes=processes)
    after = os.times()
    spent = sum(getattr(after, name) - getattr(before, name) for name in ("user", "system", "children_user"))
    return after.elapsed - before.elapsed, spent + after.children_system - before.children_system, report


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints both times and the ratio; returns 0 where the aim is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "photos"
        begun = time.perf_counter()
        generate(root, args.files)
        print(f"{args.files} files generated in {time.perf_counter() - begun:.0f} s; {visible_cpus()} processors")
        wanted = validate_dataset(root, processes=1).seen
        walls: dict[int, list[float]] = {1: [], 2: []}
        spents: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(args.rounds):
            for processes in (1, 2):
                wall, spent, report = timed(root, processes)
                assert report.seen == wanted, "both sides must find the same"
                walls[processes].append(wall)
                spents[processes].append(spent)
    ratio = statistics.median(one / two for one, two in zip(walls[1], walls[2], strict=True))
    for processes in (1, 2):
        wall, spent = statistics.median(walls[processes]), statistics.median(spents[processes])
        print(f"{processes} process(es): {wall:7.2f} s on the wall, {spent:7.2f} s of processors")
    work = statistics.median(spents[2]) / statistics.median(spents[1])
    print(f"two processes {ratio:.2f} times as fast as one (aim {AIM}); processor time {work:.2f} times one's")
    return int(ratio < AIM)


if __name__ == "__main__":
    raise SystemExit(main())
