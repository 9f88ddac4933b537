"""Optuna's parts for long sweeps: a study that shows samplers so many trials and no more, a journal without waits."""

from __future__ import annotations

import heapq
import json
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

from optuna import Study
from optuna.storages import BaseStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

SEEN, GOOD = 1000, 100
"""Trials that a sampler is shown at most, and how many of them are the best of the older ones; the rest are the latest.

Older ones that are still under way come on top.
"""


class Recent(Study):
    """A study of which samplers see all trials up to SEEN, and of more the best and the latest.

    TPE takes some 25 µs for each trial that it sees. It models the best tenth, at most 25, against the rest: the first
    are the same here, and of the rest it gives the older ones less weight anyway.
    """

    def __init__(self, name: str, storage: BaseStorage) -> None:
        super().__init__(name, storage)
        self._known = 0
        """Trials that have been looked at, by number: those are no longer among the latest."""
        self._under_way: list[int] = []
        self._best: list[tuple[tuple[bool, float, float], int]] = []
        """A heap of the GOOD best, each with its negative number, so that of equal ones the earlier stays."""

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        if deepcopy:
            return super()._get_trials(deepcopy, states, use_cache)
        every = self._storage.get_all_trials(self._study_id, deepcopy=False)
        return [trial for trial in self._shown(every) if states is None or trial.state in states]

    def _shown(self, every: list[FrozenTrial]) -> list[FrozenTrial]:
        """By number. What was found before is kept, so that this takes no longer for more trials."""
        if len(every) <= SEEN:
            return every
        latest = len(every) - (SEEN - GOOD)
        older, self._under_way = [*self._under_way, *range(self._known, latest)], []
        self._known = latest
        for number in older:
            trial = every[number]
            if not trial.state.is_finished():
                self._under_way.append(number)
            elif trial.state != TrialState.FAIL:
                put = heapq.heappushpop if len(self._best) == GOOD else heapq.heappush
                put(self._best, (_merit(trial), -number))
        kept = sorted([*self._under_way, *(-number for _, number in self._best)])
        return [*(every[number] for number in kept), *every[latest:]]


def _merit(trial: FrozenTrial) -> tuple[bool, float, float]:
    """TPE's order: completed ones by value, then stopped ones by how far they came."""
    if trial.state == TrialState.COMPLETE:
        return True, float(trial.values[0]), 0.0
    last = max(trial.intermediate_values, default=0)
    return False, float(last), trial.intermediate_values.get(last, 0.0)


class Journal(BaseJournalBackend):
    """A journal of one writer, as Optuna's own but for two things.

    It takes no lock: one driver at a time has the sweep, by a lease that a kill does not leave behind. It does not wait
    for the disk after each of a suggestion's parameters: the study is made anew where it is not what the records say.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._reader = JournalFileBackend(path, lock_obj=_Unlocked())  # type: ignore[arg-type]

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return self._reader.read_logs(log_number_from)

    def append_logs(self, logs: Sequence[dict[str, Any]]) -> None:
        text = "".join(f"{json.dumps(log, separators=(',', ':'))}\n" for log in logs)
        with self.path.open("ab") as file:
            file.write(text.encode())


class _Unlocked:
    """What Optuna takes for a lock on its journal."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return None
