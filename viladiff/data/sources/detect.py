"""Detection of a directory's layout."""

from __future__ import annotations

from pathlib import Path

from viladiff.data.files.index import FOLDER, VOC, FileIndex, scan
from viladiff.data.sources import ade20k, cityscapes, coco, voc
from viladiff.data.sources.folder import Classes, read_classes


def open_tree(root: Path | str, reduce_zero_label: bool = True) -> tuple[FileIndex, Classes]:
    """Index the files below a root in the layout that it has. Raises ValueError if it has none.

    A user's own folder takes precedence over the folders of another layout beside it. reduce_zero_label: see
    ``data.ade20k``.
    """
    top = Path(root).expanduser()
    own = (top / FOLDER.images).is_dir() and not (top / ade20k.LAYOUT.masks).is_dir()
    if not own:
        if (voc.voc_root(top) / VOC.images).is_dir():
            return scan(voc.voc_root(top), VOC), Classes(voc.CLASS_NAMES, None)
        if cityscapes.LAYOUT.is_at(top, cityscapes.PLACES):
            return cityscapes.city_tree(top)
        if coco.LAYOUT.is_at(top, coco.PLACES):
            return coco.coco_tree(top)
        if ade20k.LAYOUT.is_at(top, ade20k.PLACES):
            return ade20k.ade_tree(top, reduce_zero_label)
    tree = scan(top, FOLDER)
    return tree, read_classes(tree.root)
