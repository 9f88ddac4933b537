"""Stamps of data sets whose files were all checked on this machine, so that other starts need not look at each again.

A stamp is named by the fingerprint of the data set, a hash of the lists, the classes and the bytes of each file that a
run reads. Opening a data set computes it from every file's size, times and inode, so that a changed file has no stamp.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from viladiff.core.atomic import write_atomically
from viladiff.core.source_digest import code_digest
from viladiff.data.cache import cache_dir, fingerprint
from viladiff.data.dataset import Dataset
from viladiff.data.files.file_cache import FORMAT


def stamp_path(dataset: Dataset) -> Path:
    """Return the place of a data set's stamp in the cache folder, another one for each root and state of the checks."""
    root = "" if dataset.contents is None else str(dataset.contents.root)
    return (
        cache_dir()
        / "stamps"
        / f"{fingerprint('files', FORMAT, code_digest(), root, dataset.name, dataset.fingerprint)}.json"
    )


def stamped(dataset: Dataset, check: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
    """Return the warnings that ``check`` once found in these very files, or let it look and store them.

    What it raises is not stored. Where nothing can be written the next start checks again.
    """
    path = stamp_path(dataset)
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, list) and all(isinstance(one, str) for one in found):
            return tuple(found)
    told = check()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(told).encode())
    return told
