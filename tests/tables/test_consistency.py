"""The paper's numbers: each typed a second time; cells that tables share; contradictions that the report finds."""

from __future__ import annotations

import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from viladiff.runs.config import RunConfig, non_default_fields, override
from viladiff.tables.cells import cells, unavailable
from viladiff.tables.consistency import Inconsistency, inconsistencies, siblings
from viladiff.tables.contrasts import printed_verdict
from viladiff.tables.spec import Column, Row, Scale, Table
from viladiff.tables.spec_file import load_table

ROOT = Path(__file__).resolve().parents[2]
TABLES = {path.stem: load_table(path) for path in sorted((ROOT / "ablations").glob("*.toml"))}
PRINTED = [table for table in TABLES.values() if table.printed]

TYPED = {
    "table1": """
        92 183 366 732 1464
        SupBaseline 50.7 63.6 70.8 75.6 77.2
        PseudoSeg   57.6 65.5 69.1 72.4 -
        CPS         64.1 67.4 71.7 75.9 -
        U²PL        68.0 69.2 73.7 76.2 79.5
        PS-MT       65.8 69.6 76.6 78.4 80.0
        UniMatch    75.2 77.2 78.8 79.9 81.2
        DAW         74.8 77.4 79.5 80.6 81.5
        CorrMatch   76.4 78.5 79.4 80.6 81.8
        DDFP        75.0 78.0 79.5 81.2 82.0
        AllSpark    76.1 78.4 79.8 80.8 82.1
        ViLaDiff    78.7 80.1 81.5 82.4 83.9
    """,
    "table2": """
        662 1323 2646 5291
        SupBaseline 72.0 73.1 76.7 77.6
        CPS         72.2 75.8 77.6 78.6
        PS-MT       75.5 78.2 78.7 79.8
        UniMatch    78.1 78.4 79.2 -
        DAW         78.5 78.9 79.6 -
        CorrMatch   78.4 79.3 79.6 -
        DDFP        78.3 78.9 79.8 80.9
        AllSpark    78.3 80.0 80.4 81.1
        ViLaDiff    79.4 80.2 82.1 82.7
        U²PL†       68.0 69.2 73.7 76.2
        UniMatch†   80.9 81.9 80.4 -
        AllSpark†   81.6 82.0 80.9 81.1
        ViLaDiff†   79.7 80.3 81.6 82.9
    """,
    "table3": """
        186 372 744 1488
        SupBaseline 65.7 70.4 73.8 78.1
        CPS         69.8 74.3 74.6 76.8
        UniMatch    76.6 77.9 79.2 79.5
        SwiTh       76.8 78.4 79.4 80.5
        DAW         76.6 78.4 79.8 80.6
        LogicDiag   76.8 78.9 80.2 81.3
        CorrMatch   77.3 78.5 79.4 80.4
        SemiVL†     77.9 79.4 80.3 80.6
        DDFP        77.1 78.2 79.9 80.8
        AllSpark    78.3 79.2 80.6 81.4
        ViLaDiff    80.5 81.2 82.4 83.3
    """,
    "table4": """
        232 463 925 1849
        SupBaseline 19.7 26.8 35.9 41.2
        PseudoSeg   29.8 37.1 39.1 41.8
        UniMatch    31.9 38.9 44.4 48.2
        LogicDiag   33.1 40.3 45.4 48.8
        AllSpark    34.1 41.7 45.5 49.6
        ViLaDiff    36.5 43.9 47.6 50.7
    """,
    "table5": """
        183 732
        SemiBaseline        72.2 75.0
        ViLa,·features·only 74.5 77.3
        ViLa,·logits·only   73.7 76.1
        ViLa                75.3 77.4
        ViLa·+·q_G          77.8 79.6
        ViLa·+·q_C          78.1 80.5
        ViLa·+·q_G·+·q_C    79.6 81.8
        ViLaDiff            80.1 82.4
    """,
    "table6": """
        92 732 463 925
        0.1 77.5 81.2 43.0 46.5
        0.3 78.1 81.8 43.5 47.2
        0.5 78.7 82.4 43.9 47.6
        0.8 78.5 82.1 43.1 46.9
        1.0 77.4 80.6 42.7 46.3
    """,
    "table7": """
        92 732 463 925
        5  74.9 77.2 40.1 43.6
        10 76.3 78.5 41.6 44.9
        15 76.3 78.7 41.7 45.0
        20 76.4 78.9 41.7 45.2
        30 76.5 78.8 41.9 45.1
    """,
}
"""Tables 1-7 once more, row by row, under the numbers of labelled images."""


def typed(name: str) -> tuple[list[str], list[tuple[str, list[str]]]]:
    head, *lines = [line.split() for line in TYPED[name].strip().splitlines()]
    return head, [(line[0], line[1:]) for line in lines]


@pytest.mark.parametrize("name", TYPED)
def test_every_printed_number_was_typed_twice(name: str) -> None:
    table = TABLES[name]
    splits, lines = typed(name)
    rows = [row for row in table.rows if row.paper]
    assert [column.set["data.split"] for column in table.columns][: len(splits)] == splits
    assert len(rows) == len(lines) and not any(row.control for row in rows)
    for row, (label, numbers) in zip(rows, lines, strict=True):
        assert label.replace("·", " ") in row.label
        # As text: 79.50 or a digit more would not be what is printed.
        paper, ours = row.paper[: len(splits)], row.paper[len(splits) :]
        assert [number if number == "-" else f"{number:.1f}" for number in paper] == numbers and set(ours) <= {"-"}
        assert all(
            number == "-" or Decimal(str(number)) == Decimal(text) for number, text in zip(paper, numbers, strict=True)
        )


def test_all_seven_tables_are_there_and_nothing_else_claims_to_be_printed() -> None:
    assert {table.name for table in PRINTED} == set(TYPED)
    assert sum(len(row.paper) for table in PRINTED for row in table.rows) == 239
    ours = [column.label for column in TABLES["table5"].columns][2:]
    assert ours == ["1/16 (92)"] and {row.paper[2] for row in TABLES["table5"].rows if row.paper} == {"-"}


def test_rows_set_what_their_labels_say() -> None:
    for name, field, word in (("table6", "method.vila.lam", "λ = "), ("table7", "method.mixe.timesteps", "T = ")):
        table = TABLES[name]
        found = {cell.row: override(RunConfig(), cell.changes) for cell in cells(table, "digits", [0], columns=[1])}
        rows = [i for i, row in enumerate(table.rows) if row.paper]
        section, leaf = field.rpartition(".")[0].split(".")[1:], field.rpartition(".")[2]
        said = [float(table.rows[i].label.removeprefix(word)) for i in rows]
        assert [getattr(getattr(found[i].method, section[0]), leaf) for i in rows] == said
    blocks = {
        cell.row: non_default_fields(override(RunConfig(), cell.changes))
        for cell in cells(TABLES["table7"], "digits", [0])
    }
    for i, row in enumerate(TABLES["table7"].rows):
        assert (blocks[i].get("method.mixe.flip_schedule") == "matched") == ("matched" in row.label)
        assert (blocks[i].get("method.vila.enabled") is False) == ("without ViLa" in row.label)


def test_every_published_row_names_its_encoder_and_its_method() -> None:
    names = {"SupBaseline": "supervised", "U²PL": "u2pl", "PS-MT": "psmt", "LogicDiag (reconstruction)": "logicdiag"}
    for number in range(1, 5):
        table = TABLES[f"table{number}"]
        for row in (row for row in table.rows if row.paper):
            plain = row.label.rstrip("†")
            assert row.encoder, row.label
            assert {**table.base, **row.set}["method.name"] == names.get(plain, plain.lower())
        assert table.rows[0].label == table.supervised == "SupBaseline"


# Cells that tables share


def runs(name: str, scale: str, row: str) -> dict[str, str]:
    """By label of the column, everything that decides the run of one row's cell."""
    table = TABLES[name]
    found = cells(table, scale, [0], [row], [column.label for column in table.columns])
    return {table.columns[cell.column].label: str(sorted(_content(cell.changes).items())) for cell in found}


def _content(changes: dict[str, object]) -> dict[str, str]:
    full = non_default_fields(override(RunConfig(), changes))
    return {path: str(value) for path, value in full.items() if path != "runtime.scale"}


@pytest.mark.parametrize("scale", ["smoke", "quick", "digits", "paper"])
def test_cells_that_tables_share_are_one_run(scale: str) -> None:
    first, fourth = runs("table1", scale, "ViLaDiff"), runs("table4", scale, "ViLaDiff")
    fifth, sixth, seventh = (
        runs(*one) for one in (("table5", scale, "ViLaDiff"), ("table6", scale, "λ = 0.5"), ("table7", scale, "T = 10"))
    )
    if scale != "quick":  # whose runs of Table 5 are longer
        assert (fifth["1/8 (183)"], fifth["1/2 (732)"]) == (first["1/8 (183)"], first["1/2 (732)"])
    assert list(sixth.values()) == [
        first["1/16 (92)"],
        first["1/2 (732)"],
        fourth["1/256 (463)"],
        fourth["1/128 (925)"],
    ]
    assert seventh == sixth and len(set(first.values())) == 5
    assert runs("choices", scale, "Defaults") == {"1/8 (183)": first["1/8 (183)"]}


def test_the_blocks_of_table_2_are_other_runs() -> None:
    for scale in ("digits", "paper"):
        upper, dagger = runs("table2", scale, "ViLaDiff"), runs("table2", scale, "ViLaDiff†")
        assert not set(upper.values()) & set(dagger.values())
    lists = [cell.changes for cell in cells(TABLES["table2"], "paper", [0], ["ViLaDiff", "ViLaDiff†"])]
    assert {str(one["data.split_family"]) for one in lists} == {"aug_cps", "aug_u2pl"}


def test_rows_that_wait_are_rows_of_others_methods() -> None:
    for table in TABLES.values():
        waiting = {table.rows[place].label for place in unavailable(table)}
        assert "SupBaseline" not in waiting and not any("ViLaDiff" in label or "T = " in label for label in waiting)


# Contradictions


def test_the_report_finds_what_the_papers_numbers_contradict() -> None:
    found = {name: inconsistencies(table, list(TABLES.values())) for name, table in TABLES.items()}
    said = {name: {(one.kind, one.text) for one in those} for name, those in found.items()}
    assert found["choices"] == []

    def has(name: str, kind: str, *parts: str) -> bool:
        return any(one.kind == kind and all(part in one.text for part in parts) for one in found[name])

    assert has("table1", "claim", "1.8 above AllSpark", "3 of 5", "+1.7", "+1.6") and not has(
        "table1", "claim", "shrinks"
    )
    assert has("table2", "claim", "† block", "4 of 11", "-1.2", "-1.6", "-1.9", "-1.7")
    assert not has("table2", "claim", "upper block"), "best there, in each column"
    assert has("table2", "repeated", "“U²PL†” (68.0, 69.2, 73.7, 76.2)", "“U²PL” of Table 1")
    assert has(
        "table5", "below supervised", "“SemiBaseline”", "“SupBaseline” of Table 1", "75.0 against 75.6 (1/2 (732))"
    )
    assert has("table7", "same run", "“T = 10” and “ViLaDiff” of Table 1", "76.3 against 78.7", "78.5 against 82.4")
    assert has("table7", "same run", "“ViLaDiff” of Table 4", "41.6 against 43.9", "44.9 against 47.6")
    assert has("table1", "below supervised", "“PseudoSeg”", "69.1 against 70.8", "72.4 against 75.6")
    assert has("table3", "below supervised", "“CPS”", "76.8 against 78.1")
    assert all(has(f"table{number}", "encoders", "MiT-B5", "ViT-B/16") for number in range(1, 5))
    assert not has("table6", "claim", ""), "its claims hold in print"
    count = {name: sorted(kind for kind, _ in those) for name, those in said.items()}
    assert count["table4"] == ["encoders", "same run"] and count["table6"] == ["same run"]


def test_claims_of_the_text_hold_in_print_or_do_not() -> None:
    found = {
        (name, claim.text): printed_verdict(table, claim)
        for name, table in TABLES.items()
        for claim in table.claims
        if claim.source == "paper"
    }
    fails = {key[1].split(" (")[0] for key, (verdict, _) in found.items() if verdict == "fails"}
    assert fails == {"ViLaDiff is 1.8 above AllSpark", "ViLaDiff† is best in each column of the † block"}
    shrinks = found["table1", "The gain over the baseline shrinks as labels grow"]
    assert shrinks == ("holds", "all 4 printed differences are as claimed; the gains are 28.0, 16.5, 10.7, 6.8, 6.7")
    best = [
        why for (name, text), (verdict, why) in found.items() if "best in each column" in text and verdict == "holds"
    ]
    assert sorted(best) == sorted(f"all {n} printed differences are as claimed" for n in (48, 29, 40, 20, 14, 16))
    assert found["table7", "T = 10 is within 0.4 of the best"][0] == "holds"
    assert found["table7", "Gains shrink after T = 10: that from 5 to 10 is greater than each later one"][1].startswith(
        "all 12"
    )


def pair(*rows: Row, name: str = "a", title: str = "Table A. Rows", **more: object) -> Table:
    columns = tuple(Column(label=label, set={"data.split": label}) for label in ("92", "183", "366"))
    return Table(name=name, title=title, scale={"s": Scale()}, columns=columns, rows=rows, **more)  # type: ignore[arg-type]


def test_each_kind_of_contradiction_and_what_is_none() -> None:
    base = Row(label="sup", set={"method.name": "supervised"}, paper=(50.0, 60.0, 70.0))
    mine = Row(label="mine", set={"method.name": "x"}, paper=(50.0, 59.9, "-"))
    other = pair(Row(label="again", set={"method.name": "x"}, paper=(50.0, 61.0, 70.0)), name="b", title="Table B")
    found = inconsistencies(pair(base, mine, supervised="sup"), [other])
    assert found == [
        Inconsistency("same run", "“mine” and “again” of Table B are one run by all that is said, and differ: "
                      "59.9 against 61.0 (183)."),
        Inconsistency("below supervised", "“mine” is semi-supervised and below “sup” of Table A, which sees the "
                      "labelled images alone: 59.9 against 60.0 (183)."),
    ]  # fmt: skip
    assert inconsistencies(pair(base, mine)) == [], "no row is said to be supervised, and equal numbers are no fault"
    copied = Row(label="copy", set={"method.name": "y"}, paper=(50.0, 60.0, 70.0))
    assert [one.kind for one in inconsistencies(pair(base, copied))] == ["repeated", "repeated"]
    close = Row(label="near", set={"method.name": "y"}, paper=(50.0, 60.0, 70.1))
    assert inconsistencies(pair(base, close)) == [], "two numbers may agree by chance"
    same = pair(base, name="c", title="Table C")
    assert inconsistencies(pair(base), [same]) == [], "the same run with the same numbers is as it should be"


def test_tables_beside_a_file_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_bytes((ROOT / "ablations" / "table4.toml").read_bytes())
    (tmp_path / "two.toml").write_text("title = ")
    assert [table.name for table in siblings(tmp_path / "one.toml")] == ["one"]


def test_contradictions_are_found_without_torch() -> None:
    code = "import sys; from pathlib import Path; from viladiff.tables.consistency import *; "
    code += f"t = siblings(Path({str(ROOT / 'ablations' / 'table7.toml')!r})); "
    code += "print(sum(len(inconsistencies(x, t)) for x in t) > 10, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"
