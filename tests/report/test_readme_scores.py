"""The figures in the README are those of the published tables."""

from __future__ import annotations

import re
from pathlib import Path

from viladiff.runs.record import load_record
from viladiff.tables.plan import make_plan
from viladiff.tables.spec_file import load_table

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "reports" / "published"
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
SEEDS = {"three": "3", "six": "6"}


def lines(table: str) -> list[list[str]]:
    """The cells of each line of a published page."""
    text = (ROOT / "reports" / "published" / table / "table.md").read_text(encoding="utf-8")
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def published(row: str, table: str = "table5") -> tuple[str, str]:
    """Mean with deviation, and the number of seeds, at 183 labels."""
    line = next(line for line in lines(table) if line[0] == row)
    (mean, seeds) = next(found for cell in line if (found := re.findall(r"^([\d.]+ ± [\d.]+) \((\d)\)$", cell)))[0]
    return mean, seeds


def difference(high: str, low: str) -> list[str]:
    """Points, interval, the paper's points, p, least difference, seeds and outcome."""
    (found,) = [line[4:] for line in lines("table5") if line[:4] == [high, low, "1/8 (183)", "mIoU"]]
    return found


def test_the_rows_of_its_table() -> None:
    (seeds,) = re.findall(r"standard deviation of (\w+) seeds", README)
    rows = {"supervised`)": "a", "semibaseline`)": "1", "features only": "2", "baseline + ViLa": "4", "viladiff`)": "8"}
    for name, row in rows.items():
        mean, count = published(row)
        assert f"{name} | {mean} |" in README and count == SEEDS[seeds]


def test_the_differences_and_what_is_said_of_them() -> None:
    features = difference("ViLa, features only", "SemiBaseline")
    whole = difference("ViLaDiff", "SemiBaseline")
    mixe = difference("ViLaDiff", "ViLa")
    names = ("features only, over `semibaseline`", "`viladiff` over `semibaseline`", "`viladiff` over baseline + ViLa")
    for name, (points, interval, paper, p, *_) in zip(names, (features, whole, mixe), strict=True):
        assert f"{name} | {points} ({interval}) | {p} | {paper} |" in README
    assert [one[-1] for one in (features, whole, mixe)] == ["higher", "not shown", "not shown"]
    least = [one[4] for one in (features, whole, mixe)]
    assert f"has 80 % power for {least[0]}, {least[1]} and {least[2]} points" in README
    page = (ROOT / "reports/published/table5/table.md").read_text(encoding="utf-8")
    assert "for 34 comparisons of the paper's claims" in page
    results = [line[-1] for line in lines("table5") if line[2:3] == ["1/8 (183)"] and len(line) == 11 and line[6]]
    assert results.count("higher") == 1 and "lower" not in results, "of which this one alone"


def test_the_ceilings_and_controls() -> None:
    means = {row: float(published(row)[0].split()[0]) for row in ("1", "4", "i", "j")}
    room, edges = means["i"] - means["1"], means["j"] - means["4"]
    assert f"would give the baseline {room:.1f} points" in README
    assert f"would give ViLa {edges:.1f}." in README
    points, interval, *_, outcome = difference("ViLaDiff", "ViLaDiff, no captions")
    assert f"({points}, {interval}, over ViLaDiff without them)" in README and outcome == "not shown"


def test_the_fusion_stream_with_captions_and_without() -> None:
    plan = make_plan(load_table(ROOT / "ablations" / "table5.toml"), "digits", columns=["1/8 (183)"])
    means = []
    for label in ("ViLaDiff", "ViLaDiff, no captions"):
        row = [one.label for one in plan.table.rows].index(label)
        names = plan.run_ids(row, 0)
        found = [load_record(next(PUBLISHED.glob(f"*/records/{name}.json"))) for name in names]
        means.append(100 * sum(one.scores["teacher"]["fusion"]["miou"] for one in found) / len(found))
    assert f"has {means[0]:.1f} with an image's own captions and {means[1]:.1f} without any" in README


def test_what_it_says_of_the_leaderboard() -> None:
    board = {line[0]: line for line in lines("leaderboard") if len(line) == 4}
    (head,) = [line for line in lines("leaderboard") if "training, supervised = 1" in line]
    place = head.index("training, supervised = 1")
    costs = {line[0].split()[0]: line[place] for line in lines("leaderboard") if len(line) == len(head)}
    longer, ours, rival = (published(row, "leaderboard") for row in ("c", "17", "9"))
    pair = ["FixMatch-EMA, twice the steps", "FixMatch-EMA", "183 labels", "mIoU"]
    (gain,) = [line[4] for line in lines("leaderboard") if line[:4] == pair]
    assert f"Twice the steps give FixMatch-EMA {gain.removeprefix('+')} points" in README
    assert f"it then has {longer[0]} at {float(costs['c']):.1f} times" in README
    assert f"ViLaDiff {ours[0]} at {float(costs['17']):.1f} times (three seeds)" in README and ours[1] == "3"
    assert f"highest means, {rival[0].split()[0]} and {ours[0].split()[0]}" in README
    assert (board["9"][1], board["17"][1]) == ("UniMatch V2", "ViLaDiff")
    rest = [published(str(row), "leaderboard")[0] for row in range(1, 18) if row not in (9, 17)]
    assert max(rest) < min(ours[0], rival[0])
