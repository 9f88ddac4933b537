"""Errors of atomic writes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from viladiff.core.atomic import name_file_in_errors


@pytest.mark.parametrize(("number", "help"), [(errno.ENOSPC, "free space"), (errno.EFBIG, "ulimit -f")])
def test_an_error_of_a_full_disk_names_the_file_and_what_to_do(number: int, help: str) -> None:
    with (
        pytest.raises(
            OSError, match=rf"{os.strerror(number)} \(.*{help}.*same command again\): '/runs/a.pt'"
        ) as caught,
        name_file_in_errors(Path("/runs/a.pt")),
    ):
        raise OSError(number, os.strerror(number))
    assert caught.value.errno == number
