"""The page of a table, in one file: style, charts and pictures are embedded, and each missing number has its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from viladiff.core import colormap
from viladiff.core.atomic import abandoned, write_atomically
from viladiff.core.installation import checkout
from viladiff.core.messages import format_seconds
from viladiff.evaluation.metrics import METRICS, shown_metrics
from viladiff.report import provenance
from viladiff.report.charts import differences, figures
from viladiff.report.charts.themes import uri
from viladiff.report.markup import markdown
from viladiff.report.sections import (
    caption_quality,
    design_choices,
    feature_clusters,
    leaderboard,
    loss_gradients,
    qualitative,
    side_by_side,
    training,
)
from viladiff.report.sections.learning_curves import Curve, curves
from viladiff.report.sections.side_by_side import SideBySide
from viladiff.report.table import comparisons, exports, table_views
from viladiff.report.table import results as tables
from viladiff.report.table.results import Agreement, Results

if TYPE_CHECKING:
    from viladiff.runs.store import Store
    from viladiff.tables.claims import Verdict
    from viladiff.tables.consistency import Inconsistency
    from viladiff.tables.plan import Plan

TEMPLATES = Path(__file__).parents[1] / "templates"
REFRESH = 30
"""Seconds after which a browser loads a page again whose runs are under way."""
BOUNDARIES = ("boundary_iou", "trimap_miou")
"""Metrics that stand side by side, under a heading of their own."""


@dataclass(frozen=True, kw_only=True)
class TableSections:
    """What a page draws of a table's results, and the sections that only some tables have."""

    drawn: dict[str, list[Curve]]
    board: leaderboard.Leaderboard | None
    grouped: feature_clusters.Clusters | None
    doses: caption_quality.Dose | None
    opened: Sequence[design_choices.Choice]
    files: Sequence[str]
    """Names of the files of its figures."""
    gaps: dict[str, Path]
    """The picture of differences, by theme; empty where there is none."""
    judged: Results
    """What it is of."""


@dataclass(frozen=True, kw_only=True)
class TablePage:
    """All that the files of a page show."""

    results: Results
    """Of the columns that are shown."""
    whole: Results
    """Of all columns."""
    store: Store
    out: Path
    """The folder of the page."""
    command: str
    verdicts: Sequence[Verdict]
    agreements: Sequence[Agreement]
    printed: Sequence[Inconsistency]
    """What is wrong with the paper's numbers."""
    both: SideBySide | None
    """The runs beside published ones."""
    sections: TableSections


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
    whole = tables.collect_results(plan, store)
    results = tables.begun_columns(whole)
    both = None if published is None else load_both(results, *published, out)
    judged = both.published if both and both.any_published else results
    agreements = (
        agreement
        if agreement is not None
        else [tables.agreement(judged, c) for c in tables.begun_columns(judged).plan.columns]
    )
    page = TablePage(
        results=results,
        whole=whole,
        store=store,
        out=out,
        command=command,
        verdicts=verdicts,
        agreements=agreements,
        printed=printed,
        both=both,
        sections=draw_sections(results, store, out, verdicts, judged if both and both.any_published else whole),
    )
    said, stand_ins = banner(whole), table_views.stand_ins(results)
    texts = {
        "table.md": table_markdown(page),
        "table.tex": side_by_side.both_latex(both, [said]) if both else exports.to_latex(results, said, stand_ins),
        "table.csv": exports.csv_text(side_by_side.long_lines(both)) if both else exports.to_csv(whole),
        "index.html": table_html(page),
    }
    for name, text in texts.items():
        write_atomically(out / name, text.encode())
    return out / "index.html"


def draw_sections(
    results: Results, store: Store, out: Path, verdicts: Sequence[Verdict], judged: Results
) -> TableSections:
    """Write the figures under ``out``, which is made, and return the sections that show them.

    ``judged``: the results that claims are about, published ones where there are any; differences are those of them.
    """
    drawn = curves(results, store)
    out.mkdir(parents=True, exist_ok=True)
    for path in [*abandoned(out), *abandoned(out / "figures")]:
        path.unlink(missing_ok=True)  # of a writer that was killed
    files = [path.name for path in figures.save_figures(results, drawn, out / "figures")]
    gaps = figures.save_differences(judged, out / "figures")
    files += [path.name for path in gaps.values()]
    board = leaderboard.build_leaderboard(results, store, out, verdicts)
    grouped = feature_clusters.build_clusters(results, store, out)
    doses = caption_quality.dose(results, out)
    for section in (board, grouped, doses):
        files += section.files if section else ()
    opened = design_choices.build_choices(results, verdicts)
    return TableSections(
        drawn=drawn, board=board, grouped=grouped, doses=doses, opened=opened, files=files, gaps=gaps, judged=judged
    )


def table_markdown(page: TablePage) -> str:
    """Return table.md."""
    results, both, sections = page.results, page.both, page.sections
    columns = [results.plan.table.columns[c].label for c in results.plan.columns]
    more = {
        **leaderboard.leaderboard_markdown(sections.board, columns),
        **feature_clusters.clusters_markdown(sections.grouped),
        **caption_quality.dose_markdown(sections.doses, columns),
        **training.training_markdown(results),
        **loss_gradients.gradients_markdown(loss_gradients.section(results)),
        "What each choice is worth": design_choices.choices_markdown(sections.opened),
        "The paper's own numbers": [f"- {markdown(one.text)}" for one in page.printed],
    }
    before = {f"{side_by_side.HEADING} (%)": side_by_side.both_markdown(both)} if both else {}
    said, context = banner(page.whole), table_views.context(results)
    missing = exports.reasons(page.whole)
    return exports.to_markdown(
        results, page.verdicts, page.agreements, page.command, said, context, more, _headline(page), before, missing
    )


def load_both(results: Results, plan: Plan, store: Store, out: Path) -> SideBySide:
    """Return ``results`` beside those of ``plan`` in ``store``; ``out`` is the page's folder, for links to records."""
    published = tables.collect_results(plan, store)
    found = [one for one in provenance.origins(published, store, out) if one.entry.record is not None]
    return SideBySide(results, published, tuple(found))


def banner(results: Results) -> str:
    """Return the notice of missing runs; empty once every run is done."""
    counts = results.counts()
    total, done = sum(counts.values()), counts.get("done", 0)
    if done == total:
        return ""
    others = [f"{n} {state}" for state, n in counts.items() if state in ("failed", "running", "stale")]
    lacking = " Committed records, which belong to the source checkout, are not part of this installation."
    columns = results.plan.table.columns
    shown = tables.begun_columns(results).plan.columns
    hidden = [columns[column].label for column in results.plan.columns if column not in shown]
    return (
        f"{', '.join([f'{done} of {total} runs done', *others])}; this page is rewritten as runs finish."
        f"{f' No run is done for {chr(44).join(hidden)}.' if hidden else ''}"
        f"{lacking if checkout() is None else ''}"
    )


def table_html(page: TablePage) -> str:
    """Render the page from values computed here; the template only lays it out."""
    results, both, sections = page.results, page.both, page.sections
    table = results.plan.table
    shown = {
        **_numbers(results),
        **_figures(results, page.store, sections.drawn),
        **_judged(page.verdicts, page.agreements, len(table.claims)),
        **_sources(results, page.store, page.out),
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
            finding=_finding(page),
            beside=_side_by_side(both) if both else None,
            banner=banner(page.whole),
            counts=page.whole.counts(),
            refresh=REFRESH,
            context=table_views.context(results),
            scored=table_views.scored_images(results),
            encoders=any(row.encoder for row in table.rows),
            best_epochs=training.shows_best(results),
            lengths=training.lengths(results),
            settings=training.settings_rows(results),
            settings_notes=training.settings_notes(results),
            protocol=training.protocol_note(results),
            printed=page.printed,
            choices=sections.opened,
            board=sections.board,
            clusters=sections.grouped,
            dose=sections.doses,
            gaps={theme: uri(path) for theme, path in sections.gaps.items() if theme != "png"},
            gaps_words=differences.words(differences.gaps_of(sections.judged)),
            number=lambda row: tables.number(results, row),
            row_name=lambda row: tables.row_name(results, row),
            command=page.command,
            files=sections.files,
            id=id,
            **shown,
        )
    )


def _finding(page: TablePage) -> str:
    """Return the sentences that open the page."""
    return " ".join(filter(None, [_headline(page), design_choices.answer(page.sections.opened)]))


def _headline(page: TablePage) -> str:
    """Return the first sentence, and whether its difference to the reference is shown by the claims' tests."""
    headline = side_by_side.headline_of_both(page.both) if page.both else tables.headline_sentence(page.results)
    plan = page.sections.judged.plan
    first, base = (
        plan.table.rows[row].label for row in (page.sections.judged.headline, page.sections.judged.reference)
    )
    told = comparisons.tested(page.verdicts, first, base, plan.table.metric)
    if told and page.both and page.both.any_published:
        told = f"Test of the published runs: {told}"
    return " ".join(filter(None, [headline, told]))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"part": table_views.part_html, "signed": comparisons.signed, "duration": format_seconds}
    environment.filters |= {"interval": comparisons.interval, "p_value": comparisons.p_value}
    environment.filters |= {
        "seen": comparisons.seen,
        "in_print": comparisons.in_print,
        "it_is": comparisons.it_is,
        "least": comparisons.least,
        "power": comparisons.power,
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


def _side_by_side(both: SideBySide) -> dict[str, Any]:
    """Return the section of three columns."""
    return {
        "labels": [both.here.plan.table.columns[column].label for column in both.columns],
        "lines": side_by_side.both_rows(both),
        "sources": side_by_side.sources(both),
        "criteria": side_by_side.criteria(both),
        "reference": tables.number(both.published, both.published.reference),
        "facts": side_by_side.published_facts(both),
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


def _judged(verdicts: Sequence[Verdict], agreements: Sequence[Agreement], claims: int) -> dict[str, Any]:
    """Return the verdicts on the numbers: agreement with the printed order, and each of the table's claims."""
    placed, reach = table_views.forest(verdicts)
    agreed = [(found, exports.agreement_text(found)) for found in agreements]
    return {
        "agreements": agreed,
        "verdicts": verdicts,
        "forest": placed,
        "reach": reach,
        "tally": comparisons.tally(verdicts, claims),
        "about_tests": comparisons.LEGEND,
    }


def _sources(results: Results, store: Store, out: Path) -> dict[str, Any]:
    """Return the origin of the numbers."""
    facts = provenance.run_facts(results)
    return {
        "facts": facts,
        "mixed": [fact for fact in facts if fact.mixed],
        "origins": provenance.origins(results, store, out),
        "simulated": any("simulated" in r.captions for r in results.records().values()),
    }
