"""``viladiff data render``: the data sets of the table that are rendered, and no list of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from viladiff.cli.main import main
from viladiff.data.cache import Opened
from viladiff.data.sources import DATASETS, embedded_datasets
from viladiff.data.sources.digits import DIGITS_SOURCE


def test_render_knows_the_table_of_data_sets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {"images": np.zeros((2, 4, 4, 3), np.uint8), "dev_images": np.zeros((1, 4, 4, 3), np.uint8)}
    monkeypatch.setitem(DATASETS, "letters", replace(DIGITS_SOURCE, pixels=lambda: Opened(shapes, {})))
    assert main(["data", "render", "letters"]) == 0
    assert capsys.readouterr().out == "letters: dev_images (1, 4, 4, 3), images (2, 4, 4, 3)\n"


@pytest.mark.parametrize("name", ["digit", "voc"])
def test_render_refuses_other_names_before_it_renders_any(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path))
    assert main(["data", "render", "digits", name]) == 2
    said = capsys.readouterr().err
    assert f"{name}: is no data set that is rendered; allowed: {', '.join(embedded_datasets())}" in said
    assert ("did you mean 'digits'?" in said) == (name == "digit")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "meant"), [("50%", "; write 0.5"), ("0,2", "; write 0.2"), ("nan", ""), ("-3", ""), ("some", "")]
)
def test_split_says_how_a_share_is_written(value: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "split", "photos", f"--val={value}"])
    said = capsys.readouterr().err.strip()
    assert said.endswith(f"'{value}': must be a number of images, or a share below 1 such as 0.2{meant}")
