"""Write the page of the runs on ``dev`` that the protocol and methods' settings were chosen by, from their records.

    python reports/render_protocol.py                    from reports/published/protocol/records, in place
    python reports/render_protocol.py --records runs --report-dir /tmp/protocol

Writes table.md. A cell without a run stays empty.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from viladiff.core.messages import format_value
from viladiff.report.table.exports import pipes
from viladiff.runs.gradient_shares import Triple, by_thirds
from viladiff.runs.record import RunRecord, load_record
from viladiff.runs.verify_and_gc import contradiction
from viladiff.tables.significance import one_precision

HERE = Path(__file__).parent / "published" / "protocol"
ABOUT = (
    "All scores are of dev, in percent; they served to choose settings and compare with no score of test. A trial has "
    "183 labels and seed 0. Labelled: share of pixels of dev that get a pseudo-label. Wrong: share of all pixels that "
    "get a wrong one; with a lower threshold, that which labels as many pixels as refinement does. Fields are those "
    "that differ from the method's first run with defaults: of ViLaDiff, from its initial settings."
)
APART = ("data.dataset", "data.split", "data.split_seed", "seed", "train.steps", "method.name")
"""Fields that place a run in a table; all others that differ from their defaults make it a trial."""


def read_records(directory: Path) -> list[RunRecord]:
    """Return the records below ``directory`` in the order in which their runs ended.

    Raises ValueError for a record that does not match its name, for records of different precision, for a run that was
    not scored on ``dev``, and for one whose labelled list is not its seed's own: rows compare runs of one list.
    """
    files = sorted([*directory.glob("*.json"), *directory.glob("*/record.json")])
    records = [load_record(file) for file in files]
    for file, record in zip(files, records, strict=True):
        if why := contradiction(record):
            raise ValueError(f"{file} does not match its name: {why}")
        if record.config["eval.split"] != "dev":
            raise ValueError(f"{file}: eval.split = {record.config['eval.split']!r}; this page is of dev alone")
        own, seed = record.config.get("data.split_seed"), record.config["seed"]
        if str(record.config["data.split"]) != "all" and own != seed:
            raise ValueError(f"{file}: data.split_seed = {own}, seed = {seed}; this page is of each seed's own list")
    one_precision(records, str(directory))
    return sorted(records, key=lambda record: record.finished or "")


def own_fields(record: RunRecord, records: Sequence[RunRecord]) -> dict[str, object]:
    """Return the fields of a run that differ from its method's first run with defaults and do not place it in a table.

    Later code has other defaults, so that the fields which a run changes do not tell what it has in common with others.
    Without a run with defaults, and of fields that it does not know, they are the fields that the run changes.
    """
    plain = (one for one in records if one.config["method.name"] == record.config["method.name"])
    base = next((one.config for one in plain if not _settings(one.changed)), {})
    different = {name: value for name, value in record.config.items() if name in base and value != base[name]}
    return _settings(different | {name: value for name, value in record.changed.items() if name not in base})


def _settings(fields: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if name not in APART and not name.startswith("runtime.")}


def written(fields: dict[str, object], none: str = "defaults") -> str:
    """Return ``field=value`` pairs without the prefix ``method.``; ``none`` where there are none."""
    pairs = (f"{name.removeprefix('method.')}={format_value(value)}" for name, value in sorted(fields.items()))
    return ", ".join(f"`{pair}`" for pair in pairs) or none


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def criteria(records: Sequence[RunRecord]) -> list[str]:
    """Return one row a method, split, length and changed fields, with a cell a seed, of runs of more than one seed."""
    cells: dict[tuple[str, str, int, str], dict[int, float | None]] = defaultdict(dict)
    for record in records:
        config = record.config
        key = (
            config["method.name"],
            str(config["data.split"]),
            int(config["train.steps"]),
            written(own_fields(record, records)),
        )
        cells[key][int(config["seed"])] = record.miou
    seeds = sorted({seed for found in cells.values() for seed in found})
    rows = []
    for (method, split, steps, fields), found in sorted(cells.items()):
        values = [value for value in found.values() if value is not None]
        mean = f"{100 * statistics.mean(values):.1f}" if len(values) > 1 else ""
        rows.append([f"`{method}`", split, str(steps), fields, *(percent(found.get(seed)) for seed in seeds), mean])
    return pipes([["method", "labels", "steps", "fields", *(f"seed {seed}" for seed in seeds), "mean"], *rows])


def trial_numbers(records: Sequence[RunRecord]) -> dict[str, tuple[str, int]]:
    """Return method and number of each trial by its run's name, in the order in which trials ended.

    A trial is a run of seed 0 with 183 labels, the protocol's length and encoder, and no oracle.
    """
    found: dict[str, tuple[str, int]] = {}
    counts: dict[str, int] = defaultdict(int)
    for record in records:
        config = record.config
        fixed = str(config["data.split"]), config["seed"], config["train.steps"]
        plain = config.get("method.pseudo.oracle", "none") == "none" and not encoder(record, records)
        if fixed == ("183", 0, 1500) and plain:
            counts[config["method.name"]] += 1
            found[record.run_id] = config["method.name"], counts[config["method.name"]]
    return found


def trials(records: Sequence[RunRecord], method: str) -> list[str]:
    """Return the trials of a method's settings."""
    rows = []
    numbers = trial_numbers(records)
    for record in records:
        if numbers.get(record.run_id, ("", 0))[0] != method:
            continue
        streams = record.scores[record.network]
        quality = record.pseudo_labels
        fusion = streams["fusion"]["miou"] if "fusion" in streams else None
        before, after = quality.get("before/coverage", quality.get("coverage")), quality.get("after/coverage")
        wrong, later = quality.get("before/wrong"), quality.get("after/wrong")
        shown = (record.miou, fusion, before, wrong, after, later, quality.get("matched/wrong"))
        number = str(numbers[record.run_id][1])
        rows.append([number, written(own_fields(record, records)), *map(percent, shown)])
    header = [
        "trial",
        "fields",
        "visual mIoU",
        "fusion mIoU",
        "labelled",
        "wrong",
        "refined: labelled",
        "refined: wrong",
        "a lower threshold: wrong",
    ]
    return pipes([header, *rows])


def encoder(record: RunRecord, records: Sequence[RunRecord]) -> str:
    """Return the fields of ``model`` that differ from the method's run with defaults; empty for the shipped encoder."""
    return written({k: v for k, v in own_fields(record, records).items() if k.startswith("model.")}, "")


def encoders(records: Sequence[RunRecord]) -> list[str]:
    """Return a row an encoder: mIoU by seeds of ``supervised`` and ``semibaseline``, and of all labelled."""
    names = dict.fromkeys(encoder(record, records) for record in records if str(record.config["data.split"]) == "all")
    rows = []
    for name in sorted(names):
        mine = [one for one in records if encoder(one, records) == name and one.config["train.steps"] == 1500]
        other = {"pseudo", "oracle"}
        plain = [one for one in mine if not any(set(f.split(".")) & other for f in own_fields(one, records))]
        cells = []
        for method, split in (("supervised", "183"), ("semibaseline", "183"), ("supervised", "all")):
            found = {
                one.config["seed"]: percent(one.miou)
                for one in plain
                if (one.config["method.name"], str(one.config["data.split"])) == (method, split)
            }
            cells.append(", ".join(found[seed] for seed in sorted(found)))
        rows.append([name or "the shipped encoder", *cells])
    head = ["encoder", "`supervised`, 183 labels", "`semibaseline`, 183 labels", "all labelled"]
    return pipes([head, *rows])


def shares(records: Sequence[RunRecord]) -> list[str]:
    """Return each term's share of the gradient by thirds of training, in percent: a column a run that measured it."""
    runs = [record for record in records if record.gradient_shares]
    found = [{(one.place, one.term): one.shares for one in by_thirds(run.gradient_shares, run.steps)} for run in runs]
    names = list(dict.fromkeys(name for one in found for name in one))
    rows = [[f"`{place}`", f"`{term}`", *(_thirds(one.get((place, term))) for one in found)] for place, term in names]
    numbers = trial_numbers(records)
    heads = []
    for run in runs:
        method, number = numbers.get(run.run_id, ("", 0))
        heads.append(f"`{method}` {number}" if number else written(own_fields(run, records)))
    return pipes([["parameters", "term", *heads], *rows])


def _thirds(share: Triple | None) -> str:
    return "" if share is None else " · ".join(percent(value) or "–" for value in share)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the page of the runs on dev that choices were made by.")
    parser.add_argument("--records", type=Path, default=HERE / "records", help="directory of records")
    parser.add_argument("--report-dir", type=Path, default=HERE, help="directory of the page")
    args = parser.parse_args()
    records = read_records(args.records)
    methods = list(dict.fromkeys(record.config["method.name"] for record in records))
    lines = ["# Runs on dev", "", ABOUT, ""]
    for method in methods:
        lines += [f"## Trials of `{method}`", "", *trials(records, method), ""]
    about = "Percent in the first, middle and last third of training; columns are trials."
    lines += ["## Encoders", "", "mIoU by seed, on dev.", "", *encoders(records), ""]
    lines += ["## Shares of the gradient", "", about, "", *shares(records), ""]
    args.report_dir.mkdir(parents=True, exist_ok=True)
    (args.report_dir / "table.md").write_text(
        "\n".join([*lines, "## All runs", "", *criteria(records), ""]), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
