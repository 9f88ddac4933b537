"""Optuna's side of a sweep: a study that always says what the trials' records say, asked for points and told of ends.

The study is a view. It is checked against the records when a sweep is opened and made anew where it differs, so that a
kill between two writes, or a file that somebody lost, changes nothing. Optuna is imported where it is used.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from viladiff.study.samplers import Cmaes, Kind, distributions, next_on_grid, optuna_sampler
from viladiff.study.space import Space, Value
from viladiff.study.trials import Trial

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

JOURNAL = "optuna.journal"
OWNER = "viladiff"
"""Attribute of a study that was made here, and may therefore be made anew."""


class ForeignStudy(ValueError):
    """A study of the sweep's name that was not made here, and is left alone."""


class Asker:
    """Where points come from, and where values go."""

    def __init__(
        self, name: str, space: Space, first: Mapping[str, Value], kind: Kind, seed: int, parallel: bool, storage: str
    ) -> None:
        """``storage``: an URL as Optuna takes it, or the path of a journal. Raises ValueError where it is out of reach,
        or holds a study of the same name that is not ours."""
        _quiet()
        self.name, self.space, self.first = name, space, dict(first)
        self.kind, self.seed, self.parallel = kind, seed, parallel
        self.distributions = distributions(space)
        self.cmaes = Cmaes(space, self.first, seed) if kind == "cmaes" else None
        self.where = storage
        self.storage: BaseStorage
        self.study: Study

    # Opening

    def open(self, trials: Sequence[Trial]) -> None:
        """Brings the study to what the records say."""
        from viladiff.study.recent import Recent

        frozen = [self._frozen(trial) for trial in trials]
        try:
            self.storage = self._connect()
            found = self._found()
            if found is None or not _same(found.get_trials(deepcopy=False), frozen):
                found = self._anew(frozen)
        except ForeignStudy:
            raise
        except Exception as error:  # each kind of storage has errors of its own
            if "://" not in self.where:  # a journal that a kill has torn
                Path(self.where).unlink(missing_ok=True)
                self.storage = self._connect()
                found = self._anew(frozen)
            else:
                why = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ValueError(f"{_hidden(self.where)}: Optuna cannot keep its study there ({why})") from error
        self.study = Recent(self.name, self.storage)
        self.study_id = self.storage.get_study_id_from_name(self.name)

    def _connect(self) -> BaseStorage:
        import optuna

        from viladiff.study.recent import Journal

        if "://" in self.where:
            return optuna.storages.get_storage(self.where)
        return optuna.storages.JournalStorage(Journal(self.where))

    def _found(self) -> Study | None:
        import optuna

        names = {one.study_name for one in self.storage.get_all_studies()}
        if self.name not in names:
            return None
        study = optuna.load_study(study_name=self.name, storage=self.storage)
        if study.user_attrs.get(OWNER) is None:
            raise ForeignStudy(
                f"{_hidden(self.where)}: holds a study {self.name!r} that was not made by viladiff; give --study NAME"
            )
        return study

    def _anew(self, frozen: Sequence[FrozenTrial]) -> Study:
        import optuna

        if "://" not in self.where:
            Path(self.where).unlink(missing_ok=True)
            self.storage = self._connect()
        elif self._found() is not None:
            optuna.delete_study(study_name=self.name, storage=self.storage)
        study = optuna.create_study(study_name=self.name, storage=self.storage, direction="maximize")
        study.set_user_attr(OWNER, "rebuilt from the records of its trials")
        study.add_trials(frozen)
        return study

    # Asking and telling

    def ask(self, number: int, trials: Sequence[Trial]) -> tuple[dict[str, Value], str] | None:
        """The point of trial ``number`` and where it comes from; the first one is the paper's. None: no more points."""
        if number == 0:
            return self._fixed(self.first, "paper")
        if self.kind == "grid":
            point = next_on_grid(self.space, trials)
            return None if point is None else self._fixed(point, "grid")
        if self.cmaes is not None:
            return self._fixed(self.cmaes.point(trials, number), "cmaes")
        self.study.sampler = optuna_sampler(self.kind, self.seed, number, self.parallel)
        asked = self.study.ask(self.distributions)
        assert asked.number == number, "the study has other trials than the records"
        return {path: asked.params[path] for path in self.space}, self.kind

    def _fixed(self, point: dict[str, Value], origin: str) -> tuple[dict[str, Value], str]:
        import optuna

        running = optuna.trial.TrialState.RUNNING
        self.study.add_trial(
            optuna.trial.create_trial(state=running, params=point, distributions=dict(self.distributions))
        )
        return dict(point), origin

    def rung(self, number: int, step: int, value: float) -> None:
        """A value on the way."""
        trial = self.storage.get_trial_id_from_study_id_trial_number(self.study_id, number)
        self.storage.set_trial_intermediate_value(trial, step, value)

    def tell(self, trial: Trial) -> None:
        """How a trial ended. A stopped one is PRUNED at the budget of its last rung, never COMPLETE."""
        import optuna

        states = optuna.trial.TrialState
        state = {"complete": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}[trial.state]
        known = self.storage.get_trial_id_from_study_id_trial_number(self.study_id, trial.number)
        for name, value in _attributes(trial).items():
            self.storage.set_trial_user_attr(known, name, value)
        self.study.tell(trial.number, trial.value if trial.state == "complete" else None, state)

    def _frozen(self, trial: Trial) -> FrozenTrial:
        """A trial as the study would have it after ``ask``, ``rung`` and ``tell``, under the space as it is now."""
        import optuna

        states = optuna.trial.TrialState
        state = {
            "running": states.RUNNING,
            "complete": states.COMPLETE,
            "pruned": states.PRUNED,
            "failed": states.FAIL,
        }[trial.state]
        value = trial.value
        if trial.state == "pruned" and trial.rungs:
            value = trial.rungs[-1].value
        return optuna.trial.create_trial(
            state=state,
            value=value,
            params=trial.point,
            distributions=dict(self.distributions),
            intermediate_values={rung.step: rung.value for rung in trial.rungs},
            user_attrs=_attributes(trial) if trial.state != "running" else {},
        )


def _attributes(trial: Trial) -> dict[str, Any]:
    """What a dashboard shows beside a trial."""
    budget = {"budget": trial.rungs[-1].step} if trial.state == "pruned" and trial.rungs else {}
    reason = {"reason": trial.reason} if trial.reason else {}
    return {**budget, **reason, "seeds": len(trial.values), "runs": list(trial.runs.values())}


def _same(found: Sequence[FrozenTrial], wanted: Sequence[FrozenTrial]) -> bool:
    def content(one: FrozenTrial) -> tuple[object, ...]:
        return (
            one.state,
            one.values,
            list(one.params.items()),
            one.distributions,
            one.intermediate_values,
            one.user_attrs,
        )

    return len(found) == len(wanted) and all(content(a) == content(b) for a, b in zip(found, wanted, strict=True))


def _hidden(storage: str) -> str:
    """An URL without the password that it may carry."""
    scheme, sign, rest = storage.partition("://")
    return f"{scheme}{sign}{rest.rpartition('@')[2]}" if sign else storage


def _quiet() -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("optuna").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
