"""The display of a running table: what it shows is what it was told, at any width."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping

import pytest
from rich.console import Console

from viladiff.experiments.live_table import LiveTable
from viladiff.runs.job import Event, ExecutionSettings, PlannedRun
from viladiff.tables.plan import Plan, PlannedCell
from viladiff.tables.spec import Column, Row, Scale, Table


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plan(rows: int = 2, columns: int = 2, seeds: int = 1, steps: int = 100) -> Plan:
    table = Table(
        name="table9",
        title="Table 9. Parts [bold]",
        scale={"quick": Scale()},
        columns=tuple(Column(label=f"column {c}") for c in range(columns)),
        rows=tuple(Row(label=f"row {r} with a rather long name", control=r == 1) for r in range(rows)),
    )
    cells = tuple(
        PlannedCell(r, c, s, f"{r:x}{c:x}{s:x}".ljust(16, "0"))
        for s in range(seeds)
        for r in range(rows)
        for c in range(columns)
    )
    runs = {
        cell.run_id: PlannedRun(
            run_id=cell.run_id, changes={}, title=f"row {cell.row}, column {cell.column}", steps=steps, changed={}
        )
        for cell in cells
    }
    return Plan(table, "quick", tuple(range(rows)), tuple(range(columns)), tuple(range(seeds)), cells, runs)


def live(
    what: Plan, done: Mapping[str, float | None] | None = None, width: int = 80, terminal: bool = True, height: int = 60
) -> tuple[LiveTable, Clock, io.StringIO]:
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, color_system=None, height=height)
    return LiveTable(what, done or {}, 2, console=console, clock=clock), clock, out


def picture(shown: LiveTable, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(shown.render())
    return out.getvalue()


A, B, C, D = (name.ljust(16, "0") for name in ("000", "010", "100", "110"))


def test_each_state_of_a_run_has_its_look() -> None:
    shown, clock, _ = live(plan(), {A: 0.6123})
    shown.hear(Event("started", B))
    clock.now = 4
    shown.hear(Event("progress", B, step=10, steps=100, loss=2.5))
    clock.now = 8
    shown.hear(Event("progress", B, step=30, steps=100, loss=1.25))
    shown.hear(Event("failed", C, step=3, message="nan: the loss is nan"))
    text = picture(shown)
    row = next(line for line in text.splitlines() if line.startswith(" 1  row 0"))
    assert row.split()[-2:] == ["61.2", "30%"]
    assert "failed" in next(line for line in text.splitlines() if line.startswith(" a  row 1"))
    assert "·" in next(line for line in text.splitlines() if line.startswith(" a  row 1"))
    running = next(line for line in text.splitlines() if line.startswith("row 0, column 1"))
    assert "30/100" in running and "loss 1.250" in running and "14 s" in running  # 70 steps at 0.2 s
    assert "1 of 4 runs done, 1 running, 1 failed" in text
    assert "Table 9. Parts [bold]" in text


def test_time_left_comes_from_measured_speeds_and_slots() -> None:
    shown, clock, _ = live(plan(rows=2, columns=2))
    assert shown.left() is None
    shown.hear(Event("started", A))
    clock.now = 50
    shown.hear(Event("done", A, miou=0.5))
    # 0.5 s a step; three runs of 100 steps remain on two slots: two, then one.
    assert shown.left() == pytest.approx(100)
    for name in (B, C, D):
        shown.hear(Event("done", name, miou=0.5))
    assert shown.left() == 0


def test_rows_have_speeds_of_their_own_and_a_lone_long_run_counts_whole() -> None:
    shown, clock, _ = live(plan(rows=2, columns=2))
    shown.hear(Event("started", A))
    shown.hear(Event("started", C))
    clock.now = 10
    shown.hear(Event("done", A, miou=0.5))
    clock.now = 90
    shown.hear(Event("done", C, miou=0.5))
    assert shown.left() == pytest.approx(90)  # B takes 10 s beside D, which takes 90 s alone


def test_a_run_that_was_resumed_does_not_look_fast() -> None:
    shown, clock, _ = live(plan(rows=1, columns=2))
    shown.hear(Event("started", A))
    clock.now = 1
    shown.hear(Event("progress", A, step=90, steps=100))
    clock.now = 5
    shown.hear(Event("done", A, miou=0.5))
    assert shown.left() == pytest.approx(50)


def test_seeds_share_a_cell() -> None:
    shown, _, _ = live(plan(rows=1, columns=1, seeds=3), {A: 0.5, "001".ljust(16, "0"): 0.6})
    assert "55.0 2/3" in picture(shown)
    shown.hear(Event("progress", "002".ljust(16, "0"), step=50, steps=100))
    assert "55.0 2/3 50%" in picture(shown)
    shown.hear(Event("done", "002".ljust(16, "0"), miou=0.7))
    assert "60.0" in picture(shown) and "/3" not in picture(shown).splitlines()[2]


@pytest.mark.parametrize("width", [80, 200])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_lost(width: int) -> None:
    shown, clock, _ = live(plan(rows=3, columns=5, seeds=3), width=width)
    for i, name in enumerate(shown.runs):
        shown.hear(Event("started", name))
        clock.now += 1
        shown.hear(Event("progress", name, step=5, steps=100, loss=123456.789))
        if i % 2:
            shown.hear(Event("done", name, miou=0.123456))
    text = picture(shown, width)
    assert max(map(len, text.splitlines())) <= width
    assert "and 15 more" in text and text.count("123456.789") == 8
    assert text.count("12.3") >= 7 and "22 of 45 runs done" in text


@pytest.mark.parametrize("height", [3, 5, 8, 12, 18, 24, 40])
@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("active", [0, 1, 12])
def test_a_low_screen_keeps_the_totals_and_what_is_under_way(height: int, width: int, active: int) -> None:
    shown, _, _ = live(plan(rows=15, columns=1), height=height, width=width)
    for name in list(shown.runs)[-active:] if active else []:
        shown.hear(Event("started", name))
    text = picture(shown, width)
    lines = [line.rstrip() for line in text.splitlines()]
    assert len(lines) <= height, "rich would cut off the end"
    assert " ".join(lines[-2:]).endswith("so far") and "0 of 15 runs done" in text
    rows = [int(found[1]) for line in lines if (found := re.match(r"[ \d][\da]  row (\d+) ", line))]
    assert len(rows) == 15 or height < 40
    if len(rows) < 15 and height > 5:
        assert f"and {15 - len(rows)} more rows" in text
    if active and height > 5:
        assert "starting" in text
        missing = set(range(15)) - set(rows)
        assert not missing or not rows or set(rows) <= set(range(15 - active, 15)) or missing <= set(range(15 - active))


def test_a_note_is_told_at_once_and_belongs_to_no_run() -> None:
    for terminal in (True, False):
        shown, _, out = live(plan(), terminal=terminal)
        with shown:
            shown.hear(Event("note", "", message="stopping: 2 runs save [now]"))
            assert "stopping: 2 runs save [now]" in out.getvalue()
        assert shown.count("waiting") == 4


def test_time_left_on_a_cluster_is_shared_by_the_runs_under_way() -> None:
    shown, clock, _ = live(plan(rows=2, columns=2))
    shown.concurrency = None
    for name in (A, B, C):
        shown.hear(Event("started", name))
    clock.now = 50
    shown.hear(Event("done", A, miou=0.5))
    assert shown.left() == pytest.approx(100)  # three runs of 50 s, two of them now
    shown.hear(Event("retry", B))
    assert shown.left() == pytest.approx(150)


def test_the_time_left_falls_while_a_longer_run_waits() -> None:
    shown, clock, _ = live(plan(rows=2, columns=2))
    shown.hear(Event("started", A))
    shown.hear(Event("started", B))
    found = []
    for step in (20, 40, 60):  # half a second a step in row 0, and no run of row 1 has begun
        clock.now = step / 2
        for name in (A, B):
            shown.hear(Event("progress", name, step=step, steps=100))
        found.append(shown.left())
    assert found[1:] == pytest.approx([30 + 50, 20 + 50])


def test_runs_of_another_driver_take_no_slot_of_this_one() -> None:
    shown, clock, _ = live(plan(rows=2, columns=2))
    shown.hear(Event("started", A))
    clock.now = 50
    shown.hear(Event("done", A, miou=0.5))
    for name in (B, C):
        shown.hear(Event("elsewhere", name))
    assert shown.left() == pytest.approx(50)  # one more here, beside the others' two
    shown.hear(Event("done", D, miou=0.5))
    assert shown.left() == pytest.approx(50), "the others' runs are waited for"


def test_without_a_terminal_there_is_a_line_now_and_then_and_each_failure() -> None:
    shown, clock, out = live(plan(), terminal=False)
    with shown:
        for second in range(25):
            clock.now = second
            shown.hear(Event("progress", A, step=second, steps=100))
        assert out.getvalue().count("runs done") == 2
        shown.hear(Event("failed", B, message="nan: the loss is [nan]"))
        assert "failed row 0, column 1: nan: the loss is [nan]" in out.getvalue()
        shown.hear(Event("retry", C, message="killed: gone"))
        assert "trying again: row 1, column 0: killed: gone" in out.getvalue()
    assert "\x1b" not in out.getvalue() and out.getvalue().count("runs done") == 3


def test_a_terminal_is_left_with_the_totals() -> None:
    shown, _, out = live(plan(), {name: 0.5 for name in (A, B, C, D)})
    with shown:
        pass
    assert out.getvalue().rstrip().endswith("4 of 4 runs done, 0 s so far")


def test_foreign_runs_are_passed_over() -> None:
    shown, _, _ = live(plan())
    shown.hear(Event("done", "f" * 16, miou=1.0))
    assert shown.count("done") == 0


def test_settings_refuse_nonsense() -> None:
    for wrong in (
        {"threads": 0},
        {"gpus_per_trial": -1.0},
        {"gpus_per_trial": 1.5},
        {"max_concurrent": 0},
        {"retries": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ExecutionSettings(**wrong)  # type: ignore[arg-type]
    assert ExecutionSettings(gpus_per_trial=2.0).gpus_per_trial == 2
