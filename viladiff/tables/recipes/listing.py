"""Recipes field by field, for a terminal and for docs/datasets.md."""

from __future__ import annotations

from typing import NamedTuple

from viladiff.core.messages import format_value
from viladiff.tables.recipes.recipe import Recipe, RecipeEntry, load_recipe, recipe_names, shared


class RecipeLine(NamedTuple):
    """One field of a recipe's entry."""

    field: str
    value: str
    runs: str
    """The runs that it holds for."""
    goes: str
    """Whether it goes before a publication's setting of the field, or after it."""
    source: str


def recipe_lines(recipe: Recipe) -> list[RecipeLine]:
    """Return a line for each field of each entry, in the recipe's order."""
    return [
        RecipeLine(path, _written(value), runs_of(entry), "before" if shared(path) else "after", _source(entry))
        for entry in recipe.entries
        for path, value in entry.fields.items()
    ]


def runs_of(entry: RecipeEntry) -> str:
    """Describe the runs that an entry holds for: ``cityscapes, ade20k; supervised``."""
    parts = (entry.datasets, entry.families, entry.methods, entry.encoders)
    return "; ".join(", ".join(part) for part in parts if part) or "all"


def _written(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_written(one) for one in value)
    return str(value).lower() if isinstance(value, bool) else format_value(value, 6)


def _source(entry: RecipeEntry) -> str:
    return f"ours: {entry.why} ({entry.source})" if entry.ours else entry.source


def recipe_text(name: str) -> str:
    """Format a recipe for a terminal, a line a field. Raises ValueError for an unknown name."""
    recipe = load_recipe(name)
    grid = [RecipeLine("field", "value", "runs", "published", "source"), *recipe_lines(recipe)]
    widths = [max(len(line[i]) for line in grid) for i in range(4)]
    rows = ["  ".join([*(line[i].ljust(widths[i]) for i in range(4)), line.source]) for line in grid]
    said = [f"recipe {name}: {recipe.title} ({', '.join(recipe.datasets)})", "", *rows, ""]
    said += ["published: whether the value goes before or after what a method's publication sets for the field"]
    said += [f"note: {note}" for note in recipe.notes]
    said += [f"not expressed: {one.text} [{one.source}]" for one in recipe.not_expressed]
    return "\n".join(said) + "\n"


def recipes_markdown() -> str:
    """Return a section with a table for each recipe."""
    parts = []
    for name in sorted(recipe_names(), key=lambda name: (name != "paper", name != "strong", name)):
        recipe = load_recipe(name)
        lines = [f"### `{name}`", "", f"{recipe.title}.", ""]
        lines += ["| field | value | runs | published | source |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| `{one.field}` | {one.value} | {one.runs} | {one.goes} | {one.source} |" for one in recipe_lines(recipe)
        ]
        lines += ["", *(f"- {note}" for note in recipe.notes)]
        lines += ["", "What the source has and no field gives:", ""] if recipe.not_expressed else []
        lines += [f"- {one.text} ({one.source})" for one in recipe.not_expressed]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
