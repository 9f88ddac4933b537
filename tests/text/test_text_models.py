"""Pretrained text encoders against their libraries' own answers, banks that splits share, directories of no use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from test_caption_files import rows_of, write
from test_folder import small

from viladiff.cli import main
from viladiff.data import cache, registry
from viladiff.data.captions.simulated import GENERIC
from viladiff.data.dataset import Dataset
from viladiff.data.sources import digits
from viladiff.runs.config import RunConfig, override
from viladiff.runs.config import non_default_fields as changed
from viladiff.runs.record import strip_local_paths
from viladiff.text import embedding_bank as banks
from viladiff.text.base import LONGEST, unit
from viladiff.text.embedding_bank import encode_all, is_encoded, load_text, text_fingerprint, write_all
from viladiff.text.encoders import WordEncoder, build_text_encoder
from viladiff.text.pretrained import MINILM
from viladiff.training.fingerprints import fingerprints
from viladiff.training.trainer import fit

TEXTS = ("a photo of a cat", "dog", "a house in front of the tree and a dog and a cat")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("models")
    for make in (tiny_models.bert, tiny_models.clip, tiny_models.open_clip):
        make(top / make.__name__)
    return top


def open_(models: Path, name: str) -> Any:
    return build_text_encoder("open_clip" if name == "open_clip" else "transformers", (), str(models / name))


@pytest.mark.parametrize("name", ["bert", "clip", "open_clip"])
def test_vectors_are_those_of_the_library(models: Path, name: str) -> None:
    encoder = open_(models, name)
    tokens, mask, pooled = encoder.encode(TEXTS)
    assert tokens.dtype == pooled.dtype == np.float32 and tokens.shape == (*mask.shape, encoder.dim)
    assert mask.sum(1).tolist() == encoder.lengths(TEXTS).tolist() and not tokens[~mask].any()
    with torch.no_grad():
        for row, text in enumerate(TEXTS):
            expected, whole = LIBRARY[name](models / name, text)
            np.testing.assert_allclose(tokens[row, mask[row]], expected, atol=1e-5)
            np.testing.assert_allclose(pooled[row], unit(whole), atol=1e-5)
    backwards = encoder.encode(TEXTS[::-1])
    np.testing.assert_allclose(backwards[2][::-1], pooled, atol=1e-6)


def _bert(directory: Path, text: str) -> tuple[np.ndarray, np.ndarray]:
    from transformers import AutoModel, AutoTokenizer

    given = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")
    hidden = AutoModel.from_pretrained(directory).eval()(**given).last_hidden_state[0].numpy()
    return hidden, hidden.mean(0)


def _clip(directory: Path, text: str) -> tuple[np.ndarray, np.ndarray]:
    from transformers import AutoTokenizer, CLIPModel

    given = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")
    model = CLIPModel.from_pretrained(directory).eval()
    hidden = model.text_model(**given).last_hidden_state
    projected = model.text_projection(hidden)[0].numpy()
    return projected, projected[-1]


def _open_clip(directory: Path, text: str) -> tuple[np.ndarray, np.ndarray]:
    import open_clip

    model = open_clip.create_model(f"local-dir:{directory}").eval()
    ids = open_clip.get_tokenizer(f"local-dir:{directory}")([text])
    seen = []
    handle = model.ln_final.register_forward_hook(lambda module, inputs, output: seen.append(output))
    whole = model.encode_text(ids)[0].numpy()
    handle.remove()
    count = int(ids[0].argmax()) + 1
    return (seen[0][0, :count] @ model.text_projection).numpy(), whole


LIBRARY: dict[str, Callable[[Path, str], tuple[np.ndarray, np.ndarray]]] = {
    "bert": _bert,
    "clip": _clip,
    "open_clip": _open_clip,
}


def test_pooling_of_the_first_token_where_the_directory_says_so(models: Path, tmp_path: Path) -> None:
    place = shutil.copytree(models / "bert", tmp_path / "bert")
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    first, mean = (build_text_encoder("transformers", (), str(top)) for top in (place, models / "bert"))
    assert first.fingerprint != mean.fingerprint
    tokens, _, pooled = first.encode(TEXTS)
    np.testing.assert_allclose(pooled, unit(tokens[:, 0]), atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "open_clip", "words"])
def test_long_strange_and_foreign_texts(models: Path, name: str) -> None:
    long = " ".join(["cat"] * 200)
    odd = ("кошка 猫", "🙂 !?", "cat\u200bdog")
    encoder = WordEncoder([(long, *odd)]) if name == "words" else open_(models, name)
    tokens, mask, pooled = encoder.encode([long, *odd])
    assert mask[0].sum() == LONGEST == encoder.lengths([long])[0] and encoder.cut([long, *odd]) == 1
    assert np.isfinite(tokens).all() and np.isfinite(pooled).all()
    if name == "bert":
        assert encoder.unknown(["a cat", *odd]) >= 4 and encoder.unknown(["a cat"]) == 0
        last = encoder.tower.cut(encoder.tower.ids([long])[0])[-1]
        assert last == encoder.tower.ids(["cat"])[0][-1], "a text that was cut ends as a text"


def test_a_clip_reads_no_further_than_its_positions(models: Path) -> None:
    encoder = open_(models, "clip")
    assert encoder.lengths(["cat " * 50]).tolist() == [20] and encoder.cut(["cat " * 50, "cat"]) == 1
    assert np.isfinite(encoder.encode(["cat " * 50])[2]).all()


# Directories


def test_directories_of_no_use(models: Path, tmp_path: Path) -> None:
    def refused(name: str, place: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            build_text_encoder(name, (), str(place)).encode(["cat"])
        assert str(place) in str(error.value)

    refused("transformers", tmp_path / "none", "there is no such directory")
    (tmp_path / "empty").mkdir()
    refused("transformers", tmp_path / "empty", "has no config.json, so it is no directory of transformers")
    refused("transformers", models / "open_clip", "looks like one of open_clip: data.text_encoder=open_clip")
    refused("open_clip", models / "bert", "has no open_clip_config.json.*data.text_encoder=transformers")
    for kind in ("bert", "open_clip"):
        bare = shutil.copytree(models / kind, tmp_path / f"bare-{kind}")
        weights = next(bare.glob("*.safetensors"))
        refused_as = "open_clip" if kind == "open_clip" else "transformers"
        weights.write_bytes(weights.read_bytes()[:-100])
        refused(refused_as, bare, "cannot load it")
        weights.rename(bare / "pytorch_model.bin")
        refused(refused_as, bare, r"has no weights .*pytorch_model\.bin could carry code")
    mixed = shutil.copytree(models / "bert", tmp_path / "mixed")
    shutil.copy(models / "clip" / "model.safetensors", mixed)
    refused("transformers", mixed, "its weights are of another model: .* missing, first")
    broken = shutil.copytree(models / "open_clip", tmp_path / "broken")
    (broken / "open_clip_config.json").write_text("{")
    refused("open_clip", broken, "is not JSON")


def test_a_model_of_images_is_no_text_encoder(tmp_path: Path) -> None:
    place = tiny_models.blip(tmp_path / "blip")
    with pytest.raises(ValueError, match="a 'blip-2' is no text encoder"):
        build_text_encoder("transformers", (), str(place)).encode(["cat"])


def test_the_encoder_is_named_by_its_files(models: Path, tmp_path: Path) -> None:
    same = shutil.copytree(models / "bert", tmp_path / "elsewhere")
    one, two = (build_text_encoder("transformers", (), str(top)).fingerprint for top in (models / "bert", same))
    assert one == two
    tiny_models.bert(same, seed=1)
    assert build_text_encoder("transformers", (), str(same)).fingerprint != one


# Banks


def test_a_bank_is_written_in_pieces(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = open_(models, "bert")
    captions = tuple((TEXTS[i % 3], TEXTS[(i + 1) % 3]) if i % 4 else () for i in range(11))
    whole = encode_all(captions, encoder)
    monkeypatch.setattr(banks, "CHUNK", 3)
    heard: list[tuple[int, int]] = []
    write_all(tmp_path, captions, encoder, lambda done, of: heard.append((done, of)))
    for name, array in whole.items():
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), array)
    assert heard == [(3, 11), (6, 11), (9, 11), (11, 11)]


@pytest.fixture
def few_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digits, "VARIANTS", {"digits": digits.Variant(digits.DIGITS, 100, 10, 10)})
    return registry.load_dataset("digits", "92")


def test_captions_are_encoded_once_whatever_the_split_and_the_pairing(
    models: Path, few_digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = str(models / "bert"), []
    for control in ("own", "shuffled"):
        assert is_encoded(few_digits, "transformers", control, model=model) is (control != "own")
        named = text_fingerprint(few_digits, "transformers", control, model=model)
        train, val = load_text(few_digits, "transformers", control, model=model)
        assert train.fingerprint == named and (len(train), len(val)) == (100, 10)
        asked.append(train)
        monkeypatch.setattr(banks, "encode_all", None)
    own, shuffled = asked
    assert own.fingerprint != shuffled.fingerprint
    monkeypatch.undo()


def test_words_of_a_shared_bank_are_those_of_the_image(models: Path, few_digits: Dataset) -> None:
    encoder = build_text_encoder("transformers", (), str(models / "bert"))
    train, _ = load_text(few_digits, "transformers", model=str(models / "bert"))
    for place in (0, 57, 99):
        batch = train.batch([place])
        parts = [encoder.encode([text]) for text in few_digits.captions[place]]
        expected = np.concatenate([tokens[0] for tokens, _, _ in parts])
        np.testing.assert_allclose(batch.tokens[0][batch.mask[0]].numpy(), expected, atol=2e-3)
        np.testing.assert_allclose(train.pooled_of([place])[0], unit(sum(p[2][0] for p in parts)), atol=2e-3)
    generic, _ = load_text(few_digits, "transformers", "generic", model=str(models / "bert"))
    silent, _ = load_text(few_digits, "transformers", "none", model=str(models / "bert"))
    assert generic.tokens.shape[:2] == (1, encoder.lengths([GENERIC])[0]) and len(generic) == 100
    assert not silent.batch([3]).mask.any() and silent.dim == train.dim == 16


def test_what_an_encoder_loses_is_said(models: Path, few_digits: Dataset) -> None:
    train, _ = load_text(few_digits, "transformers", model=str(models / "bert"))
    assert train.unknown > 0 and f"does not know {train.unknown} words" in train.notes()[0]
    words, _ = load_text(few_digits)
    assert words.notes() == () and words.cut == 0


def test_large_files_are_known_by_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LARGE", 2**20)
    monkeypatch.setattr(cache, "PIECE", 2**8)
    place = (
        cache.open_or_make(tmp_path / "x", lambda draft: _save(draft, np.arange(2**18))) and tmp_path / "x" / "a.npy"
    )
    cache.open_checked(tmp_path / "x")
    data = bytearray(place.read_bytes())
    for at, message in ((len(data) - 1, "altered"), (100, "altered"), (None, "bytes found")):
        changed = data[:-1] if at is None else bytes([*data[:at], data[at] ^ 1, *data[at + 1 :]])
        place.write_bytes(changed)
        with pytest.raises(ValueError, match=message):
            cache.open_checked(tmp_path / "x")


def _save(draft: Path, array: np.ndarray) -> cache.Facts:
    np.save(draft / "a.npy", array)
    return {}


def test_words_are_read_from_the_file_and_not_through_the_map(
    models: Path, few_digits: Dataset, tmp_path: Path
) -> None:
    """Neither stays in memory then, nor costs a page fault for every 4 KB."""
    train, _ = load_text(few_digits, "transformers", model=str(models / "bert"))
    asked = [6, 5, 6, 0, -1]
    rows = asked if train.rows is None else train.rows[asked]
    found = train.batch(asked)
    assert torch.equal(found.tokens, torch.from_numpy(np.array(train.tokens)[rows].astype(np.float32)))
    assert found.tokens[0].abs().sum() > 0 and not torch.equal(found.tokens[0], found.tokens[1])
    assert torch.equal(found.mask, torch.from_numpy(np.array(train.mask)[rows]))
    with pytest.raises(IndexError):
        train.batch([len(train)])
    (place,) = (tmp_path / "cache" / "text").glob("*/tokens.npy")
    os.truncate(place, place.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"tokens\.npy: \d+ of \d+ bytes of row"):
        train.batch(range(len(train)))


# The small encoder that is a package


def test_minilm_stands_where_words_stand(few_digits: Dataset) -> None:
    pytest.importorskip(MINILM)
    encoder = build_text_encoder("minilm", ())
    words = build_text_encoder("words", few_digits.captions)
    texts = [
        "A photo of a three",
        "A picture of the number three",
        "A red car in the street",
        few_digits.captions[0][0],
    ]
    for one in (encoder, words):
        tokens, mask, pooled = one.encode(texts)
        assert tokens.shape == (4, mask.shape[1], one.dim) and pooled.shape == (4, one.dim)
        assert one.lengths(texts).tolist() == mask.sum(1).tolist()
    assert encoder.dim == 384
    close = encoder.encode(texts)[2]
    assert close[0] @ close[1] > close[0] @ close[2] + 0.2, "it knows what is alike"
    train, val = load_text(few_digits, "minilm")
    assert (len(train), len(val), train.dim) == (100, 10, 384) and train.unknown == 0


# From captions in a file to a trained network


@pytest.mark.parametrize(
    ("layout", "kind"), [("folder", "bert"), pytest.param("voc", "open_clip", marks=pytest.mark.slow)]
)
def test_from_captions_in_a_file_to_a_network(
    models: Path,
    photo_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    layout: str,
    kind: str,
) -> None:
    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path / "cache"))
    root = photo_folder(10, layout, labelled=3, val=2, sizes=(40, 70))
    names = sorted(path.stem for path in (root / ("JPEGImages" if layout == "voc" else "images")).iterdir())
    file = write(tmp_path / "c.parquet", [{**row, "model": "blip2-tiny"} for row in rows_of(names[:-1])])
    encoder = "open_clip" if kind == "open_clip" else "transformers"
    split = {"data.split": "92"} if layout == "voc" else {}
    base = small(root, tmp_path / "runs", "supervised")
    cfg = override(
        base if layout == "folder" else type(base)(),
        {
            **({} if layout == "folder" else _fields(base, layout)),
            **split,
            "method.name": "viladiff",
            "data.text_encoder": encoder,
            "runtime.captions": str(file),
            "runtime.text_model": str(models / kind),
        },
    )
    named = fingerprints(cfg)
    assert not list((tmp_path / "cache").rglob("tokens.npy")), "naming a run encodes nothing"
    fields = [f"data.dataset={layout}", f"runtime.data_root={root}", f"data.text_encoder={encoder}"]
    fields += [f"data.split={cfg.data.split}", "--captions", str(file), "--text-model", str(models / kind), "--quiet"]
    assert main.main(["embed", *fields, "--dry-run"]) == 0 and "encoded before   no" in capsys.readouterr().out
    assert main.main(["embed", *fields]) == 0
    assert "1 of 2 validation images have no caption" in capsys.readouterr().err
    monkeypatch.setattr(banks, "encode_all", None)
    result = fit(cfg)
    record = result.record
    assert record.fingerprints == named and record.miou is not None
    assert record.captions == "captions of blip2-tiny (c.parquet); 1 of 10 images have none"
    assert record.text_encoder == f"{encoder} {kind}" and "fusion" in record.scores["teacher"]
    assert str(tmp_path) not in strip_local_paths(record).model_dump_json()


def _fields(cfg: RunConfig, layout: str) -> dict[str, object]:
    return {**changed(cfg), "data.dataset": layout, "data.crop": 32}


def test_bad_captions_stop_a_run_before_it_starts(photo_folder: Callable[..., Path], tmp_path: Path) -> None:
    root = photo_folder(8, sizes=(40, 70))
    cfg = small(root, tmp_path / "runs", "viladiff", **{"runtime.captions": str(tmp_path / "none.csv")})
    with pytest.raises(ValueError, match=r"runtime\.captions = .*none\.csv'?: there is no such file"):
        fit(cfg)
    file = write(tmp_path / "c.csv", rows_of(["china_0000"]))
    with pytest.raises(ValueError, match=r"runtime\.text_model: must be set"):
        fit(override(cfg, {"runtime.captions": str(file)}))
    assert not (tmp_path / "runs").exists()
