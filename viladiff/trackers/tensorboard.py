"""Losses and scores as TensorBoard's files in the run's directory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from viladiff.runs.record import RunRecord
from viladiff.trackers.base import Callback, RunInfo, scalars

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(Callback):
    """Writes ``RUN/tensorboard``; points of steps that an interruption undid are purged."""

    writer: SummaryWriter

    def on_start(self, run: RunInfo) -> None:
        """Open the writer. Raises ValueError where tensorboard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "runtime.tensorboard = true: the package tensorboard is not installed; pip install 'viladiff[trackers]'"
            ) from error
        place = run.directory / "tensorboard"
        if run.step == 0:
            shutil.rmtree(place, ignore_errors=True)
        self.writer = SummaryWriter(str(place), purge_step=run.step)
        for entry in run.evaluations:
            if entry["step"] >= run.step:  # the checkpoint's own evaluation, which purging takes as well
                self.on_evaluation(entry["step"], entry["miou"])

    def on_log(self, rows: Sequence[Mapping[str, float]]) -> None:
        for row in rows:
            for name, value in row.items():
                if name != "step":
                    self.writer.add_scalar(name, value, int(row["step"]))

    def on_evaluation(self, step: int, miou: float | None) -> None:
        if miou is not None:
            self.writer.add_scalar("miou", miou, step)

    def on_end(self, record: RunRecord | None) -> None:
        for name, value in ({} if record is None else scalars(record)).items():
            assert record is not None
            self.writer.add_scalar(name, value, record.steps)
        self.writer.close()
