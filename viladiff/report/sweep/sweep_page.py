"""The page of a sweep: verdict on fresh seeds first, then the search, each comparison at one budget."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from viladiff.core.atomic import abandoned, write_atomically
from viladiff.core.messages import plain_cell
from viladiff.report import provenance
from viladiff.report.charts.sweep_figures import BEST, LINE, PAPER, PLAIN, save_picture
from viladiff.report.sweep import sweep_views
from viladiff.runs.record import RunRecord
from viladiff.sweeps.finals import FinalComparison, Finalist, Tuned, chosen, compare_finalists, scores
from viladiff.sweeps.spec import FRESH, Sweep, choosing_images
from viladiff.sweeps.summary import FOREST, TrialRow, importances, one_budget, rungs, to_toml, trial_rows
from viladiff.sweeps.trials import Trial, without_paths
from viladiff.tables.significance import Records

TEMPLATES = Path(__file__).parents[1] / "templates"
LISTED = 500
"""Trials that the table shows at most; trials.csv has every one."""


@dataclass(frozen=True)
class Shown:
    """All that a page is made from."""

    sweep: Sweep
    scale: str
    trials: Sequence[Trial]
    finalists: Sequence[Finalist]
    records: Records
    steps: Sequence[int]
    """Of the rungs, the last the full length."""
    wanted: int
    select: str
    command: str
    """Goes on with the sweep."""
    again: str
    """Trains the winner's first run again."""
    given_up: str = ""
    resting: bool = True
    """Whether the sweep does not go on now; only then is there time for what takes long."""
    tuned: Sequence[Tuned] = ()
    """This sweep and those ``beside`` it."""


def render_sweep(shown: Shown, out: Path) -> Path:
    """Write index.html, trials.csv and winner.toml under ``out``; return the path of index.html.

    A sweep that only chooses writes chosen.toml too, the point with the highest mean on fresh seeds. Each file is
    replaced atomically: the page is rewritten during the sweep.
    """
    out.mkdir(parents=True, exist_ok=True)
    for path in abandoned(out):
        path.unlink(missing_ok=True)  # of a writer that was killed
    trials = [without_paths(trial) for trial in shown.trials]
    every = trial_rows(trials, shown.records, shown.steps[-1])
    best = min((row for row in every if row.rank is not None), key=lambda row: row.rank or 0, default=None)
    if best is not None:
        write_atomically(out / "winner.toml", to_toml(best.point).encode())
    else:
        (out / "winner.toml").unlink(missing_ok=True)
    taken = chosen(shown.finalists, shown.records) if shown.sweep.finals_split == "dev" else None
    if taken is not None:
        write_atomically(out / "chosen.toml", to_toml(taken.point).encode())
    else:
        (out / "chosen.toml").unlink(missing_ok=True)
    write_atomically(out / "trials.csv", trials_csv(shown.sweep, trials, every).encode())
    write_atomically(out / "index.html", sweep_html(shown, trials, every, best, out).encode())
    return out / "index.html"


def sweep_html(
    shown: Shown, trials: Sequence[Trial], every: Sequence[TrialRow], best: TrialRow | None, out: Path
) -> str:
    """Render the page from values computed here; the template only lays it out."""
    sweep, records = shown.sweep, shown.records
    used = _used(trials, shown.finalists, records)
    fewest = min(FRESH, len(sweep.final_seeds))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"last": sweep_views.last, "short": sweep_views.short}
    facts = [*provenance.shared_facts(list(used.values())), *_totals(used)] if used else []
    return environment.get_template("sweep.html.j2").render(
        css=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        colours={"plain": PLAIN, "best": BEST, "line": LINE, "paper": PAPER},
        sweep=sweep,
        scale=shown.scale,
        command=shown.command,
        again=shown.again,
        given_up=shown.given_up,
        quoted=sweep.finals_split == "test",
        fewest=fewest,
        tuned=shown.tuned,
        peeked=shown.select == "val",
        chosen_by=choosing_images(sweep, shown.scale),
        wanted=shown.wanted,
        counts={state: sum(trial.state == state for trial in trials) for state in _STATES},
        steps=list(shown.steps),
        finals=[_final(one, records, len(sweep.final_seeds)) for one in shown.finalists],
        contests=[_said(one) for one in compare_finalists(shown.finalists, records, fewest)],
        winner=to_toml(best.point) if best else "",
        download=f"data:application/toml;charset=utf-8,{quote(to_toml(best.point))}" if best else "",
        **_pictures(shown, trials, every, best, out / "figures"),
        rungs=rungs(trials, shown.steps),
        mattered=_mattered(sweep, trials, shown.steps) if shown.resting else None,
        later=not shown.resting and len(sweep.space) > 1,
        every=len(every),
        listed=_listed(every),
        runs=_runs(trials, shown.finalists, records, out),
        facts=facts,
        mixed=[fact.name.lower() for fact in facts if fact.mixed],
    )


def _pictures(
    shown: Shown, trials: Sequence[Trial], every: Sequence[TrialRow], best: TrialRow | None, folder: Path
) -> dict[str, Any]:
    """Return figures by the template's names, drawn below ``folder``; None for one that has nothing to show."""
    sweep = shown.sweep
    found: dict[str, Any] = {
        "responses": [],
        "printed": sweep_views.printed(sweep),
        "threads": sweep_views.threads(sweep, every, best) if best and len(sweep.space) > 1 else None,
        "history": sweep_views.history(every, trials),
        "cost": sweep_views.cost(trials, shown.steps[-1]) if best else None,
        "minutes": sweep_views.minutes(every, best) if best else None,
        "climbs": sweep_views.climbs(trials, shown.steps),
    }
    for name in ("threads", "history", "cost", "minutes", "climbs"):
        found[name] = found[name] and save_picture(found[name], folder, name)
    for i, path in enumerate(sweep.space if best else (), 1):
        chart, width = sweep_views.response(sweep, path, every, best)  # type: ignore[arg-type]
        found["responses"].append((path, save_picture(chart, folder, f"response-{i}"), width))
    for i, one in enumerate(found["printed"], 1):
        one["chart"] = save_picture(one["chart"], folder, f"printed-{i}")
    return found


_STATES = ("complete", "pruned", "failed", "running")


# Numbers


def trials_csv(sweep: Sweep, trials: Sequence[Trial], every: Sequence[TrialRow]) -> str:
    """Return a line a trial: its point, its score in percent and the step of that score; empty if missing."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = ("state", "score", "step", "seeds", "rank", "train_seconds", "origin", "reason", "runs")
    writer.writerow(map(plain_cell, ["trial", *sweep.space, *names]))
    for trial, row in zip(trials, every, strict=True):
        about = (row.state, row.mean, row.budget, row.seeds, row.rank, row.seconds, row.origin, row.reason)
        point = (row.point.get(path) for path in sweep.space)
        writer.writerow(map(plain_cell, [row.number, *point, *about, " ".join(trial.runs.values())]))
    return buffer.getvalue()


def _final(one: Finalist, records: Records, wanted: int) -> dict[str, Any]:
    values = list(scores(one, records).values())
    mean = math.fsum(values) / len(values) if values else None
    sd = None
    if mean is not None and len(values) > 1:
        sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    about = {"label": one.label, "trial": one.trial, "point": one.point, "values": values, "wanted": wanted}
    return {**about, "mean": mean, "sd": sd}


def _said(one: FinalComparison) -> dict[str, Any]:
    verdict = {"shown": "better", "reversed": "worse", "open": "not told apart"}[one.outcome]
    return {**vars(one), "verdict": verdict}


def _mattered(sweep: Sweep, trials: Sequence[Trial], steps: Sequence[int]) -> dict[str, Any] | None:
    """Return importances by field from both evaluators at one budget; None for a space of one dimension."""
    step = one_budget(trials, steps)
    if len(sweep.space) < 2 or step is None:
        return None
    kinds: dict[str, Literal["ped_anova", "fanova"]] = {"PED-ANOVA": "ped_anova", "fANOVA": "fanova"}
    shares = {how: importances(trials, sweep.space, step, kind) for how, kind in kinds.items()}
    if any(one is None for one in shares.values()):
        return None
    order = sorted(sweep.space, key=lambda path: -(shares["fANOVA"] or {})[path])
    came = sum(trial.twin is None and any(rung.step == step for rung in trial.rungs) for trial in trials)
    return {"step": step, "shares": shares, "order": order, "came": came, "forest": min(came, FOREST)}


def _listed(every: Sequence[TrialRow]) -> list[TrialRow]:
    """Return all trials, or of very many the best and the latest."""
    if len(every) <= LISTED:
        return list(every)
    first = sorted((row for row in every if row.rank is not None), key=lambda row: row.rank or 0)[: LISTED // 2]
    kept = {row.number for row in (*first, *every[-LISTED // 2 :])}
    return [row for row in every if row.number in kept]


def _used(trials: Sequence[Trial], found: Sequence[Finalist], records: Records) -> dict[str, RunRecord]:
    """Return the records behind the page."""
    names = [*(run for trial in trials for run in trial.runs.values())]
    names += [run.run_id for one in found for run in one.runs.values()]
    return {name: records[name] for name in names if name in records}


def _totals(used: Mapping[str, RunRecord]) -> list[provenance.Fact]:
    return [
        provenance.Fact(name, ((value, len(used)),)) for name, value in provenance.spent(list(used.values())).items()
    ]


def _runs(trials: Sequence[Trial], found: Sequence[Finalist], records: Records, out: Path) -> list[dict[str, Any]]:
    """Return finished runs of the finalists, and of all trials if there are few; with links to records nearby."""
    stands: dict[str, list[str]] = {}
    for one in found:
        for seed, run in one.runs.items():
            stands.setdefault(run.run_id, []).append(f"{one.label}, fresh seed {seed}")
    for trial in trials if len(trials) <= LISTED else ():
        for named, run_id in trial.runs.items():
            stands.setdefault(run_id, []).append(f"trial {trial.number}, seed {named}")
    return [
        {"run": run_id, "stands": where, "record": records[run_id], "link": _link(run_id, out)}
        for run_id, where in stands.items()
        if run_id in records
    ]


def _link(run_id: str, out: Path) -> str:
    """Link a record beside the page; no other path is shown, since the page may be published."""
    path = out / "records" / f"{run_id}.json"
    return Path(os.path.relpath(path, out)).as_posix() if path.is_file() else ""
