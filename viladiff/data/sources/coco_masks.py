"""Masks of COCO's images from its instances: one PNG an image, 0 for background, 1 ... 80 for things, 255 for crowds.

The conversion behind the literature's masks is not published, so that ours may differ from them in a few pixels. Where
instances overlap, the smaller one is on top: regions are painted by falling area, in a tie the later one in the file
last. A crowd is painted in the same order, as 255.
"""

from __future__ import annotations

import importlib.util
import io
import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from viladiff.core.atomic import write_atomically
from viladiff.core.hashing import file_sha256
from viladiff.core.messages import names_file, one_line, shown
from viladiff.data.constants import IGNORE
from viladiff.data.files.images import image_size
from viladiff.data.files.index import FOLDER, locate, scan
from viladiff.data.files.validate import Advance
from viladiff.data.process_pool import map_in_processes
from viladiff.data.sources.coco import CATEGORY_IDS, CLASS_NAMES, LAYOUT, PLACES
from viladiff.data.sources.coco_regions import (
    checked_polygons,
    checked_runs,
    checked_size,
    lack,
    refuse_no_regions,
    whole_id,
)

REVISION = 1
"""Raised when the same instances would give other masks."""
MANIFEST = ".coco-masks.json"
"""Which files the masks beside it were made of; hidden, so that no scan takes it for one."""
CHUNK = 64
"""Images that a process is handed at a time."""
_CLASS = {number: label for label, number in enumerate(CATEGORY_IDS, 1)}


class Region(NamedTuple):
    """An annotation as it is painted."""

    label: int
    """The class, from 1, or 255 for a crowd."""
    segmentation: Any
    """Polygons, or a run-length encoding, as the file has it."""
    source: str
    """Which annotation, for messages."""


class Task(NamedTuple):
    """An image whose mask is to be made."""

    name: str
    height: int
    width: int
    regions: tuple[Region, ...]


class Made(NamedTuple):
    """What ``make_masks`` did, in images and in regions of all of them."""

    written: int = 0
    there: int = 0
    """Made before, by a call that was interrupted or finished."""
    empty: int = 0
    """Images without an annotation, whose masks are background throughout."""
    crowds: int = 0
    hollow: int = 0
    """Polygons of fewer than three points, and regions without a pixel: left out."""
    hollow_in: tuple[str, ...] = ()
    """The images that they are of."""
    absent: tuple[str, ...] = ()
    """Images of one's own file that are not below ``images``."""
    unnamed: tuple[str, ...] = ()
    """Images there that the file does not name, which get no mask."""

    def __add__(self, other: tuple[Any, ...]) -> Made:
        pairs: list[tuple[Any, Any]] = [*zip(self, other, strict=True)]
        return Made(*(a + b for a, b in pairs))  # numbers, or names one after the other


def make_masks(
    root: Path | str,
    instances: Sequence[Path | str] = (),
    out: Path | str | None = None,
    processes: int | None = None,
    advance: Advance = lambda done, of: None,
) -> Made:
    """Make the masks that are missing in ``out`` (``masks`` below ``root``), in ``processes`` (one for each core).

    instances: COCO's JSON files; those of train2017 and val2017 below ``root/annotations`` by default. Each mask is
    written atomically, so that an interrupted call can be resumed. Raises ValueError for a file that is not of COCO's
    instances, and for masks in ``out`` that were made from other files.
    """
    top = locate(root, PLACES, LAYOUT)
    folder = top / LAYOUT.masks if out is None else Path(out).expanduser()
    _need_pycocotools()
    files = [Path(path).expanduser() for path in instances] or _default(top)
    return _made(folder, ((path, read_instances(path)) for path in files), processes, advance)


def make_own_masks(
    root: Path | str,
    instances: Sequence[Path | str],
    out: Path | str | None = None,
    processes: int | None = None,
    advance: Advance = lambda done, of: None,
) -> Made:
    """Make the masks of ``root/images`` and ``root/classes.txt`` from one JSON file of any categories.

    Background is class 0, and the categories that are annotated follow by rising id. Raises ValueError as
    ``make_masks``, for more than one file, where classes.txt or palette.txt says something else, and for an image
    whose size is not the file's.
    """
    if len(instances) != 1:
        raise ValueError(f"--own: needs one --instances FILE, got {len(instances)}; merge them first")
    _need_pycocotools()
    top, path = Path(root).expanduser(), Path(instances[0]).expanduser()
    tasks, classes = read_own_instances(path)
    file, text = top / "classes.txt", "\n".join(classes) + "\n"
    if (top / "palette.txt").exists() or (
        file.exists() and file.read_text(encoding="utf-8").split("\n") != text.split("\n")
    ):
        raise ValueError(f"{top}: has a palette.txt or another classes.txt, and {path.name} has {', '.join(classes)}")
    absent, unnamed = _beside_images(top, path, tasks)
    folder = top / FOLDER.masks if out is None else Path(out).expanduser()
    made = _made(folder, [(path, tasks)], processes, advance)._replace(absent=absent, unnamed=unnamed)
    try:
        write_atomically(file, text.encode())  # after the masks: a file that fails may come again with other categories
    except OSError as error:
        raise ValueError(f"{file}: cannot be written ({error.strerror or error})") from error
    return made


def _beside_images(top: Path, path: Path, tasks: Sequence[Task]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the images of the file that are not in ``images``, and those there that it does not name.

    Raises ValueError if none of them is there, and for one whose size is not the file's. Nothing is compared where
    there is no such folder, or an empty one.
    """
    folder = top / FOLDER.images
    if not folder.is_dir() or not any(folder.iterdir()):
        return (), ()
    images = scan(top, FOLDER).images
    named = {unicodedata.normalize("NFC", task.name): task for task in tasks}
    absent = tuple(name for name in named if name not in images)
    if len(absent) == len(named):
        raise ValueError(
            f"{path}: none of its {len(named)} images is in {folder}, first {absent[0]!r}; file_name is "
            "relative to that folder"
        )
    for name, task in named.items():
        size = image_size(images[name]) if name in images else (task.height, task.width)
        if size != (task.height, task.width):
            raise ValueError(
                f"{path}: image {task.name!r} has {task.width} x {task.height} pixels (width x height) in it, and "
                f"{images[name]} has {size[1]} x {size[0]}; scale its annotations, or bring the image that they are of"
            )
    return absent, tuple(name for name in images if name not in named)


def _need_pycocotools() -> None:
    if importlib.util.find_spec("pycocotools") is None:
        raise ValueError("pycocotools is missing, which reads COCO's regions: pip install 'viladiff[coco]'")


def _made(folder: Path, files: Iterable[tuple[Path, Sequence[Task]]], processes: int | None, advance: Advance) -> Made:
    made = Made()
    for path, tasks in files:
        there = _begin(folder, path, tasks)
        todo = [task for task in tasks if f"{task.name}.png" not in there]
        chunks = [(folder, todo[start : start + CHUNK]) for start in range(0, len(todo), CHUNK)]
        crowds = sum(region.label == IGNORE for task in tasks for region in task.regions)
        before = made = made + Made(0, len(tasks) - len(todo), sum(not task.regions for task in tasks), crowds)
        with map_in_processes(processes, len(chunks)) as run:
            for (_, some), hollow in zip(chunks, run(_paint_some, chunks), strict=True):
                names = tuple(task.name for task, skipped in zip(some, hollow, strict=True) if skipped)
                made += Made(len(hollow), hollow=sum(hollow), hollow_in=names)
                advance(made.written - before.written, len(todo))
    return made


@names_file
def read_instances(path: Path) -> list[Task]:
    """Read every image of the file with its regions. Raises ValueError for what differs from COCO's instances."""
    content = _content(path)
    try:
        _check_categories(path, {int(one["id"]): str(one["name"]) for one in content["categories"]})
        return _tasks(path, content, _CLASS)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a file of COCO's instances: {lack(error, content)}") from error


@names_file
def read_own_instances(path: Path) -> tuple[list[Task], tuple[str, ...]]:
    """Read the images of a file of any categories, and the names of its classes, background first.

    Classes are the categories that some annotation has, by rising id. Raises ValueError for a file that is none of
    instances, or whose categories cannot be told apart.
    """
    content = _content(path)
    try:
        names = {whole_id(one["id"]): str(one["name"]).strip() for one in content["categories"]}
        used = sorted({whole_id(one["category_id"]) for one in content["annotations"] if not one.get("iscrowd", 0)})
        missing = [number for number in used if number not in names]
        if missing:
            raise ValueError(f"{path}: category_id = {missing[0]} is none of its categories")
        classes = ("background", *(names[number] for number in used))
        odd = [name for name in classes if not name or "\n" in name or classes.count(name) > 1]
        if odd or not 2 <= len(classes) <= IGNORE:
            what = f"the name {odd[0]!r} is empty or of two" if odd else f"{len(classes) - 1} categories are annotated"
            raise ValueError(f"{path}: {what}; must be 1 to {IGNORE - 1} different ones beside 'background'")
        tasks = _tasks(path, content, {number: label for label, number in enumerate(used, 1)}, folders=True)
        refuse_no_regions(path, [region.segmentation for task in tasks for region in task.regions])
        return tasks, classes
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a file of instances: {lack(error, content)}") from error


def _no_number(text: str) -> None:
    raise ValueError(f"it holds {text}, which is no number")


def _content(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = json.load(file, parse_constant=_no_number)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    parts = ("images", "annotations", "categories")
    lacks = [part for part in parts if not isinstance(content, dict) or not isinstance(content.get(part), list)]
    if lacks:
        raise ValueError(
            f"{path}: not a file of COCO's instances, such as instances_val2017.json: has no list {lacks[0]!r}"
        )
    return content


def _check_categories(path: Path, found: dict[int, str]) -> None:
    wanted = dict(zip(CATEGORY_IDS, CLASS_NAMES[1:], strict=True))
    for number in sorted({*wanted, *found}):
        if wanted.get(number) != found.get(number):
            raise ValueError(
                f"{path}: its categories are not COCO's 80 things: {number} is {found.get(number, 'missing')!r} here "
                f"and {wanted.get(number, 'unused')!r} there; keypoints and stuff have others, and --own reads any"
            )


def _tasks(path: Path, content: dict[str, Any], classes: dict[int, int], folders: bool = False) -> list[Task]:
    """folders: names of images may have some."""
    regions: dict[Any, list[Region]] = {}
    files: dict[Any, str] = {}
    for one in content["images"]:
        if (number := whole_id(one["id"])) in files:
            both = f"{files[number]!r} and {one['file_name']!r}"
            raise ValueError(f"{path}: image {one['id']!r}: two entries have this id, {both}; give each its own")
        files[number], regions[number] = str(one["file_name"]), []
    for one in content["annotations"]:
        source, image = f"{path}: annotation {shown(one.get('id', '?'), 40)}", whole_id(one["image_id"])
        if image not in regions:
            raise ValueError(f"{source}: is of image {one['image_id']!r}, which the file does not have")
        source = f"{source} of {one_line(files[image], 200)}"
        crowd, category = bool(one.get("iscrowd", 0)), whole_id(one["category_id"])
        if category not in classes and not (folders and crowd):
            whose = "none of its categories" if folders else "none of COCO's 80 things"
            raise ValueError(f"{source}: category_id = {one['category_id']!r} is {whose}")
        if "segmentation" not in one:
            raise ValueError(f"{source}: has no segmentation; a box alone makes no mask: draw a polygon")
        regions[image].append(Region(IGNORE if crowd else classes[category], one["segmentation"], source))
    tasks: list[Task] = []
    seen: dict[str, Any] = {}
    for one in content["images"]:
        name = _image_name(str(one["file_name"]), folders)
        if not name:
            wanted = "lie below images/" if folders else "be a bare name"
            raise ValueError(f"{path}: image {one['id']}: file_name = {one['file_name']!r} must {wanted}")
        try:
            height, width = checked_size(one["height"], one["width"])
        except ValueError as error:
            raise ValueError(f"{path}: image {one['id']}: {error}") from None
        if name in seen:
            raise ValueError(
                f"{path}: images {seen[name]!r} and {one['id']!r} would have one mask, {name}.png; file_name must "
                "differ by more than its suffix"
            )
        seen[name] = one["id"]
        tasks.append(Task(name, height, width, tuple(regions[whole_id(one["id"])])))
    return tasks


def _image_name(file: str, folders: bool) -> str:
    """Return an image's name without its suffix; empty if it leads elsewhere."""
    name, dot, suffix = file.removeprefix("./").rpartition(".")
    if folders:
        name = name.replace("\\", "/").removeprefix(f"{FOLDER.images}/")
    parts = PurePosixPath(name).parts
    wrong = not dot or not suffix or not name or name.startswith("/") or "/" in suffix or "://" in file
    if (
        wrong
        or any(part == ".." or part.startswith(".") for part in parts)
        or (not folders and name != Path(name).name)
    ):
        return ""
    return name


def paint(task: Task) -> tuple[np.ndarray, int]:
    """Return the (h, w) uint8 mask, and the omitted part as ``Made.hollow``. Raises ValueError for no segmentation."""
    from pycocotools import mask as masks

    labels = np.zeros((task.height, task.width), np.uint8)
    found = [(region, *_encoded(region, task.height, task.width)) for region in task.regions]
    hollow = sum(dropped for _, _, dropped in found)
    solid = [(region, encoded) for region, encoded, _ in found if encoded is not None]
    areas = np.array([int(masks.area(encoded)) for _, encoded in solid], np.int64)
    for place in np.argsort(-areas, kind="stable"):
        region, encoded = solid[place]
        try:
            labels[masks.decode(encoded) > 0] = region.label
        except ValueError as error:
            raise ValueError(one_line(f"{region.source}: its segmentation cannot be read: {error}")) from error
    return labels, hollow + int((areas == 0).sum())


def _encoded(region: Region, height: int, width: int) -> tuple[Any, int]:
    """Return pycocotools' run-length encoding, None if no polygon is left, and the number of polygons skipped."""
    from pycocotools import mask as masks

    given = region.segmentation
    try:
        if isinstance(given, dict):
            listed = checked_runs(given, height, width)
            return (masks.frPyObjects(given, height, width) if listed else given), 0
        whole, dropped = checked_polygons(given, height, width)
        return (masks.merge(masks.frPyObjects(whole, height, width)) if whole else None), dropped
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(one_line(f"{region.source}: its segmentation cannot be read: {error}")) from error


def _paint_some(chunk: tuple[Path, Sequence[Task]]) -> list[int]:
    folder, tasks = chunk
    hollow = []
    for task in tasks:
        labels, dropped = paint(task)
        packed = io.BytesIO()
        Image.fromarray(labels).save(packed, "PNG")
        path = folder / f"{task.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, packed.getvalue())
        hollow.append(dropped)
    return hollow


def _default(top: Path) -> list[Path]:
    files = [top / "annotations" / f"instances_{part}.json" for part in (LAYOUT.images, LAYOUT.val_images)]
    there = [path for path in files if path.is_file()]
    if not there:
        raise ValueError(f"{files[0]}: there is no such file; unpack annotations_trainval2017.zip, or name --instances")
    return there


def _begin(folder: Path, path: Path, tasks: Sequence[Task]) -> frozenset[str]:
    """Return the names of the existing files, after checking that masks among them are of the same instances."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = frozenset(one.relative_to(folder).as_posix() for one in folder.rglob("*"))
        manifest = folder / MANIFEST
        known = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
        digest = f"{REVISION}/{file_sha256(path)}"
        strange = [] if known.get(path.name) == digest else [one for one in tasks if f"{one.name}.png" in there]
        if strange:
            raise ValueError(
                f"{folder}: {len(strange)} masks, first {strange[0].name}.png, were not made from this {path.name}; "
                "move them away, or name another --out"
            )
        write_atomically(manifest, json.dumps(known | {path.name: digest}, indent=2).encode())
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return there
