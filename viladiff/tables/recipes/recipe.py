"""Recipes: what a scale's runs on the data sets of the literature have in common, field by field with its source.

A recipe is one TOML file in this folder, which ``recipe = "strong"`` in a table's scale names. Nothing here loads torch
when it is imported; ``recipe_fields`` does, to check the fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, ValidationError

from viladiff.config.base import ConfigError, Section, did_you_mean
from viladiff.config.toml_file import entry_name, format_toml_error, read_toml, strange_values
from viladiff.core.messages import fault_lines

FOLDER = Path(__file__).resolve().parent
AVERAGE = "method.teacher.momentum"
"""The one field of methods that belongs to the protocol, as optimiser, batch, crop and length do."""


class RecipeEntry(Section):
    """Fields of some runs; of two entries that hold for a run, the later one goes first."""

    label: str = Field(min_length=1)
    datasets: tuple[str, ...] = ()
    """Values of ``data.dataset`` that it holds for; empty for all of the recipe's."""
    families: tuple[str, ...] = ()
    """Values of ``data.split_family``; empty for all."""
    methods: tuple[str, ...] = ()
    """Values of ``method.name``; empty for all."""
    encoders: tuple[str, ...] = ()
    """Values of ``model.encoder``, as set so far, timm's tag and registers aside; empty for all."""
    fields: dict[str, Any] = Field(min_length=1)
    """Dotted path to value; those of methods reach the methods that have them."""
    source: str = Field(min_length=1)
    """Publication, or repository and commit; of our own choices the reason's origin."""
    ours: bool = False
    """Whether no publication of this protocol says so."""
    why: str = ""
    """The reason of what is ours."""

    def holds(self, values: Mapping[str, object]) -> bool:
        """Return whether it applies to a run with these fields (dotted path to value)."""
        wanted = {
            "data.dataset": self.datasets,
            "data.split_family": self.families,
            "method.name": self.methods,
            "model.encoder": self.encoders,
        }
        given = {
            **values,
            "model.encoder": str(values.get("model.encoder", "")).partition(".")[0].replace("_reg4_", "_"),
        }
        return all(not allowed or given.get(path) in allowed for path, allowed in wanted.items())


class NotExpressed(Section):
    """What the source has and no field here gives."""

    text: str = Field(min_length=1)
    source: str = Field(min_length=1)


class Recipe(Section):
    name: str
    """The file's stem."""
    title: str = Field(min_length=1)
    datasets: tuple[str, ...]
    """Data sets that it has settings for; other ones are refused."""
    notes: tuple[str, ...] = ()
    entries: tuple[RecipeEntry, ...]
    not_expressed: tuple[NotExpressed, ...] = ()

    def place(self, number: int) -> str:
        """Return the entry's place, in words for a message."""
        return f"recipe {self.name}: {entry_name('entries', number, self.entries[number].label)}"


class RecipeValue(NamedTuple):
    """A field's value and the entry that sets it."""

    value: Any
    entry: str
    source: str
    ours: bool


def recipe_names() -> tuple[str, ...]:
    """Return the names of the recipes that are there."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def recipe_file(name: str) -> Path:
    return FOLDER / f"{name}.toml"


def read_recipe(path: Path) -> Recipe:
    """Read the recipe in a TOML file; ``check_recipe`` validates the paths of fields.

    Raises ValueError with a line for each error: file, entry, value, allowed values.
    """
    tree = read_toml(path)
    faults = list(strange_values(tree))
    if not faults:
        try:
            recipe = Recipe.model_validate_json(json.dumps({**tree, "name": path.stem}), strict=True)
        except ValidationError as error:
            sections: dict[str, type[Section]] = {"entries": RecipeEntry, "not_expressed": NotExpressed}
            faults = [format_toml_error(item, tree, Recipe, sections) for item in error.errors(include_url=False)]
        else:
            faults = list(_entry_faults(recipe))
    if faults:
        raise ValueError(fault_lines(path.name, faults))
    return recipe


@cache
def load_recipe(name: str) -> Recipe:
    """Read the recipe of this name. Raises ValueError that names the nearest one."""
    if name not in recipe_names():
        known = recipe_names()
        raise ValueError(f"recipe = {name!r}: allowed: {', '.join(known)}{did_you_mean(name, known)}")
    return read_recipe(recipe_file(name))


def _entry_faults(recipe: Recipe) -> Iterator[str]:
    if not recipe.datasets or not recipe.entries:
        yield "datasets, entries: one at least of each"
    for i, entry in enumerate(recipe.entries):
        here = entry_name("entries", i, entry.label)
        if entry.ours != bool(entry.why):
            yield f"{here}: why = {entry.why!r}: the reason of what is ours, and of nothing else; ours = {entry.ours}"
        for dataset in entry.datasets:
            if dataset not in recipe.datasets:
                allowed = f"allowed: {', '.join(recipe.datasets)}{did_you_mean(dataset, recipe.datasets)}"
                yield f"{here}: datasets = {dataset!r}: {allowed}"
        for path, value in entry.fields.items():
            if isinstance(value, dict):
                yield f'{here}: {path} = {value!r}: write the whole path in quotes, as in "{path}.field" = ...'


def shared(path: str) -> bool:
    """Return whether a field belongs to the protocol, so that a recipe's value wins over a publication's.

    Those of methods do not, but for the momentum of the teacher: thresholds, weights and hard pixels are their own.
    """
    return not path.startswith("method.") or path == AVERAGE


def recipe_fields(name: str, values: Mapping[str, object]) -> dict[str, RecipeValue]:
    """Return what the recipe sets for a run with these fields (dotted path to value), by path.

    Fields that the run's method lacks are left out. Loads torch. Raises ConfigError for a data set that the recipe has
    no settings of, and for a path that no data set and method has, with the nearest name.
    """
    from viladiff.runs.config import schema

    recipe = load_recipe(name)
    check_recipe(recipe)
    dataset, method = str(values.get("data.dataset")), str(values.get("method.name"))
    known = schema(dataset, method)
    if dataset not in recipe.datasets:
        allowed = f"allowed: {', '.join(recipe.datasets)}{did_you_mean(dataset, recipe.datasets)}"
        raise ConfigError(f"recipe {name}: data.dataset = {dataset!r}: {allowed}")
    defaults = {path: info.default for path, info in known.items()}
    found: dict[str, RecipeValue] = {}
    for i, entry in enumerate(recipe.entries):
        so_far = {**defaults, **{path: one.value for path, one in found.items()}, **values}
        if entry.holds(so_far):
            told = recipe.place(i), entry.source, entry.ours
            found |= {path: RecipeValue(value, *told) for path, value in entry.fields.items() if path in known}
    return found


@cache
def _paths(datasets: tuple[str, ...]) -> frozenset[str]:
    from viladiff.methods import METHODS
    from viladiff.runs.config import schema

    return frozenset(path for dataset in datasets for method in METHODS for path in schema(dataset, method))


def check_recipe(recipe: Recipe) -> None:
    """Raise ConfigError with a line for each entry with an unknown data set, method or field. Loads torch."""
    from viladiff.data.sources import DATASETS
    from viladiff.methods import METHODS

    faults = [_unknown(f"recipe {recipe.name}: datasets", one, DATASETS) for one in recipe.datasets]
    if not any(faults):
        known = _paths(recipe.datasets)
        for i, entry in enumerate(recipe.entries):
            faults += [_unknown(f"{recipe.place(i)}: methods", one, METHODS) for one in entry.methods]
            faults += [
                f"{recipe.place(i)}: {path}: no such field{did_you_mean(path, known)}"
                for path in entry.fields
                if path not in known
            ]
    if any(faults):
        raise ConfigError("\n".join(filter(None, faults)))


def _unknown(here: str, name: str, known: Iterable[str]) -> str:
    """Return the error of a name that is not known; empty if it is."""
    known = list(known)
    return "" if name in known else f"{here}: {name!r}: allowed: {', '.join(known)}{did_you_mean(name, known)}"
