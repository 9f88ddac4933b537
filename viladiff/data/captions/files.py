"""Captions from a CSV, JSON-lines or Parquet file: read, matched to a data set's images, and counted.

Unusable entries that can be left out are counted, and the counts are in the run's notes and record. A file that is no
table of captions, or of entirely other images, is an error.
"""

from __future__ import annotations

import csv
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from viladiff.config.base import did_you_mean
from viladiff.core.messages import errors_name, names_file, shown
from viladiff.data.captions.simulated import Captions
from viladiff.data.files.index import image_id

COLUMNS = {
    "image": ("image", "image_id", "id", "file_name", "filename", "file"),
    "text": ("text", "caption", "captions"),
    "prompt": ("prompt",),
    "model": ("model",),
    "revision": ("revision",),
}
"""What a column may be called; the first two there must be."""
SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")


class CaptionRow(NamedTuple):
    """One caption of one image; without text where the captioner failed."""

    image: str
    text: str
    prompt: str = ""
    model: str = ""
    revision: str = ""


class CaptionFile(NamedTuple):
    """The content of a caption file."""

    name: str
    """Of the file, without its folder."""
    texts: dict[str, tuple[str, ...]]
    """By image as the file names it: one text per prompt, in the order in which the prompts first occur."""
    prompts: tuple[str, ...]
    """Empty where the file names none."""
    writers: tuple[str, ...]
    """Models with their revisions, as far as the file says."""
    empty: int
    """Rows without text."""


class Matched(NamedTuple):
    """The captions of a data set's images, by place, and what had to be left out."""

    train: Captions
    val: Captions
    source: str
    notes: tuple[str, ...]


@names_file
def read_captions(path: Path | str) -> CaptionFile:
    """Read a table of captions in the format of its suffix.

    Columns are named in ``COLUMNS``; rows of one image and no prompt are several captions of it, in their order. In
    JSON lines and Parquet a text may be a list of them. Raises ValueError that names the file, and the row where there
    is one: no such file, another format, a missing column, no text at all, two texts for one prompt.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"runtime.captions = {str(path)!r}: captions come in files that end in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"runtime.captions = {str(path)!r}: there is no such file")
    found: dict[str, dict[str, str]] = {}
    prompts: dict[str, None] = {}
    writers: dict[str, None] = {}
    empty = 0
    for number, row in enumerate(_rows(path), 1):
        where = f"{path}, row {number}"
        if not row.image:
            raise ValueError(f"{where}: names no image")
        if row.model:
            writers[f"{row.model} {row.revision}".strip()] = None
        if not row.text:
            empty += 1
            continue
        texts = found.setdefault(row.image, {})
        key = row.prompt or f"\0{len(texts)}"
        if texts.setdefault(key, row.text) != row.text:
            raise ValueError(f"{where}: a second text for {row.image!r} and the prompt {row.prompt!r}")
        if row.prompt:
            prompts[row.prompt] = None
    if not found:
        raise ValueError(f"{path}: holds no caption" + (f"; {empty} rows have an empty text" if empty else ""))
    order = {prompt: place for place, prompt in enumerate(prompts)}
    in_order = {
        image: tuple(lines[key] for key in sorted(lines, key=lambda key: order.get(key, len(order))))
        for image, lines in found.items()
    }
    return CaptionFile(path.name, in_order, tuple(prompts), tuple(writers), empty)


def match(file: CaptionFile, train: Sequence[str], val: Sequence[str]) -> Matched:
    """Return the captions of the images ``train`` and ``val``; empty for images without any.

    An image may be named with its suffix and with folders above it. Raises ValueError if the file has none of these
    images, or two names for one.
    """
    known = {*train, *val}
    texts: dict[str, tuple[str, ...]] = {}
    strange = []
    for given, lines in file.texts.items():
        image = given if given in known else next((name for name in _names(given) if name in known), None)
        if image is None:
            strange.append(given)
        elif image in texts:
            raise ValueError(f"{file.name}: names the image {image!r} in two ways, once as {given!r}")
        else:
            texts[image] = lines
    if not texts:
        raise ValueError(
            f"{file.name}: none of its {len(file.texts)} images is in the data set, which has {len(known)}; first "
            f"{strange[0]!r}, where the data set has {next(iter(train), '')!r}{did_you_mean(strange[0], known)}"
        )
    notes = [*_missing(file, texts, train, val), *_left_out(file, strange), *_foreign(file, texts)]
    writers = f"captions of {' and '.join(file.writers)}" if file.writers else "captions of a file"
    source = f"{writers} ({file.name})"
    lacking = len(known) - len(texts)
    source += f"; {lacking} of {len(known)} images have none" if lacking else ""
    captions, val_captions = (tuple(texts.get(image, ()) for image in part) for part in (train, val))
    return Matched(captions, val_captions, source, tuple(notes))


def clean(text: str) -> str:
    """Return one line in Unicode's composed form, without control characters. Raises ValueError for surrogates."""
    if text.isascii() and text.isprintable():  # as nearly all are
        return " ".join(text.split())
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{shown(text)} is no valid Unicode") from error
    spaced = "".join(" " if unicodedata.category(sign) == "Cc" else sign for sign in text)
    return unicodedata.normalize("NFC", " ".join(spaced.split()))


# Formats


def _rows(path: Path) -> Iterator[CaptionRow]:
    reader = {".csv": _from_csv, ".parquet": _from_parquet}.get(path.suffix.lower(), _from_jsonl)
    try:
        for number, (names, values) in enumerate(reader(path), 1):
            with errors_name(f"{path}, row {number}"):
                rows = _row(names, values)
            yield from rows
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text: {error}") from error
    except (OSError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _row(names: Mapping[str, str], values: Mapping[str, Any]) -> list[CaptionRow]:
    """Return one row, or one for each text of a list; ``names`` maps columns."""
    text = values[names["text"]]
    for what in ("image", "prompt", "model", "revision"):
        if what in names and not isinstance(given := values.get(names[what]), str | int | float | None):
            raise ValueError(f"the {what} is {shown(given)}, not a text")
    said = [_repeated(values.get(names[what])) if what in names else "" for what in ("prompt", "model", "revision")]
    image = values[names["image"]]
    rows = []
    for one in text if isinstance(text, list) else [text]:
        if one is not None and not isinstance(one, str):
            raise ValueError(f"the text is {shown(one)}, not a text")
        rows.append(CaptionRow("" if image is None else str(image).strip(), clean(one or ""), *said))
    return rows


@cache
def _repeated(value: object) -> str:
    """Clean a text that many rows share, once."""
    return "" if value is None else clean(str(value))


@cache
def _columns(there: tuple[str, ...]) -> dict[str, str]:
    """Map a file's columns to their meaning. Raises ValueError if image or text is missing."""
    lower = {name.strip().lower(): name for name in there}
    found = {what: next((lower[name] for name in known if name in lower), "") for what, known in COLUMNS.items()}
    for what in ("image", "text"):
        if not found[what]:
            has = ", ".join(map(repr, there)) or "none"
            allowed = " or ".join(map(repr, COLUMNS[what]))
            other = next((sign for sign in ";\t|" if len(there) == 1 and sign in there[0]), "")
            hint = (
                f"; columns are separated by ',', not {other!r}"
                if other
                else did_you_mean(COLUMNS[what][0], list(lower))
            )
            raise ValueError(f"no column {allowed} among {has}{hint}")
    return {what: name for what, name in found.items() if name}


def _from_csv(path: Path) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        names = _named(path, tuple(reader.fieldnames or ()))
        for values in reader:
            if None in values:  # its key for what is beyond the last column
                raise ValueError(
                    f"{path}, line {reader.line_num}: more fields than columns; a text with a comma must be in quotes"
                )
            yield names, values


def _from_jsonl(path: Path) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:  # also of an integer of thousands of digits
                raise ValueError(f"{path}, line {number}: is not JSON: {error}") from error
            if not isinstance(values, dict):
                raise ValueError(f"{path}, line {number}: is not an object with an image and a text")
            yield _named(path, tuple(values)), values


def _from_parquet(path: Path) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = _named(path, tuple(pq.read_schema(path).names))
        for batch in pq.ParquetFile(path).iter_batches(columns=list(names.values())):
            for values in batch.to_pylist():
                yield names, values
    except pa.ArrowException as error:
        raise ValueError(f"{path}: is not a Parquet file that can be read: {str(error).splitlines()[0]}") from error


def _named(path: Path, there: tuple[str, ...]) -> dict[str, str]:
    try:
        return _columns(there)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# Matching


def _names(given: str) -> Iterator[str]:
    """Yield the ids that a name may mean: itself, and itself without its first folders."""
    parts = given.replace("\\", "/").removeprefix("./").split("/")
    for start in range(len(parts)):
        yield image_id("/".join(parts[start:]))


def _missing(
    file: CaptionFile, texts: Mapping[str, tuple[str, ...]], train: Sequence[str], val: Sequence[str]
) -> Iterator[str]:
    for part, images in (("training", train), ("validation", val)):
        without = [image for image in images if image not in texts]
        if without:
            yield (
                f"{file.name}: {len(without)} of {len(images)} {part} images have no caption, first {without[0]!r}; "
                "for them the network reads its null token"
            )
    few = [image for image, lines in texts.items() if len(lines) < len(file.prompts)]
    if few:
        yield f"{file.name}: {len(few)} images lack one of the {len(file.prompts)} prompts, first {few[0]!r}"


def _left_out(file: CaptionFile, strange: Sequence[str]) -> Iterator[str]:
    if strange:
        yield f"{file.name}: {len(strange)} images are not in the data set and left out, first {strange[0]!r}"
    if file.empty:
        yield f"{file.name}: {file.empty} empty captions are left out"


def _foreign(file: CaptionFile, texts: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    odd = (text for lines in texts.values() for text in lines if not text.isascii())
    found = Counter(name for text in odd for name in scripts(text) - {"LATIN"})
    if found:
        listed = ", ".join(f"{name.title()} {count}" for name, count in found.most_common(5))
        yield (
            f"{file.name}: captions with letters of other scripts than Latin: {listed}; they are kept, but a text "
            "encoder that was not trained on them tells little of them apart"
        )


def scripts(text: str) -> set[str]:
    """Return the first words of the Unicode names of a text's letters, such as LATIN, CYRILLIC, CJK."""
    return {_script(sign) for sign in text if sign.isalpha()}


@cache
def _script(sign: str) -> str:
    name = unicodedata.name(sign, "UNNAMED").split()[0]
    return "LATIN" if name in ("FULLWIDTH", "FEMININE", "MASCULINE", "MODIFIER", "MICRO") else name
