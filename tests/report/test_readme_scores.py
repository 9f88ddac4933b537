"""The figures in the README are those of the published tables."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
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
    rows = {"supervised`)": "a", "semibaseline`)": "1", "baseline + ViLa": "4", "viladiff`)": "8"}
    for name, row in rows.items():
        mean, count = published(row)
        assert f"{name} | {mean} |" in README and count == SEEDS[seeds]


def test_the_differences_and_what_is_said_of_them() -> None:
    whole = difference("ViLaDiff", "SemiBaseline")
    features = difference("ViLa, features only", "SemiBaseline")
    mixe = difference("ViLaDiff", "ViLa")
    names = (
        "`viladiff` over `semibaseline`",
        "distilled features over `semibaseline`",
        "`viladiff` over baseline + ViLa",
    )
    for name, (points, interval, paper, *_) in zip(names, (whole, features, mixe), strict=True):
        assert f"{name} | {points} ({interval}) | {paper} |" in README
    assert [one[-1] for one in (whole, features, mixe)] == ["higher", "higher", "open"], "Here ViLaDiff helps ..."
    assert f"a true difference of {whole[4].removeprefix('&lt; ')} points" in README
    assert float(whole[4].removeprefix("&lt; ")) == float(mixe[4].removeprefix("&lt; "))
    assert any(
        "for 34 comparisons" in line for line in (ROOT / "reports/published/table5/table.md").read_text().splitlines()
    )


def test_the_ceilings_and_controls() -> None:
    means = {row: float(published(row)[0].split()[0]) for row in ("1", "4", "8", "i", "j")}
    room, edges = means["i"] - means["1"], means["j"] - means["4"]
    assert f"would give the baseline {room:.1f} points" in README and room < 7.9, "the paper's gain is out of reach"
    assert f"would give ViLa {edges:.1f}, of which MixE takes none" in README and means["8"] <= means["4"]
    assert f"in place of the diffusion has {published('f')[0]}, a guided filter (ours) {published('g')[0]}." in README
    points, interval, *_, outcome = difference("ViLaDiff", "ViLaDiff, no captions")
    assert f"ViLaDiff without captions has {published('d')[0]} (captions: {points}, {interval})" in README
    assert outcome == "open", "not shown to matter"
    rival, ours = (published(row, "leaderboard") for row in ("9", "17"))
    assert f"has no captions, has {rival[0]} on the first three seeds, ViLaDiff {ours[0]}." in README
    assert rival[1] == ours[1] == "3"
    assert {("9", "UniMatch V2"), ("17", "ViLaDiff")} <= {tuple(line[:2]) for line in lines("leaderboard")}
