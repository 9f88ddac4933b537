"""Draws the curves of three methods over the splits of ``digits`` from records of runs.

    python reports/render_core.py                         from reports/published/core/records, in place
    python reports/render_core.py --records runs --report-dir /tmp/core

Writes curves.png, table.md and table.csv. A cell that no run has filled stays empty.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from viladiff.cli.common import CommandParser
from viladiff.runs.record import RunRecord, load_record
from viladiff.runs.verify_and_gc import contradiction
from viladiff.tables.significance import one_precision

HERE = Path(__file__).parent / "published" / "core"
METHODS = {"supervised": "#777777", "semibaseline": "#2b7bba", "viladiff": "#c8553d"}
SPLITS = ("92", "183", "366", "732", "1464")


def read(directory: Path) -> pd.DataFrame:
    """One row a run and network stream; mIoU and the like in percent; none without a record.

    Raises ValueError for a record that does not match its name, and for records of different precision.
    """
    files = sorted([*directory.glob("*.json"), *directory.glob("*/record.json")])
    records = [load_record(file) for file in files]
    for file, record in zip(files, records, strict=True):
        if why := contradiction(record):
            raise ValueError(f"{file} does not match its name: {why}")
    one_precision(records, str(directory))
    return pd.DataFrame([row for record in records for row in _rows(record)])


def _rows(record: RunRecord) -> list[dict[str, object]]:
    base = {
        "method": record.config["method.name"],
        "split": record.config["data.split"],
        "seed": record.config["seed"],
        "seconds": record.train_seconds,
        "revision": str(record.git.get("revision") or "not known")[:12],
        **{f"pseudo {name}": 100 * value for name, value in record.pseudo_labels.items() if value is not None},
    }
    return [
        {
            **base,
            "network": network,
            "stream": stream,
            "headline": (network, stream) == (record.network, record.stream),
            **{
                name: 100 * scores[name] for name in ("miou", "boundary_iou", "trimap_miou") if scores[name] is not None
            },
        }
        for network, streams in record.scores.items()
        for stream, scores in streams.items()
    ]


def cell(values: pd.Series) -> str:
    """``56.0 ± 0.4 (3)``: mean, standard deviation over seeds, number of seeds."""
    spread = f" ± {values.std():.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread} ({len(values)})"


def table(frame: pd.DataFrame, by: list[str], score: str) -> pd.DataFrame:
    """Rows by ``by``, a column a split, an em dash where no run has been made."""
    wide = frame.groupby([*by, "split"])[score].apply(cell).unstack("split")
    return wide.reindex(columns=[split for split in SPLITS if split in wide]).fillna("—")


def markdown(wide: pd.DataFrame) -> str:
    flat = wide.reset_index()
    lines = ["| " + " | ".join(map(str, flat.columns)) + " |", "| " + " | ".join("---" for _ in flat.columns) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in flat.itertuples(index=False))])


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Mean over seeds with every single run as a dot."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharex=True)
    for axis, score, title in zip(axes, ("miou", "boundary_iou"), ("mIoU", "boundary IoU"), strict=True):
        for method, colour in METHODS.items():
            runs = frame[frame["headline"] & (frame["method"] == method)].assign(split=lambda f: f["split"].astype(int))
            if runs.empty:
                continue
            mean = runs.groupby("split")[score].mean()
            axis.plot(mean.index, mean, color=colour, marker="o", label=method)
            axis.scatter(runs["split"], runs[score], color=colour, s=12, alpha=0.45, linewidths=0)
        axis.set_xscale("log")
        axis.set_xticks([int(split) for split in SPLITS], SPLITS)
        axis.minorticks_off()
        axis.set_xlabel("labelled images")
        axis.set_ylabel(f"{title} (%)")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle("digits, 600 steps, simulated captions; dots are seeds", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=HERE / "records")
    parser.add_argument("--report-dir", type=Path, default=HERE)
    args = parser.parse_args()
    frame = read(args.records)
    if frame.empty:
        print(f"{args.records}: no records yet, nothing is drawn; python scripts/core_curves.py makes them")
        return
    head = frame[frame["headline"]]
    args.report_dir.mkdir(parents=True, exist_ok=True)
    parts = ["# The core on `digits`: three methods over the splits", ""]
    parts += [
        "Percent on 400 validation scenes, last step, mean ± standard deviation (seeds). Captions are simulated.",
        "",
    ]
    for score, name in (("miou", "mIoU"), ("boundary_iou", "Boundary IoU"), ("trimap_miou", "Trimap mIoU")):
        parts += [f"## {name}", "", markdown(table(head, ["method"], score)), ""]
    parts += [
        "## mIoU of every network and stream",
        "",
        markdown(table(frame, ["method", "network", "stream"], "miou")),
        "",
    ]
    for name in sorted(column for column in frame if str(column).startswith("pseudo ")):
        some = head.dropna(subset=[name])
        title = str(name).removeprefix("pseudo ")
        parts += [f"## Pseudo-labels on validation images: {title}", "", markdown(table(some, ["method"], name)), ""]
    parts += ["## Seconds of training, one thread", "", markdown(table(head, ["method"], "seconds")), ""]
    parts += ["The machine did other work beside most runs, so that these seconds do not compare methods.", ""]
    revisions = head.groupby("method")["revision"].agg(lambda found: ", ".join(sorted(set(found))))
    parts += ["Code revisions: " + "; ".join(f"{method}: {found}" for method, found in revisions.items()) + ".", ""]
    parts += ["Made by `python reports/render_core.py` from the records beside this page.", ""]
    (args.report_dir / "table.md").write_text("\n".join(parts))
    frame.to_csv(args.report_dir / "table.csv", index=False)
    draw(frame, args.report_dir / "curves.png")


if __name__ == "__main__":
    main()
