"""Captioning of a data set by Ray Data: one model per actor, batches in any order, parts written as they arrive."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from viladiff.cluster.executor import cluster
from viladiff.cluster.resources import visible_gpus
from viladiff.core.progress import Advance
from viladiff.runs.job import ExecutionSettings
from viladiff.text.captioning import job as caption_job
from viladiff.text.captioning.blip2 import Captioner, CaptionerSpec, ImageRef, caption_batch, reader
from viladiff.text.captioning.job import CaptioningJob

if TYPE_CHECKING:
    from collections.abc import Iterable

PART = 256
"""Images of a part."""
PATIENCE = 60.0
"""Seconds after which what has come is written though it is no whole part."""
BLOCKS = 2000
"""Tasks at most: each costs Ray some milliseconds and memory of the driver."""


class _Actor:
    """Loads the model once and captions every batch that it is given; Ray starts one that died again."""

    def __init__(self, who: CaptionerSpec, dataset: str) -> None:
        self.captioner, self.read = Captioner(who), reader(dataset)

    def __call__(self, batch: pa.Table) -> pa.Table:
        pictures = [ImageRef(row["image"], row["where"]) for row in batch.to_pylist()]
        return caption_job.rows_table(caption_batch(self.captioner, pictures, self.read))


def run_job(
    job: CaptioningJob,
    *,
    actors: int | None = None,
    batch: int = 16,
    threads: int = 1,
    address: str | None = None,
    advance: Advance = lambda done, of: None,
) -> pa.Table:
    """Caption what is missing and return the table of all captions, failed ones with their reason.

    actors: models that run at the same time; by default one for each GPU, or one. batch: images in a batch. threads:
    CPU threads of an actor. address: of a cluster; by default a Ray instance is started on this machine and stopped at
    the end. Raises ValueError for a model that cannot be loaded and a file that cannot be written.
    """
    found = caption_job.state(job)
    caption_job.begin(job)
    if found.todo:
        here = visible_gpus() if address is None else 0
        count = actors or max(1, here)
        with cluster(ExecutionSettings(threads=threads, address=address), count) as session:
            _carry_out(job, found.todo, count, batch, threads, _share(here, count, address), advance, session.refresh)
    return caption_job.finish(job)


def _share(here: int, actors: int, address: str | None) -> float:
    """Return the GPUs of an actor: an equal share of this machine's; one on a cluster that has some."""
    if address is None:
        return min(1.0, here / actors)
    import ray

    return float(bool(ray.cluster_resources().get("GPU", 0)))


def _carry_out(
    job: CaptioningJob,
    todo: tuple[ImageRef, ...],
    actors: int,
    batch: int,
    threads: int,
    gpu: float,
    advance: Advance,
    refresh: Any,
) -> None:
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    DataContext.get_current().enable_progress_bars = False
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("ray.data")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what loading it has set to INFO
    rows = [picture._asdict() for picture in todo]
    blocks = min(BLOCKS, -(-len(rows) // batch))
    data = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        _Actor,
        batch_size=batch,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=actors),
        fn_constructor_args=(job.who, job.dataset),
        num_cpus=threads,
        num_gpus=gpu,
    )
    try:
        _keep(job, data.iter_batches(batch_size=None, batch_format="pyarrow"), len(todo), advance, refresh)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise ValueError(str(cause).strip().splitlines()[-1]) from error


def _keep(job: CaptioningJob, tables: Iterable[pa.Table], images: int, advance: Advance, refresh: Any) -> None:
    """Write a part for each table that arrives, and the remaining images' part when the job ends or is interrupted."""
    before = len(job.pictures) - images
    waiting: list[pa.Table] = []
    done, since, prompts = 0, time.monotonic(), len(job.who.prompts)
    try:
        for table in tables:
            refresh()
            waiting.append(table)
            done += len(table) // prompts
            if sum(map(len, waiting)) >= PART * prompts or time.monotonic() - since > PATIENCE:
                caption_job.write_part(job, waiting)
                waiting, since = [], time.monotonic()
            advance(before + done, len(job.pictures))
    finally:
        if waiting:
            caption_job.write_part(job, waiting)
