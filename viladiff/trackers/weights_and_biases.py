"""Losses and scores in Weights & Biases, online or offline as its own environment variables say."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from viladiff.runs.record import RunRecord
from viladiff.trackers.base import Callback, RunInfo, scalars

if TYPE_CHECKING:
    import wandb

_PRIVATE: dict[str, Any] = {
    "host": "",
    "disable_git": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}
"""What keeps paths, names and programs of the machine from being sent."""
PROJECT = "viladiff"
"""Of runs where ``WANDB_PROJECT`` names none."""


class WeightsAndBiases(Callback):
    """One W&B run a run, of the same id, in ``RUN/wandb``.

    The rows that W&B gets are a fixed sequence: a row a step, and one an evaluation before the row of its step. A run
    that continues sends the sequence from the first row that W&B lacks: none twice, none left out. Offline W&B knows of
    no earlier rows, so all are written again, to a folder that takes the place of the earlier ones.
    """

    run: wandb.Run

    def on_start(self, run: RunInfo) -> None:
        """Open the W&B run and send what it lacks. Raises ValueError where wandb is not installed, or cannot start."""
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "runtime.wandb = true: the package wandb is not installed; pip install 'viladiff[trackers]'"
            ) from error
        place = run.directory / "wandb"
        if os.environ.get("WANDB_MODE") == "offline":
            _remove_legs(place, run.name)  # before: W&B names a folder by the second, which two legs may share
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                dir=run.directory,
                id=run.name,
                name=run.title,
                group=run.group or None,
                config=run.config,
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(console="off", quiet=True, **_PRIVATE),
            )
        except (wandb.Error, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"runtime.wandb = true: {reason}; WANDB_MODE=offline needs no account") from error
        self.run.define_metric("*", step_metric="step")
        self.skip = self.run.step
        """Rows that W&B has already."""
        if self.run.offline:
            _remove_legs(place, run.name, Path(self.run.dir).parent)
        if run.step:
            for row in _in_order(run.log(), run.evaluations):
                self._send(row)

    def on_log(self, rows: Sequence[Mapping[str, float]]) -> None:
        for row in rows:
            self._send(row)

    def on_evaluation(self, step: int, miou: float | None) -> None:
        self._send({"step": step, "miou": miou} if miou is not None else {"step": step})

    def on_end(self, record: RunRecord | None) -> None:
        if record is not None:
            self.on_evaluation(record.steps, record.miou)
            self.run.summary.update({**scalars(record), "steps": record.steps, "finished": record.finished})
        self.run.summary["complete"] = record is not None
        self.run.finish()

    def _send(self, row: Mapping[str, Any]) -> None:
        if self.skip:
            self.skip -= 1
        else:
            self.run.log(dict(row))


def _in_order(rows: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rows in the order in which a run without interruption sends them."""
    waiting = [{"step": entry["step"], "miou": entry["miou"]} for entry in evaluations]
    for row in rows:
        while waiting and waiting[0]["step"] <= row["step"]:
            yield _known(waiting.pop(0))
        yield row
    yield from map(_known, waiting)


def _known(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if value is not None}


def _remove_legs(place: Path, run_id: str, own: Path | None = None) -> None:
    """Remove the offline folders of this run's earlier legs, which the new one repeats."""
    for path in place.glob(f"offline-run-*-{run_id}"):
        if own is None or path.resolve() != own.resolve():
            shutil.rmtree(path, ignore_errors=True)
