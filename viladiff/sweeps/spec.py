"""The spec of a sweep, from one TOML file: search space, first point, budgets, comparison of runs.

Reading it loads no torch; ``check`` and ``SweepPlanner`` do, since they build configurations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from viladiff.config.base import ConfigError, did_you_mean
from viladiff.config.toml_file import format_toml_error, read_toml, strange_values
from viladiff.core.messages import fault_lines, shown
from viladiff.runs.job import PlannedRun
from viladiff.runs.run_name import arithmetic
from viladiff.sweeps.space import Dimension, Point, Value, edges, strays
from viladiff.tables.cells import check_lists, embedded, list_of_seed
from viladiff.tables.spec import RESERVED, PaperValue, Scale, Seeds, Strict
from viladiff.tables.spec_file import published_lists

if TYPE_CHECKING:
    from viladiff.training.fingerprints import Named

Select = Literal["holdout", "val"]
FRESH = 5
"""Fewest seeds that a winner is quoted with."""
FRESH_TO_CHOOSE = 3
"""Fewest seeds that a winner is chosen with, where nothing is quoted (``finals_split = "dev"``)."""
OURS = {
    "data.holdout": "it is the sweep's own holdout",
    "method.pseudo.oracle": "it reads true masks of unlabelled images: a ceiling is no method to be tuned",
    "eval.split": "the sweep chooses on what it holds out; --select val reads the reported set and the page says it",
    "eval.every_steps": "it follows from the rungs",
    "eval.every_epochs": "it follows from the rungs",
    **RESERVED,
}


def _as_rungs(value: object) -> object:
    shares = value if isinstance(value, list | tuple) else ()
    fine = all(isinstance(one, int | float) and 0 < one <= 1 for one in shares)
    if fine and shares and list(shares) == sorted(set(shares)) and shares[-1] == 1:
        return tuple(float(one) for one in shares)
    raise ValueError("shares of the steps in rising order, the last one 1.0, such as [0.25, 0.5, 1.0]")


class PaperCurve(Strict):
    """Numbers that the paper prints along one dimension, to be drawn beside what was found."""

    label: str = Field(min_length=1)
    field: str
    at: tuple[Value, ...] = Field(min_length=1)
    miou: tuple[PaperValue, ...]
    """Percent, one for each place."""


class Sweep(Strict):
    name: str
    """The file's stem without ``sweep_``."""
    title: str
    metric: Literal["miou"] = "miou"
    trials: int = Field(20, ge=1)
    seeds: Seeds = (0, 1, 2)
    final_seeds: Seeds = (3, 4, 5, 6, 7)
    """Fresh seeds with which the winner, the paper's value and the runner-up are trained anew, on the full list."""
    finals_split: Literal["test", "dev"] = "test"
    """What those runs score: the reported set or, where the sweep is for a choice and quotes nothing, ``dev`` of
    built-in data and elsewhere the labelled images that trials are chosen on."""
    beside: tuple[str, ...] = ()
    """Names of sweeps of other methods with as many trials and seeds, which the page lists beside this one."""
    holdout: float = Field(0.25, gt=0, lt=1)
    """Share of the labelled list that trials are chosen on and not trained on."""
    rungs: Annotated[tuple[float, ...], BeforeValidator(_as_rungs)] = (0.25, 0.5, 1.0)
    """Shares of the steps at which trials may be stopped early."""
    base: dict[str, Any] = Field(default_factory=dict)
    space: dict[str, Dimension] = Field(min_length=1)
    initial_point: dict[str, Value]
    """The first point that is tried."""
    initial_label: str = Field("the paper's value", min_length=1)
    """What that point is, in words."""
    initial_at: dict[str, dict[str, Value]] = Field(default_factory=dict)
    """By scale, what the paper's value has in place of the first point's; there the first point is the paper's."""
    points: tuple[dict[str, Value], ...] = ()
    """Points that are tried after it, before the sampler draws: each by its differences from the initial point."""
    scale: dict[str, Scale] = Field(min_length=1)
    paper: tuple[PaperCurve, ...] = ()
    notes: tuple[str, ...] = ()


# Reading


def load_sweep(path: Path | str) -> Sweep:
    """Read the sweep in a TOML file; ``check`` validates the meaning of its fields.

    Raises ValueError with one line a fault: file, entry, value, what is allowed.
    """
    path = Path(path)
    tree = read_toml(path)
    faults = list(strange_values(tree))
    if "name" in tree:
        faults.append(f"name = {tree['name']!r}: a sweep is named by its file; remove the line")
    if not faults:
        try:
            text = json.dumps({**tree, "name": path.stem.removeprefix("sweep_")})
            sweep = Sweep.model_validate_json(text)
        except ValidationError as error:
            faults = [_said(item, tree) for item in error.errors(include_url=False)]
        else:
            faults = [*_faults(sweep), *_beside_faults(sweep, path)]
    if faults:
        raise ValueError(fault_lines(path, faults))
    return sweep


def _said(item: Any, tree: Mapping[str, Any]) -> str:
    """Format a pydantic error of ``space``, whose keys are paths of fields with dots of their own."""
    loc = item["loc"]
    if loc and loc[0] in ("space", "initial_point") and len(loc) > 1:
        inner = {**item, "loc": loc[2:] if len(loc) > 2 and loc[0] == "space" else ()}
        return f'{loc[0]}."{loc[1]}": {format_toml_error(inner, tree, Dimension, {})}'
    return format_toml_error(item, tree, Sweep, {"scale": Scale, "paper": PaperCurve})


def _faults(sweep: Sweep) -> Iterator[str]:
    for path, dimension in sweep.space.items():
        here = f'space."{path}"'
        if path in OURS:
            yield f"{here}: not searched: {OURS[path]}"
        if path in sweep.base:
            yield f"{here}: base sets it too; remove one"
        if path in sweep.initial_point and not dimension.has(sweep.initial_point[path]):
            yield f'initial_point."{path}" = {sweep.initial_point[path]!r}: must lie in the space, {dimension}'
    for fault in strays(sweep.initial_point, sweep.space):
        if "is not in" not in fault:
            yield f"initial_point: {fault}{did_you_mean(fault.split(' ')[0], sweep.space)}"
    for scale, point in sweep.initial_at.items():
        if scale not in sweep.scale:
            yield f"initial_at.{scale}: allowed: {', '.join(sweep.scale)}{did_you_mean(scale, sweep.scale)}"
        for fault in strays({**sweep.initial_point, **point}, sweep.space):
            yield f"initial_at.{scale}: {fault}{did_you_mean(fault.split(' ')[0], sweep.space)}"
    for i, point in enumerate(sweep.points):
        for fault in strays({**sweep.initial_point, **point}, sweep.space):
            yield f"points[{i}]: {fault}{did_you_mean(fault.split(' ')[0], sweep.space)}"
    if len(sweep.points) >= sweep.trials:
        yield f"points: {len(sweep.points)} and the initial point are more than trials = {sweep.trials}"
    for entry, fields in [("base", sweep.base), *((f"scale.{name}", one.set) for name, one in sweep.scale.items())]:
        for path, value in fields.items():
            if path in OURS:
                yield f"{entry}: {path} = {value!r}: not set here: {OURS[path]}"
            elif isinstance(value, dict):
                yield f'{entry}: {path} = {value!r}: write the whole path in quotes, as in "{path}.field" = ...'
    yield from published_lists(sweep.scale)
    for name, one in sweep.scale.items():
        if one.recipe:
            yield f"scale.{name}: recipe = {one.recipe!r}: of tables alone; write its fields in set"
        if one.shared_method_fields:
            fields = one.shared_method_fields
            yield f"scale.{name}: shared_method_fields = {fields}: a sweep has one method: write it in set"
    for name, seeds in (("seeds", sweep.seeds), ("final_seeds", sweep.final_seeds)):
        if len(set(seeds)) < len(seeds):
            yield f"{name} = {list(seeds)}: a seed is named twice"
    fewest = FRESH if sweep.finals_split == "test" else FRESH_TO_CHOOSE
    if set(sweep.seeds) & set(sweep.final_seeds) or len(sweep.final_seeds) < fewest:
        here = f"final_seeds = {list(sweep.final_seeds)}"
        yield f"{here}: {fewest} seeds or more, none of them in seeds = {list(sweep.seeds)}"
    for i, curve in enumerate(sweep.paper):
        here = f"paper[{i + 1}] {curve.label!r}"
        if curve.field not in sweep.space:
            yield f"{here}: field = {curve.field!r}: not in the space{did_you_mean(curve.field, sweep.space)}"
        if len(curve.at) != len(curve.miou):
            yield f"{here}: {len(curve.miou)} numbers at {len(curve.at)} places"


def _beside_faults(sweep: Sweep, path: Path) -> Iterator[str]:
    """Yield methods tuned by other means: they are not tuned equally."""
    for name in sweep.beside:
        other = path.with_name(f"sweep_{name}.toml")
        if not other.is_file():
            yield f"beside = {name!r}: there is no {other.name} beside this file"
            continue
        found = load_sweep(other)
        for field in ("trials", "seeds", "final_seeds", "finals_split", "holdout", "rungs"):
            mine, theirs = getattr(sweep, field), getattr(found, field)
            if mine != theirs:
                yield f"beside = {name!r}: {field} = {theirs} there, and {mine} here; both must be equal"


def at_scale(sweep: Sweep, scale: str) -> Sweep:
    """Return the sweep with the first point of a scale."""
    here = sweep.initial_at.get(scale)
    if here is None:
        return sweep
    fields = {**dict(sweep), "initial_point": {**sweep.initial_point, **here}}
    return Sweep(**{**fields, "initial_label": Sweep.model_fields["initial_label"].default})


# Runs


def changes(sweep: Sweep, scale: str, typed: Mapping[str, object], select: Select) -> dict[str, object]:
    """Return the fields of every run of the search: base, scale, command line, scored images; not the point or seed.

    A run of the search is scored at each rung and at the end on images that it does not train on and that no result is
    read from: ``dev`` of a built-in data set, else labelled images that are held out. ``select`` val is for data in
    files alone: on built-in data it would be ``test``. Raises ValueError for that, for an unknown scale, and for a
    field that must not be set here.
    """
    fixed = common(sweep, scale, typed)
    if select == "val" and embedded(fixed):
        raise ValueError(
            f"--select val: trials on {fixed.get('data.dataset', 'digits')!r} are scored on dev, and never on test, "
            "which only finals read; remove it"
        )
    steps = rung_steps(sweep, fixed)
    chosen: dict[str, object] = {"eval.every_steps": math.gcd(*steps), "eval.boundary": False}
    if select == "holdout":
        chosen |= _choosing(sweep, fixed)
    return {**fixed, **chosen}


def common(sweep: Sweep, scale: str, typed: Mapping[str, object]) -> dict[str, object]:
    """Return the fields that the runs of the search share with those of the finals."""
    if scale not in sweep.scale:
        raise ValueError(f"scale = {scale!r}: allowed: {', '.join(sweep.scale)}{did_you_mean(scale, sweep.scale)}")
    for path, value in typed.items():
        if path in OURS:
            raise ValueError(f"{path} = {value}: not set here: {OURS[path]}")
        if path in sweep.space:
            raise ValueError(f"{path} = {value}: the sweep searches it; remove it")
    size = sweep.scale[scale]
    mapped: dict[str, object] = dict(sweep.base)
    for path, value in sweep.base.items():
        mapped |= size.substitute.get(f"{path}={value}", {})
    asked = str(sweep.base.get("data.dataset"))
    if asked in size.datasets:
        mapped["data.dataset"] = size.datasets[asked]
    threads: dict[str, object] = {} if size.threads is None else {"runtime.threads": size.threads}
    found = {**mapped, **threads, **size.set, **typed, "runtime.scale": scale}
    if sweep.finals_split == "dev":
        return {**found, **_choosing(sweep, found)}
    return {**found, "eval.split": "test"} if embedded(found) else found


def _choosing(sweep: Sweep, fixed: Mapping[str, object]) -> dict[str, object]:
    """Return the fields that score a run on images that no result is read from."""
    return {"eval.split": "dev"} if embedded(fixed) else {"data.holdout": sweep.holdout, "eval.split": "holdout"}


def choosing_images(sweep: Sweep, scale: str) -> str:
    """Describe the images that points are chosen by, if they are not the reported set."""
    if embedded(common(sweep, scale, {})):
        return "the part dev of the built-in data"
    listed = str(common(sweep, scale, {}).get("data.split", ""))
    many = f" (at most {round(sweep.holdout * int(listed))} of {listed})" if listed.isdigit() else ""
    return f"{sweep.holdout:.0%} of the labelled images{many}"


def rung_steps(sweep: Sweep, fixed: Mapping[str, object]) -> tuple[int, ...]:
    """Return the steps of the rungs, the last one the full length. Raises ValueError if they coincide."""
    text = str(fixed.get("train.steps"))
    if not text.isdigit() or int(text) < 1:
        raise ValueError(
            f"train.steps = {shown(fixed.get('train.steps'))}: a sweep needs a number of steps, set by its scale"
        )
    steps = tuple(round(share * int(text)) for share in sweep.rungs)
    if len(set(steps)) < len(steps) or steps[0] < 1:
        raise ValueError(f"rungs = {list(sweep.rungs)}: of train.steps = {text} they are the steps {list(steps)}")
    if steps[-1] // math.gcd(*steps) > 100:
        raise ValueError(
            f"rungs = {list(sweep.rungs)}: of train.steps = {text} they are the steps {list(steps)}, which only an "
            f"evaluation every {math.gcd(*steps)} steps would meet; choose others"
        )
    return steps


def check(sweep: Sweep, scale: str, typed: Mapping[str, object] | None = None, select: Select = "holdout") -> None:
    """Build the configurations at the space's edges, so that no trial can fail for its fields. Loads torch.

    Raises ValueError with a line for each error: entry, value, allowed values, nearest name.
    """
    from viladiff.runs.config import RunConfig, override

    fixed = changes(sweep, scale, typed or {}, select)
    if sweep.scale[scale].split_per_seed:
        check_lists(f"sweep_{sweep.name}.toml: scale.{scale}", fixed)
    faults: dict[str, None] = {}
    try:
        override(RunConfig(), {**fixed, **sweep.initial_point})
    except ConfigError as error:
        faults |= dict.fromkeys(_blamed(str(error), sweep, scale, sweep.initial_point))
    if not faults:
        faults |= dict.fromkeys(_kinds(sweep, fixed))
    if not faults:
        listed = [{**sweep.initial_point, **point} for point in sweep.points]
        for point in [*listed, *edges(sweep.space, sweep.initial_point)]:
            try:
                override(RunConfig(), {**fixed, **point})
            except ConfigError as error:
                faults |= dict.fromkeys(_blamed(str(error), sweep, scale, point))
    if faults:
        first = list(faults)[:8]
        more = [f"and {len(faults) - len(first)} more faults"] if len(faults) > len(first) else []
        raise ValueError(fault_lines(f"sweep_{sweep.name}.toml", [*first, *more]))


def _kinds(sweep: Sweep, fixed: Mapping[str, object]) -> Iterator[str]:
    """Yield float fields with whole numbers, which would be searched as whole numbers."""
    from viladiff.runs.config import RunConfig, override, schema

    cfg = override(RunConfig(), {**fixed, **sweep.initial_point})
    known = schema(cfg.data.dataset, cfg.method.name)
    for path, dimension in sweep.space.items():
        if dimension.whole and known[path].annotation is float:
            yield (
                f'space."{path}": low = {dimension.low}, high = {dimension.high}: whole numbers, but the field holds '
                f"any; write {float(dimension.low or 0)} and {float(dimension.high or 0)}"
            )


def _blamed(error: str, sweep: Sweep, scale: str, point: Point) -> Iterator[str]:
    for line in error.splitlines():
        named = [path for path in sweep.space if path in line]
        if named:
            where = ", ".join(f"{path} = {point[path]!r}" for path in named if path in point)
            yield f'space."{named[0]}" (at {where}): {line}'
        else:
            owner = next((f"scale.{scale}" for path in sweep.scale[scale].set if path in line), "base")
            yield f"{owner}: {line}"


class SweepPlanner:
    """Runs of a point, named as training names them; data, words and weights are read once."""

    def __init__(self, sweep: Sweep, scale: str, typed: Mapping[str, object], select: Select, workers: int = 1) -> None:
        self.sweep, self.workers = sweep, workers
        self.own_lists = sweep.scale[scale].split_per_seed if scale in sweep.scale else False
        self.common = {**common(sweep, scale, typed), "runtime.workers": workers}
        self.fixed = {**changes(sweep, scale, typed, select), "runtime.workers": workers}
        self.steps = rung_steps(sweep, self.fixed)
        self._prints: dict[object, Named] = {}

    def planned(self, point: Point, seed: int, title: str = "") -> PlannedRun:
        """Return the run of a point under a seed. Loads torch. Raises ValueError for a point that cannot be run."""
        found = self._named({**self.fixed, **point, **self._seeded(point, seed)}, title)
        if found.changed.get("eval.split") == "test":
            raise ValueError("eval.split = 'test': a trial is never scored on the images that finals are quoted from")
        return found

    def final(self, point: Point, seed: int, title: str = "") -> PlannedRun:
        """Return the run that is quoted for a point: the full labelled list, scored on the reported set.

        With ``finals_split = "dev"`` the run only chooses the point: it is scored as a trial is.
        """
        return self._named({**self.common, **point, **self._seeded(point, seed)}, title)

    def _seeded(self, point: Point, seed: int) -> dict[str, object]:
        """Return the fields of a seed: with the scale's ``split_per_seed`` the list too, the same for all points."""
        drawn = list_of_seed({**self.common, **point}, seed) if self.own_lists else {}
        return {"seed": seed, **drawn}

    def _named(self, given: dict[str, object], title: str) -> PlannedRun:
        from viladiff.runs.config import RunConfig, non_default_fields, override, run_id
        from viladiff.training.fingerprints import name_runs

        cfg = override(RunConfig(), given)
        key = (cfg.data, cfg.model, cfg.eval.split)
        if key not in self._prints:
            self._prints[key] = name_runs([cfg])[0]
        fields = {path: value for path, value in non_default_fields(cfg).items() if not path.startswith("runtime.")}
        assert cfg.train.steps is not None  # rung_steps has seen it
        how = self.workers, cfg.runtime.threads, arithmetic(cfg.train.precision, cfg.train.tf32)
        named = self._prints[key]
        return PlannedRun(run_id(cfg, named.fingerprints), given, title, cfg.train.steps, fields, *how, named.data)
