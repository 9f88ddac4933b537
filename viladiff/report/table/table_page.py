"""The page of a table, in one file: style, charts and pictures are embedded, and each missing number has its reason."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from viladiff.core import colormap
from viladiff.core.atomic import write_atomically
from viladiff.core.messages import format_seconds
from viladiff.evaluation.metric_table import METRICS, shown_metrics
from viladiff.report import provenance
from viladiff.report.charts import figures
from viladiff.report.markup import markdown
from viladiff.report.sections import (
    beside,
    caption_dose,
    design_choices,
    feature_clusters,
    leaderboard,
    loss_gradients,
    qualitative,
    training,
)
from viladiff.report.sections.beside import Beside
from viladiff.report.sections.learning_curves import Curve, curves
from viladiff.report.table import exports, table_views
from viladiff.report.table import results as tables
from viladiff.report.table.results import Agreement, Results
from viladiff.runs.store import abandoned

if TYPE_CHECKING:
    from viladiff.runs.store import Store
    from viladiff.tables.claims import Verdict
    from viladiff.tables.consistency import Inconsistency
    from viladiff.tables.plan import Plan

TEMPLATES = Path(__file__).parents[1] / "templates"
BOUNDARIES = ("boundary_iou", "trimap_miou")
"""Metrics that stand side by side, under a heading of their own."""


def render_table(
    plan: Plan,
    store: Store,
    out: Path,
    *,
    command: str,
    verdicts: Sequence[Verdict],
    agreement: Sequence[Agreement] | None = None,
    printed: Sequence[Inconsistency] = (),
    published: tuple[Plan, Store] | None = None,
) -> Path:
    """Write index.html, table.md, table.tex, table.csv and figures/ under ``out``; return the path of index.html.

    ``agreement`` is computed here unless given; ``printed`` lists what is wrong with the paper's numbers; ``published``
    is shown beside the runs: the plan of another scale, and a store of committed records alone. Each file is replaced
    atomically, so that a reader of the page, which is rewritten as runs finish, never sees half of it.
    """
    results = tables.collect_results(plan, store)
    drawn = curves(results, store)
    both = None if published is None else beside_of(results, *published, out)
    judged = both.published if both and both.any_published else results
    agreements = agreement if agreement is not None else [tables.agreement(judged, c) for c in judged.plan.columns]
    out.mkdir(parents=True, exist_ok=True)
    for path in [*abandoned(out), *abandoned(out / "figures")]:
        path.unlink(missing_ok=True)  # of a writer that was killed
    files = [path.name for path in figures.save_figures(results, drawn, out / "figures")]
    board = leaderboard.build_leaderboard(results, store, out, verdicts)
    files += board.files if board else ()
    grouped = feature_clusters.build_clusters(results, store, out)
    files += grouped.files if grouped else ()
    said = banner(results)
    doses = caption_dose.dose(results, out)
    files += doses.files if doses else ()
    opened = design_choices.build_choices(results, verdicts)
    more = {
        **leaderboard.leaderboard_markdown(board, [plan.table.columns[c].label for c in plan.columns]),
        **feature_clusters.clusters_markdown(grouped),
        **caption_dose.dose_markdown(doses, [plan.table.columns[c].label for c in plan.columns]),
        **training.training_markdown(results),
        **loss_gradients.gradients_markdown(loss_gradients.section(results)),
        "What each choice is worth": design_choices.choices_markdown(opened),
        "The paper's own numbers": [f"- {markdown(one.text)}" for one in printed],
    }
    stand_ins, context = table_views.stand_ins(results), table_views.context(results)
    first = beside.headline_beside(both) if both else ""
    before = {f"{beside.HEADING} (%)": beside.beside_markdown(both)} if both else {}
    texts = {
        "table.md": exports.to_markdown(results, verdicts, agreements, command, said, context, more, first, before),
        "table.tex": beside.beside_latex(both, [said]) if both else exports.to_latex(results, said, stand_ins),
        "table.csv": exports.csv_text(beside.long_lines(both)) if both else exports.to_csv(results),
        "index.html": table_html(
            results,
            store,
            out,
            command,
            verdicts,
            agreements,
            drawn,
            files,
            printed,
            opened,
            board,
            grouped,
            doses,
            both,
        ),
    }
    for name, text in texts.items():
        write_atomically(out / name, text.encode())
    return out / "index.html"


def beside_of(results: Results, plan: Plan, store: Store, out: Path) -> Beside:
    """Return ``results`` beside those of ``plan`` in ``store``; ``out`` is the page's folder, for links to records."""
    published = tables.collect_results(plan, store)
    found = [one for one in provenance.origins(published, store, out) if one.entry.record is not None]
    return Beside(results, published, tuple(found))


def banner(results: Results) -> str:
    """Return the notice of missing runs; empty once every run is done."""
    counts = results.counts()
    total, done = sum(counts.values()), counts.get("done", 0)
    if done == total:
        return ""
    others = [f"{n} {state}" for state, n in counts.items() if state in ("failed", "running", "stale")]
    return f"{', '.join([f'{done} of {total} runs done', *others])}; this page is rewritten as runs finish."


def table_html(
    results: Results,
    store: Store,
    out: Path,
    command: str,
    verdicts: Sequence[Verdict],
    agreements: Sequence[Agreement],
    drawn: dict[str, list[Curve]],
    files: Sequence[str],
    printed: Sequence[Inconsistency] = (),
    opened: Sequence[design_choices.Choice] = (),
    board: leaderboard.Leaderboard | None = None,
    grouped: feature_clusters.Clusters | None = None,
    doses: caption_dose.Dose | None = None,
    both: Beside | None = None,
) -> str:
    """Render the page from values computed here; the template only lays it out."""
    table = results.plan.table
    shown = {
        **_numbers(results),
        **_figures(results, store, drawn),
        **_judged(results, verdicts, agreements),
        **_sources(results, store, out),
    }
    return (
        _environment()
        .get_template("table.html.j2")
        .render(
            css=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
            series=colormap.SERIES,
            table=table,
            scale=results.plan.scale,
            columns=[table.columns[c].label for c in results.plan.columns],
            parts=tables.table_parts(results),
            finding=" ".join(
                filter(
                    None,
                    [
                        beside.headline_beside(both) if both else tables.headline_sentence(results),
                        design_choices.answer(opened),
                    ],
                )
            ),
            beside=_beside(both) if both else None,
            banner=banner(results),
            counts=results.counts(),
            context=table_views.context(results),
            scored=table_views.scored_images(results),
            encoders=any(row.encoder for row in table.rows),
            best_epochs=training.shows_best(results),
            lengths=training.lengths(results),
            settings=training.settings_rows(results),
            settings_notes=training.settings_notes(results),
            protocol=training.protocol_note(results),
            printed=printed,
            choices=opened,
            board=board,
            clusters=grouped,
            dose=doses,
            number=lambda row: tables.number(results, row),
            row_name=lambda row: tables.row_name(results, row),
            command=command,
            files=files,
            id=id,
            **shown,
        )
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"part": table_views.part_html, "signed": exports.signed, "duration": format_seconds}
    environment.filters |= {"interval": table_views.interval, "p_value": table_views.p_value}
    environment.filters |= {
        "seen": table_views.seen,
        "least": table_views.least,
        "figure": leaderboard.text,
        "timed": leaderboard.timed,
        "percent": loss_gradients.percent,
        "small": loss_gradients.small,
    }
    return environment


def _numbers(results: Results) -> dict[str, Any]:
    """Return scores of every metric, network and stream, and of pseudo-labels and classes."""
    own, reasons = results.plan.table.metric, table_views.Reasons()
    shown = shown_metrics(own)
    scores = {metric: table_views.table_rows(results, metric, reasons) for metric in shown}
    dots, axes = table_views.seed_dots(results, scores[results.plan.table.metric])
    return {
        "metrics": {name: metric.heading() if name in shown else metric.name for name, metric in METRICS.items()},
        "more_metrics": [name for name in shown if name not in (own, *BOUNDARIES)],
        "best": "highest" if METRICS[own].better == "higher" else "lowest",
        "tables": scores,
        "spread": exports.SPREAD,
        "reasons": reasons.letters,
        "dots": dots,
        "axes": axes,
        "reference": tables.number(results, results.reference),
        "networks": table_views.network_scores(results),
        "streams": table_views.stream_scores(results),
        "nets": list(dict.fromkeys(net for r in results.records().values() for net in r.scores)),
        "pseudo": table_views.pseudo(results),
        "pseudo_names": table_views.PSEUDO,
        "heat": table_views.class_heatmap(results),
    }


def _beside(both: Beside) -> dict[str, Any]:
    """Return the section of three columns."""
    return {
        "labels": [both.here.plan.table.columns[column].label for column in both.columns],
        "lines": beside.beside_rows(both),
        "sources": beside.sources(both),
        "criteria": beside.criteria(both),
        "reference": tables.number(both.published, both.published.reference),
        "facts": beside.published_facts(both),
        "origins": both.origins,
        "any_published": both.any_published,
    }


def _figures(results: Results, store: Store, drawn: dict[str, list[Curve]]) -> dict[str, Any]:
    pictures, wrong = qualitative.build_strips(results, store)
    panels, legend = table_views.panels(results, drawn), qualitative.legend(results)
    return {
        "gradients": loss_gradients.section(results),
        "panels": panels,
        "strips": pictures,
        "wrong": wrong,
        "legend": legend,
    }


def _judged(results: Results, verdicts: Sequence[Verdict], agreements: Sequence[Agreement]) -> dict[str, Any]:
    """Return the verdicts on the numbers: agreement with the printed order, and each claim."""
    placed, reach = table_views.forest(verdicts)
    agreed = [(found, exports.agreement_text(found)) for found in agreements]
    return {"agreements": agreed, "verdicts": verdicts, "forest": placed, "reach": reach}


def _sources(results: Results, store: Store, out: Path) -> dict[str, Any]:
    """Return the origin of the numbers."""
    facts = provenance.run_facts(results)
    return {
        "facts": facts,
        "mixed": [fact for fact in facts if fact.mixed],
        "origins": provenance.origins(results, store, out),
        "simulated": any("simulated" in r.captions for r in results.records().values()),
    }
