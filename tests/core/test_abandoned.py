"""What a killed writer leaves is told from what a living one is writing, in this container and in others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from viladiff.core.atomic import GRACE_ELSEWHERE, abandoned, draft_of, writer_token
from viladiff.data.cache import open_or_make

KILLED = """
import os, signal, sys
from pathlib import Path
from viladiff.core.atomic import draft_of, write_atomically
folder = Path(sys.argv[1])
draft = draft_of(folder / "made")
draft.mkdir()
(draft / "half").write_bytes(b"x")
os.replace = os.rename = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(folder / "file.json", b"{}")
"""


def test_a_killed_writer_leaves_a_file_and_a_folder_that_the_next_one_removes(tmp_path: Path) -> None:
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)]).returncode == -9
    left = sorted(tmp_path.iterdir())
    assert len(left) == 3, "the second has removed the first one's folder"
    files = [path for path in left if path.is_file()]
    assert sorted(abandoned(tmp_path)) == files and len(files) == 2
    other = tmp_path / f".other-{os.getpid()}-{writer_token()}"
    other.mkdir()
    assert draft_of(tmp_path / "made").name.startswith(f".made-{os.getpid()}-")
    assert [path for path in sorted(tmp_path.iterdir()) if path.is_dir()] == [other]


def test_the_living_and_those_elsewhere_are_spared(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    mine, elsewhere = writer_token(), f"{int(writer_token()[:4], 16) ^ 1:04x}0000"
    kept = [f".made-{os.getpid()}-{mine}", f".made-{dead.pid}-{elsewhere}", ".made-notes-x"]
    for name in (*kept, f".made-{dead.pid}-{mine}"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - 1800, time.time() - 1800))
    draft_of(tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    old = time.time() - GRACE_ELSEWHERE - 10
    os.utime(tmp_path / kept[1], (old, old))
    draft_of(tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([kept[0], kept[2]])


def test_a_folder_of_the_cache_removes_what_kills_left_of_it(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".abc-{dead.pid}-{writer_token()}").mkdir()

    def fill(folder: Path) -> dict[str, str | int | float]:
        np.save(folder / "x.npy", np.zeros(1))
        return {}

    open_or_make(tmp_path / "abc", fill)
    assert [path.name for path in tmp_path.iterdir()] == ["abc"]
