"""Optuna study rebuilt from the trial records, with ask, report and tell.

The study is a view. When a sweep is opened, its records are replayed to a study in memory, and the stored study is
rebuilt if it differs from that one. So a kill between two writes, or a lost file, changes nothing. Sampler and pruner
work on the study in memory, with their own notes; the stored one, for dashboards, gets the results, a new trial with
all its parameters in one write. Optuna is imported where it is used.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from viladiff.core.messages import hidden_url, hide_passwords
from viladiff.sweeps.samplers import Cmaes, Kind, distributions, next_on_grid, optuna_sampler
from viladiff.sweeps.space import Space, Value
from viladiff.sweeps.trials import Rung, Trial

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial as OptunaTrial

JOURNAL = "optuna.journal"
OWNER = "viladiff"
"""Attribute of a study that was made here, and may therefore be made anew."""
LOCK_SECONDS = 3
"""Age at which the journal's lock is that of a killed driver; one driver at a time has the sweep, by its lease."""


class ForeignStudyError(ValueError):
    """A study of the sweep's name that was not made here, and is left alone."""


class OptunaStudy:
    """The source of a sweep's points, and the receiver of their values."""

    def __init__(
        self,
        name: str,
        space: Space,
        listed: Sequence[Mapping[str, Value]],
        kind: Kind,
        seed: int,
        parallel: bool,
        storage: str,
        pruner: BasePruner,
    ) -> None:
        """Create the study's view. ``listed``: points to try first, the paper's before all others.

        ``storage``: a URL as Optuna takes it, or the path of a journal. Raises ValueError if it cannot be reached, or
        holds a study of the same name from elsewhere.
        """
        _quiet()
        self.name, self.space, self.listed = name, space, [dict(point) for point in listed]
        self.kind, self.seed, self.parallel, self.pruner = kind, seed, parallel, pruner
        self.distributions = distributions(space)
        self.cmaes = Cmaes(space, self.listed[0], seed) if kind == "cmaes" else None
        self.where = storage
        self.storage: BaseStorage
        self.memory: Told
        """Where sampler and pruner work."""
        self.stored: Told
        """The same for whoever looks on."""

    @property
    def stopped(self) -> set[int]:
        """Trials under way that the pruner has ended."""
        return self.memory.stopped

    # Opening

    def open(self, trials: Sequence[Trial], full: int) -> None:
        """Bring the study to the state of the records; ``full``: steps of the last rung, where nothing is pruned."""
        self.memory = self._replay(trials, full)
        wanted = self.memory.study.get_trials(deepcopy=False)
        try:
            self.storage = self._connect()
            study = self._found()
            if study is None or not _same(study.get_trials(deepcopy=False), wanted):
                study = self._anew(wanted)
        except ForeignStudyError:
            raise
        except Exception as error:  # each kind of storage has errors of its own
            if "://" in self.where:
                raise self._out_of_reach(error) from self._cause(error)
            study = self._anew(wanted)  # a journal that is damaged
        self.stored = Told(study, self.storage, self.distributions, full, judges=False)

    def _out_of_reach(self, error: Exception) -> ValueError:
        why = hide_passwords(str(error) or type(error).__name__, self.where).splitlines()[0]
        return ValueError(f"{hidden_url(self.where)}: Optuna cannot keep its study there ({why})")

    def _cause(self, error: Exception) -> Exception | None:
        """Return the error, for a traceback, or None if that would have the storage's password."""
        text = "".join(traceback.format_exception(error))
        return error if hide_passwords(text, self.where) == text else None

    @contextmanager
    def _storing(self) -> Iterator[None]:
        """Within the context an error of a database, whose text may hold its password, is a ValueError without it."""
        try:
            yield
        except Exception as error:
            if "://" not in self.where:
                raise
            raise self._out_of_reach(error) from self._cause(error)

    def _replay(self, trials: Sequence[Trial], full: int) -> Told:
        """Replay the trials' events in order into a study in memory."""
        import optuna

        storage = optuna.storages.InMemoryStorage()
        told = Told(self._create(storage), storage, self.distributions, full)
        happened: list[tuple[int, Callable[[], object]]] = []
        for trial in trials:
            happened.append((trial.order, partial(told.add, trial.point)))
            happened += [(rung.order, partial(told.report, trial, [rung])) for rung in trial.rungs]
            if trial.ended is not None:
                happened.append((trial.ended, partial(told.tell, trial)))
        for _, event in sorted(happened, key=lambda one: one[0]):
            event()
        return told

    def _connect(self) -> BaseStorage:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        if "://" in self.where:
            return optuna.storages.get_storage(self.where)
        journal = Path(self.where)
        if journal.is_file() and not journal.read_bytes().endswith(b"\n"):
            journal.unlink()  # torn by a full disk: the next line would be added to half of one
        # Optuna's other lock, a link, is waited for without an end where it points to no file.
        lock = JournalFileOpenLock(self.where, grace_period=LOCK_SECONDS)
        return optuna.storages.JournalStorage(JournalFileBackend(self.where, lock))

    def _found(self) -> Study | None:
        import optuna

        studies = self.storage.get_all_studies()
        foreign = [one.study_name for one in studies if one.user_attrs.get(OWNER) is None]
        if "://" not in self.where and foreign:  # the journal is made anew as a whole
            raise ForeignStudyError(
                f"{self.where}: holds a study {foreign[0]!r} that was not made by viladiff; move the file away"
            )
        if self.name not in {one.study_name for one in studies}:
            return None
        study = optuna.load_study(study_name=self.name, storage=self.storage, pruner=self.pruner)
        if study.user_attrs.get(OWNER) is None:
            found = f"holds a study {self.name!r} that was not made by viladiff"
            raise ForeignStudyError(f"{hidden_url(self.where)}: {found}; give --study NAME")
        return study

    def _anew(self, frozen: Sequence[FrozenTrial]) -> Study:
        import optuna

        if "://" not in self.where:
            Path(self.where).unlink(missing_ok=True)
            self.storage = self._connect()
        elif self._found() is not None:
            optuna.delete_study(study_name=self.name, storage=self.storage)
        study = self._create(self.storage)
        study.set_user_attr(OWNER, "rebuilt from the records of its trials")
        study.add_trials(frozen)
        return study

    def _create(self, storage: BaseStorage) -> Study:
        import optuna

        return optuna.create_study(study_name=self.name, storage=storage, direction="maximize", pruner=self.pruner)

    # Asking and telling

    def ask(self, number: int, trials: Sequence[Trial]) -> tuple[dict[str, Value], str] | None:
        """Return the point of trial ``number`` and its origin; the first is the paper's. None: no more points."""
        if number < len(self.listed):
            return self._fixed(self.listed[number], "listed" if number else "paper")
        if self.kind == "grid":
            point = next_on_grid(self.space, trials)
            return None if point is None else self._fixed(point, "grid")
        if self.cmaes is not None:
            return self._fixed(self.cmaes.point(trials, number), "cmaes")
        self.memory.study.sampler = optuna_sampler(self.kind, self.seed, number, self.parallel)
        asked = self.memory.study.ask(self.distributions)
        assert asked.number == number, "the study has other trials than the records"
        point = {path: asked.params[path] for path in self.space}
        with self._storing():
            self.stored.add(point)
        return point, self.kind

    def _fixed(self, point: dict[str, Value], origin: str) -> tuple[dict[str, Value], str]:
        self.memory.add(point)
        with self._storing():
            self.stored.add(point)
        return dict(point), origin

    def report(self, trial: Trial, rungs: Sequence[Rung]) -> None:
        """Report intermediate values as ``Told.report`` does."""
        self.memory.report(trial, rungs)
        with self._storing():
            self.stored.report(trial, rungs)

    def tell(self, trial: Trial) -> None:
        """Report the end of a trial."""
        self.memory.tell(trial)
        with self._storing():
            self.stored.tell(trial)


class Told:
    """A study that is told what happens in a sweep; where it ``judges``, also what its pruner says to that."""

    def __init__(
        self,
        study: Study,
        storage: BaseStorage,
        distributions: Mapping[str, BaseDistribution],
        full: int,
        judges: bool = True,
    ) -> None:
        self.study, self.storage, self.distributions, self.full = study, storage, dict(distributions), full
        self.judges = judges
        self.study_id = storage.get_study_id_from_name(study.study_name)
        self.stopped: set[int] = set()

    def add(self, point: Mapping[str, Value]) -> None:
        """Start a trial at a point that no Optuna sampler has drawn."""
        import optuna

        running = optuna.trial.TrialState.RUNNING
        self.study.add_trial(
            optuna.trial.create_trial(state=running, params=dict(point), distributions=self.distributions)
        )

    def report(self, trial: Trial, rungs: Iterable[Rung]) -> None:
        """Report the first seed's values at the rungs to the pruner.

        It decides at each rung but the last. A twin, whose values it knows, and a trial that has a value are not
        stopped.
        """
        asked = self._asked(trial.number)
        for rung in rungs:
            asked.report(rung.value, rung.step)
            judged = self.judges and trial.twin is None and rung.step < self.full
            if judged and asked.should_prune() and not trial.values:
                self.stopped.add(trial.number)

    def tell(self, trial: Trial) -> None:
        """Report the end of a trial. A stopped one is PRUNED at the budget of its last rung, never COMPLETE."""
        import optuna

        states = optuna.trial.TrialState
        state = {"complete": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}[trial.state]
        asked = self._asked(trial.number)
        for name, value in _attributes(trial).items():
            asked.set_user_attr(name, value)
        self.study.tell(trial.number, trial.value if trial.state == "complete" else None, state)
        self.stopped.discard(trial.number)

    def _asked(self, number: int) -> OptunaTrial:
        import optuna

        return optuna.trial.Trial(
            self.study, self.storage.get_trial_id_from_study_id_trial_number(self.study_id, number)
        )


def _attributes(trial: Trial) -> dict[str, Any]:
    """Return what a dashboard shows beside a trial."""
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

    return len(found) == len(wanted) and all(
        # What sampler and pruner note of a trial is kept in memory alone.
        content(a) == content(b)
        for a, b in zip(found, wanted, strict=True)
    )


def _quiet() -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("optuna").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
