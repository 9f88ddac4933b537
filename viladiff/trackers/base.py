"""What follows a run from outside: the callback protocol, and the trackers that are built in.

>>> class Printer(Callback):
...     def on_evaluation(self, step, miou):
...         print(step, miou)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from viladiff.core.messages import print_text
from viladiff.runs.config import RunConfig, flatten
from viladiff.runs.record import RunRecord


class RunInfo(NamedTuple):
    """What a callback is told of a run that starts or continues."""

    name: str
    """Id of the run."""
    directory: Path
    title: str
    """Method, data and seed, for people."""
    group: str
    """Table or sweep that it belongs to; empty for a run of its own."""
    config: dict[str, object]
    """Every field by dotted path, but those of this machine."""
    step: int
    """Steps that are done: 0, or those of the checkpoint from which it continues."""
    log: Callable[[], list[dict[str, Any]]]
    """Reads the rows of the steps that are done, as ``Callback.on_log`` was given them."""
    evaluations: list[dict[str, Any]]
    """Those that were made so far: step, miou."""


class Callback:
    """Follows one run in its first worker; each method does nothing unless it is overridden.

    A run that is interrupted and continues starts again with ``on_start``; steps after ``RunInfo.step`` then come a
    second time, with the same values.
    """

    def on_start(self, run: RunInfo) -> None:
        """Before the first step, or the first after an interruption."""

    def on_log(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Every ``runtime.log_every`` steps: ``step``, ``lr`` and the loss's terms of each step since the last call."""

    def on_evaluation(self, step: int, miou: float | None) -> None:
        """After an evaluation during training. miou: in [0, 1], None where it was not measured."""

    def on_end(self, record: RunRecord | None) -> None:
        """At the end. record: None for a run that was stopped, killed or failed."""


class Callbacks:
    """Calls each callback in turn, between ``start`` and the end of the ``with`` block.

    An error of a callback that the caller gave is the caller's. A built-in tracker that fails after it has started is
    dropped with one line on stderr: training does not depend on a dashboard.
    """

    def __init__(self, given: Iterable[Callback], built_in: Iterable[Callback] = ()) -> None:
        self._given, self._built_in = list(given), list(built_in)
        self._begun: list[Callback] = []

    def start(self, run: RunInfo) -> None:
        """Start all. Raises ValueError for a built-in tracker that cannot be used."""
        for callback in [*self._given, *self._built_in]:
            callback.on_start(run)
            self._begun.append(callback)

    def log(self, rows: Sequence[Mapping[str, float]]) -> None:
        self._all(lambda callback: callback.on_log(rows))

    def evaluation(self, step: int, miou: float | None) -> None:
        self._all(lambda callback: callback.on_evaluation(step, miou))

    def end(self, record: RunRecord | None) -> None:
        """Tell each the end once. An error of a callback that the caller gave is raised when all have been told."""
        begun, self._begun = self._begun, []
        self._all(lambda callback: callback.on_end(record), begun)

    def _all(self, call: Callable[[Callback], None], whom: Sequence[Callback] | None = None) -> None:
        first: Exception | None = None
        for callback in [*(self._begun if whom is None else whom)]:
            try:
                call(callback)
            except Exception as error:
                if callback in self._given:
                    first = first or error
                    continue
                if callback in self._begun:
                    self._begun.remove(callback)
                reason = " ".join(str(error).split()) or type(error).__name__
                print_text(f"note: {type(callback).__name__} is left out from here on: {reason}", error=True)
        if first is not None:
            raise first

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(None)


def tracked_config(cfg: RunConfig) -> dict[str, object]:
    """Return the fields without those that only this machine understands."""
    here = ("runtime.", "data.split_dir")
    fields = {path: value for path, value in flatten(cfg).items() if not path.startswith(here)}
    weights = {} if cfg.model.weights is None else {"model.weights": Path(cfg.model.weights).name}
    return {**fields, **weights, "runtime.scale": cfg.runtime.scale, "runtime.workers": cfg.runtime.workers}


def scalars(record: RunRecord) -> dict[str, float]:
    """Return the final scores of all networks and streams by network/stream/score; what was not measured is absent."""
    found = {
        f"{network}/{stream}/{name}": value
        for network, streams in record.scores.items()
        for stream, scores in streams.items()
        for name, value in scores.items()
        if isinstance(value, int | float)
    }
    return found if record.miou is None else {"miou": record.miou, **found}
