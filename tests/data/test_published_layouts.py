"""The published layouts from files to scores, and the paper's tables planned on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import published_layouts as layouts
import pytest

from viladiff.cli import main
from viladiff.cli.tables import table_parser
from viladiff.data.files.validate import validate_dataset
from viladiff.experiments import tables
from viladiff.runs.config import RunConfig, flatten, override
from viladiff.tables.cells import COMMON, cells
from viladiff.tables.spec_file import load_table

ROOT = Path(__file__).resolve().parents[2]
WRITE = {"cityscapes": layouts.cityscapes, "coco": layouts.coco, "ade20k": layouts.ade20k}
SMALL = (
    "model.encoder=digits_vit",
    "model.pretrained=shipped",
    "model.decoder_width=16",
    "data.crop=48",
    "data.text_encoder=words",
    "train.steps=2",
    "data.batch_labelled=2",
    "data.batch_unlabelled=2",
    "eval.boundary=false",
)


def train(root: Path, dataset: str, split: str, method: str, *words: str) -> Path:
    """The directory of a short run."""
    out = root.parent / f"runs-{method}"
    fields = [f"data.dataset={dataset}", f"data.split={split}", f"runtime.data_root={root}", f"method.name={method}"]
    assert main.main(["train", *fields, *SMALL, f"runtime.runs_dir={out}", *words, "--threads", "1", "--quiet"]) == 0
    return next(path.parent for path in out.glob("*/record.json"))


def scored(directory: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    capsys.readouterr()
    assert main.main(["evaluate", str(directory), *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("dataset", "split", "classes"), [("cityscapes", "372", 19), ("ade20k", "1263", 150)])
def test_from_files_to_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str, split: str, classes: int
) -> None:
    made = WRITE[dataset](tmp_path / dataset)
    directory = train(made.root, dataset, split, "semibaseline", "method.ohem.enabled=true")
    record = json.loads((directory / "record.json").read_text(encoding="utf-8"))
    assert len(record["class_names"]) == classes and record["split_name"].startswith("no published list: 3 images")
    assert record["config"]["eval.protocol"] == ("sliding_window" if dataset == "cityscapes" else "original")
    assert record["config"]["method.ohem.enabled"] and record["scores"]["teacher"]["visual"]["images"] == 2
    assert scored(directory, capsys)["scores"]["teacher"]["visual"]["miou"] == pytest.approx(record["miou"])


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "split"), [("cityscapes", "372"), ("coco", "463"), ("ade20k", "1263")])
def test_from_files_and_captions_to_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str, split: str
) -> None:
    made = WRITE[dataset](tmp_path / dataset, **({"masks": False} if dataset == "coco" else {}))
    if dataset == "coco":
        assert main.main(["data", "coco-masks", str(made.root), "--processes", "2", "--quiet"]) == 0
    assert validate_dataset(made.root, processes=1).errors == 0
    table = tmp_path / "captions.csv"
    rows = [f"{name},a photograph with {len(set(labels.flat))} things" for name, labels in made.labels.items()]
    table.write_text("\n".join(["image,text", *rows]) + "\n", encoding="utf-8")
    directory = train(made.root, dataset, split, "viladiff", f"runtime.captions={table}")
    found = scored(directory, capsys)["scores"]["teacher"]
    assert {"visual", "fusion"} <= set(found)
    plain = train(made.root, dataset, split, "supervised")
    assert scored(plain, capsys, "eval.protocol=center_crop")["scores"]["student"]["visual"]["images"] == 2


@pytest.mark.parametrize(
    ("table", "dataset", "splits", "scale"),
    [
        ("table3", "cityscapes", ("186", "372", "744", "1488"), "paper"),
        pytest.param("table3", "cityscapes", ("186", "372", "744", "1488"), "strong", marks=pytest.mark.slow),
        ("table4", "coco", ("232", "463", "925", "1849"), "paper"),
        pytest.param("table4", "coco", ("232", "463", "925", "1849"), "resnet", marks=pytest.mark.slow),
    ],
)
def test_tables_of_the_paper_are_planned_on_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], table: str, dataset: str, splits: tuple[str, ...], scale: str
) -> None:
    made = WRITE[dataset](tmp_path / dataset, split=splits[0])
    for split in splits[1:]:
        shutil.copytree(made.root / "splits" / splits[0], made.root / "splits" / split)
    spec = ROOT / "ablations" / f"{table}.toml"
    words = ["--scale", scale, "--seeds", "1", "--rows", "SupBaseline", "UniMatch", "ViLaDiff", "--dry-run"]
    words += ["--runs-dir", str(tmp_path / "runs"), "--", f"runtime.data_root={made.root}"]
    words += ["model.encoder=digits_vit", "model.pretrained=none", "model.encoder_stride=none", "model.decoder=light"]
    words += ["data.crop=512"]
    with pytest.raises(
        ValueError, match=r"^these rows cannot run:\nrow .* 'ViLaDiff': data\.captions = 'own': .*\n2 rows"
    ):
        tables.run_table(spec, table_parser(spec, "t").parse_args(words), "t")
    told = " ".join(capsys.readouterr().out.split())
    assert "12 runs" in told and f"recipe {scale}; viladiff methods --recipe {scale} lists it" in told, told
    assert tables.run_table(spec, table_parser(spec, "t").parse_args([*words, "data.captions=none"]), "t") == 0
    with pytest.raises(ValueError, match=r"runtime\.data_root: must be set"):
        tables.run_table(spec, table_parser(spec, "t").parse_args(words[: words.index("--")]), "t")


def test_hard_pixels_are_for_all_rows_of_table_3_at_scale_paper_but_semivl() -> None:
    table = load_table(ROOT / "ablations" / "table3.toml")
    for scale, wanted, semivl in (("paper", True, False), ("digits", None, None)):
        found = cells(table, scale, [0])
        assert len({cell.row for cell in found}) > 8
        for cell in found:
            expected = semivl if cell.changes["method.name"] == "semivl" else wanted
            assert cell.changes.get("method.ohem.enabled") == expected
    other = load_table(ROOT / "ablations" / "table4.toml")
    assert not any(path.startswith(COMMON) for cell in cells(other, "paper", [0]) for path in cell.changes)


def test_what_all_methods_have_in_common_is_what_the_tables_keep() -> None:
    from viladiff.methods import METHODS

    each = [set(flatten(override(RunConfig(), {"method.name": name}))) for name in METHODS]
    shared = {path for path in set.intersection(*each) if path.startswith("method.") and path != "method.name"}
    assert shared == {path for path in shared if path.startswith(COMMON)} and len(shared) == 3
