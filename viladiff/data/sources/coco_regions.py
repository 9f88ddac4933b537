"""Bounds of the segmentations in a JSON file of instances, checked before pycocotools reads them.

It allocates and loops by what the numbers say, in C: one that is not finite or far outside hangs it, exhausts memory or
ends the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from viladiff.core.messages import shown

MOST_PIXELS = 178_956_970
"""Of an image, as Pillow's limit: a mask is held whole."""
_SHORTEST = 6
"""Numbers of a polygon of three points."""


def whole_id(value: Any) -> Any:
    """Return the number that an id is, which some programs write as text or with a fraction of 0; else the id."""
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def lack(error: Exception, content: Mapping[str, Any]) -> str:
    """Return what a file's content lacks by the error of its reader; of a key, with the first entry that lacks it."""
    if not isinstance(error, KeyError):
        return str(error)
    key = error.args[0]
    for part in ("categories", "images", "annotations"):
        needed = any(isinstance(one, dict) and key in one for one in content[part])
        lacking = [place for place, one in enumerate(content[part], 1) if not isinstance(one, dict) or key not in one]
        if needed and lacking:
            return f"an entry lacks {key!r}: number {lacking[0]} of {part}, {str(content[part][lacking[0] - 1])[:80]}"
    return f"an entry lacks {key!r}"


def refuse_no_regions(path: Path, segmentations: Sequence[Any]) -> None:
    """Raise ValueError if all masks would be background throughout: for boxes alone, and for points in 0..1."""
    given = [one for one in segmentations if one]
    if segmentations and not given:
        raise ValueError(
            f"{path}: none of its {len(segmentations)} annotations has a segmentation; boxes alone make no mask: draw "
            "polygons"
        )
    polygons = [polygon for one in given if isinstance(one, list) for polygon in one if isinstance(polygon, list)]
    numbers = [number for polygon in polygons for number in polygon if isinstance(number, int | float)]
    listed = bool(numbers) and all(isinstance(one, list) for one in given)
    if listed and all(0 <= number <= 1 for number in numbers):
        raise ValueError(
            f"{path}: all points of its {len(given)} segmentations lie in 0..1, which is less than a pixel; multiply x "
            "by the image's width and y by its height"
        )


def checked_size(height: object, width: object) -> tuple[int, int]:
    """Return the sides of an image. Raises ValueError unless they are whole numbers that a mask can have."""
    sides = []
    for side in (height, width):
        whole = isinstance(side, int) or (isinstance(side, float) and side.is_integer())
        if isinstance(side, bool) or not whole:
            raise ValueError(f"height and width are {shown(height, 40)} and {shown(width, 40)}; must be whole numbers")
        sides.append(int(side))  # type: ignore[call-overload]
    if min(sides) < 1:
        raise ValueError(f"height and width are {sides[0]} and {sides[1]}")
    if sides[0] * sides[1] > MOST_PIXELS:
        told = f"{shown(sides[0], 40)} and {shown(sides[1], 40)}"
        raise ValueError(f"height and width are {told}: more than {MOST_PIXELS:,} pixels")
    return sides[0], sides[1]


def checked_polygons(given: Any, height: int, width: int) -> tuple[list[list[float]], int]:
    """Return the polygons of three points or more, and the number of others.

    Points may lie outside of the image by its own width or height, as those of tools that crop do. Raises ValueError
    for others, and for what is no list of numbers.
    """
    if not isinstance(given, list) or not all(isinstance(polygon, list) for polygon in given):
        raise ValueError(
            f"{shown(given, 40)} is not iterable as polygons, each a list of numbers, nor a run-length encoding"
        )
    whole = []
    for polygon in given:
        odd = [number for number in polygon if isinstance(number, bool) or not isinstance(number, int | float)]
        if odd:
            raise ValueError(f"could not convert {str(odd[0])[:40]!r} of a polygon to a number")
        for place, number in enumerate(polygon):
            side = (width, height)[place % 2]
            if not -side <= number <= 2 * side:  # nor is a number that is not finite
                axis = "xy"[place % 2]
                told = f"the image has {width} x {height} pixels"
                raise ValueError(f"{axis} = {shown(number, 40)} of a point, and {told}")
        # pycocotools takes four numbers for a box, which is not what a polygon of two points is.
        if len(polygon) >= _SHORTEST and len(polygon) % 2 == 0:
            whole.append([float(number) for number in polygon])
    return whole, len(given) - len(whole) + (not given)


def checked_runs(given: dict[str, Any], height: int, width: int) -> bool:
    """Check a run-length encoding; return whether its runs are a list, not packed text.

    Raises ValueError for another size than the image's, and for runs that do not make up the image.
    """
    if "size" not in given:
        raise ValueError("it lacks 'size'")
    if not isinstance(given["size"], list) or [*given["size"]] != [height, width]:
        raise ValueError(f"its size is {shown(given['size'], 60)}, the image's {[height, width]} (height, width)")
    counts = given.get("counts")
    if isinstance(counts, list):
        if any(isinstance(run, bool) or not isinstance(run, int) for run in counts):
            raise ValueError("its runs must be whole numbers")
        runs = counts
    elif isinstance(counts, str):
        runs = unpacked_runs(counts)
    else:
        raise ValueError("its counts must be a list of runs, or their packed text")
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        raise ValueError("its runs do not make up the image")
    return isinstance(counts, list)


def unpacked_runs(text: str) -> list[int]:
    """Return the runs in COCO's packed text.

    A number is written in groups of five bits, the lowest first, each as the character 48 + group, with 32 added where
    more follow; the last group's highest bit is the sign. From the fourth run on it is the difference from the run two
    before. Raises ValueError for other characters, and for a number that does not end.
    """
    runs: list[int] = []
    number = shift = 0
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64 or shift > 60:
            raise ValueError(f"invalid RLE: its packed runs hold {character!r}, which ends no number")
        number |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            number -= 1 << shift
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number = shift = 0
    if shift:
        raise ValueError("invalid RLE: its packed runs end within a number")
    return runs
