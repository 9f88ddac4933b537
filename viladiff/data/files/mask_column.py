"""Masks that a list names beside its images, looked up among the PNGs below the root; names are never used as paths."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from viladiff.config.base import did_you_mean
from viladiff.core.messages import shown
from viladiff.data.files.index import FOLDER, FileIndex, below
from viladiff.data.files.split_lists import ListLine

NONE = "None"
"""What lists have in place of a mask where there is none."""


def named_masks(tree: FileIndex, source: Path, lines: Mapping[str, ListLine], needed: bool) -> FileIndex:
    """Return the index with the masks that a list names; images of lines without a second column keep theirs.

    The same picture's mask in another coding is the same mask, and the one that the layout reads stays. needed: the
    masks of these images are read. Others are not, so that a name without a file is no error there, but the image then
    has no mask. Raises ValueError that names file and line for a name that climbs out of the root, for one that is not
    below it or of another kind, and for ``None`` where a mask is needed.
    """
    finder = _Finder(tree)
    masks, without = dict(tree.masks), set(tree.unmasked)
    for name, line in lines.items():
        if not line.mask:
            continue
        where = f"{source}, line {line.number}"
        if ".." in PurePosixPath(line.mask).parts:
            raise ValueError(
                f"{where}: the mask {shown(line.mask)} climbs out of {tree.root}; names are relative to it"
            )
        found = None if line.mask == NONE else finder.find(name, line.mask)
        if found is not None:
            masks[name] = found
        elif needed:
            raise ValueError(f"{where}: {finder.refusal(name, line.mask)}")
        else:
            masks.pop(name, None)
            without.add(name)
    masks |= finder.beside([name for name in tree.images if name not in masks and name not in without])
    return tree._replace(masks=dict(sorted(masks.items())), unmasked=frozenset(without))


class _Finder:
    """Looks names up among the PNGs in the folders of a root that lists name."""

    def __init__(self, tree: FileIndex) -> None:
        self.tree, self.layout = tree, tree.layout
        self._files: dict[str, dict[str, Path]] = {}
        self._others: set[str] = set()

    def find(self, name: str, text: str) -> Path | None:
        """Return the mask that ``text`` names for an image; None if it is no readable mask."""
        text = _spelt(str(PurePosixPath(text.lstrip("/"))))
        read = self.tree.masks.get(name)
        tried = [text] if self.layout.val_images else [text, f"{self.layout.masks}/{text}"]
        if read is not None and self._relative(read) in tried:
            return read
        alike = PurePosixPath(text).name in {f"{name}{end}{self.layout.mask_suffix}" for end in self.layout.same_ends}
        own = tuple(f"{folder}/" for folder in (self.layout.masks, self.layout.val_masks) if folder)
        for one in tried:
            there = self._pngs(one.partition("/")[0]).get(one)
            if there is None or (alike and one.startswith(own)):
                continue
            usual = f"/{self.layout.mask_name(name)}"
            if one.endswith(usual):
                self._others.add(one.removesuffix(usual))
            elif self.layout.dataset != FOLDER.dataset:
                return None
            return there
        return read if alike else None

    def beside(self, names: Sequence[str]) -> dict[str, Path]:
        """Return masks of images in the other folders that lists have named so far."""
        found: dict[str, Path] = {}
        for folder in sorted(self._others):
            there = self._pngs(folder.partition("/")[0])
            every = ((name, there.get(f"{folder}/{self.layout.mask_name(name)}")) for name in names)
            found |= {name: place for name, place in every if place is not None}
        return found

    def refusal(self, name: str, text: str) -> str:
        """Explain why ``text`` cannot be the mask of an image, and which files can."""
        read, root, layout = self.tree.masks.get(name), self.tree.root, self.layout
        here = f"the mask there is {self._relative(read)!r}" if read else f"there is no mask in {layout.masks!r}"
        if text == NONE:
            return f"{name!r} has {NONE} in place of a mask, and needs one; name it, or take the line out ({here})"
        allowed, close = f"a PNG called {PurePosixPath(layout.mask_name(name)).name!r}", ""
        if layout.dataset == FOLDER.dataset:
            plain = text.lstrip("/")
            allowed, close = "a PNG", did_you_mean(plain, [*self._pngs(plain.partition("/")[0])])
        return (
            f"names the mask {shown(text)}, which is not {allowed} below {root}; {here}; "
            f"name one that is, or leave the second column out{close}"
        )

    def _relative(self, path: Path) -> str:
        return _spelt(os.fspath(path)[len(os.fspath(self.tree.root)) + 1 :].replace(os.sep, "/"))

    def _pngs(self, folder: str) -> dict[str, Path]:
        """Return the PNGs below a folder of the root by relative name, without hidden folders and files."""
        if folder not in self._files:
            there = below(self.tree.root, folder) if folder else ()
            ends = (".png", self.layout.mask_suffix.lower())
            self._files[folder] = {_spelt(name): path for name, path in there if name.lower().endswith(ends)}
        return self._files[folder]


def _spelt(text: str) -> str:
    return unicodedata.normalize("NFC", text)
