"""The result of ``fit``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from viladiff.core.messages import first_names
from viladiff.runs.checkpoint import StepLog
from viladiff.runs.record import RunRecord

if TYPE_CHECKING:
    import pandas as pd

NAMED = 8
"""Classes that a note names at most."""


@dataclass(frozen=True)
class Result:
    """A finished run."""

    directory: Path
    record: RunRecord = field(repr=False)
    already_finished: bool = False
    """Whether the run was finished before this call, which then trained nothing."""

    @property
    def miou(self) -> float | None:
        """The headline mIoU in [0, 1]."""
        return self.record.miou

    @property
    def metrics(self) -> dict[str, float | None]:
        """Flat scores, ``network/stream/score``."""
        return {
            f"{network}/{stream}/{name}": value
            for network, streams in self.record.scores.items()
            for stream, scores in streams.items()
            for name, value in scores.items()
            if not isinstance(value, list)
        }

    def summary(self) -> dict[str, Any]:
        """Return the run's name, choices and scores as one flat row, for a ``pandas.DataFrame``."""
        chosen = {path: value for path, value in self.record.changed.items() if not path.startswith("runtime.")}
        return {
            "run_id": self.record.run_id,
            **chosen,
            "seed": self.record.config["seed"],
            "miou": self.miou,
            **self.metrics,
        }

    def notes(self) -> list[str]:
        """Return what its scores call attention to, a sentence each."""
        lost, classes = self.record.unlearned, len(self.record.class_names)
        if not lost:
            return []
        where = f"{len(lost)} of {classes} classes have IoU 0 on {self.record.config['eval.split']}"
        return [f"{where}, so that none of their pixels is labelled right: {first_names(lost, NAMED)}"]

    def frame(self) -> pd.DataFrame:
        """Return the per-step log."""
        import pandas as pd

        return pd.DataFrame(StepLog(self.directory / self.record.step_log).read())
