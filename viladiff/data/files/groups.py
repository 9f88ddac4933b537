"""Groups of images that belong together, as those of a patient or a video."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from viladiff.config.base import did_you_mean
from viladiff.core.messages import shown
from viladiff.data.files.index import FileIndex, image_id

FOLDERS = "folder"


def groups_of(tree: FileIndex, how: str) -> dict[str, str]:
    """Return the group of each image, by id.

    how: ``folder`` for the folder that an image is in; the path of a CSV file of two columns, image and group; or a
    regular expression, whose first group, or else the whole match, in an id is the group, as ``patient[0-9]+``. Raises
    ValueError that names an image without a group, and for fewer than two groups.
    """
    if how == FOLDERS:
        found = {name: name.rpartition("/")[0] for name in tree.images}
    elif how.lower().endswith(".csv") or Path(how).expanduser().is_file():
        found = _from_table(tree, Path(how).expanduser())
    else:
        found = _from_names(tree, how)
    if len({*found.values()}) < 2:
        only = next(iter(found.values()), "")
        raise ValueError(f"--groups {how!r}: all {len(found)} images are in one group, {only!r}; there must be two")
    return found


def _from_names(tree: FileIndex, how: str) -> dict[str, str]:
    try:
        pattern = re.compile(how)
    except re.error as error:
        raise ValueError(
            f"--groups {how!r}: neither a file, nor {FOLDERS!r}, nor a regular expression ({error})"
        ) from None
    found = {}
    for name in tree.images:
        match = pattern.search(name)
        if match is None:
            raise ValueError(
                f"--groups {how!r}: the image {name!r} has no such part; give {FOLDERS!r}, a CSV file of image and "
                "group, or a regular expression that fits every name"
            )
        found[name] = match[1] if pattern.groups else match[0]
    return found


def _from_table(tree: FileIndex, path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a table of groups: {error}") from error
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise ValueError(
                f"{path}, row {number}: {shown(row)} has {len(row)} columns; there must be two, image and group"
            )
        name, group = tree.layout.image_id(row[0].strip()), row[1].strip()
        name = name.removeprefix(f"{tree.layout.images}/")
        if name not in tree.images:
            if number == 1:
                continue  # the names of the columns
            raise ValueError(
                f"{path}, row {number}: {shown(row[0])} is no image{did_you_mean(image_id(name), tree.images)}"
            )
        if not group:
            raise ValueError(f"{path}, row {number}: {name!r} has no group; write one, its own if it has no neighbour")
        if found.setdefault(name, group) != group:
            raise ValueError(f"{path}, row {number}: {name!r} is in the groups {shown(found[name])} and {shown(group)}")
    missing = [name for name in tree.images if name not in found]
    if missing:
        raise ValueError(f"{path}: {len(missing)} images have no group, first {missing[0]!r}")
    return found
