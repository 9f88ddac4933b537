"""A disk that is full, or may only be read: one line that names the file, nothing half-written, and on it goes.

The kernel refuses a write past the limit of a file's size as it does on a full disk: some bytes are already there.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from viladiff.cli import main
from viladiff.runs.checkpoint import load_checkpoint

FULL = os.strerror(errno.EFBIG)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Bytes that a file may grow to meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Trained(NamedTuple):
    """A run that a full disk stopped twice."""

    directory: Path
    told: list[str]
    left: list[set[str]]
    """Files in its directory, each time."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    out, told, left = tmp_path_factory.mktemp("runs"), [], []
    train = ["train", "train.steps=2", "data.batch_labelled=2", "eval.max_images=4", "eval.boundary=false"]
    train += ["--threads", "1", "--quiet", "--runs-dir"]
    # A first run fills the caches of pictures and texts, which are files too: the limit below is for the run's own.
    assert main.main([*train, str(tmp_path_factory.mktemp("first"))]) == 0
    train.append(str(out))
    for size in (100_000, 10):
        with redirect_stderr(StringIO()) as said, files_of_at_most(size):
            assert main.main(train) == 2
        told.append(said.getvalue())
        left.append(files(out))
    assert main.main(train) == 0
    return Trained(next(out.iterdir()), told, left)


def check_told(said: str, name: str, why: str = FULL) -> None:
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ") and name in last and why in last, said


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_a_run_goes_on_once_there_is_room(trained: Trained) -> None:
    check_told(trained.told[0], "checkpoint.pt")
    check_told(trained.told[1], "lease-")
    assert [{Path(name).name for name in names} - {"steps.jsonl"} for names in trained.left] == [set(), set()]
    state = load_checkpoint(trained.directory / "checkpoint.pt")
    assert state is not None and state["step"] == 2 and (trained.directory / "record.json").is_file()


def test_masks_and_folders_are_whole_or_not_there(
    trained: Trained, photo_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = photo_folder(3) / "images"
    predict = ["predict", str(photos), "--model", str(trained.directory), "--out", str(tmp_path / "out"), "--quiet"]
    with files_of_at_most(700):
        assert main.main(predict) == 2
    check_told(capsys.readouterr().err, str(tmp_path / "out"))
    assert all(path.stat().st_size < 700 and not path.name.endswith(".tmp") for path in (tmp_path / "out").rglob("*.*"))
    assert main.main(predict) == 0 and len(files(tmp_path / "out")) == 10
    capsys.readouterr()
    export = ["export", str(trained.directory), str(tmp_path / "model")]
    with files_of_at_most(100_000):
        assert main.main(export) == 2
    check_told(capsys.readouterr().err, str(tmp_path / "model"))
    assert not [path for path in tmp_path.iterdir() if "model" in path.name]
    assert main.main(export) == 0


def test_lists_and_pages_are_whole_or_not_there(
    photo_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = photo_folder(12, unlabelled_masks=True)
    page, split = ["--out", str(tmp_path / "page")], ["--labelled", "4", "--name", "new"]
    for what, more, name in (("check", page, "page"), ("split", split, "new")):
        with files_of_at_most(20):
            assert main.main(["data", what, str(root), *more, "--processes", "1", "--quiet"]) == 2
        check_told(capsys.readouterr().err, name)
    assert not files(tmp_path / "page") and [path.name for path in (root / "splits").iterdir()] == ["labelled"]


@pytest.mark.parametrize("command", ["train", "predict", "export"])
def test_a_place_that_may_only_be_read(
    command: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, real = tmp_path / "disk", os.mkdir
    photograph = tmp_path / "a.png"
    Image.new("RGB", (20, 30)).save(photograph)
    words = {
        "train": ["train", "train.steps=2", "--runs-dir", str(place), "--threads", "1", "--quiet"],
        "predict": ["predict", str(photograph), "--model", str(trained.directory), "--out", str(place)],
        "export": ["export", str(trained.directory), str(place / "model")],
    }

    def read_only(path: str, *rest: object, **named: object) -> None:
        if str(place) in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        real(path, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "mkdir", read_only)
    assert main.main(words[command]) == 2
    check_told(capsys.readouterr().err, str(place), os.strerror(errno.EROFS))
    assert not place.exists()
