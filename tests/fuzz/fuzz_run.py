"""Fuzzing of all readers: ``make fuzz``. Seeded, and resumed where it was stopped; exits with 1 after a finding.

Inputs are made in blocks, by mutators and by hypothesis, from the corpus, the seed and the number of the block alone. A
worker process under RLIMIT_AS reads them; one that dies or hangs is replaced, and the input that it had is a finding.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import resource
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CORPUS, FOUND = HERE / "corpus", HERE / "found"
BLOCK = 250
"""Inputs that a worker is handed at a time."""
EACH, ALL = 3000, 100_000
"""Fewest inputs of a reader, and of all."""
SLOW = ("archive", "image", "list", "model", "published", "table")
"""Readers that take several times as long as others, and get no more than the fewest."""
MEMORY = 1 << 30
"""Bytes beyond what a worker has before its first input."""
SECONDS = 5.0
"""Of the processor, for an input."""
PATIENCE = 20.0
"""Seconds of the processor that a worker may take for one: native code does not hear the alarm."""
STILL = 600.0
"""Seconds of the clock without a sign of it."""


class TooLongError(BaseException):
    """An input takes longer than SECONDS."""


def seeds_of(reader: str) -> list[Path]:
    return sorted(path for path in (CORPUS / reader).iterdir() if path.is_file())


def kind_of(kinds: dict[str, str], name: str) -> str:
    return kinds.get(Path(name).suffix) or kinds.get("") or next(iter(kinds.values()))


def inputs(reader: str, kinds: dict[str, str], seed: int, block: int, number: int) -> list[tuple[str, bytes]]:
    """The inputs of a block: names of files and their bytes. Every sixth block is of hypothesis."""
    from fuzz_mutators import MUTATORS
    from fuzz_strategies import drawn

    files = seeds_of(reader)
    first = int.from_bytes(hashlib.sha256(f"{seed} {reader} {block}".encode()).digest()[:8], "big")
    if block % 6 == 3:
        path = files[block // 6 % len(files)]
        return [(path.name, data) for data in drawn(kind_of(kinds, path.name), path.read_bytes(), number, first)]
    rng, found = Random(first), []
    for _ in range(number):
        path = rng.choice(files)
        found.append((path.name, MUTATORS[kind_of(kinds, path.name)](rng, path.read_bytes())))
    return found


# The worker


def alarm(number: int, frame: object) -> None:
    raise TooLongError


def signature(what: str, error: BaseException | None) -> str:
    """What a finding is, so that it is kept once: the kind and the innermost line of the project."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    mine = [frame for frame in frames if "/viladiff/" in frame.filename]
    where = f"{Path(mine[-1].filename).name}:{mine[-1].name}" if mine else ""
    return f"{what} in {where}" if where else what


def judged(reader: Any, folder: Path, name: str, data: bytes) -> tuple[str, str, str]:
    """(outcome, signature, text of the error) of one input."""
    from fuzz_readers import attempt

    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        outcome, why, error = attempt(reader, folder, name, data)
    except TooLongError as late:
        outcome, why, error = "finding", "too long", late
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return (
        outcome,
        signature(why, error) if why else "",
        ascii(f"{type(error).__name__}: {error}")[1:300] if error else "",
    )


def is_finding(reader: Any, folder: Path, name: str, what: str, data: bytes) -> bool:
    return judged(reader, folder, name, data)[1] == what


def minimised(test: Callable[[bytes], bool], data: bytes, seconds: float = 6.0) -> bytes:
    """The smallest input found in some seconds that is the same finding."""
    until, size = time.monotonic() + seconds, max(1, len(data) // 2)
    while size and time.monotonic() < until:
        place, smaller = 0, False
        while place < len(data) and time.monotonic() < until:
            less = data[:place] + data[place + size :]
            if test(less):
                data, smaller = less, True
            else:
                place += size
        size = size // 2 if not smaller or size > 1 else size
        if size == 1 and not smaller:
            break
        size = min(size, max(1, len(data) // 2))
    return data


def kept(reader: str, name: str, data: bytes) -> Path:
    path = FOUND / reader / f"{hashlib.sha256(data).hexdigest()[:8]}-{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def limit_memory() -> None:
    lines = Path("/proc/self/status").read_text().splitlines()
    now = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize:"))
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def warm_up(readers: dict[str, Any], folder: Path) -> None:
    """Read each sound file, so that what is imported at first use is there before the limit."""
    for name, reader in readers.items():
        for path in seeds_of(name):
            outcome, why, text = judged(reader, folder, path.name, path.read_bytes())
            if outcome == "finding":
                raise SystemExit(f"{path}: a sound file is a finding: {why}: {text}")


def work(progress: Path) -> None:
    """Read tasks from stdin, a JSON object a line, and answer each with one."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, alarm)
    from fuzz_readers import READERS

    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch, progress.open("r+b") as file:
        shared, folder = mmap.mmap(file.fileno(), 8), Path(scratch) / "input"
        warm_up(READERS, folder)
        limit_memory()
        print("ready", file=out, flush=True)
        for line in sys.stdin:
            task = json.loads(line)
            reader = READERS[task["reader"]]
            made = [(Path(path).name.partition("-")[2], Path(path).read_bytes()) for path in task.get("files", ())]
            made = made or inputs(task["reader"], reader.kinds, task["seed"], task["block"], task["number"])
            counts: Counter[str] = Counter()
            findings: dict[str, dict[str, str]] = {}
            for place in range(task["start"], len(made)):
                shared[:8] = struct.pack("<Q", place)
                name, data = made[place]
                outcome, what, text = judged(reader, folder, name, data)
                counts[outcome] += 1
                if outcome == "finding" and what not in findings and what not in task["known"]:
                    if task["keep"]:
                        test = partial(is_finding, reader, folder, name, what)
                        data = minimised(test, data) if "too long" not in what else data
                        text += f" [{kept(task['reader'], name, data).name}]"
                    findings[what] = {"text": text}
            print(json.dumps({"counts": counts, "findings": findings, "made": len(made)}), file=out, flush=True)


# The driver


class Worker:
    """One process, started anew after its death."""

    def __init__(self) -> None:
        self.file = tempfile.NamedTemporaryFile(prefix="fuzz-progress-")  # noqa: SIM115 - as long as the driver
        self.file.write(bytes(8))
        self.file.flush()
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        words = [sys.executable, str(HERE / "fuzz_run.py"), "--worker", self.file.name]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        if self.line(120) != "ready":
            raise SystemExit("the worker did not start; run it by hand: python tests/fuzz/fuzz_run.py --worker FILE")
        return self.process

    def line(self, patience: float) -> str:
        """The worker's next line; empty where it died or gave no sign for so long."""
        assert self.process is not None and self.process.stdout is not None
        with selectors.DefaultSelector() as wait:
            wait.register(self.process.stdout, selectors.EVENT_READ)
            last = (self.place(), time.monotonic(), self.used())
            while not wait.select(1.0):
                if self.place() != last[0]:
                    last = (self.place(), time.monotonic(), self.used())
                if time.monotonic() - last[1] > STILL or self.used() - last[2] > patience:
                    self.process.kill()
        return self.process.stdout.readline().strip()

    def used(self) -> float:
        """Seconds of the processor that the worker has taken."""
        try:
            fields = (
                Path(f"/proc/{self.process.pid if self.process else 0}/stat").read_text().rpartition(")")[2].split()
            )
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def place(self) -> int:
        return struct.unpack("<Q", Path(self.file.name).read_bytes()[:8])[0]

    def ask(self, task: dict[str, Any]) -> dict[str, Any] | None:
        """The answer; None where the worker died, and then ``place`` is the input that it had."""
        process = self.process if self.process is not None and self.process.poll() is None else self.start()
        assert process.stdin is not None
        self.file.seek(0)
        self.file.write(struct.pack("<Q", task["start"]))
        self.file.flush()
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        answer = self.line(PATIENCE)
        return json.loads(answer) if answer else None

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.file.close()


def run_block(worker: Worker, task: dict[str, Any]) -> dict[str, Any]:
    """Let a worker do a block, past the inputs that kill it."""
    total: dict[str, Any] = {"counts": Counter(), "findings": {}}
    while True:
        answer = worker.ask(task)
        if answer is not None:
            total["counts"].update(answer["counts"])
            return {**total, "findings": {**total["findings"], **answer["findings"]}}
        place = worker.place()
        code = worker.process.wait() if worker.process else 0
        what = f"death ({signal.Signals(-code).name if code < 0 else code})"
        total["counts"].update({"finding": 1, "accepted": 0})
        if what not in total["findings"] and task["keep"] and not task.get("files"):
            from fuzz_readers import READERS

            made = inputs(task["reader"], READERS[task["reader"]].kinds, task["seed"], task["block"], task["number"])
            total["findings"][what] = {"text": kept(task["reader"], *made[place]).name}
        total["findings"].setdefault(what, {"text": f"input {place} of block {task['block']}"})
        total["counts"]["uncounted"] += place - task["start"]
        task = {**task, "start": place + 1}


def blocks(readers: list[str], each: int, total: int, size: int) -> Iterator[tuple[str, int]]:
    """Reader and number of a block, all readers in turn; those that take long have no more than the fewest."""
    fewest = -(-each // size)
    others = [reader for reader in readers if reader not in SLOW]
    rest = total - fewest * size * (len(readers) - len(others))
    most = max(fewest, -(-rest // (size * max(1, len(others)))))
    for block in range(most):
        for reader in readers if block < fewest else others:
            yield reader, block


def fuzz(args: argparse.Namespace) -> int:
    readers = args.readers or sorted(path.name for path in CORPUS.iterdir())
    args.state.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in args.state.read_text().splitlines()] if args.state.is_file() else []
    there = {(one["reader"], one["block"]) for one in done}
    worker, begun = Worker(), time.monotonic()
    known: dict[str, set[str]] = {}
    for one in done:
        known.setdefault(one["reader"], set()).update(one["findings"])
    try:
        with args.state.open("a") as file:
            for reader, block in blocks(readers, args.each, args.total, args.block):
                if (reader, block) in there:
                    continue
                mine = known.setdefault(reader, set())
                task = {
                    "reader": reader,
                    "seed": args.seed,
                    "block": block,
                    "number": args.block,
                    "start": 0,
                    "keep": args.keep,
                }
                answer = run_block(worker, {**task, "known": sorted(mine)})
                mine.update(answer["findings"])
                done.append({"reader": reader, "block": block, **answer})
                print(json.dumps(done[-1]), file=file, flush=True)
                for what, finding in answer["findings"].items():
                    print(f"finding: {reader}: {what}: {finding['text']}", flush=True)
            old = regressions(worker, readers)
    finally:
        worker.stop()
    text, wrong = report(done, old, args.seed, time.monotonic() - begun)
    args.state.with_suffix(".txt").write_text(text)
    print(text)
    return int(wrong)


def regressions(worker: Worker, readers: list[str]) -> dict[str, tuple[int, dict[str, Any]]]:
    """Read every input of an earlier finding again."""
    found = {}
    for reader in readers:
        files = sorted(map(str, (FOUND / reader).glob("*")))
        if files:
            answer = run_block(
                worker, {"reader": reader, "files": files, "start": 0, "keep": False, "known": [], "block": -1}
            )
            found[reader] = len(files), answer
    return found


def report(
    done: list[dict[str, Any]], old: dict[str, tuple[int, dict[str, Any]]], seed: int, seconds: float
) -> tuple[str, bool]:
    """The table of counts, and whether anything was found."""
    rows, sums = [], Counter[str]()
    for reader in sorted({one["reader"] for one in done}):
        counts = Counter[str]()
        for one in done:
            counts.update(one["counts"] if one["reader"] == reader else {})
        sums.update(counts)
        many, answer = old.get(reader, (0, {"counts": {}}))
        again = answer["counts"].get("finding", 0)
        sums.update({"old": many, "again": again})
        shown = [counts["accepted"], counts["refused"], counts["uncounted"], counts["finding"], many, again]
        rows.append((reader, sum(counts.values()), *shown))
    head = ("reader", "inputs", "accepted", "refused", "unjudged", "findings", "kept", "again")
    inputs_ = sum(row[1] for row in rows)
    rows.append(
        (
            "all",
            inputs_,
            sums["accepted"],
            sums["refused"],
            sums["uncounted"],
            sums["finding"],
            sums["old"],
            sums["again"],
        )
    )
    lines = [" ".join(f"{cell!s:>10}" for cell in row) for row in (head, *rows)]
    kinds = [f"{one['reader']}: {what}: {finding['text']}" for one in done for what, finding in one["findings"].items()]
    lines += [
        f"{reader}: a kept input: {what}: {finding['text']}"
        for reader, (_, answer) in old.items()
        for what, finding in answer["findings"].items()
    ]
    text = "\n".join([f"seed {seed}, {inputs_} inputs, {seconds:.0f} s in this call", *lines, *kinds]) + "\n"
    return text, bool(sums["finding"] or sums["again"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", help="folders of the corpus (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=EACH, help="fewest inputs of a reader")
    parser.add_argument("--total", type=int, default=ALL, help="fewest inputs of all readers")
    parser.add_argument("--block", type=int, default=BLOCK)
    parser.add_argument(
        "--state", type=Path, default=None, help="where finished blocks are noted, which are not done again"
    )
    parser.add_argument("--keep", action="store_true", help="keep minimised findings in tests/fuzz/found")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return 0
    args.state = args.state or ROOT / "build" / "fuzz" / f"seed-{args.seed}.jsonl"
    return fuzz(args)


if __name__ == "__main__":
    sys.exit(main())
