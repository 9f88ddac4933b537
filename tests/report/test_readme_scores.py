"""The figures in the README are those of the published tables."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from viladiff.runs.record import load_record
from viladiff.tables.contrasts import contrasts
from viladiff.tables.plan import make_plan
from viladiff.tables.spec_file import load_table

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "reports" / "published"
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
SEEDS = {"three": "3", "six": "6"}
COLUMNS = {"table5": "1/8 (183)", "captions": "1/8 (183)", "leaderboard": "183 labels"}


@cache
def lines(table: str) -> list[list[str]]:
    """The cells of each line of a published page."""
    text = (ROOT / "reports" / "published" / table / "table.md").read_text(encoding="utf-8")
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def published(row: str, table: str = "table5", column: str = "") -> tuple[str, str]:
    """Mean with deviation, and the number of seeds, at 183 labels or in a column, of a row by its number or label."""
    place = next(line for line in lines(table) if line[1:2] == ["row"]).index(f"{column or COLUMNS[table]} measured")
    line = next(line for line in lines(table) if row in (line[0], line[1].split(" (")[0]))
    ((mean, seeds),) = re.findall(r"^([\d.]+ ± [\d.]+) \((\d)\)$", line[place])
    return mean, seeds


def difference(high: str, low: str, column: str = "1/8 (183)") -> list[str]:
    """Points, interval, the paper's points, p, least difference, seeds and outcome."""
    (found,) = [line[4:] for line in lines("table5") if line[:4] == [high, low, column, "mIoU"]]
    return found


def printed(row: str, column: str) -> str:
    """The paper's number, empty for a row of ours."""
    place = next(line for line in lines("table5") if line[1:2] == ["row"]).index(f"{column} paper")
    return next(line[place] for line in lines("table5") if line[0] == row)


def test_the_rows_of_its_table() -> None:
    ((most, fewer),) = re.findall(r"standard deviation of (\w+) seeds at 183 labels and of (\w+) at 92 and 732", README)
    counts = {"1/16 (92)": SEEDS[fewer], "1/8 (183)": SEEDS[most], "1/2 (732)": SEEDS[fewer]}
    rows = {"supervised`)": "a", "semibaseline`)": "1", "features only": "2", "baseline + ViLa": "4", "viladiff`)": "8"}
    for name, row in rows.items():
        found = {column: published(row, column=column) for column in counts}
        paper = " ".join(f"{printed(row, column)} |".strip() for column in ("1/8 (183)", "1/2 (732)"))
        assert f"{name} | {' | '.join(mean for mean, _ in found.values())} | {paper}" in README
        assert {column: seeds for column, (_, seeds) in found.items()} == counts


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
    results = [line[-1] for line in lines("table5") if len(line) == 11 and line[6] and "(" in line[2]]
    assert results.count("higher") == 1 and "lower" not in results, "this one alone"
    table = load_table(ROOT / "ablations" / "table5.toml")
    papers = [claim for claim in table.claims if claim.source == "paper"]
    asked = {(claim.metric, tuple(sorted(one.terms))) for claim in papers for one in contrasts(table, claim)}
    columns = {table.columns[term.column].label for _, terms in asked for term in terms}
    assert columns == {"1/8 (183)", "1/2 (732)"}
    assert (
        f"for the {len(asked)} comparisons that the paper's claims ask for, at 183 and 732 labels; this one" in README
    )


def test_what_it_says_of_732_and_92_labels() -> None:
    pairs = (("ViLa, features only", "SemiBaseline"), ("ViLaDiff", "SemiBaseline"), ("ViLaDiff", "ViLa"))
    found = [difference(*pair, "1/2 (732)") for pair in pairs]
    assert f"has 80 % power for {found[0][4]}, {found[1][4]} and {found[2][4]} points in the three" in README
    above = [line[-1] for line in lines("table5") if line[1:4] == ["SemiBaseline", "1/2 (732)", "mIoU"]]
    assert len(above) == 3 and set(above) == {"not shown"}
    fewest = [difference(*pair, "1/16 (92)") for pair in (pairs[0], pairs[2])]
    assert {one[-1] for one in fewest} == {"not shown"} and {one[-2] for one in (*fewest, *found)} == {"3"}
    assert {one[4] for one in fewest} == {"2.5"} and "for 2.5 points of ViLa's features or of MixE." in README


def test_the_ceilings_and_controls() -> None:
    names = ("1", "4", "SemiBaseline, true labels everywhere", "ViLa, true labels at edges from half on")
    room, edges = [], []
    for column in ("1/16 (92)", "1/8 (183)"):
        base, vila, everywhere, at_edges = (float(published(row, column=column)[0].split()[0]) for row in names)
        room.append(f"{everywhere - base:.1f}")
        edges.append(f"{at_edges - vila:.1f}")
    assert f"would give the baseline {room[0]} points at 92 labels and {room[1]} at 183;" in README
    assert f"would give ViLa {edges[0]} and {edges[1]}." in README
    points, interval, *_, outcome = difference("ViLaDiff", "ViLaDiff, no captions")
    assert f"({points}, {interval}, over ViLaDiff without them)" in README and outcome == "not shown"


def test_the_baseline_of_the_best_trial() -> None:
    points, interval, _, p, *_, outcome = difference("ViLa, features only", "SemiBaseline, weight 0.5")
    mean, seeds = published("SemiBaseline, weight 0.5")
    best = f"Over the baseline with its best trial ({mean.split()[0]}) ViLa with the teacher's features has"
    assert f"{best} {points} ({interval}, p {p})." in README and (outcome, seeds) == ("higher", "6")


def test_the_fusion_stream_with_captions_and_without() -> None:
    plan = make_plan(load_table(ROOT / "ablations" / "table5.toml"), "digits", columns=["1/8 (183)"])
    means = []
    for label, stream in (("ViLaDiff", "fusion"), ("ViLaDiff", "fusion_no_text"), ("ViLaDiff, no captions", "fusion")):
        row = [one.label for one in plan.table.rows].index(label)
        names = plan.run_ids(row, 0)
        found = [load_record(next(PUBLISHED.glob(f"*/records/{name}.json"))) for name in names]
        means.append(100 * sum(one.scores["teacher"][stream]["miou"] for one in found) / len(found))
    own, unread, untrained = (f"{mean:.1f}" for mean in means)
    assert (
        f"has {own} with an image's own captions and {unread} without any; trained without captions it has {untrained}."
        in README
    )


def test_what_it_says_of_the_leaderboard() -> None:
    (width, *_) = (len(line) for line in lines("leaderboard") if line[1:2] == ["row"])
    board = {line[0]: line for line in lines("leaderboard") if len(line) == width}
    (head,) = [line for line in lines("leaderboard") if "the same, times steps" in line]
    place = head.index("the same, times steps")
    costs = {line[0].split()[0]: line[place] for line in lines("leaderboard") if len(line) == len(head)}
    longer, ours, rival = (published(row, "leaderboard") for row in ("c", "17", "9"))
    pair = ["FixMatch-EMA, twice the steps", "FixMatch-EMA", "183 labels", "mIoU"]
    (gain,) = [line[4] for line in lines("leaderboard") if line[:4] == pair]
    assert f"Twice the steps give FixMatch-EMA {gain.removeprefix('+')} points at 183 labels" in README
    assert f"labels: {longer[0]} (three seeds) at {float(costs['c']):.1f} times the cost of `supervised`" in README
    assert f"once MixE refines (from half of training on), costs {float(costs['17']):.1f} times as much" in README
    means = {board[str(row)][1]: float(published(str(row), "leaderboard")[0].split()[0]) for row in range(1, 18)}
    names = sorted(means, key=lambda name: -means[name])[:3]
    assert names == ["UniMatch V2", "ViLaDiff", "UniMatch"] and {ours[1], rival[1], longer[1]} == {"3"}
    high = f"{means[names[0]]}, {means[names[1]]} and {means[names[2]]}"
    assert f"highest means of 17 methods under one protocol, {high}; none" in README
    assert f"FixMatch-EMA's {means['FixMatch-EMA']}. At 92 labels" in README
    tests = [line for line in lines("leaderboard") if line[0] in names and line[1:4] == pair[1:]]
    assert [line[-1] for line in tests] == ["not shown"] * 3


def test_what_it_says_of_seeds_of_which_the_settings_know_nothing() -> None:
    plan = make_plan(load_table(ROOT / "ablations" / "table5.toml"), "digits", columns=["1/8 (183)"], seeds=range(6))
    labels = [row.label for row in plan.table.rows]

    def scores(label: str) -> dict[int, float]:
        names = plan.by_seed(labels.index(label), 0)
        found = {seed: load_record(next(PUBLISHED.glob(f"*/records/{name}.json"))) for seed, name in names.items()}
        return {seed: 100 * one.miou for seed, one in found.items() if one.miou is not None}

    def gain(label: str, low: str, seeds: range) -> list[float]:
        return [scores(label)[seed] - scores(low)[seed] for seed in seeds]

    whole, features = (
        [f"{sum(gain(label, 'SemiBaseline', seeds)) / 3:.1f}" for seeds in (range(3), range(3, 6))]
        for label in ("ViLaDiff", "ViLa, features only")
    )
    said = f"`viladiff` is {whole[0]} points above the baseline and ViLa with the teacher's features {features[0]};"
    assert said in README and f"they are {whole[1]} and {features[1]} above it." in README
    controls = ("ViLaDiff, guided filter", "ViLaDiff, refiner without noise")
    means = [published(label)[0].split()[0] for label in controls]
    assert f"a guided filter of ours has {means[0]} and a refiner without noise {means[1]}," in README
    assert all(min(gain(label, "ViLaDiff", range(6))) > 0 for label in controls), "on all six seeds"


def test_the_order_of_rows() -> None:
    page = (PUBLISHED / "table5" / "table.md").read_text(encoding="utf-8")
    ((dense, sparse),) = re.findall(
        r"- 1/8 \(183\): τ = (\S+) over 8 rows.*\n- 1/2 \(732\): τ = (\S+) over 8 rows", page
    )
    assert f"eight rows and ours is {dense} at 183 labels and {sparse.replace('-', '−')} at 732." in README


def test_what_it_says_of_the_leaderboard_at_92_labels() -> None:
    (width, *_) = (len(line) for line in lines("leaderboard") if line[1:2] == ["row"])
    board = {line[0]: line[1] for line in lines("leaderboard") if len(line) == width}
    found = {board[str(row)]: published(str(row), "leaderboard", "92 labels") for row in range(1, 18)}
    assert {seeds for _, seeds in found.values()} == {"3"}
    means = {name.split(" (")[0]: float(mean.split()[0]) for name, (mean, _) in found.items()}
    names = sorted(means, key=lambda name: -means[name])[:3]
    assert names == ["UniMatch", "UniMatch V2", "ViLaDiff"]
    high = f"{means[names[0]]}, {means[names[1]]} and {means[names[2]]}, and none"
    assert f"At 92 labels UniMatch, UniMatch V2 and ViLaDiff have {high}" in README
    assert f"none is shown to differ from FixMatch-EMA's {means['FixMatch-EMA']}. Three" in README
    page = (PUBLISHED / "leaderboard" / "table.md").read_text(encoding="utf-8")
    least = re.findall(r"80 % power for ([\d.]+) to ([\d.]+) points, depending on the method", page)
    assert [{round(float(end)) for end in ends} for ends in least] == [{5}, {2}], "92 labels, 183 labels"
    assert "Three seeds leave differences of two points open at 183 labels and of five at 92" in README
    place = ["FixMatch-EMA", "92 labels", "mIoU"]
    tests = [line for line in lines("leaderboard") if line[0] in names and line[1:4] == place]
    assert [line[-1] for line in tests] == ["not shown"] * 3


def test_what_captions_bring() -> None:
    plan = make_plan(load_table(ROOT / "ablations" / "captions.toml"), "digits", seeds=[0, 1, 2])
    labels = [row.label for row in plan.table.rows]
    curve = []
    for label in ("ViLa, recall 0.3", "ViLa, recall 0.5", "ViLa, recall 0.7", "ViLa", "ViLa, recall 1.0"):
        names = plan.run_ids(labels.index(label), plan.columns[0])
        found = [load_record(next(PUBLISHED.glob(f"*/records/{name}.json"))) for name in names]
        scores = [[one.scores[one.network][stream]["miou"] for one in found] for stream in ("visual", "fusion")]
        assert {len(values) for values in scores} == {3}
        curve.append([f"{100 * sum(values) / 3:.1f}" for values in scores])
    visual, fusion = zip(*curve, strict=True)
    assert f"stays between {min(visual)} and {max(visual)}, and its fusion stream rises from" in README
    assert f"rises from {fusion[0]} to {fusion[-1]} (the same three seeds" in README and list(fusion) == sorted(fusion)
    for row in ("ViLa, captions on labelled images", "ViLa, captions on unlabelled images"):
        assert float(published(row, "captions")[0].split()[0]) < 30, "training collapses"
