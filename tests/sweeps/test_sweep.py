"""Sweeps as data: every file loads, what is wrong is named before anything runs, points name the runs they should."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from viladiff.cli.main import main as viladiff
from viladiff.cli.sweeps import sweep_parser
from viladiff.experiments import sweep_setup, sweeps
from viladiff.experiments.sweeps import conclusion
from viladiff.methods import METHODS
from viladiff.runs.job import PlannedRun
from viladiff.sweeps.finals import Finalist, compare_finalists, finalists, format_verdict
from viladiff.sweeps.space import Dimension, edges, grid, shrunk
from viladiff.sweeps.spec import Sweep, SweepPlanner, at_scale, changes, check, choosing_images, load_sweep, rung_steps
from viladiff.sweeps.summary import best_so_far, importances, rungs, to_toml, train_command, trial_rows
from viladiff.sweeps.trials import Rung, Trial
from viladiff.tables.significance import smallest_detectable

pytestmark = pytest.mark.usefixtures("prints_once")
TUNE = Path(__file__).resolve().parents[2] / "tune"
FILES = sorted(TUNE.glob("sweep_*.toml"))


def edited(tmp_path: Path, *changes: tuple[str, str], name: str = "lambda") -> Path:
    """A copy of a shipped sweep with text replaced."""
    text = (TUNE / f"sweep_{name}.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / f"sweep_{name}.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_sweep_can_be_run_at_its_edges_at_every_scale(path: Path) -> None:
    sweep = load_sweep(path)
    assert path.with_suffix(".py").is_file() and set(sweep.scale) == {"smoke", "quick", "digits", "paper"}
    for scale in sweep.scale:
        check(sweep, scale)


def test_the_five_sweeps_search_what_they_say() -> None:
    found = {path.stem.removeprefix("sweep_"): set(load_sweep(path).space) for path in FILES}
    found = {name: space for name, space in found.items() if name.removesuffix("_tags") not in METHODS}
    mixe = "method.mixe."
    assert set(found) == {"lambda", "timesteps", "tau", "flip", "joint"}
    assert found["lambda"] == {"method.vila.lam"} and found["timesteps"] == {mixe + "timesteps"}
    assert found["tau"] == {mixe + f"tau_{part}" for part in ("start", "end", "ramp", "shape")}
    assert found["flip"] == {mixe + part for part in ("beta", "edge_bonus", "flip_schedule", "gaussian_region")}
    assert found["joint"] == set().union(*found.values())
    assert found["joint"] >= {"optim.lr", "optim.encoder_lr_scale", "method.vila.temperature"}


def test_the_papers_value_is_the_methods_default() -> None:
    from viladiff.runs.config import RunConfig, flatten, override

    for path in FILES:
        sweep = load_sweep(path)
        where = {"method.name": sweep.base["method.name"]}
        if path.stem == "sweep_viladiff":  # its first point is the initial settings, which built-in data do not run
            where |= {"data.dataset": "voc", "method.pseudo.threshold": "0.7"}
            where |= {"method.mixe.width": "32", "method.mixe.depth": "2"}
        plain = flatten(override(RunConfig(), where))
        if "method.mixe.condition" in plain:
            plain["method.mixe.condition"] = ",".join(plain["method.mixe.condition"])  # type: ignore[arg-type]
        arrows = "method.vila.distillation_paths"
        tuples = {arrows: ",".join(plain[arrows])} if arrows in plain else {}  # type: ignore[arg-type]
        first = dict(sweep.initial_point)
        if path.stem == "sweep_semibaseline_tags":
            assert first.pop("method.tags.weight") == 1.0, "no tags are the default"
        assert first == {field: (plain | tuples)[field] for field in first}, path.stem


def test_the_joint_search_starts_from_the_papers_rates_on_its_data_alone(tmp_path: Path) -> None:
    joint = load_sweep(TUNE / "sweep_joint.toml")
    rates = ("optim.lr", "optim.encoder_lr_scale")
    assert [joint.initial_point[path] for path in rates] == [0.006, 0.2] and "but for" in joint.initial_label
    assert at_scale(joint, "digits") is joint
    paper = at_scale(joint, "paper")
    assert [paper.initial_point[path] for path in rates] == [0.001, 1.0]
    assert paper.initial_label == "the paper's value" and paper.points == joint.points
    assert {p: v for p, v in paper.initial_point.items() if p not in rates}.items() <= joint.initial_point.items()
    check(paper, "paper")
    path = tmp_path / "sweep_joint.toml"
    text = (TUNE / "sweep_joint.toml").read_text()
    for old, new, why in (
        ("[initial_at.paper]", "[initial_at.papr]", r"initial_at\.papr: allowed: .*did you mean 'paper'"),
        ('"optim.lr" = 0.001', '"optim.lrr" = 0.001', r"initial_at\.paper: optim\.lrr .*did you mean"),
        ('"optim.lr" = 0.001', '"optim.lr" = 0.5', r"initial_at\.paper: optim\.lr"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=why):
            load_sweep(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_trial_on_the_papers_data_is_as_long_as_a_run_of_its_tables(path: Path) -> None:
    """60 epochs of the 9,850 unlabelled images at 732 labels, four a step, to the next thousand that rungs divide."""
    from viladiff.runs.config import RunConfig, override

    fixed = changes(load_sweep(path), "paper", {}, "holdout")
    cfg = override(RunConfig(), {**fixed, **load_sweep(path).initial_point})
    assert (cfg.data.split, cfg.data.batch_unlabelled) == ("732", 4)
    assert 0 <= fixed["train.steps"] - 60 * 9850 / 4 < 1000  # type: ignore[operator]


def test_the_command_that_repeats_a_run_has_its_inputs() -> None:
    changed = {"data.dataset": "voc", "runtime.scale": "paper"}
    inputs = {"runtime.data_root": "/data/my voc", "runtime.captions": "c.parquet"}
    text = train_command(changed, 1, inputs)
    assert text == (
        "viladiff train data.dataset=voc 'runtime.data_root=/data/my voc' runtime.captions=c.parquet --threads 1"
    )
    assert train_command(changed, None) == "viladiff train data.dataset=voc"


def test_printed_curves_are_the_papers() -> None:
    """Tables 6 and 7, typed row by row as they are printed."""
    table6 = """0.1 77.5 81.2 43.0 46.5
                0.3 78.1 81.8 43.5 47.2
                0.5 78.7 82.4 43.9 47.6
                0.8 78.5 82.1 43.1 46.9
                1.0 77.4 80.6 42.7 46.3"""
    table7 = """5 74.9 77.2 40.1 43.6
                10 76.3 78.5 41.6 44.9
                15 76.3 78.7 41.7 45.0
                20 76.4 78.9 41.7 45.2
                30 76.5 78.8 41.9 45.1"""
    for name, text in (("lambda", table6), ("timesteps", table7)):
        printed = [[float(word) for word in line.split()] for line in text.splitlines()]
        curves = load_sweep(TUNE / f"sweep_{name}.toml").paper
        assert [list(curve.at) for curve in curves] == [[row[0] for row in printed]] * 4
        assert [list(curve.miou) for curve in curves] == [[row[i] for row in printed] for i in range(1, 5)]


WRONG = {
    "misspelt key": (("rungs =", "rung ="), r"rung: no such key; did you mean 'rungs'"),
    "misspelt range": (("low = 0.05", "lo = 0.05"), r'space."method.vila.lam": lo: no such key; did you mean .low'),
    "upside down": (("low = 0.05", "low = 5.0"), r'space."method.vila.lam".*low = 5.0, high = 2.0: .* low < high'),
    "log from nothing": (("low = 0.05", "low = 0.0"), r"log = true: needs low > 0"),
    "first outside": (('"method.vila.lam" = 0.5', '"method.vila.lam" = 3.0'), r"= 3.0: must lie in the space, 0.05 to"),
    "first of another": (
        ('"method.vila.lam" = 0.5', '"method.vila.lan" = 0.5'),
        r"initial_point: method.vila.lan is not a dim.*",
    ),
    "a listed point outside": (
        ("[scale.smoke]", '[[points]]\n"method.vila.lam" = 3.0\n[scale.smoke]'),
        r"points\[0\]: .*= 3.0 is not in",
    ),
    "a listed point of another": (
        ("[scale.smoke]", '[[points]]\n"method.vila.lan" = 1.0\n[scale.smoke]'),
        r"points\[0\]: method.vila.lan is not a dim.*",
    ),
    "rungs that fall": (("[0.25, 0.5, 1.0]", "[0.5, 0.25, 1.0]"), r"rungs = .*rising order"),
    "rungs that do not end": (("[0.25, 0.5, 1.0]", "[0.25, 0.5]"), r"rungs = .*the last one 1.0"),
    "finals that are not fresh": (
        ("final_seeds = [3, 4", "final_seeds = [2, 4"),
        r"final_seeds = .*none of them in seeds",
    ),
    "too few finals": (
        ("final_seeds = [3, 4, 5, 6, 7]", "final_seeds = [3, 4]"),
        r"final_seeds = \[3, 4\]: 5 seeds or more",
    ),
    "a field of the sweep": (
        ('"data.split" = "183"', '"eval.split" = "val"'),
        r"base: eval.split = 'val': not set here: .*--select val",
    ),
    "shared by one method": (
        ("[scale.smoke]", '[scale.smoke]\nshared_method_fields = { "eval.split" = "val" }'),
        r"scale.smoke: shared_method_fields = .*: a sweep has one method: write it in set",
    ),
    "not finite": (("high = 2.0", "high = inf"), r"must be text, a finite number"),
    "twice": (('"data.split" = "183"', '"method.vila.lam" = 0.1'), r"base sets it too"),
    "too many numbers": (("miou = [77.5,", "miou = [77.5, 1.0,"), r"6 numbers at 5 places"),
    "not toml": (("[space]", "[space"), r"not TOML"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_explained(tmp_path: Path, name: str) -> None:
    change, said_ = WRONG[name]
    with pytest.raises(ValueError, match=said_) as found:
        load_sweep(edited(tmp_path, change))
    assert "sweep_lambda.toml" in str(found.value)


IMPOSSIBLE = {
    "misspelt field": (
        (("method.vila.lam", "method.vila.lan"),),
        r'space."method.vila.lan".*no such field; did you mean .method.vila.lam',
    ),
    "below what the field takes": (
        (("low = 0.05, high = 2.0, log = true", "low = -1.0, high = 2.0"),),
        r'space."method.vila.lam" \(at method.vila.lam = -1.0\): method.vila.lam = -1.0: must be ≥ 0',
    ),
    "whole numbers for any": (
        (
            ("low = 0.05, high = 2.0, log = true", "low = 0, high = 2"),
            ('[initial_point]\n"method.vila.lam" = 0.5', '[initial_point]\n"method.vila.lam" = 1'),
        ),
        r"whole numbers, but the field holds any; write 0.0 and 2.0",
    ),
    "rungs that are no steps": (
        (("[0.25, 0.5, 1.0]", "[0.001, 0.5, 1.0]"),),
        r"rungs = .*of train.steps = 4 they are the steps \[0, 2, 4\]",
    ),
    "a field of another method": (
        (('"method.name" = "viladiff"', '"method.name" = "semibaseline"'),),
        r"it is one of method.name=viladiff",
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_space_is_refused_before_anything_runs(tmp_path: Path, name: str) -> None:
    changes_, said_ = IMPOSSIBLE[name]
    with pytest.raises(ValueError, match=said_):
        check(load_sweep(edited(tmp_path, *changes_)), "smoke")


def test_rungs_that_a_scheduler_would_skip_are_refused_before_anything_runs(tmp_path: Path) -> None:
    path = edited(tmp_path, ("[0.25, 0.5, 1.0]", "[0.5, 0.75, 1.0]"))
    with pytest.raises(ValueError, match=r"--early-stopping hyperband: rungs must grow by one factor .*\[2, 3, 4\]"):
        sweep_setup.prepare(path, asked(tmp_path, "--early-stopping", "hyperband"))
    assert sweep_setup.prepare(path, asked(tmp_path, "--early-stopping", "median")).namer.steps == (2, 3, 4)


def test_limits_that_tie_fields_together_are_seen_at_the_corners(tmp_path: Path) -> None:
    path = edited(tmp_path, ("{ low = 0.0, high = 0.4 }", "{ low = 0.0, high = 0.59 }"), name="flip")
    with pytest.raises(ValueError, match=r"at method.mixe.beta = 0.4, method.mixe.edge_bonus = 0.59"):
        check(load_sweep(path), "smoke")


def test_a_large_space_is_tried_at_each_end_and_at_random() -> None:
    space = {f"d{i}": Dimension(low=0.0, high=1.0) for i in range(20)}
    found = list(edges(space, dict.fromkeys(space, 0.5)))
    assert len(found) < 400 and all(any(point[path] == end for point in found) for path in space for end in (0, 1))
    assert list(edges(space, dict.fromkeys(space, 0.5))) == found


def test_grids_lie_in_their_space() -> None:
    space = {
        "a": Dimension(low=0.01, high=1.0, log=True),
        "b": Dimension(low=1, high=4),
        "c": Dimension(choices=("x", "y")),
        "d": Dimension(low=0.0, high=1.0, step=0.5),
    }
    points = list(grid(space))
    assert len(points) == 5 * 4 * 2 * 3 and len({json.dumps(point) for point in points}) == len(points)
    assert all(dimension.has(point[path]) for point in points for path, dimension in space.items())
    assert [round(float(value), 6) for value in space["a"].places(3)] == [0.01, 0.1, 1.0]
    for path in ("a", "b", "d"):
        for value in space[path].places():
            assert space[path].number(space[path].unit(value)) == pytest.approx(value)
    assert not space["d"].has(0.3) and not space["b"].has(2.0) and not space["b"].has(True) and space["a"].has(1)


def test_a_space_may_only_grow() -> None:
    old = {"a": Dimension(low=0.1, high=1.0), "m": Dimension(choices=("x", "y"))}
    text = {path: one.model_dump_json() for path, one in old.items()}
    wide = {"a": Dimension(low=0.05, high=2.0, log=True), "m": Dimension(choices=("w", "x", "y"))}
    assert shrunk(text, old) == shrunk(text, wide) == []
    assert (
        "was searched in 0.1 to 1.0, and is now in 0.2 to 1.0"
        in shrunk(text, {**old, "a": Dimension(low=0.2, high=1.0)})[0]
    )
    assert shrunk(text, {"a": old["a"]}) == ["m is no longer searched"]
    assert shrunk(text, {**old, "n": old["a"]}) == ["n was not searched before"]


# Runs


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    return load_sweep(TUNE / "sweep_lambda.toml")


def test_a_search_runs_on_held_out_images_and_its_finals_on_the_reported_ones(sweep: Sweep) -> None:
    from viladiff.runs.config import RunConfig, override
    from viladiff.training.fingerprints import name_runs

    namer = SweepPlanner(sweep, "smoke", {}, "holdout")
    assert namer.steps == (1, 2, 4)
    run, final = namer.planned({"method.vila.lam": 0.7}, 1), namer.final({"method.vila.lam": 0.5}, 3)
    assert run.changed["eval.every_steps"] == 1 and not {"data.holdout", "eval.split"} & set(run.changed), "dev"
    assert run.changed["method.vila.lam"] == 0.7 and run.changed["seed"] == 1 and run.steps == 4 and run.threads == 1
    assert final.changed["eval.split"] == "test"
    assert not {"data.holdout", "eval.every_steps", "method.vila.lam"} & set(final.changed)
    for one in (run, final):
        assert name_runs([override(RunConfig(), one.changes)])[0].run_id == one.run_id
    real = changes(sweep, "paper", {}, "holdout")
    assert (real["data.holdout"], real["eval.split"]) == (0.25, "holdout")
    assert not {"data.holdout", "eval.split"} & set(changes(sweep, "paper", {}, "val"))


def test_the_images_that_points_are_chosen_by_are_named(sweep: Sweep) -> None:
    assert choosing_images(sweep, "digits") == choosing_images(sweep, "smoke") == "the part dev of the built-in data"
    assert choosing_images(sweep, "paper") == "25% of the labelled images (at most 183 of 732)"


def test_fields_of_the_sweep_are_not_typed(sweep: Sweep) -> None:
    for typed, why in (("eval.split", "chooses on what it holds out"), ("method.vila.lam", "the sweep searches it")):
        with pytest.raises(ValueError, match=why):
            SweepPlanner(sweep, "smoke", {typed: "1"}, "holdout")
    with pytest.raises(ValueError, match=r"scale = 'digit': allowed: .*did you mean 'digits'"):
        SweepPlanner(sweep, "digit", {}, "holdout")
    with pytest.raises(ValueError, match="a sweep needs a number of steps"):
        rung_steps(sweep, {"train.steps": None})


def asked(tmp_path: Path, *words: str) -> argparse.Namespace:
    return sweep_parser(TUNE / "sweep_lambda.toml", "x").parse_args(
        ["--scale", "smoke", "--runs-dir", str(tmp_path), *words]
    )


def opened(tmp_path: Path, *words: str, path: Path = TUNE / "sweep_lambda.toml") -> sweep_setup.SweepJob:
    job = sweep_setup.prepare(path, asked(tmp_path, *words))
    with sweep_setup.alone(job.directory):
        sweep_setup.open_directory(job)
    return job


def test_a_sweep_is_not_continued_as_another_one(tmp_path: Path) -> None:
    opened(tmp_path)
    opened(tmp_path, "--trials", "99", "--sampler", "random", "--early-stopping", "asha")
    wider = edited(tmp_path, ("low = 0.05, high = 2.0", "low = 0.01, high = 4.0"))
    opened(tmp_path, path=wider)
    for words, why in (
        (["--seeds", "2"], r"seeds was \[0\], and is now \[0, 1\]"),
        (["--", "train.steps=8"], r"rungs was \[1, 2, 4\], and is now \[2, 4, 8\]"),
        ([], r"method.vila.lam was searched in 0.01 to 4.0, log, and is now in 0.05 to 2.0"),
    ):
        with pytest.raises(ValueError, match=why) as found:
            opened(tmp_path, *words)
        assert "--study NAME" in str(found.value)
    opened(tmp_path, "--study", "other", "--seeds", "2")


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    job = sweep_setup.prepare(TUNE / "sweep_lambda.toml", asked(tmp_path))
    with sweep_setup.alone(job.directory), pytest.raises(ValueError, match=r"sweep is locked by process \d+ on "):
        sweep_setup.alone(job.directory)
    with sweep_setup.alone(job.directory):
        pass


def test_storage_that_cannot_be_written_and_wrong_words_are_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        opened(tmp_path / "file")

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sweep_setup, "write_atomically", full)
        with pytest.raises(ValueError, match=r"sweep.json: cannot be written \(No space left on device\)"):
            opened(tmp_path)
    for words, why in (
        (["--trials", "0"], "--trials 0: must be more than 0"),
        (["--seeds", "0,4"], r"--seeds 0,4: \[4\] are reserved"),
        (["--select", "val"], r"--select val: trials on 'digits' are scored on dev, and never on test"),
        (["--study", "../up"], "--study '../up': must be of letters"),
        (["--trial-timeout", "-1"], "must be more than 0"),
    ):
        with pytest.raises(ValueError, match=why):
            sweep_setup.prepare(TUNE / "sweep_lambda.toml", asked(tmp_path, *words))
    assert viladiff(["sweep", "lambd", "--dry-run"]) == 2
    assert "did you mean 'lambda'?" in capsys.readouterr().err


def test_a_dry_run_says_what_would_run_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", "lambda", "--scale", "smoke", "--runs-dir", str(tmp_path / "runs"), "--dry-run"]
    assert viladiff(words) == 0
    out = capsys.readouterr().out
    assert "0.05 to 2.0, log" in out and "16 of 1 seeds, by tpe" in out and "the part dev of the built-in data" in out
    assert "31 runs, 124 steps" in out and not (tmp_path / "runs" / "sweeps").exists()


# What is quoted


def trial(number: int, lam: float, *values: float, origin: str = "tpe", state: str = "complete") -> Trial:
    scores = {str(i): value for i, value in enumerate(values)}
    climbed = [Rung(step=2, value=0.1 + number / 100, order=10 * number + 1)]
    climbed += [Rung(step=4, value=values[0], order=10 * number + 2)] if values else []
    return Trial(
        number=number,
        point={"method.vila.lam": lam},
        runs={str(i): f"{number:015x}{i}" for i in range(max(1, len(values)))},
        order=10 * number,
        state=state,  # type: ignore[arg-type]
        values=scores,
        rungs=climbed,
        origin=origin,
        ended=10 * number + 9,
    )


def test_finalists_are_winner_paper_and_second_each_once(sweep: Sweep) -> None:
    namer: Any = SimpleNamespace(
        final=lambda point, seed, title: PlannedRun(f"{point['method.vila.lam']}-{seed}", {}, title, 4, {})
    )
    trials = [trial(0, 0.5, 0.4, origin="paper"), trial(1, 0.7, 0.6), trial(2, 0.9, 0.5), trial(3, 1.1, state="pruned")]
    found = finalists(sweep, trials, namer)
    assert [(one.roles, one.trial) for one in found] == [(("winner",), 1), (("paper",), 0), (("runner-up",), 2)]
    assert list(found[0].runs) == [3, 4, 5, 6, 7] and found[0].runs[3].run_id == "0.7-3"
    best = [trial(0, 0.5, 0.9, origin="paper"), trial(1, 0.7, 0.6)]
    assert [one.roles for one in finalists(sweep, best, namer)] == [("winner", "paper"), ("runner-up",)]
    assert finalists(sweep, [trial(0, 0.5, state="failed", origin="paper")], namer) == []


def records(values: dict[str, list[float]]) -> tuple[list[Finalist], dict[str, Any]]:
    found, done = [], {}
    for number, (role, scores) in enumerate(values.items()):
        runs = {seed: PlannedRun(f"{role}{seed}", {}, "", 4, {}) for seed in range(3, 8)}
        found.append(Finalist((role,), number, {"x": 1.0}, runs))  # type: ignore[arg-type]
        done |= {f"{role}{seed}": SimpleNamespace(miou=score / 100) for seed, score in zip(runs, scores, strict=False)}
    return found, done


def test_contests_are_paired_corrected_and_say_what_could_have_been_seen() -> None:
    from scipy import stats

    winner, paper, second = [50.0, 52, 51, 53, 49], [48.0, 50.5, 48.7, 51.2, 46.8], [49.9, 52.3, 50.8, 53.1, 48.7]
    found, done = records({"winner": winner, "paper": paper, "runner-up": second})
    one, other = compare_finalists(found, done)
    better = stats.ttest_rel(winner, paper)
    assert one.p == pytest.approx(2 * better.pvalue) and one.outcome == "shown" and one.n == 5
    assert one.interval == pytest.approx(tuple(better.confidence_interval(0.95)))
    assert other.outcome == "open" and other.p == pytest.approx(stats.ttest_rel(winner, second).pvalue)
    error = math.sqrt(statistics.variance([a - b for a, b in zip(winner, paper, strict=True)]) / 5)
    assert one.spread == pytest.approx(error * math.sqrt(5))
    assert one.detectable == pytest.approx(smallest_detectable(error, 4, 4)), "two comparisons with two sides each"
    lines = list(format_verdict(found, done, 5))
    assert "winner: 51.00 ± 1.58 mIoU over 5 of 5 fresh seeds" in lines[0]
    assert (
        "better (two-sided paired t over 5 seeds, standard deviation of paired differences 0.32, Holm" in lines[3]
        and "not told apart" in lines[4]
    )


def test_a_contest_is_open_where_its_interval_has_zero_and_can_be_reversed() -> None:
    """One comparison, so that nothing is corrected: verdict and interval must agree."""
    for second, outcome in (([49.6, 51.2, 51.1, 51.9, 48.6], "open"), ([51.0, 53.2, 51.9, 54.1, 50.2], "reversed")):
        found, done = records({"winner": [50.0, 52, 51, 53, 49], "runner-up": second})
        (one,) = compare_finalists(found, done)
        unsure = one.interval[0] < 0 < one.interval[1]
        assert one.outcome == outcome and unsure == (outcome == "open") == (one.p >= 0.05)
        assert (0.025 < one.p / 2 < 0.05) == (outcome == "open"), "one-sided, the first would be better"


def test_four_fresh_seeds_decide_nothing() -> None:
    found, done = records({"winner": [50, 51, 52, 53], "paper": [10, 11, 12, 13, 14]})
    assert compare_finalists(found, done) == []
    assert "over 4 of 5 fresh seeds" in next(format_verdict(found, done, 5))


def test_detectable_is_found_four_times_in_five() -> None:
    """Drawn with a true difference of what is said to be detectable."""
    import numpy as np

    drawn, sd = np.random.default_rng(1), 1.3
    effect = smallest_detectable(sd / 5**0.5, 4, 1)
    from scipy import stats

    d = effect + sd * drawn.standard_normal((4000, 5))
    p = stats.ttest_1samp(d, 0, axis=1, alternative="greater").pvalue
    assert 0.77 < (p < 0.05).mean() < 0.83


# What a page needs


def test_page_data_compares_at_one_budget() -> None:
    trials = [trial(0, 0.5, 0.40, 0.44, origin="paper"), trial(1, 0.1, state="pruned"), trial(2, 0.9, 0.50)]
    found = trial_rows(trials, {f"{0:016x}": SimpleNamespace(train_seconds=3.0)}, 4)  # type: ignore[dict-item]
    assert [(row.budget, row.rank, row.seeds, row.seconds) for row in found] == [
        (4, 2, 2, None),
        (2, None, 0, None),
        (4, 1, 1, None),
    ]
    assert found[0].mean == pytest.approx(42) and (found[0].low, found[0].high) == pytest.approx((40, 44))
    assert found[1].mean == pytest.approx(11) and best_so_far(trials) == [
        (0, pytest.approx(42)),
        (2, pytest.approx(50)),
    ]
    steps = rungs(trials, (2, 4))
    assert [number for number, _ in steps[0].came] == [0, 1, 2] and steps[0].on == {0, 2}
    assert [number for number, _ in steps[1].came] == [0, 2]


def test_importance_tells_what_matters_from_what_does_not() -> None:
    space = {"a": Dimension(low=0.0, high=1.0), "b": Dimension(low=0.0, high=1.0)}
    trials = []
    for number in range(40):
        a, b = (number * 0.618) % 1, (number * 0.414) % 1
        one = trial(number, 0.5, a * a)
        one.point = {"a": a, "b": b}
        trials.append(one)
    for kind in ("ped_anova", "fanova"):
        found = importances(trials, space, 4, kind)  # type: ignore[arg-type]
        assert found is not None and found["a"] > 0.7 > found["b"]
    assert importances(trials[:5], space, 4) is None and importances(trials, space, 3) is None


def test_the_printed_command_and_toml_mean_the_same_run(sweep: Sweep, tmp_path: Path) -> None:
    from viladiff.runs.config import RunConfig, override, parse_overrides

    run = SweepPlanner(sweep, "smoke", {}, "holdout").planned({"method.vila.lam": 0.1 + 0.2}, 1)
    words = train_command(run.changed, run.threads).split()
    fields = [word for word in words[2:] if "=" in word]
    again = override(RunConfig(), parse_overrides(fields))
    from viladiff.training.fingerprints import name_runs

    assert name_runs([again])[0].run_id == run.run_id and words[-2:] == ["--threads", "1"]
    assert "method.vila.lam=0.30000000000000004" in words
    path = edited(
        tmp_path,
        (
            '"data.split" = "183"\n',
            '"data.split" = "183"\n' + to_toml({"method.mixe.tau_shape": "step", "method.mixe.beta": 0.1 + 0.2}),
        ),
    )
    assert load_sweep(path).base["method.mixe.beta"] == 0.1 + 0.2


def test_the_printed_command_gives_the_winners_metric_bit_for_bit(tmp_path: Path) -> None:
    """A real sweep without Ray, one run of it interrupted; then the command that its conclusion prints."""
    from viladiff.runs.config import RunConfig, override
    from viladiff.runs.record import load_record
    from viladiff.training.errors import StopRequested
    from viladiff.training.trainer import fit

    words = ["--trials", "1", "--sampler", "random", "--no-finals", "--", "method.mixe.timesteps=2"]
    job = sweep_setup.prepare(TUNE / "sweep_lambda.toml", asked(tmp_path / "runs", *words))
    with sweep_setup.alone(job.directory):
        sweep_setup.open_directory(job)
        queue = sweeps._desk(job)
        while (run := queue.next_job()) is not None:
            queue.on_started(run.run_id)
            cfg = override(
                RunConfig(), {**run.changes, "runtime.runs_dir": str(tmp_path / "runs"), "runtime.progress": False}
            )
            with pytest.raises(StopRequested):
                fit(cfg, report=lambda news: "miou" in news and news["step"] == 2)
            queue.on_result(run.run_id, {"state": "done", "miou": fit(cfg).miou})
    trials = queue.search.trials
    assert [trial.state for trial in trials] == ["complete"] and queue.done
    printed = shlex.split(conclusion(job, trials, [])[-1])
    assert viladiff([*printed[1:], "--runs-dir", str(tmp_path / "again"), "--quiet"]) == 0
    (path,) = (tmp_path / "again").glob("*/record.json")
    best = max(trials, key=lambda trial: trial.value or 0)
    assert load_record(path).miou == best.values["0"] and path.parent.name == best.runs["0"]
    measured = {entry["step"]: entry["miou"] for entry in load_record(path).history}
    assert [(rung.step, measured[rung.step]) for rung in best.rungs] == [(rung.step, rung.value) for rung in best.rungs]
    assert [rung.step for rung in best.rungs] == [1, 2, 4]
