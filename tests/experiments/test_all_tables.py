"""All tables at once: a run that stands in several of them counts once, and what cannot be timed is said."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from viladiff.cli.tables import add_table_options
from viladiff.experiments.all_tables import merged, outline_all, share_of, totals
from viladiff.tables.estimate import estimate

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
    assert [(one.cells, len(one.runs), one.waiting) for one in shares] == [(8, 8, 0), (4, 4, 1)]
    assert shares[1].runs < shares[0].runs, "the second table needs nothing that the first has not"
    plan, job = merged(shares)
    assert plan is not None and job is not None and len(plan.runs) == 8 and len(plan.cells) == 12
    lines = totals(shares, args)
    assert lines["cells"] == "12 with 8 different runs" and lines["done"] == "0 of 8 runs"
    assert estimate(plan, job.store).seconds == pytest.approx(8 * (10 + 5))
    assert lines["time"].startswith("2 min 0 s of work left, 1 min 0 s with 2 at once (8 runs remaining: 8 estimated")
    assert lines["cost"] == "0.06", "60 s of the machine at 3.6 an hour"
    assert lines["unavailable"].startswith("1 rows")


def test_the_outline_shows_what_each_table_adds(
    tmp_path: Path, paths: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert outline_all(paths, asked(tmp_path, "--scale", "smoke")) == 0
    rows = {line.split()[0]: line.split()[1:5] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["one"] == ["8", "8", "8", "0"] and rows["other"] == ["4", "4", "0", "0"]
    assert "cost" not in rows


def test_without_the_data_equal_settings_are_one_run_and_nothing_is_timed(tmp_path: Path, paths: list[Path]) -> None:
    args = asked(tmp_path, "--scale", "paper")
    shares = [share_of(path, args) for path in paths]
    assert [(one.cells, len(one.runs)) for one in shares] == [(12, 12), (6, 6)] and shares[1].runs < shares[0].runs
    lines = totals(shares, args)
    assert lines["cells"] == "18 with 12 different runs" and "time" not in lines and "cost" not in lines
    assert lines["one"].startswith("not timed: ") and len(lines["one"]) > 20


def test_what_is_of_one_table_alone_is_refused(tmp_path: Path, paths: list[Path]) -> None:
    with pytest.raises(ValueError, match="--rows is not supported by `plan all`"):
        outline_all(paths, asked(tmp_path, "--scale", "smoke", "--rows", "1"))
    broken = paths[0].read_text().replace('"optim.lr"', '"optim.rate"')
    paths[0].write_text(broken)
    with pytest.raises(ValueError, match=r"one\.toml: rows\[2\] 'slow': optim\.rate: no such field"):
        outline_all(paths, asked(tmp_path, "--scale", "smoke"))
    quick = share_of(paths[1], asked(tmp_path, "--scale", "digits"))
    assert quick.cells == 0 and quick.why == "has no scale digits"
