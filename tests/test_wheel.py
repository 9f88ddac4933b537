"""The wheel works without the checkout: its tables and sweeps run from an empty directory."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from viladiff.core import installation

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the unpacked wheel."""
    out = tmp_path_factory.mktemp("wheel")
    words = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "-w", str(out), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True, timeout=120)
    (wheel,) = out.glob("viladiff-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(out / "site")
    return out / "site"


def run(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "viladiff", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("kind", ["ablations", "tune"])
def test_the_wheel_has_every_table_and_sweep(site: Path, kind: str) -> None:
    shipped = {path.name: path.read_bytes() for path in (site / "viladiff" / "shipped" / kind).iterdir()}
    assert shipped == {path.name: path.read_bytes() for path in (ROOT / kind).glob("*.toml")}


def test_a_table_and_a_sweep_run_from_an_empty_directory(site: Path, tmp_path: Path) -> None:
    found = run(site, tmp_path, "table", "5", "--scale", "smoke", "--dry-run")
    assert found.returncode == 0, found.stderr
    assert f"page      {tmp_path}/reports/smoke/table5/index.html" in found.stdout
    found = run(site, tmp_path, "sweep", "lambda", "--scale", "smoke", "--dry-run")
    assert found.returncode == 0, found.stderr
    assert f"page       {tmp_path}/reports/smoke/sweep_lambda/index.html" in found.stdout


def test_a_wheel_publishes_nothing(site: Path, tmp_path: Path) -> None:
    for words in (("table", "5"), ("sweep", "lambda")):
        found = run(site, tmp_path, *words, "--scale", "digits", "--publish")
        assert found.returncode == 2
        assert "--publish: writes reports/published/ of a checkout" in found.stderr
        assert "Traceback" not in found.stderr


def test_an_unknown_table_names_those_of_the_wheel(site: Path, tmp_path: Path) -> None:
    found = run(site, tmp_path, "table", "55")
    assert found.returncode == 2 and "table5" in found.stderr


def test_the_page_of_a_wheel_says_why_there_are_no_published_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from viladiff.report.sections.side_by_side import no_records

    assert "yet" in no_records()
    monkeypatch.setattr(installation, "_PACKAGE", tmp_path / "viladiff")
    assert no_records() == "Published records are part of the source checkout, and this installation has none."


def test_a_folder_beside_the_package_is_no_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ablations").mkdir()  # of another project in site-packages
    monkeypatch.setattr(installation, "_PACKAGE", tmp_path / "viladiff")
    assert installation.checkout() is None
    assert installation.specs_dir("ablations") == tmp_path / "viladiff" / "shipped" / "ablations"
