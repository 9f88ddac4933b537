"""Anyone's captions: every format says the same, and what cannot be used is counted or named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from viladiff.data import registry
from viladiff.data.captions.files import match, read_captions, scripts
from viladiff.data.captions.simulated import PROMPTS

Make = Callable[..., Path]
Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(images: list[str], prompts: tuple[str, ...] = PROMPTS) -> Rows:
    return [{"image": name, "prompt": p, "text": f"{p} a thing, {name}"} for name in images for p in prompts]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".ndjson", ".parquet"])
def test_every_format_says_the_same(tmp_path: Path, suffix: str) -> None:
    rows = [{**row, "model": "blip2", "revision": "12"} for row in rows_of(["a", "b/ü"])]
    found = read_captions(write(tmp_path / f"c{suffix}", rows[::-1]))
    assert found.prompts == PROMPTS[::-1], "in the order in which they first occur"
    assert found.texts == {name: tuple(f"{p} a thing, {name}" for p in PROMPTS[::-1]) for name in ("b/ü", "a")}
    assert found.writers == ("blip2 12",) and found.empty == 0


def test_other_names_of_columns_and_several_captions_without_prompts(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_bytes(b"\xef\xbb\xbfFile_Name;x\n".replace(b";", b",") + b"a.jpg,1\n")
    with pytest.raises(ValueError, match=r"c\.csv: no column 'text' or 'caption' or 'captions' among 'File_Name', 'x'"):
        read_captions(path)
    path.write_bytes(b'\xef\xbb\xbfFile_Name,Caption\na.jpg, one\n a.jpg ,two\nb.jpg,"three,\n four"\n')
    assert read_captions(path).texts == {"a.jpg": ("one", "two"), "b.jpg": ("three, four",)}
    listed = write(tmp_path / "c.jsonl", [{"image_id": 7, "captions": ["x", "y"]}, {"image_id": 8, "captions": None}])
    assert read_captions(listed).texts == {"7": ("x", "y")} and read_captions(listed).empty == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.xlsx", b"", "captions come in files that end in .csv, .jsonl"),
        ("c.csv", b"", "no column 'image'"),
        ("c.csv", b"image,text\n", "holds no caption"),
        ("c.csv", b"image,text\na,\nb,  \n", "holds no caption; 2 rows have an empty text"),
        ("c.csv", b"imag,text\na,b\n", "no column 'image' or .*did you mean 'imag'"),
        ("c.csv", b"image;text\na;b\n", "among 'image;text'; columns are separated by ',', not ';'$"),
        ("c.csv", b"image\ttext\na\tb\n", "columns are separated by ',', not "),
        ("c.csv", b"image,text\na,one, two\n", "line 2: more fields than columns"),
        ("c.csv", b"image,text\n,one\n", "row 1: names no image"),
        ("c.csv", b"image,text\na,\xff\n", "is not UTF-8"),
        ("c.csv", b'image,text\na,"open\n', "cannot be read"),
        ("c.csv", b"image,prompt,text\na,p,one\na,p,two\n", "row 2: a second text for 'a' and the prompt 'p'"),
        ("c.jsonl", b'{"image": "a", "text": "b"}\n{"image"', "line 2: is not JSON"),
        ("c.jsonl", b"[1]\n", "line 1: is not an object"),
        ("c.jsonl", b'{"image": "a", "text": 3}\n', "row 1: the text is 3, not a text"),
        ("c.jsonl", b'{"image": "a", "text": "\\ud800"}\n', "row 1: .*no valid Unicode"),
        ("c.jsonl", b'{"image": "a"}\n', "no column 'text'"),
        ("c.parquet", b"PAR1 nothing", "is not a Parquet file"),
    ],
)
def test_what_is_no_table_of_captions(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_captions(tmp_path / name)
    assert name in str(error.value)
    with pytest.raises(ValueError, match="there is no such file"):
        read_captions(tmp_path / "other.csv")


def test_images_are_found_with_folders_suffixes_and_either_spelling(tmp_path: Path) -> None:
    given = ["JPEGImages/a.jpg", "./b.PNG", "c", "sub\\d.jpeg", "U\u0308bung.jpg"]
    file = read_captions(write(tmp_path / "c.jsonl", [{"image": name, "text": name} for name in given]))
    found = match(file, ["a", "b", "c"], ["sub/d", "Übung"])
    assert found.train == (("JPEGImages/a.jpg",), ("./b.PNG",), ("c",)) and all(found.val) and found.notes == ()
    with pytest.raises(ValueError, match=r"names the image 'a' in two ways, once as 'images/a\.jpg'"):
        match(read_captions(write(tmp_path / "d.jsonl", rows_of(["a", "images/a.jpg"]))), ["a"], [])


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    rows = [
        *rows_of(["a", "b"]),
        {"image": "c", "prompt": PROMPTS[0], "text": "A photo of кошка"},
        {"image": "c", "prompt": PROMPTS[1], "text": ""},
        {"image": "d", "prompt": PROMPTS[0], "text": "猫 と cat"},
        {"image": "lost", "prompt": PROMPTS[0], "text": "x"},
    ]
    found = match(read_captions(write(tmp_path / "c.csv", rows)), ["a", "b", "c", "e"], ["d", "f", "g"])
    assert found.train[2] == ("A photo of кошка",) and found.val[0] == ("猫 と cat",)
    assert found.train[3] == found.val[1] == ()
    said = "\n".join(found.notes)
    for part in (
        "1 of 4 training images have no caption, first 'e'",
        "2 of 3 validation images have no caption, first 'f'",
        "2 images lack one of the 2 prompts, first 'c'",
        "1 images are not in the data set and left out, first 'lost'",
        "1 empty captions are left out",
        "Cyrillic 1",
        "Cjk 1",
        "Hiragana 1",
    ):
        assert part in said, part
    assert found.source == "captions of a file (c.csv); 3 of 7 images have none"
    assert scripts("Ünï, 3 ﬁ!") == {"LATIN"}


def test_captions_of_other_images_altogether(tmp_path: Path) -> None:
    file = read_captions(write(tmp_path / "c.csv", rows_of(["photo_001", "photo_002"])))
    with pytest.raises(ValueError, match=r"none of its 2 images .* first 'photo_001', .* 'photo_011'; did you mean"):
        match(file, ["photo_011"], ["photo_012"])


@pytest.mark.parametrize("layout", ["folder", "voc"])
def test_a_data_set_takes_them(photo_folder: Make, tmp_path: Path, layout: str) -> None:
    root = photo_folder(14, layout, labelled=9, val=2)
    split = "92" if layout == "voc" else "labelled"
    plain = registry.load_dataset(layout, split, root=str(root))
    train, val = registry.image_ids(plain)
    path = write(tmp_path / "c.parquet", rows_of([*val, *train[:-1]]))
    found = registry.load_dataset(layout, split, root=str(root), captions=str(path))
    assert found.captions[0] == tuple(f"{p} a thing, {train[0]}" for p in PROMPTS) and found.captions[-1] == ()
    assert all(len(lines) == 2 for lines in found.val_captions)
    assert f"c.parquet: 1 of 12 training images have no caption, first {train[-1]!r}" in found.notes[-1]
    assert found.fingerprint != plain.fingerprint and found.caption_source.endswith("1 of 14 images have none")
    moved = write(tmp_path / "moved.csv", rows_of([*train[:-1], *val]))
    again = registry.load_dataset(layout, split, root=str(root), captions=str(moved))
    assert again.fingerprint == found.fingerprint, "what they say counts, not the file"
    held = registry.load_dataset(layout, split, root=str(root), captions=str(path), holdout=0.5, scored="holdout")
    assert held.val_captions and set(held.val_captions) < set(found.captions)


def test_an_embedded_data_set_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from viladiff.data.sources import digits

    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(digits, "VARIANTS", {"digits": digits.Variant(digits.DIGITS, 100, 4, 4)})
    path = write(tmp_path / "c.jsonl", rows_of(["train/99", "dev/0"]))
    found = registry.load_dataset("digits", "92", captions=str(path))
    assert sum(map(bool, found.captions)) == 1 and found.captions[99][0] == "A photo of a thing, train/99"
    assert found.val_captions[0] and "simulated" not in found.caption_source
