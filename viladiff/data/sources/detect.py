"""Detection of a directory's layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from viladiff.config.base import coerce, did_you_mean, format_errors
from viladiff.config.sections import DataConfig
from viladiff.data.files.index import FOLDER, FileIndex
from viladiff.data.sources import DATASETS
from viladiff.data.sources.base import Classes, FileSource


def open_tree(root: Path | str, **fields: object) -> tuple[FileIndex, Classes]:
    """Return the files below a root in whichever layout it has, and its classes. ValueError where it has none.

    One's own folder comes first, also where it has the folders of another beside, but for a layout whose folders lie
    within those of ``folder``. fields: of ``data``, as values or as text, such as ``value_range``;
    ``reduce_zero_label`` is passed over by data sets without it. Raises ValueError for another one that is unknown.
    """
    top = Path(root).expanduser()
    files = [source for source in DATASETS.values() if isinstance(source, FileSource)]
    others = [source for source in files if source.layout != FOLDER]
    within = [source for source in others if source.layout.images.startswith(f"{FOLDER.images}/")]
    own = (top / FOLDER.images).is_dir() and not any((top / source.layout.masks).is_dir() for source in within)
    fitting = [source for source in others if not own and source.layout.is_at(top, source.places)]
    chosen = next(iter([*fitting, *(source for source in files if source.layout == FOLDER)]))
    return chosen.scan(top, _section(chosen, fields))


def _section(source: FileSource, fields: Mapping[str, object]) -> DataConfig:
    known = source.config.model_fields
    given = {name: value for name, value in fields.items() if name in known or name != "reduce_zero_label"}
    for name in given:
        if name not in known:
            raise ValueError(f"data.{name}: {source.layout.dataset} has no such field{did_you_mean(name, known)}")
    try:
        return source.config(**coerce(source.config, given, "data."))
    except ValidationError as error:
        lines = format_errors(error, known, ()).splitlines()
        raise ValueError("\n".join(f"data.{line}" for line in lines)) from None
