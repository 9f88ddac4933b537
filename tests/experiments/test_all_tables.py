"""All tables at once: a run that stands in several of them counts once, and what cannot be timed is said."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from viladiff.cli.tables import add_table_options
from viladiff.evaluation.devices import DEVICES
from viladiff.evaluation.step_time import Load
from viladiff.experiments.all_tables import merged, outline_all, share_of, totals
from viladiff.tables.estimate import Target, estimate
from viladiff.training.run_cost import CountedStep, CountedSteps

HEAD = """
title = "Table"
[base]
"method.name" = "supervised"
[scale.smoke]
datasets = { voc = "digits" }
seeds = [0, 1]
threads = 1
seconds_per_step = 1
seconds_overhead = 5
set = { "train.steps" = 10 }
[scale.paper]
[[columns]]
label = "92"
set = { "data.dataset" = "voc", "data.split" = "92" }
[[columns]]
label = "183"
set = { "data.dataset" = "voc", "data.split" = "183" }
"""
ONE = '[[rows]]\nlabel = "base"\n[[rows]]\nlabel = "slow"\nset = { "optim.lr" = 0.002 }\n'
OTHER = '[[rows]]\nlabel = "the same"\n[[rows]]\nlabel = "later"\nrequires = "method.clip.weights"\n'


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two tables: 2 and 1 rows that can be run, of which one is the same, on 2 columns and 2 seeds."""
    # or committed records would be as good as one's own
    monkeypatch.setattr("viladiff.core.installation._PACKAGE", tmp_path / "viladiff")
    found = [tmp_path / "one.toml", tmp_path / "other.toml"]
    for path, rows in zip(found, (ONE, OTHER), strict=True):
        path.write_text(HEAD + rows)
    return found


def asked(tmp_path: Path, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_table_options(parser)
    return parser.parse_args(["--runs-dir", str(tmp_path / "runs"), "--max-concurrent", "2", *words])


def test_runs_that_tables_share_count_once(tmp_path: Path, paths: list[Path]) -> None:
    args = asked(tmp_path, "--scale", "smoke", "--hourly-price", "3.6")
    shares = [share_of(path, args) for path in paths]
    assert [(one.cells, len(one.runs), len(one.waiting)) for one in shares] == [(8, 8, 0), (4, 4, 1)]
    assert shares[1].runs < shares[0].runs, "the second table needs nothing that the first has not"
    plan, job = merged(shares)
    assert plan is not None and job is not None and len(plan.runs) == 8 and len(plan.cells) == 12
    lines = totals(shares, args)
    assert lines["cells"] == "12 with 8 different runs" and lines["done"] == "0 of 8 runs"
    assert estimate(plan, job.store).seconds == pytest.approx(8 * (10 + 5))
    assert lines["time"].startswith("2 min 0 s of work left, 1 min 0 s with 2 at once (8 runs remaining: 8 estimated")
    assert lines["cost"] == "0.06 at 3.60 an hour (--hourly-price)", "60 s of the machine"
    assert lines["unavailable"] == "1 rows, not counted: 'later' requires method.clip.weights (other)"
    assert lines["shared runs"].startswith("a run of several tables is in each table's")


def test_the_outline_shows_what_each_table_adds(
    tmp_path: Path, paths: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert outline_all(paths, asked(tmp_path, "--scale", "smoke")) == 0
    rows = {line.split()[0]: line.split()[1:5] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["one"] == ["8", "8", "8", "0"] and rows["other"] == ["4", "4", "0", "0"]
    assert "cost" not in rows and rows["table"] == ["cells", "runs", "new", "runs"], "no column without an entry"


def test_without_the_data_equal_settings_are_one_run_of_the_published_size(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    h100 = DEVICES["h100"]
    second = Load("product", True, int(h100.half * h100.sustained), 0, 1)
    monkeypatch.setattr(CountedSteps, "of", lambda steps, run: CountedStep((second,), 5 * 2**30, 2**30, 10**15))
    monkeypatch.setattr("viladiff.experiments.target_device.visible_gpus", lambda: 0)
    args = asked(tmp_path, "--scale", "paper")
    shares = [share_of(path, args) for path in paths]
    assert [(one.cells, len(one.runs)) for one in shares] == [(12, 12), (6, 6)] and shares[1].runs < shares[0].runs
    lines = totals(shares, args)
    assert lines["cells"] == "18 with 12 different runs" and "time" not in lines
    assert lines["no data here"].startswith("one, other (runtime.data_root: must be set")
    assert lines["no data here"].endswith("; costed with the published number of images, done runs not known")
    assert lines["basis"] == "12 runs remaining: 12 estimated from their counted work" and "too large" not in lines
    steps = {one.changed.get("data.split", "183"): one.steps for share in shares for one in share.plan.runs.values()}  # type: ignore[union-attr]
    assert set(steps) == {"92", "183"}
    hours = sum(6 * count for count in steps.values()) / 3600
    assert lines["GPU-hours"].startswith(f"{hours:,.0f} on h100, estimated to within")
    money = float(lines["cost"].split()[0].replace(",", ""))
    assert money == pytest.approx(hours * (h100.price or 0), abs=0.5) and "3.00 an hour for one h100" in lines["cost"]
    assert outline_all(paths, args) == 0
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("one ")]
    assert row[1:5] == ["12", "12", "12", "–"] and row[-4:-1] == [
        f"{hours:,.0f}",
        "5.0",
        f"{hours * (h100.price or 0):,.0f}",
    ]
    small = totals(shares, args, Target(h100._replace(memory=4 * 2**30)))
    wanted = "for the memory of h100, and counted: one 12 of 12 runs, up to 5 GiB (supervised); other 6 of 6 runs"
    assert small["too large"].startswith(wanted)
    assert totals(shares, asked(tmp_path, "--scale", "paper", "--device", "a100"))["GPU-hours"].count("a100") == 1
    with pytest.raises(ValueError, match=r"--device h10: unknown; allowed: cpu, h200, h100.*did you mean 'h100'"):
        totals(shares, asked(tmp_path, "--scale", "paper", "--device", "h10"))


def test_what_is_of_one_table_alone_is_refused(tmp_path: Path, paths: list[Path]) -> None:
    with pytest.raises(ValueError, match="--rows is not supported by `plan all`"):
        outline_all(paths, asked(tmp_path, "--scale", "smoke", "--rows", "1"))
    broken = paths[0].read_text().replace('"optim.lr"', '"optim.rate"')
    paths[0].write_text(broken)
    with pytest.raises(ValueError, match=r"one\.toml: rows\[2\] 'slow': optim\.rate: no such field"):
        outline_all(paths, asked(tmp_path, "--scale", "smoke"))
    quick = share_of(paths[1], asked(tmp_path, "--scale", "digits"))
    assert quick.cells == 0 and quick.absent and quick.why == "has no scale digits"
