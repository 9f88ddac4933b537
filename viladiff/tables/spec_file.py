"""Reader of a table's file, with checks of the whole: labels, scales, sets, claims, oracles.

Nothing here loads torch: ``viladiff.tables.cells`` checks the paths and values of fields.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from viladiff.config.base import Section, did_you_mean
from viladiff.config.toml_file import entry_name, format_toml_error, listed, read_toml, strange_values
from viladiff.core.messages import fault_lines
from viladiff.tables.recipes.recipe import recipe_names
from viladiff.tables.spec import (
    AMONG,
    ORACLE,
    RESERVED,
    ROWS_OF,
    Claim,
    Column,
    Criterion,
    Gap,
    Layer,
    Row,
    Scale,
    Table,
    table_layers,
)

_PATH = re.compile(r"[a-z][a-z_]*(\.[a-z][a-z_]*)*")


def load_table(path: Path | str) -> Table:
    """Read the table in a TOML file; ``cells`` validates the paths and values of fields.

    Raises ValueError with a line for each error: file, entry (rows and the like are counted from 1), value, allowed
    values.
    """
    path = Path(path)
    tree = read_toml(path)
    faults = [*_unknown_at_top(tree), *strange_values(tree)]
    if not faults:
        try:
            # JSON's strict mode takes an array for a tuple, which TOML cannot write.
            table = Table.model_validate_json(json.dumps({**tree, "name": path.stem}))
        except ValidationError as error:
            faults = [format_toml_error(item, tree, Table, SECTIONS) for item in error.errors(include_url=False)]
        else:
            kinds = (
                _label_faults,
                _row_faults,
                _scale_faults,
                _beside_faults,
                _set_faults,
                _claim_faults,
                _oracle_faults,
                _gap_faults,
            )
            faults = [fault for kind in kinds for fault in kind(table)]
    if faults:
        raise ValueError(fault_lines(path, faults))
    return table


def _unknown_at_top(tree: Mapping[str, Any]) -> Iterator[str]:
    if "name" in tree:
        yield f"name = {tree['name']!r}: a table is named by its file; remove the line"


SECTIONS: dict[str, type[Section]] = {
    "scale": Scale,
    "columns": Column,
    "rows": Row,
    "claims": Claim,
    "criteria": Criterion,
    "gaps": Gap,
}


def _label_faults(table: Table) -> Iterator[str]:
    for kind in ("rows", "columns"):
        yield from _twice(kind, [one.label for one in getattr(table, kind)])
    yield from _twice("claims", [claim.text for claim in table.claims])
    for where, seeds in [("", table.seeds), *((f"scale.{name}.", one.seeds) for name, one in table.scale.items())]:
        if seeds is not None and len(set(seeds)) < len(seeds):
            yield f"{where}seeds = {list(seeds)}: a seed is named twice"
    for name, one in table.scale.items():
        for label, seeds in one.column_seeds.items():
            if more := sorted(set(seeds) - set(one.seeds or table.seeds)):
                allowed = f"allowed: {list(one.seeds or table.seeds)}, the seeds of the scale"
                yield f"scale.{name}: column_seeds: {label!r} has {more}; {allowed}"
            if len(set(seeds)) < len(seeds):
                yield f"scale.{name}: column_seeds: {label!r} has {list(seeds)}: a seed is named twice"


def _twice(kind: str, labels: Sequence[str]) -> Iterator[str]:
    for i, label in enumerate(labels):
        if label in labels[:i]:
            yield f"{entry_name(kind, i, label)}: {kind}[{labels.index(label) + 1}] is called the same"


def _row_faults(table: Table) -> Iterator[str]:
    for i, row in enumerate(table.rows):
        entry = entry_name("rows", i, row.label)
        if row.control and row.paper:
            yield f"{entry}: paper = {list(row.paper)}: a control is ours, so the paper has no numbers for it"
        elif row.paper and len(row.paper) != len(table.columns):
            yield f"{entry}: paper = {list(row.paper)}: {len(row.paper)} numbers for {len(table.columns)} columns"
        if row.requires and not _PATH.fullmatch(row.requires):
            yield f"{entry}: requires = {row.requires!r}: not a dotted path such as 'method.clip.weights'"
        if len(set(row.components)) < len(row.components):
            yield f"{entry}: components = {list(row.components)}: a component is named twice"


def _scale_faults(table: Table) -> Iterator[str]:
    """Yield labels and replaced values that the table does not have."""
    rows, columns = [row.label for row in table.rows], [column.label for column in table.columns]
    for i, row in enumerate(table.rows):
        for name in row.scales:
            if name not in table.scale:
                allowed = f"allowed: {', '.join(table.scale)}{did_you_mean(name, table.scale)}"
                yield f"{entry_name('rows', i, row.label)}: scales = {name!r}: {allowed}"
    own = {"reference": table.reference, "headline": table.headline, "supervised": table.supervised}
    asked = [(f"{name} = {label!r}", label, rows) for name, label in own.items() if label]
    for name, one in table.scale.items():
        asked += [(f"scale.{name}: rows = {label!r}", label, rows) for label in one.rows]
        asked += [(f"scale.{name}: columns = {label!r}", label, columns) for label in one.columns]
        asked += [(f"scale.{name}: column_seeds: {label!r}", label, columns) for label in one.column_seeds]
    for said, label, known in asked:
        if label not in known:
            yield f"{said}: no such label{did_you_mean(label, known) or '.'} {listed(known)}"
    there = {f"{path}={value}" for _, fields in table_layers(table) for path, value in fields.items()}
    for name, one in table.scale.items():
        if one.recipe and one.recipe not in recipe_names():
            allowed = f"allowed: {', '.join(recipe_names())}{did_you_mean(one.recipe, recipe_names())}"
            yield f"scale.{name}: recipe = {one.recipe!r}: {allowed}"
        if one.recipe and one.datasets:
            here = f"scale.{name}: recipe = {one.recipe!r}"
            yield f"{here}: of the literature's data sets, and datasets names others; keep one of the two"
        for key in one.substitute.keys() - there:
            yield f"scale.{name}: substitute: {key!r}: nothing in the table sets this{did_you_mean(key, there)}"


def _beside_faults(table: Table) -> Iterator[str]:
    """Yield missing scales and rows of comparisons with published runs."""
    for name, one in table.scale.items():
        other, here = one.published_runs, f"scale.{name}: published_runs = {one.published_runs!r}"
        if other and other not in table.scale:
            yield f"{here}: no such scale{did_you_mean(other, table.scale)}. Allowed: {', '.join(table.scale)}"
        elif other and table.scale[other].published_runs:
            why = "the scale itself" if other == name else "a scale that shows published runs itself"
            yield f"{here}: {why}; name the scale that --publish runs at, such as 'digits'"
    labels = [row.label for row in table.rows]
    for i, wanted in enumerate(table.criteria):
        entry = entry_name("criteria", i, wanted.row)
        for key, label in (("row", wanted.row), ("above", wanted.above)):
            if label and label not in labels:
                yield f"{entry}: {key} = {label!r}: no such label{did_you_mean(label, labels) or '.'} {listed(labels)}"
        if (wanted.deviations is None) == (wanted.points is None):
            yield f"{entry}: deviations = {wanted.deviations}, points = {wanted.points}: give one of the two"
        elif (wanted.deviations is None) != (not wanted.above) or wanted.above == wanted.row:
            yield f"{entry}: above = {wanted.above!r}: another row where deviations is given, and none where points is"
    if table.criteria and not any(one.published_runs for one in table.scale.values()):
        yield "criteria: no scale has published_runs, which they are measured against"


def _gap_faults(table: Table) -> Iterator[str]:
    labels = [row.label for row in table.rows]
    for i, gap in enumerate(table.gaps):
        for field, label in (("row", gap.row), ("low", gap.low), ("high", gap.high)):
            if label not in labels:
                where = entry_name("gaps", i, gap.row)
                close = did_you_mean(label, labels) or "."
                yield f"{where}: {field} = {label!r}: no such label{close} {listed(labels)}"


def _set_faults(table: Table) -> Iterator[str]:
    scales = [Layer(f"scale.{name}", one.set) for name, one in table.scale.items()]
    scales += [
        Layer(f"scale.{name}: shared_method_fields", one.shared_method_fields) for name, one in table.scale.items()
    ]
    scales += [
        Layer(f"scale.{name}: substitute for {key}", fields)
        for name, one in table.scale.items()
        for key, fields in one.substitute.items()
    ]
    for entry, fields in (*table_layers(table), *scales):
        for path, value in fields.items():
            here = f"{entry}: {path} = {value!r}"
            if path in RESERVED:
                yield f"{here}: not set here: {RESERVED[path]}"
            elif isinstance(value, dict):
                yield f'{here}: write the whole path in quotes, as in "{path}.{next(iter(value), "field")}" = ...'
            elif not _PATH.fullmatch(path):
                yield f"{here}: not a dotted path such as 'train.steps'"
    yield from published_lists(table.scale)
    for name, one in table.scale.items():
        if one.threads is not None and "runtime.threads" in one.set:
            also = one.set["runtime.threads"]
            yield f"scale.{name}: threads = {one.threads} and runtime.threads = {also!r}: keep one"
        for entry, fields in table_layers(table):
            asked = fields.get("data.dataset")
            if one.datasets and asked is not None and str(asked) not in one.datasets:
                yield (
                    f"scale.{name}: datasets = {one.datasets}: does not say what becomes of {asked!r}, "
                    f"which {entry} asks for{did_you_mean(str(asked), one.datasets)}"
                )


def published_lists(scales: Mapping[str, Scale]) -> Iterator[str]:
    """Yield an error for a scale of the paper's own data whose seeds draw lists of their own."""
    for name, one in scales.items():
        if one.split_per_seed and (name == "paper" or one.recipe):
            yield (
                f"scale.{name}: split_per_seed = true: the paper's lists are published, so that all seeds train on "
                "them; allowed at scales of built-in data; leave it out"
            )


def _claim_faults(table: Table) -> Iterator[str]:
    rows, columns = [row.label for row in table.rows], [column.label for column in table.columns]
    for i, claim in enumerate(table.claims):
        entry = entry_name("claims", i, claim.text)
        fewest, most = ROWS_OF[claim.kind]
        if len(claim.rows) < fewest or (most is not None and len(claim.rows) > most):
            wanted = str(fewest) if fewest == most else f"{fewest} or more"
            yield f"{entry}: rows = {list(claim.rows)}: {len(claim.rows)} rows, but {claim.kind} names {wanted}"
        named = (("rows", claim.rows, rows), ("columns", claim.columns, columns), ("among", claim.among, rows))
        for kind, asked, known in named:
            for label in asked:
                if label not in known:
                    close = did_you_mean(label, known) or "."
                    yield f"{entry}: {kind} = {label!r}: no such label{close} {listed(known)}"
            # Of two gains, the lower row of one may well be the higher one of the other.
            if len(set(asked)) < len(asked) and (kind, claim.kind) != ("rows", "gain_exceeds"):
                yield f"{entry}: {kind} = {list(asked)}: a label is named twice"
        if claim.kind == "gain_shrinks" and len(claim.columns or columns) < 2:
            yield f"{entry}: a gain shrinks from column to column, so it takes two at least"
        if claim.among and claim.kind not in AMONG:
            yield f"{entry}: among = {list(claim.among)}: only {', '.join(AMONG)} compare with other rows"
        if claim.tolerance and claim.margin:
            yield f"{entry}: tolerance = {claim.tolerance:g} and margin = {claim.margin:g}: keep one"
        if claim.kind in ("less_stable", "differs") and (claim.tolerance or claim.margin):
            yield f"{entry}: {claim.kind} takes neither tolerance nor margin"


def _oracle_faults(table: Table) -> Iterator[str]:
    """Yield rows that read true masks without a mark, and claims that would rank them among methods."""
    scales = [Layer(f"scale.{name}", {**one.set, **one.shared_method_fields}) for name, one in table.scale.items()]
    columns = [Layer(entry_name("columns", i, one.label), one.set) for i, one in enumerate(table.columns)]
    for entry, fields in (Layer("base", table.base), *scales, *columns):
        if fields.get(ORACLE, "none") != "none":
            yield f"{entry}: {ORACLE} = {fields[ORACLE]!r}: set it in a row with control = true, which is a ceiling"
    ceilings = {row.label for row in table.rows if row.oracle}
    for i, row in enumerate(table.rows):
        if row.oracle and not row.control:
            yield f"{entry_name('rows', i, row.label)}: {ORACLE} = {row.set[ORACLE]!r}: takes control = true"
    for name, label in (("reference", table.reference), ("headline", table.headline), ("supervised", table.supervised)):
        if label in ceilings:
            yield f"{name} = {label!r}: a row that reads true masks ({ORACLE}) is a ceiling; name another"
    for i, claim in enumerate(table.claims):
        for label in (*claim.rows, *claim.among):
            if label in ceilings and (claim.source == "paper" or claim.kind in (*AMONG, "superset_increases")):
                yield (
                    f"{entry_name('claims', i, claim.text)}: {label!r} reads true masks ({ORACLE}): a ceiling is in "
                    "no ranking; leave it out, or ask source = 'ours' with kind = 'higher'"
                )
