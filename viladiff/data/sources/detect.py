"""Detection of a directory's layout."""

from __future__ import annotations

from pathlib import Path

from viladiff.data.files.index import FOLDER, FileIndex
from viladiff.data.sources import DATASETS
from viladiff.data.sources.base import Classes, FileSource


def open_tree(root: Path | str, **fields: object) -> tuple[FileIndex, Classes]:
    """Return the files below a root in whichever layout it has, and its classes. ValueError where it has none.

    One's own folder comes first, also where it has the folders of another beside, but for a layout whose folders lie
    within those of ``folder``. fields: of ``data``, such as ``reduce_zero_label``, for the data sets that have them.
    """
    top = Path(root).expanduser()
    files = [source for source in DATASETS.values() if isinstance(source, FileSource)]
    others = [source for source in files if source.layout != FOLDER]
    within = [source for source in others if source.layout.images.startswith(f"{FOLDER.images}/")]
    own = (top / FOLDER.images).is_dir() and not any((top / source.layout.masks).is_dir() for source in within)
    fitting = [source for source in others if not own and source.layout.is_at(top, source.places)]
    chosen = next(iter([*fitting, *(source for source in files if source.layout == FOLDER)]))
    given = {name: value for name, value in fields.items() if name in chosen.config.model_fields}
    return chosen.scan(top, chosen.section(**given))
