"""A sweep's page and what is published of it: numbers at one budget, nothing of a machine, the next machine goes on."""

from __future__ import annotations

import csv
import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
from record_kit import content_of

from viladiff.cli.sweeps import sweep_parser
from viladiff.experiments import publish_sweep, sweep_setup
from viladiff.experiments import sweeps as sweep_drive
from viladiff.report.charts import sweep_figures
from viladiff.report.charts.sweep_figures import (
    Axis,
    ParallelChart,
    ParallelLine,
    Point,
    Polyline,
    TrialChart,
    draw_parallel,
    draw_trials,
    save_picture,
)
from viladiff.report.charts.themes import THEMES
from viladiff.report.sweep import sweep_page
from viladiff.report.sweep.sweep_page import Shown, render_sweep
from viladiff.runs.job import PlannedRun
from viladiff.runs.record import RunRecord, save_record
from viladiff.sweeps import summary
from viladiff.sweeps.finals import Finalist
from viladiff.sweeps.spec import Sweep, load_sweep
from viladiff.sweeps.summary import local_mean, one_budget, trained
from viladiff.sweeps.trials import Rung, Trial, load_trials, save_trial, without_paths

pytestmark = pytest.mark.usefixtures("prints_once")
TUNE = Path(__file__).resolve().parents[2] / "tune"
STEPS = (150, 300, 600)
FIELDS: dict[str, Any] = {
    "config": {"data.dataset": "digits", "runtime.runs_dir": "/home/somebody/runs"},
    "changed": {"runtime.runs_dir": "/home/somebody/runs"},
    "fingerprints": {"data": "d"},
    "steps": 600,
    "network": "teacher",
    "stream": "visual",
    "scores": {},
    "best": None,
    "history": [],
    "pseudo_labels": {},
    "class_names": [],
    "captions": "simulated",
    "text_encoder": "words",
    "encoder": "digits_vit",
    "pretrained": "shipped",
    "wall_seconds": 100.0,
    "train_seconds": 90.0,
    "seconds_per_step": 0.1,
    "peak_memory_bytes": None,
    "workers": 1,
    "threads": 1,
    "device": "cpu",
    "versions": {},
    "git": {},
}


def record(run_id: str, miou: float) -> RunRecord:
    return RunRecord(run_id=run_id, miou=miou, core_revision=0, method_revision=0, **FIELDS)


def record_of(run: PlannedRun, miou: float) -> RunRecord:
    """Of a run that a sweep has named; its file can be read."""
    return RunRecord(miou=miou, **{**FIELDS, **content_of(run, **{"runtime.runs_dir": "/home/somebody/runs"})})


def run_of(number: int, seed: int) -> str:
    return f"{number:012x}{seed:04x}"


def trial(number: int, point: dict[str, Any], *values: float, state: Any = "complete", reached: int = 3) -> Trial:
    """A trial whose first seed scored 0.1, 0.2 on its way, and less than its end where it is bad."""
    first = values[0] if values else 0.3 - number / 1000
    rungs = [Rung(step=step, value=first * (0.5 + 0.25 * i), order=20 * number + i + 1) for i, step in enumerate(STEPS)]
    return Trial(
        number=number,
        point=point,
        runs={str(seed): run_of(number, seed) for seed in range(3)},
        order=20 * number,
        state=state,
        values={str(seed): value for seed, value in enumerate(values)},
        rungs=rungs[:reached],
        reason="" if state == "complete" else f"{state} at /home/somebody/runs/x/hang.txt",
        origin="tpe" if number else "paper",
        ended=None if state == "running" else 20 * number + 9,
    )


def lambdas() -> list[Trial]:
    """Nine complete trials with one best at λ = 0.6, two stopped, one failed, one under way."""
    places = [0.5, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5]
    found = []
    for i, lam in enumerate(places):
        scores = [0.5 - 0.1 * abs(lam - 0.6) + 0.001 * seed for seed in range(3)]
        found.append(trial(i, {"method.vila.lam": lam}, *scores))
    found += [trial(i, {"method.vila.lam": 1.9}, state="pruned", reached=1) for i in (9, 10)]
    found.append(trial(11, {"method.vila.lam": 0.05}, state="failed", reached=0))
    return [*found, trial(12, {"method.vila.lam": 0.55}, state="running", reached=2)]


def finals(sweep: Sweep, *trials: Trial) -> tuple[list[Finalist], dict[str, RunRecord]]:
    found, records = [], {}
    for role, one in zip(("winner", "paper"), trials, strict=True):
        runs = {seed: PlannedRun(run_of(1000 + one.number, seed), {}, "", 600, {}) for seed in sweep.final_seeds}
        found.append(Finalist((role,), one.number, dict(one.point), runs))  # type: ignore[arg-type]
        for seed, run in runs.items():
            records[run.run_id] = record(run.run_id, 0.5 - 0.02 * (role == "paper") + 0.001 * (seed * one.number % 3))
    return found, records


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    return load_sweep(TUNE / "sweep_lambda.toml")


def shown(sweep: Sweep, trials: list[Trial], **changes: Any) -> Shown:
    records = {
        run: record(run, one.values[seed]) for one in trials for seed, run in one.runs.items() if seed in one.values
    }
    found, more = finals(sweep, trials[5], trials[0]) if len(trials) > 5 else ([], {})
    given = {"select": "holdout", "command": "python tune/sweep_lambda.py", "again": "viladiff train x=<1>", **changes}
    return Shown(sweep, "digits", trials, found, {**records, **more}, STEPS, 14, **given)


class Page(HTMLParser):
    """Tags, what they refer to, and the text of each section by its id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.refers: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.said: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.refers += [str(given[name]) for name in ("href", "src") if given.get(name)]
        self.ids += [str(given["id"])] if "id" in given else []
        if tag == "section":
            self.open.append(str(given["id"]))

    def handle_endtag(self, tag: str) -> None:
        if tag == "section":
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.said[self.open[-1]] = self.said.get(self.open[-1], "") + data


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, TrialChart | ParallelChart]:
    """Charts that were asked for, by name; matplotlib takes seconds."""
    charts: dict[str, TrialChart | ParallelChart] = {}

    def save_drawn(chart: TrialChart | ParallelChart, picture: object, folder: Path, name: str) -> dict[str, Path]:
        charts[name] = chart
        folder.mkdir(parents=True, exist_ok=True)
        paths = {theme: folder / f"{name}-{theme}.svg" for theme in THEMES}
        for theme, path in paths.items():
            path.write_text(f"<svg>{theme}</svg>")
        return paths

    monkeypatch.setattr(sweep_figures, "save_drawn", save_drawn)
    return charts


def test_figures_draw_every_trial_in_both_themes(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axis = Axis(0.05, 2.0, "lam", log=True)
    dots = [Point(0.1 * i, 40.0 + i, f"trial {i}", low=39.0 + i, high=41.0 + i, hollow=i == 3) for i in (1, 2, 3)]
    lines = [Polyline([(0.1, 41.0), (0.3, 42.0)], words="local mean", band=[1.0, 2.0])]
    chart = TrialChart(axis, "mIoU along lam", dots, lines, rug=(0.5, 1.0))
    (axes,) = draw_trials(chart).axes
    marks = [line for line in axes.lines if line.get_marker() == "o"]
    assert [len(line.get_xdata()) for line in marks] == [2, 1] and marks[1].get_markerfacecolor() == "#ffffff"  # type: ignore[arg-type]
    (rug,) = (line for line in axes.lines if line.get_marker() == "|")
    assert list(rug.get_xdata()) == [0.5, 1.0]  # type: ignore[arg-type]
    assert len(axes.collections) == 4, "a spread for each dot, and the band"
    assert axes.get_xscale() == "log" and [text.get_text() for text in axes.get_xticklabels()] == [
        f"{mark:g}" for mark in (0.05, 0.1, 0.2, 0.5, 1, 2)
    ]
    choices = Axis(-0.5, 1.5, "schedule", names=("cosine", "linear"))
    parallel = ParallelChart([axis, choices], "all", [ParallelLine([0.2, 0.25], "trial 1", 0.5)])
    (axes,) = draw_parallel(parallel).axes
    assert list(axes.lines[0].get_ydata()) == [0.2, 0.25]  # type: ignore[arg-type]
    assert {"lam", "schedule", "cosine", "linear"} <= {text.get_text() for text in axes.texts}
    monkeypatch.undo()
    picture = save_picture(chart, tmp_path, "chart")
    assert picture.words == "mIoU along lam. trial 1; trial 2; trial 3; local mean"
    texts = [(tmp_path / f"chart-{theme}.svg").read_text() for theme in ("light", "dark")]
    assert THEMES["dark"]["ground"] in texts[1] and THEMES["light"]["ground"] not in texts[1]
    assert picture.light.startswith("data:image/svg+xml;base64,") and picture.light != picture.dark


def test_the_page_shows_all_that_a_sweep_found(
    sweep: Sweep, tmp_path: Path, drawn: dict[str, TrialChart | ParallelChart]
) -> None:
    text = render_sweep(shown(sweep, lambdas()), tmp_path).read_text()
    page = Page(text)
    assert page.ids == list(dict.fromkeys(page.ids))
    assert all(ref.startswith(("#", "data:", "trials.csv", "records/")) for ref in page.refers), "self-contained"
    assert {ref[1:] for ref in page.refers if ref.startswith("#")} <= set(page.ids)
    assert "http" not in text.replace("https://", "http") or not re.search(r'(src|href)="http', text)
    assert "/home/somebody" not in text and "failed at …/hang.txt" in text
    assert "Winner against first point: +" in text and "x=&lt;1&gt;" in text
    assert "12 of 14 trials have ended" in text and "9 trials complete, 2 stopped early, 1 failed, 1 under way" in text
    # The response: nine places with their spread, a local mean with its band, what was stopped, the paper's own curve.
    response = text.split('id="response"')[1].split("</section>")[0]
    assert response.count("<picture>") == 2 and response.count("prefers-color-scheme: dark") == 2
    measured = drawn["response-1"]
    assert isinstance(measured, TrialChart)
    assert (len(measured.dots), [len(line.band) > 0 for line in measured.lines]) == (9, [True, False])
    assert len(measured.rug) == 2 and "2 stopped early" in response and "trial 5 (best, 3 seeds)" in response
    printed = drawn["printed-1"]
    assert isinstance(printed, TrialChart) and (len(printed.lines), len(printed.dots)) == (4, 20)
    assert all(number in page.said["response"] for number in ("77.5", "82.4", "46.3"))
    assert "What mattered" not in text, "a space of one dimension has nothing to share out"
    winner = next(ref for ref in page.refers if ref.startswith("data:application/toml"))
    assert tomllib.loads(unquote(winner.partition(",")[2])) == {"method.vila.lam": 0.6}
    assert (tmp_path / "winner.toml").read_text() == '"method.vila.lam" = 0.6\n'


def test_stopped_trials_are_at_their_own_budget(
    sweep: Sweep, tmp_path: Path, drawn: dict[str, TrialChart | ParallelChart]
) -> None:
    trials = lambdas()
    text = render_sweep(shown(sweep, trials), tmp_path).read_text()
    page = Page(text)
    lines = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [line["step"] for line in lines] == ["600"] * 9 + ["150", "150", "", "300"]
    assert [line["rank"] for line in lines[9:]] == [""] * 4 and lines[5]["rank"] == "1"
    assert float(lines[5]["score"]) == pytest.approx(50.1) and lines[11]["score"] == ""
    assert lines[0]["runs"].split()[1] == run_of(0, 1) and "/home" not in (tmp_path / "trials.csv").read_text()
    assert "150" in page.said["rungs"] and 'class="num">12</td><td class="num">10</td>' in text
    history = drawn["history"]
    assert isinstance(history, TrialChart) and len(history.dots) == 9
    assert "Points were chosen by the part dev of the built-in data, on which no trial was trained" in text


def test_peeking_is_said_in_red_and_an_empty_sweep_says_so(sweep: Sweep, tmp_path: Path) -> None:
    peeked = render_sweep(shown(sweep, lambdas(), select="val"), tmp_path).read_text()
    assert re.search(r'class="peeked" role="alert">Points were chosen by the reported validation set', peeked)
    assert "on which no trial was trained" not in peeked and "mIoU (%) on the reported set" in peeked
    style = re.search(r"\.peeked \{[^}]*background: (#\w+)", peeked)
    assert style is not None
    red, green, blue = bytes.fromhex(style[1][1:])
    assert red > 2 * max(green, blue)
    honest = render_sweep(shown(sweep, lambdas()), tmp_path).read_text()
    assert 'role="alert"' not in honest and "on which no trial was trained" in honest
    empty = render_sweep(shown(sweep, []), tmp_path).read_text()
    assert "Nothing is decided yet" in empty and "no trial is complete yet" in empty
    assert not (tmp_path / "winner.toml").exists() and "Download" not in empty
    assert (
        "Given up:</b> the loss is nan"
        in render_sweep(shown(sweep, [], given_up="the loss is nan\nT"), tmp_path).read_text()
    )


def test_a_space_of_many_dimensions_has_threads_and_importances_at_one_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: dict[str, TrialChart | ParallelChart]
) -> None:
    flip = load_sweep(TUNE / "sweep_flip.toml")
    asked: list[int] = []
    found = summary.importances

    def importances(trials: Any, space: Any, step: int, kind: Any) -> Any:
        asked.append(step)
        return found(trials, space, step, kind)

    monkeypatch.setattr(sweep_page, "importances", importances)
    trials = []
    for i in range(24):
        beta, bonus = 0.01 + 0.39 * (i * 0.618 % 1), 0.4 * (i * 0.414 % 1)
        point = {**flip.initial_point, "method.mixe.beta": beta, "method.mixe.edge_bonus": bonus}
        stopped = i % 4 > 1
        values = [] if stopped else [0.3 + beta / 2] * 3
        one = trial(i, point, *values, state="pruned" if stopped else "complete", reached=2 if stopped else 3)
        trials.append(one.model_copy(update={"rungs": [r.model_copy(update={"value": beta}) for r in one.rungs]}))
    page = Page(render_sweep(shown(flip, trials), tmp_path).read_text())
    assert asked == [600, 600], "half of all came to the last rung"
    assert page.said["importances"].index("method.mixe.beta") < page.said["importances"].index("method.mixe.edge_bonus")
    assert "the 12 trials that came to it" in page.said["importances"]
    assert len(drawn["threads"].lines) == 12
    assert "when the sweep rests" in render_sweep(shown(flip, trials, resting=False), tmp_path).read_text()


def test_the_one_budget_is_the_last_that_half_of_all_came_to() -> None:
    trials = [
        trial(i, {}, *([0.5] * 3), state="complete", reached=3 if i < 8 else 2 if i < 12 else 1) for i in range(24)
    ]
    assert one_budget(trials, STEPS) == 300
    assert one_budget(trials[:16], STEPS) == 600
    assert one_budget(trials[:7], STEPS) is None


def test_steps_are_counted_for_stopped_trials_too() -> None:
    trials = lambdas()
    assert trained(trials, 600) == [(i, 1800 * (i + 1)) for i in range(9)] + [(9, 16350), (10, 16500), (11, 16500)]


def test_the_local_mean_follows_its_formula() -> None:
    import numpy as np

    drawn = np.random.default_rng(3)
    at, values = drawn.random(40), drawn.standard_normal(40)
    values += 10 * np.sin(6 * at)
    found = local_mean(at.tolist(), values.tolist())
    assert found is not None and found.width <= 0.12
    i, h = 17, found.width
    weights = [np.exp(-((found.at[i] - u) ** 2) / (2 * h * h)) for u in at]
    assert found.mean[i] == pytest.approx(sum(w * y for w, y in zip(weights, values, strict=True)) / sum(weights))
    left_out = []
    for j in range(40):
        others = [k for k in range(40) if k != j]
        w = [np.exp(-((at[j] - at[k]) ** 2) / (2 * h * h)) for k in others]
        left_out.append(values[j] - sum(a * values[k] for a, k in zip(w, others, strict=True)) / sum(w))
    s = float(np.sqrt(np.mean(np.square(left_out))))
    assert found.error[i] == pytest.approx(s * np.sqrt(sum(w * w for w in weights)) / sum(weights))
    assert found.at[0] == at.min() and found.at[-1] == at.max()
    assert local_mean([0.1, 0.2] * 20, [1.0] * 40) is None


def test_very_many_trials_make_a_page_of_bounded_size(sweep: Sweep, tmp_path: Path) -> None:
    trials = [trial(i, {"method.vila.lam": 0.05 + i / 2000}, 0.4 + i / 10000) for i in range(1200)]
    text = render_sweep(shown(sweep, trials), tmp_path).read_text()
    assert len(text) < 900_000 and "The best and the latest of 1200 trials" in text
    assert len((tmp_path / "trials.csv").read_text().splitlines()) == 1201


def test_reasons_are_told_without_a_machines_folders() -> None:
    for reason, said in (
        ("no sign of life; where it stood: /home/a/runs/b/hang.txt", "no sign of life; where it stood: …/hang.txt"),
        ("~/x/y/z.json is gone", "…/z.json is gone"),
        (r"C:\Users\me\run.txt", "…/run.txt"),
        ("stopped at step 1 of 4", "stopped at step 1 of 4"),
        ("ratio 1/2 or n/a", "ratio 1/2 or n/a"),
    ):
        assert without_paths(Trial(number=0, point={}, runs={}, order=0, reason=reason)).reason == said


# Publishing


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout, as far as reports go."""
    (tmp_path / "checkout" / "ablations").mkdir(parents=True)
    (tmp_path / "checkout" / "pyproject.toml").touch()
    monkeypatch.setattr("viladiff.core.installation._PACKAGE", tmp_path / "checkout" / "viladiff")
    return tmp_path / "checkout" / "reports" / "published" / "sweep_lambda"


def machine(root: Path, *words: str) -> sweep_setup.SweepJob:
    """A sweep as somebody asks for it whose storage is ``root``, opened."""
    given = ["--scale", "digits", "--runs-dir", str(root), "--sampler", "random", *words]
    job = sweep_setup.prepare(
        TUNE / "sweep_lambda.toml", sweep_parser(TUNE / "sweep_lambda.toml", "x").parse_args(given)
    )
    with sweep_setup.alone(job.directory):
        sweep_setup.open_directory(job)
        publish_sweep.adopt(job)
    return job


def train(job: sweep_setup.SweepJob, wanted: int, score: float = 0.4) -> None:
    """Plays the sweep's first runs with made-up scores."""
    queue = sweep_drive._desk(job)
    while len(queue.search.trials) < wanted or queue.search.owner:
        run = queue.next_job()
        assert run is not None
        queue.on_started(run.run_id)
        for step in queue.search.steps[:-1]:
            queue.should_stop(run.run_id, step, score / 2)
        made = record_of(run, score + 0.001 * len(queue.search.trials))
        (job.store.root / run.run_id).mkdir(parents=True)
        save_record(made, job.store.root / run.run_id / "record.json")
        if len(queue.search.trials) == wanted and run.changes["seed"] == 1:
            return  # in the middle of a trial
        queue.on_result(run.run_id, {"state": "done", "miou": made.miou})


def test_the_next_machine_goes_on_from_what_is_published(checkout: Path, tmp_path: Path) -> None:
    job = machine(tmp_path / "a", "--trials", "5", "--publish")
    train(job, 3)
    here = load_trials(job.directory / "trials")
    assert [one.state for one in here] == ["complete", "complete", "running"] and list(here[2].values) == ["0"]
    index = sweep_drive.write_sweep_page(job, here, f"python tune/sweep_lambda.py --runs-dir {tmp_path} --publish")
    assert index == checkout / "index.html"
    files = [path for path in checkout.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == {"sweep_lambda", "trials", "records", "figures"}
    assert len(list((checkout / "records").iterdir())) == 8
    for path in files:
        assert str(tmp_path) not in path.read_text() and "/home/" not in path.read_text(), path
    assert 'href="records/' in index.read_text()

    other = machine(tmp_path / "b", "--trials", "5")
    assert load_trials(other.directory / "trials") == here
    queue = sweep_drive._desk(other)
    assert all(other.store.get(run) is not None for one in here[:2] for run in one.runs.values())
    names = []
    while not queue.done and (run := queue.next_job()) is not None:
        names.append(run.title)
        queue.on_started(run.run_id)
        queue.request_stop()
    assert names == ["trial 2, seed 2"], "finished runs count as done"
    assert [one.number for one in queue.search.trials] == [0, 1, 2]

    # A page of what is committed alone is the same page, wherever it is made.
    before = {path.name: path.read_bytes() for path in checkout.iterdir() if path.is_file()}
    third = sweep_setup.prepare(
        TUNE / "sweep_lambda.toml",
        sweep_parser(TUNE / "sweep_lambda.toml", "x").parse_args(
            ["--scale", "digits", "--runs-dir", str(tmp_path / "c"), "--trials", "5", "--publish", "--render"]
        ),
    )
    sweep_drive.write_sweep_page(
        third, publish_sweep.published_trials(third), f"python tune/sweep_lambda.py --runs-dir {tmp_path} --publish"
    )
    assert {path.name: path.read_bytes() for path in checkout.iterdir() if path.is_file()} == before
    assert not (tmp_path / "c" / "sweeps").exists()


@pytest.mark.slow
def test_trials_that_went_another_way_are_not_published_over(checkout: Path, tmp_path: Path) -> None:
    job = machine(tmp_path / "a", "--trials", "2", "--publish")
    train(job, 2)
    sweep_drive.write_sweep_page(job, load_trials(job.directory / "trials"), "x")
    # Without the published ones in sight, another machine's trials take another course.
    (checkout / "sweep.json").rename(checkout / "hidden")
    other = machine(tmp_path / "b", "--trials", "2", "--sampler-seed", "5")
    train(other, 2, 0.3)
    (checkout / "hidden").rename(checkout / "sweep.json")
    mine = load_trials(other.directory / "trials")
    assert machine(tmp_path / "b", "--trials", "3").trials == 3 and load_trials(other.directory / "trials") == mine
    with pytest.raises(
        ValueError, match=r"trials have diverged from those published in .*; use --study NAME to continue"
    ):
        machine(tmp_path / "b", "--trials", "3", "--publish")
    assert len(load_trials(machine(tmp_path / "b", "--publish", "--study", "anew").directory / "trials")) == 2
    # One that is ahead of what is published publishes over it.
    train(machine(tmp_path / "a", "--trials", "3"), 3)
    machine(tmp_path / "a", "--trials", "3", "--publish")
    (checkout / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"sweep.json: damaged"):
        machine(tmp_path / "a", "--publish")


def test_what_is_published_of_another_sweep_is_left_alone(checkout: Path, tmp_path: Path) -> None:
    job = machine(tmp_path / "a", "--trials", "2", "--publish")
    train(job, 2)
    sweep_drive.write_sweep_page(job, load_trials(job.directory / "trials"), "x")
    meta = json.loads((checkout / "sweep.json").read_text())
    (checkout / "sweep.json").write_text(json.dumps({**meta, "first run": "0" * 16}))
    other = machine(tmp_path / "b", "--trials", "2", "--publish")
    assert load_trials(other.directory / "trials") == []
    train(other, 1)
    sweep_drive.write_sweep_page(other, load_trials(other.directory / "trials"), "x")
    assert load_trials(checkout / "trials") == load_trials(other.directory / "trials")
    assert json.loads((checkout / "sweep.json").read_text()) == meta


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["--scale", "smoke"], "--publish --scale smoke"),
        (["--scale", "digits", "--seeds", "2"], "--publish --seeds"),
        (["--scale", "digits", "--", "train.steps=4"], "--publish --changes"),
    ],
)
def test_only_the_sweep_as_its_file_has_it_is_published(tmp_path: Path, words: list[str], wrong: str) -> None:
    given = sweep_parser(TUNE / "sweep_lambda.toml", "x").parse_args(["--publish", "--runs-dir", str(tmp_path), *words])
    with pytest.raises(ValueError, match=f"{wrong}: not allowed; a published page is of the sweep as in its file"):
        sweep_setup.prepare(TUNE / "sweep_lambda.toml", given)


def test_continues_knows_what_may_grow() -> None:
    done, running = trial(0, {"x": 1}, 0.5, 0.5, 0.5), trial(1, {"x": 2}, 0.4, state="running", reached=1)
    later = trial(1, {"x": 2}, 0.4, 0.5, 0.6)
    assert publish_sweep.continues([done, later], [done, running]) and not publish_sweep.continues(
        [done], [done, later]
    )
    assert not publish_sweep.continues([done, running], [done, later])
    assert not publish_sweep.continues([done, trial(1, {"x": 3}, 0.4, 0.5, 0.6)], [done, running])
    assert not publish_sweep.continues([done, trial(1, {"x": 2}, 0.41, 0.5, 0.6)], [done, running])
    assert publish_sweep.continues([done], [])
    further = trial(1, {"x": 2}, 0.4, state="running", reached=2)
    assert publish_sweep.continues([done, further], [done, running])
    assert not publish_sweep.continues([done, running], [done, further])
    forgotten = Trial(**{**running.model_dump(), "values": {}})
    assert publish_sweep.continues([done, running], [done, forgotten])
    assert not publish_sweep.continues([done, forgotten], [done, running])


def test_a_published_trial_is_written_once(checkout: Path, tmp_path: Path) -> None:
    """So that a page that is rewritten every few seconds does not touch every file."""
    (checkout / "trials").mkdir(parents=True)
    one = trial(0, {"method.vila.lam": 0.5}, 0.5)
    save_trial(one, checkout / "trials")
    before = (checkout / "trials" / "000000.json").stat().st_mtime_ns
    job: Any = SimpleNamespace(sweep=SimpleNamespace(name="lambda"), store=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish_sweep, "publish_records", lambda *given: [])
        patch.setattr(publish_sweep, "meta", lambda job: {})
        publish_sweep.publish_sweep(job, [one], [])
        assert (checkout / "trials" / "000000.json").stat().st_mtime_ns == before
        publish_sweep.publish_sweep(job, [], [])
    assert list((checkout / "trials").iterdir()) == []
