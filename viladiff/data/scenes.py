"""Every scene is handwriting from scikit-learn's scans, filled with and laid on pieces of its two photographs.

Nothing is downloaded. An image depends on its variant, part and index alone. The parts share no handwriting; ``dev``
and ``test`` also have photo columns of their own (``MATERIAL``). While a scene is composed, colours are float32 in
[0, 1] with the channel first; lengths are in pixels, angles in degrees.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import ndimage

from viladiff.core import keyed_random

Part = Literal["pretrain", "train", "dev", "test"]
Array = np.ndarray
Range = tuple[float, float]

REVISION = 3
"""Raised whenever a scene comes out different for an unchanged recipe."""
SEED = 20240
SCENES = ("building", "flowers")
"""What the photograph behind the digits shows, in the order in which scikit-learn lists its photographs."""

SCANS = 1797


class Material(NamedTuple):
    """What the scenes of one part are made of, as half-open ranges."""

    scans: tuple[int, int]
    """Indices into scikit-learn's list, which is ordered by writer."""
    columns: tuple[int, int]
    """Pixels of the two photographs."""


MATERIAL: dict[Part, Material] = {
    "pretrain": Material((0, 600), (160, 400)),
    "train": Material((600, 1197), (160, 400)),
    "dev": Material((1197, 1437), (416, 640)),
    "test": Material((1437, SCANS), (0, 144)),
}
"""``pretrain`` is for the shipped encoder, ``train`` is the pool, ``dev`` is for choices and ``test`` for results.

The pool has the middle of both photographs, with flower, building, trees and sky: a network that has never seen the
flower takes its petals for digits. The gap of 16 columns between ranges is one block of the JPEG's subsampled colours,
so that no decoded pixel leaks.
"""
_ZOOMS = (1.0, 0.7, 0.5)
_MARGIN = 3
"""Zero pixels around a scan, so that the spline falls to zero inside the patch."""
_HUE_ORDER = (0, 7, 4, 1, 8, 5, 2, 9, 6, 3)
"""Place of each digit on the colour circle, so that digits next in value are far apart in hue."""
_FINE = 4
"""Samples per scan pixel of the upsampled handwriting."""


@dataclass(frozen=True)
class SceneRecipe:
    """All that decides how hard a scene is; a changed field is a different data set with another fingerprint."""

    side: int = 64
    objects: tuple[int, int] = (1, 3)
    """Fewest and most digits in a scene."""
    height: Range = (26, 36)
    aspect: Range = (0.9, 1.1)
    """Width over height, against that of the scan."""
    rotation: float = 8
    """Largest angle to either side."""
    shear: float = 0.1
    ink: Range = (0.40, 0.56)
    """Level of the upsampled scan (1 = darkest) where the outline lies; lower is thicker."""
    hue_spread: float = 50
    """Standard deviation in degrees around a class's hue; neighbours are 36 apart."""
    chroma: Range = (0.06, 0.22)
    """Strength of the class's hue; 0 is grey."""
    own_chroma: float = 0.35
    """Share of the crop's own colour that is kept."""
    contrast: Range = (0.22, 0.45)
    """Difference in mean luminance between a digit and what lies behind it."""
    texture: float = 0.5
    """Factor of the photo's own light and dark inside a digit."""
    background_gain: Range = (0.65, 1.0)
    background_shift: Range = (-0.08, 0.12)
    shadow: Range = (0.0, 0.35)
    """How dark the soft halo around a digit is."""
    overlap: float = 0.25
    """Largest share of a digit's area that may lie over others, where ``tries`` places find such a one."""
    outside: float = 0.12
    """Largest share of a digit's height beyond the border."""
    tries: int = 12
    noise: float = 0.02
    """Standard deviation of the grain, which is grey."""


class Sources(NamedTuple):
    """The raw material of one part."""

    ink: Array
    """(scans, s, s) float32 in [0, 1], _FINE samples to a pixel of the scan."""
    scans: tuple[Array, ...]
    """Per digit: (number of the scan,), indices into ``ink``."""
    photos: tuple[tuple[Array, ...], ...]
    """Per photograph and zoom: (3, h, w) float32."""


class Scene(NamedTuple):
    image: Array
    """(side, side, 3) uint8."""
    mask: Array
    """(side, side) uint8: 0 background, 1 + d for digit d, by the topmost digit whose coverage is at least one half."""


def scene_kind(name: str, part: Part, index: int) -> int:
    """Index into SCENES of the photograph behind scene ``index``; known without rendering it."""
    return int(keyed_random.numpy_generator(SEED, name, part, index, "kind").integers(len(SCENES)))


def render(recipe: SceneRecipe, name: str, part: Part, index: int, sources: Sources | None = None) -> Scene:
    """Draw scene ``index``, far digits first; equal arguments give equal pixels, in any order of calls.

    ``sources`` replaces the material of ``part``.
    """
    rng = keyed_random.numpy_generator(SEED, name, part, index)
    sources = sources or load_sources(part)
    image = _background(rng, recipe, sources.photos[scene_kind(name, part, index)])
    mask = np.zeros((recipe.side, recipe.side), np.uint8)
    digits = rng.integers(10, size=rng.integers(recipe.objects[0], recipe.objects[1] + 1)).tolist()
    scans = [sources.ink[sources.scans[digit][rng.integers(len(sources.scans[digit]))]] for digit in digits]
    for digit, (ink, alpha) in zip(digits, write_digits(rng, recipe, scans), strict=True):
        top, left = _place(rng, recipe, alpha >= 0.5, mask)
        inner, outer = _windows(recipe.side, top, left, *alpha.shape)
        under, cover = image[:, *outer], alpha[inner]
        # Where there is some ink, but not enough for the outline, the digit's shadow falls.
        under *= 1 - np.float32(rng.uniform(*recipe.shadow)) * ink[inner]
        crop = _crop(rng, sources.photos[rng.integers(len(sources.photos))], *alpha.shape)[:, *inner]
        behind = float((under * cover).sum() / max(3 * cover.sum(), 1e-6))
        under += cover * (recolour(rng, recipe, crop, digit, behind) - under)
        mask[outer][alpha[inner] >= 0.5] = 1 + digit
    image += rng.standard_normal(mask.shape, np.float32) * np.float32(recipe.noise)
    return Scene(np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0), mask)


@functools.lru_cache(maxsize=4)
def load_sources(part: Part) -> Sources:
    """Load handwriting and photo columns of one part."""
    from sklearn.datasets import load_digits, load_sample_images

    (first, last), columns = MATERIAL[part]
    labels = load_digits().target
    scans = tuple(first + np.flatnonzero(labels[first:last] == digit) for digit in range(10))
    regions = [
        np.ascontiguousarray(photo[:, slice(*columns)].transpose(2, 0, 1), np.float32) / 255
        for photo in load_sample_images().images
    ]
    return Sources(_scans(), scans, tuple(tuple(_shrink(region, zoom) for zoom in _ZOOMS) for region in regions))


def deform_handwriting(sources: Sources, copies: int, amplitude: float, seed: int) -> Sources:
    """Replace each scan by ``copies`` elastic deformations of it; the photographs stay.

    The displacement is a cubic spline through 5 x 5 normal draws of standard deviation ``amplitude``, in pixels of the
    scan. Raises ValueError for no copies.
    """
    if copies < 1:
        raise ValueError(f"copies = {copies}: must be at least 1")
    side = sources.ink.shape[1]
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij")).astype(np.float32)
    spline = ndimage.zoom(np.eye(5), (side / 5, 1), order=3)
    chosen = np.sort(np.concatenate(sources.scans))
    ink = np.empty((len(chosen) * copies, side, side), np.float32)
    for place, scan in enumerate(chosen.tolist()):
        for copy in range(copies):
            field = (
                keyed_random.numpy_generator(seed, "elastic", scan, copy).standard_normal((2, 5, 5)) * amplitude * _FINE
            )
            shift = np.einsum("ia,nab,jb->nij", spline, field, spline)
            ndimage.map_coordinates(sources.ink[scan], grid + shift, ink[place * copies + copy], order=1)
    places = [np.searchsorted(chosen, scans)[:, None] * copies + np.arange(copies) for scans in sources.scans]
    return sources._replace(ink=ink, scans=tuple(place.ravel() for place in places))


def _shrink(region: Array, zoom: float) -> Array:
    if zoom == 1:
        return region
    blurred = ndimage.gaussian_filter(region, (0, 0.5 / zoom, 0.5 / zoom))
    return np.clip(ndimage.zoom(blurred, (1, zoom, zoom), order=1), 0, 1)


@functools.lru_cache(maxsize=1)
def _scans() -> Array:
    """Return (1797, s, s) float32 ink in [0, 1]: cubic splines through all scans, sampled _FINE times as densely."""
    from sklearn.datasets import load_digits

    margins = ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN))
    scans = np.pad(load_digits().images / 16, margins)
    length = scans.shape[1]
    # The spline is linear in its samples, so one matrix stands for it and serves all scans at once.
    refine = ndimage.zoom(np.eye(length), (((length - 1) * _FINE + 1) / length, 1), order=3)
    return (refine @ scans @ refine.T).astype(np.float32)


def write_digits(rng: np.random.Generator, recipe: SceneRecipe, scans: list[Array]) -> list[tuple[Array, Array]]:
    """Draw each scan (s, s) under a random size, slant and turn: ink over the outline's level, at most 1, and coverage.

    Both (p, q), without empty borders. Coverage, in [0, 1], is the distance to the outline in pixels, estimated as
    (ink - level) / |gradient|, plus one half.
    """
    if not scans:
        return []
    spans = (recipe.height, recipe.aspect, (-recipe.rotation, recipe.rotation), (-recipe.shear, recipe.shear))
    low, high = np.transpose((*spans, recipe.ink))
    drawn = rng.uniform(low, high, (len(scans), 5))
    level = drawn[:, 4:, None].astype(np.float32)
    side = math.ceil((drawn[:, 0] * np.maximum(drawn[:, 1], 1)).max() * 1.4)
    ink = np.empty((len(scans), side, side), np.float32)
    for patch, source, (height, aspect, degrees, slant) in zip(ink, scans, drawn[:, :4].tolist(), strict=True):
        matrix = _matrix(height, aspect, math.radians(degrees), slant)
        offset = (len(source) - 1) / 2 - matrix.sum(1) * ((side - 1) / 2)
        ndimage.affine_transform(source, matrix, offset, output=patch, order=1)
    down, across = ink[:, 2:, 1:-1] - ink[:, :-2, 1:-1], ink[:, 1:-1, 2:] - ink[:, 1:-1, :-2]
    steepness = np.sqrt(down * down + across * across) / 2
    alpha = np.clip(0.5 + (ink[:, 1:-1, 1:-1] - level) / np.maximum(steepness, 0.02), 0, 1)
    halo = np.clip(ink[:, 1:-1, 1:-1] / level, 0, 1)
    boxes = [_box(patch > 0) for patch in alpha]
    return [(halo[i][box], alpha[i][box]) for i, box in enumerate(boxes)]


def _matrix(height: float, aspect: float, angle: float, slant: float) -> Array:
    """Return (2, 2) from pixels of a patch to those of the upsampled scan: turn, then slant, then scale."""
    rows, columns = 8 * _FINE / height, 8 * _FINE / (height * aspect)
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[rows * cos, -rows * sin], [columns * (slant * cos + sin), columns * (cos - slant * sin)]])


def _box(shape: Array) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _background(rng: np.random.Generator, recipe: SceneRecipe, zooms: tuple[Array, ...]) -> Array:
    crop = _crop(rng, zooms, recipe.side, recipe.side)
    gain, shift = rng.uniform(*recipe.background_gain), rng.uniform(*recipe.background_shift)
    return np.clip((crop - 0.5) * np.float32(gain) + np.float32(0.5 + shift), 0, 1)


def _crop(rng: np.random.Generator, zooms: tuple[Array, ...], height: int, width: int) -> Array:
    photo = zooms[rng.integers(len(zooms))]
    top = rng.integers(photo.shape[1] - height + 1)
    left = rng.integers(photo.shape[2] - width + 1)
    crop = photo[:, top : top + height, left : left + width]
    return crop[:, :, ::-1] if rng.random() < 0.5 else crop


def _place(rng: np.random.Generator, recipe: SceneRecipe, shape: Array, mask: Array) -> tuple[int, int]:
    """Top and left of the first place tried where little of the digit lies over others, or of the best one."""
    height, width = shape.shape
    out = int(recipe.outside * height)
    room = max(recipe.side - height + 2 * out, 0) + 1, max(recipe.side - width + 2 * out, 0) + 1
    allowed = recipe.overlap * np.count_nonzero(shape)
    best, place = shape.size + 1, (0, 0)
    for across, down in rng.random((recipe.tries, 2)).tolist():
        top, left = int(down * room[0]) - out, int(across * room[1]) - out
        inner, outer = _windows(recipe.side, top, left, height, width)
        hidden = int(np.count_nonzero(mask[outer] * shape[inner]))
        if hidden < best:
            best, place = hidden, (top, left)
        if hidden <= allowed:
            break
    return place


def _windows(
    side: int, top: int, left: int, height: int, width: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return the part of a patch that lies on the canvas, in the patch's and in the canvas's own coordinates."""
    bottom, right = min(top + height, side), min(left + width, side)
    outer = (slice(max(top, 0), bottom), slice(max(left, 0), right))
    inner = (slice(max(-top, 0), bottom - top), slice(max(-left, 0), right - left))
    return inner, outer


def recolour(rng: np.random.Generator, recipe: SceneRecipe, crop: Array, digit: int, behind: float) -> Array:
    """Give the crop (3, h, w) the digit's hue and a mean luminance that stands off from ``behind`` (0 to 1).

    Hue is an angle in the plane orthogonal to grey; the digit's own is 36 degrees times its place on the circle.
    """
    luminance = (crop[0] + crop[1] + crop[2]) / np.float32(3)
    own = (crop - luminance) * np.float32(recipe.own_chroma)
    step, chroma, up = rng.uniform(*recipe.contrast), rng.uniform(*recipe.chroma), rng.random()
    # Lighter where there is no room to be darker and the other way round; either where there is room for both.
    lighter = behind < step + 0.1 or (behind < 0.9 - step and up < 0.5)
    level = behind + step if lighter else behind - step
    hue = 36 * _HUE_ORDER[digit] + recipe.hue_spread * rng.standard_normal()
    tint = np.array([[[math.cos(math.radians(hue + phase)) * chroma]] for phase in (0, -120, 120)], np.float32)
    luminance *= np.float32(recipe.texture)
    luminance += np.float32(level - luminance.sum() / luminance.size)
    return np.clip(own + luminance + tint, 0, 1)
