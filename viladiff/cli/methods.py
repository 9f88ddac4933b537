"""The command ``viladiff methods``: each method's paper, views, state and cost of a step."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from viladiff.config.base import ConfigError, did_you_mean
from viladiff.data.batch import Views
from viladiff.methods import METHODS
from viladiff.methods.base import Method, StepCost
from viladiff.methods.common.published import PublishedSetting
from viladiff.tables.recipes.listing import recipe_text
from viladiff.tables.recipes.recipe import check_recipe, load_recipe


def method_rows() -> list[dict[str, Any]]:
    """Return one flat row a method, in the order of the table; None for missing values."""
    return [_row(name, method) for name, method in METHODS.items()]


def _row(name: str, method: type[Method]) -> dict[str, Any]:
    paper, passes = method.paper, method.step_cost
    return {
        "method": name,
        "paper": paper.title if paper else None,
        "venue": paper.venue if paper else None,
        "year": paper.year if paper else None,
        "views": needs(method.views),
        "keeps": method.extra_state or None,
        "passes": written(passes) if passes else None,
        "revision": method.revision,
        "published": [_declared(one) for one in method.published],
        "protocols": [_declared(one) for one in method.protocols],
    }


def _declared(one: PublishedSetting) -> dict[str, Any]:
    """Return the setting's entries that are not empty."""
    lists = {"datasets": list(one.datasets), "splits": list(one.splits), "families": list(one.families)}
    rest = {"given": dict(one.given), "fields": dict(one.fields), "not_available": one.not_available}
    return {name: value for name, value in {**lists, **rest, "source": one.source}.items() if value}


def needs(views: Views) -> str:
    """Describe the views that the data layer makes for a step."""
    parts = ["labelled"]
    parts += ["labelled in colours"] if views.strong_labelled else []
    parts += [f"{count} {kind}" for kind, count in (("weak", views.weak), ("strong", views.strong)) if count]
    parts += ["CutMix boxes"] if views.cutmix else []
    parts += ["pairs"] if views.pairs else []
    parts += ["captions"] if views.text else []
    parts += ["classes that captions mention"] if views.tags else []
    return ", ".join(parts)


def written(passes: StepCost) -> str:
    """Format the passes of a batch: f and b through the whole network, df and db through a decoder alone."""
    found = [(passes.forward, "f"), (passes.backward, "b"), (passes.decoder_forward, "df")]
    text = " + ".join(f"{count}{kind}" for count, kind in [*found, (passes.decoder_backward, "db")] if count)
    return f"{text}; {passes.beside}" if passes.beside else text


def published_lines(settings: Iterable[PublishedSetting]) -> list[str]:
    """List settings of a method's publication by data set and list, one a line."""
    said = []
    for one in settings:
        limits = [*one.splits, *one.families, *(f"{path}={value}" for path, value in one.given.items())]
        where = ", ".join(one.datasets) + (f" ({', '.join(limits)})" if limits else "")
        fields = ", ".join(f"{path}={value}" for path, value in one.fields.items())
        more = f"; not available: {one.not_available}" if one.not_available else ""
        said.append(f"{where}: {fields}{more} [{one.source}]")
    return said


def format_recipe(name: str, as_json: bool, method: str | None) -> str:
    """Format a recipe as JSON or a line a field. Raises ValueError for an unknown one, or beside a method."""
    if method is not None:
        raise ValueError(f"--recipe {name} and {method}: give one of the two")
    recipe = load_recipe(name)
    check_recipe(recipe)
    return recipe.model_dump_json(indent=1) + "\n" if as_json else recipe_text(name)


def format_methods(as_json: bool, width: int | None, name: str | None = None) -> str:
    """Format the rows as JSON, or as a table for people, as wide as the terminal where ``width`` is none.

    With ``name``, return that method alone with its published settings. Raises ConfigError for an unknown name.
    """
    if name is not None and name not in METHODS:
        raise ConfigError(f"method {name!r}: allowed: {', '.join(METHODS)}{did_you_mean(name, METHODS)}")
    chosen = [row for row in method_rows() if name in (None, row["method"])]
    if as_json:
        return json.dumps(chosen, indent=1, ensure_ascii=False) + "\n"
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("method", "published", "inputs", "networks beside the student", "passes per step", "paper"):
        table.add_column(title, no_wrap=title in ("method", "published"))
    for row in chosen:
        published = f"{row['venue']} {row['year']}" if row["paper"] else "-"
        rest = (row[name] or "-" for name in ("views", "keeps", "passes", "paper"))
        table.add_row(row["method"], published, *rest)
    console = Console(width=width, markup=False, highlight=False)
    with console.capture() as text:
        console.print(table)
        console.print(
            "\nf, b: a batch forward and backward through encoder and decoder; df, db: through a decoder alone."
        )
    if name is None:
        return text.get()
    own = published_lines(METHODS[name].published) or ["none declared"]
    shared = published_lines(METHODS[name].protocols) or ["none declared"]
    heading = "Published settings by data set, used by tables at scales paper, strong and resnet:"
    other = "Published protocol by data set, in whose place a table has its own:"
    said = [heading, *(f"  {line}" for line in own), "", other, *(f"  {line}" for line in shared)]
    return text.get() + "\n" + "\n".join(said) + "\n"
