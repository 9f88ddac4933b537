"""What is said of a process that died, from the file that Ray leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from viladiff.cluster.ray_tune import death_message, killed_for_memory, trial_error

MEMORY = """Failure # 1 (occurred at 2026-11-29_11-43-14)
1 worker(s) were killed due to the node running low on memory. Memory on the node was 5.55GB used / 23.54GB limit
To adjust the kill threshold, set the environment variable `RAY_memory_usage_threshold`
"""
KILLED = """Failure # 1 (occurred at 2026-11-29_11-43-14)
The actor died unexpectedly before finishing this task.
Worker exit type: SYSTEM_ERROR Worker exit detail: Worker exits with error code 2. There are some
"""


def test_the_memory_monitor_is_told_with_what_to_lower(tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_text(MEMORY)
    text = trial_error(SimpleNamespace(error_file=str(tmp_path / "error.txt"), get_error=lambda: None))
    assert killed_for_memory(text)
    assert death_message(text).startswith("Ray's memory monitor ended its process") and "\n" not in death_message(text)
    assert "--max-concurrent" in death_message(text)


def test_another_death_is_none_of_memory() -> None:
    assert not killed_for_memory(KILLED)
    assert death_message(KILLED) == "its process died: Worker exits with error code 2."


@pytest.mark.parametrize("found", [None, "", "gone"])
def test_a_death_without_a_file_is_told_too(found: str | None, tmp_path: Path) -> None:
    text = trial_error(SimpleNamespace(error_file=str(tmp_path / "none.txt"), get_error=lambda: found))
    assert death_message(text) == f"its process died: {found or 'no reason given'}"
