"""A table's runs as trials of Ray Tune: one process a slot, reused from run to run, and the records are the truth.

Tune places processes and notices their death. What is next, what is tried again and when to stop is decided by
``viladiff.runs.job_queue``; what Tune writes is thrown away, since a run continues from its own checkpoint.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from viladiff.cluster.resources import ask_cluster, plan_capacity, send_note
from viladiff.cluster.session import TOKEN, load_ray, private
from viladiff.core.atomic import GRACE, hold
from viladiff.core.environment import visible_cpus
from viladiff.core.watchdog import Reaper, descendants, start
from viladiff.runs.job import Event, ExecutionSettings, Outcome, PlannedRun
from viladiff.runs.job_queue import JobQueue
from viladiff.runs.store import Store

SCRATCH = 50 * 2**20
"""Free bytes that the temporary folder must have: Ray's start hangs where its logs cannot be written."""
LONGEST = 40
"""Characters of a directory in which Ray can make its sockets, whose names may have 107."""
_LOCKS: dict[Path, int | None] = {}
"""Descriptors by which this process holds its scratch directories."""
OBJECT_STORE = 100 * 2**20
"""Bytes; only names and numbers pass through it."""


def run_jobs(
    jobs: Sequence[PlannedRun],
    store: Store,
    settings: ExecutionSettings,
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[Outcome]:
    """Run the jobs that are not done and return one outcome a job, in order; ``on_event`` is called on this thread.

    A failed run is its own outcome and does not affect the others. The first Ctrl-C or SIGTERM lets every run save a
    checkpoint and return as "stopped"; the second ends them and raises KeyboardInterrupt. A run that another driver
    holds is waited for, and taken over if that driver dies. Raises ValueError for settings that this machine cannot
    meet.
    """
    if not jobs:
        return []
    settings = replace(settings, threads=max(job.threads or settings.threads for job in jobs))
    kinds = [job for job in jobs if job.workers == 1], [job for job in jobs if job.workers > 1]
    rooms = [plan_capacity(settings, some) for some in kinds]
    single, shared = (
        JobQueue(some, store, one.settings, one.slots, on_event) for some, one in zip(kinds, rooms, strict=True)
    )
    for queue in (single, shared):
        queue.drop_finished()
    if not (single.done and shared.done):  # starting Ray takes seconds
        for note in dict.fromkeys(
            one.note for one, queue in zip(rooms, (single, shared), strict=True) if not queue.done
        ):
            send_note(on_event, note)
        gone: list[int] = []
        try:
            # Ray sets a handler of its own for SIGTERM, so ours come after it.
            with cluster(settings, single.slots, shared.waiting, gone) as session, interrupts(single, shared):
                send_note(on_event, session.note)
                ask_cluster(single, shared)
                _run_single(single, session)
                _run_shared(shared, session)
        except BaseException:
            store.clean(gone)  # what was ended in the middle of a step
            raise
    for queue in (single, shared):
        if queue.trouble is not None:
            raise queue.trouble
    outcomes = single.outcomes | shared.outcomes
    return [outcomes[job.run_id] for job in jobs]


# Ray itself


@dataclass
class RaySession:
    """A driver's hold on Ray."""

    scratch: Path
    """Removed at the end, whatever the end is."""
    refresh: Callable[[], None]
    """To be called often: keeps the reaper's list of processes up to date."""
    note: str = ""
    """Where its dashboard is and what that asks for, if it has one."""


@contextmanager
def cluster(
    settings: ExecutionSettings, slots: int, shared: Iterable[PlannedRun] = (), gone: list[int] | None = None
) -> Iterator[RaySession]:
    """Join ``settings.address``, or start a silent Ray instance for this driver alone, and stop it at the end.

    A killed driver's Ray and scratch directory are removed too. ``gone`` receives the processes that were ended with
    it.
    """
    _silence_ray(settings)
    scratch = _scratch()
    reaper = Reaper(scratch)
    others = set(descendants(os.getpid()))
    roots: list[int] = []

    def ours() -> list[int]:
        """Ray's processes; what else this process has started is none of them."""
        if settings.address is not None:
            return []
        return [*roots, *descendants(*roots)] if roots else sorted(set(descendants(os.getpid())) - others)

    # Ray starts processes and waits; that is time to import in, but only Ray itself may be started on this thread: its
    # processes die with the thread that started them.
    threading.Thread(target=import_module, args=["ray.tune"], daemon=True).start()
    options = _options(settings, slots, shared)
    try:
        with nullcontext() if settings.address else private(scratch), _short(scratch) as place:
            if settings.address is None:
                options["_temp_dir"] = str(place / "r")
            try:
                begun = _start(settings.address or "local", options, ours)
                roots += ours()
                asks = f"dashboard: http://{begun.dashboard_url} asks for the token in {scratch / TOKEN}"
                note = asks if options.get("include_dashboard") else ""
                session = RaySession(scratch, _seldom(lambda: reaper.watch(ours())), note)
                session.refresh()
                yield session
            finally:
                ended = _shut_down(ours())
                if gone is not None:
                    gone += ended
    finally:
        _remove(scratch)
        reaper.dismiss()


def _silence_ray(settings: ExecutionSettings) -> None:
    """Load Ray with its messages off."""
    load_ray(local=settings.address is None)
    for name in ("ray", "ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _shut_down(pids: Sequence[int]) -> list[int]:
    """Leave or stop Ray and end those of its processes that remain; return ``pids``."""
    import ray

    left = {pid: start(pid) for pid in pids}
    ray.shutdown()
    _end_all(left)
    return list(left)


def _options(settings: ExecutionSettings, slots: int, shared: Iterable[PlannedRun]) -> dict[str, Any]:
    """Return the arguments of ``ray.init``, more of them for starting than for joining."""
    # An idle thread of a numerical library is still a thread that spins beside the others.
    env = {name: str(settings.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    options: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    options["runtime_env"] = {"env_vars": env}
    if settings.address is None:
        wanted = max([slots * settings.threads, *(job.workers * settings.threads for job in shared)])
        options |= {
            "num_cpus": max(visible_cpus(), wanted),
            "object_store_memory": OBJECT_STORE,
            "include_dashboard": settings.dashboard,
            "dashboard_host": "127.0.0.1",
        }
    return options


def _start(address: str, options: dict[str, Any], ours: Callable[[], list[int]]) -> Any:
    """Call ``ray.init`` and return its result; retry once if the machine was too busy."""
    import ray

    _check_answers(address)
    for last in (False, True):
        try:
            return ray.init(address=address, **options)
        except Exception as error:
            ray.shutdown()
            _end(ours())
            if "_temp_dir" not in options and not isinstance(error, ValueError):
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ValueError(f"--address {address}: cannot be joined: {reason}") from error
            if last or "timed out during startup" not in str(error):
                raise


def _check_answers(address: str) -> None:
    """Raise ValueError if nothing answers at HOST:PORT, which Ray would try for many minutes without a word."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=20).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"--address {address}: cannot be joined: {reason}; is a head running there, and is its port open?"
        ) from error


def _end(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _end_all(begun: dict[int, int | None]) -> None:
    """End the remaining processes, each named by number and start, and wait briefly for them to be gone."""
    until = time.monotonic() + 5
    while (left := [pid for pid, began in begun.items() if began is not None and start(pid) == began]) and (
        time.monotonic() < until
    ):
        _end(left)
        time.sleep(0.02)


def _seldom(do: Callable[[], None]) -> Callable[[], None]:
    """Wrap a function so that it runs at most every other second."""
    before = -math.inf

    def maybe() -> None:
        nonlocal before
        if time.monotonic() - before > 2:
            before = time.monotonic()
            do()

    return maybe


def _scratch() -> Path:
    """Create a directory for this driver; remove those that even a watchdog left (a power cut).

    Raises ValueError if the temporary folder is full.
    """
    base, free = temporary_space()
    if free < SCRATCH:
        raise ValueError(
            f"temporary folder {base}: {free / 2**20:.0f} MB free, and Ray needs {SCRATCH / 2**20:.0f} MB for its "
            "logs; free some, or set TMPDIR to another folder"
        )
    _clear(base)
    return _claimed(base)


def _clear(base: Path) -> None:
    """Remove the directories there whose drivers are dead."""
    for old in base.glob("viladiff-*-*"):
        with suppress(OSError):  # its reaper, or another driver, may be at it too
            found = old.stat()
            rested = abs(time.time() - found.st_mtime) > GRACE  # else its driver may be about to lock it
            if old.name.split("-")[1].isdigit() and found.st_uid == os.getuid() and rested:
                _remove_dead(old)


def _claimed(base: Path) -> Path:
    """Create a directory there and lock it as this driver's."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=f"viladiff-{os.getpid()}-", dir=base))
        _LOCKS[made] = hold(made)
        if made.exists():  # else another driver found it before it was locked
            return made


def _remove_dead(directory: Path) -> None:
    """Remove a directory unless its driver lives, in whatever container, which its lock says; OSError if it does."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(descriptor)


def temporary_space() -> tuple[Path, int]:
    """Return the folder of Ray's scratch directories, which TMPDIR names, and its free bytes."""
    base = Path(tempfile.gettempdir())
    return base, shutil.disk_usage(base).free


@contextmanager
def _short(scratch: Path) -> Iterator[Path]:
    """Give Ray a name of the directory under which those of its sockets stay below 107 characters."""
    if len(str(scratch)) <= LONGEST:
        yield scratch
        return
    places = [Path(place) for place in ("/tmp", "/dev/shm", "/var/tmp")]
    place = next((place for place in places if place.is_dir() and os.access(place, os.W_OK)), None)
    if place is None:
        raise ValueError(f"temporary folder {scratch.parent}: too long for Ray's sockets; set TMPDIR to a shorter one")
    _clear(place)
    folder = _claimed(place)
    try:
        (folder / "s").symlink_to(scratch)
        yield folder / "s"
    finally:
        _remove(folder)


def _remove(scratch: Path) -> None:
    """Remove the directory and its lock, retrying while Ray's last processes may still write."""
    if (descriptor := _LOCKS.pop(scratch, None)) is not None:
        os.close(descriptor)
    for _ in range(50):
        shutil.rmtree(scratch, ignore_errors=True)
        if not scratch.exists():
            return
        time.sleep(0.1)


@contextmanager
def interrupts(*queues: JobQueue) -> Iterator[None]:
    """Let the queues' next ticks handle the first Ctrl-C or SIGTERM; a second one ends this process's wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        if queues[0].asked_to_stop:
            raise KeyboardInterrupt("killed; re-run to resume from the last checkpoints")
        for queue in queues:
            queue.asked_to_stop = True

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# Trials of one worker


def _run_single(queue: JobQueue, session: RaySession) -> None:
    if queue.done:
        return
    from ray import tune

    from viladiff.cluster.ray_tune import QueueSearcher, worker_context
    from viladiff.cluster.worker import train_run

    place = worker_context(queue)
    jobs = {job.run_id: job for job in queue.waiting}
    run_tuner(
        queue, session, tune.with_parameters(train_run, jobs=jobs, place=place), QueueSearcher(queue), place.stop_name
    )


def run_tuner(
    queue: JobQueue, session: RaySession, trainable: Any, searcher: Any, stop: str, scheduler: Any = None
) -> None:
    """Run Tune's trials until the searcher has no more: one process a slot, reused from run to run.

    ``stop`` names the actor that tells them to stop; ``scheduler`` is Tune's, its default where none.
    """
    from ray import tune

    from viladiff.cluster.ray_tune import QueueCallback

    resources = {"cpu": queue.settings.threads, "gpu": queue.settings.gpus_per_trial or 0.0}
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(queue.slots)
    tune.Tuner(
        tune.with_resources(trainable, resources),
        tune_config=tune.TuneConfig(search_alg=searcher, scheduler=scheduler, num_samples=-1, reuse_actors=True),
        run_config=tune.RunConfig(
            name="runs",
            storage_path=str(session.scratch / "tune"),
            verbose=0,
            callbacks=[QueueCallback(queue, stop, session.refresh)],
        ),
    ).fit()


def _run_shared(queue: JobQueue, session: RaySession) -> None:
    if queue.done:
        return
    from viladiff.cluster.torch_trainer import run_shared

    run_shared(queue, session.scratch, session.refresh)


__all__ = ["Event", "ExecutionSettings", "Outcome", "cluster", "run_jobs"]
