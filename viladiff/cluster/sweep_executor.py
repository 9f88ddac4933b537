"""Sweeps on Ray: a session, the number of trials at once, and Tune or ``TorchTrainer`` by the size of the runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from viladiff.cluster.executor import cluster, interrupts
from viladiff.cluster.resources import ask_cluster, cluster_slots, send_note
from viladiff.sweeps.trial_queue import TrialQueue

if TYPE_CHECKING:
    from viladiff.cluster.sweep_tune import Work


def run_search(queue: TrialQueue, work: Work | None = None) -> None:
    """Run a sweep until it has its trials, is interrupted or is given up; ``queue.search`` holds the outcome.

    work: does a run; by default trains it. The first Ctrl-C lets every run save a checkpoint; the second ends them and
    raises KeyboardInterrupt.
    """
    queue.prime()
    if queue.done:  # starting Ray takes seconds
        return
    known = [*queue.waiting, *(job for job, _ in queue.elsewhere.values())]
    shared = [job for job in known if job.workers > 1]
    gone: list[int] = []
    try:
        with cluster(queue.settings, queue.slots, shared, gone) as session, interrupts(queue):
            send_note(queue.tell, session.note)
            ask_cluster(queue)
            if queue.settings.address is not None and queue.settings.max_concurrent is None:
                # Each point is the better for knowing those before it, so that none is asked for ahead of its place.
                queue.slots = min(
                    queue.slots, cluster_slots(queue.settings, max((job.workers for job in known), default=1))
                )
            if shared:
                from viladiff.cluster.torch_trainer import run_shared

                run_shared(queue, session.scratch, session.refresh)
            else:
                from viladiff.cluster.sweep_tune import run_trials

                run_trials(queue, session, *([work] if work else []))
    except BaseException:
        queue.store.clean(gone)
        raise
