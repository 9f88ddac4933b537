"""Captions keep to their stated rates and name no places; words have vectors of their own; the bank keeps both."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from viladiff.config.sections import DataConfig
from viladiff.data.captions import simulated as cap
from viladiff.data.captions.simulated import GENERIC, SIMULATED, CaptionTable, describe, simulate
from viladiff.data.captions.words import split_words
from viladiff.data.scenes import SCENES, render
from viladiff.data.sources import digits
from viladiff.data.sources.digits import CLASS_NAMES
from viladiff.data.splits import classes_present
from viladiff.text.embedding_bank import build_bank, encode_all, load_text, open_bank
from viladiff.text.encoders import ENCODERS, WORDS_DIM, WordEncoder, build_text_encoder

IMAGES = 3000


@pytest.fixture(scope="module")
def present() -> np.ndarray:
    rng = np.random.default_rng(1)
    shown = np.zeros((IMAGES, 11), bool)
    for row in shown:
        row[rng.choice(np.arange(1, 11), rng.integers(1, 4), replace=False)] = True
    shown[:, 0] = True
    return shown


@pytest.fixture(scope="module")
def texts(present: np.ndarray) -> cap.Captions:
    return simulate(present, [SCENES[i % 2] for i in range(len(present))], CLASS_NAMES, "test")


@pytest.fixture(scope="module")
def words(texts: cap.Captions) -> WordEncoder:
    return WordEncoder(texts)


def named(text: str) -> np.ndarray:
    return np.isin(CLASS_NAMES, split_words(text))


def table(texts: cap.Captions) -> CaptionTable:
    return CaptionTable({f"train/{i}": lines for i, lines in enumerate(texts)}, str(SIMULATED))


# Captions


def test_recall_and_false_mentions_are_as_stated(present: np.ndarray, texts: cap.Captions) -> None:
    noticed = np.stack([named(contains) for _, contains in texts])[:, 1:]
    truth = present[:, 1:]
    for rate, stated, trials in (
        (noticed[truth].mean(), 0.85, truth.sum()),
        (noticed[~truth].mean(), 0.02, (~truth).sum()),
    ):
        error = np.sqrt(stated * (1 - stated) / trials)
        assert abs(rate - stated) < 4 * error
    assert (SIMULATED.recall, SIMULATED.false_mention) == (0.85, 0.02)
    assert str(SIMULATED) == "simulated captions (recall 0.85, false mentions 0.02 a class)"


def test_both_prompts_tell_of_the_same_things(texts: cap.Captions) -> None:
    for photo_of, contains in texts:
        few, every = named(photo_of), named(contains)
        assert photo_of.startswith("A photo of ") and contains.startswith("A photo contains ")
        assert few.sum() == min(2, every.sum()) and not (few & ~every).any()


def test_a_caption_depends_on_the_set_of_classes_and_not_on_places() -> None:
    masks = np.stack([render(digits.DENSE, "dense", "train", i).mask for i in range(6)])
    moved = np.roll(masks, (17, 30), (1, 2))[:, ::-1, ::-1]
    before, after = classes_present(masks, 11), classes_present(moved, 11)
    assert np.array_equal(before, after)
    scenes = ["flowers"] * 6
    assert simulate(before, scenes, CLASS_NAMES, "k") == simulate(after, scenes, CLASS_NAMES, "k")
    assert simulate(before, scenes, CLASS_NAMES, "k") != simulate(before, scenes, CLASS_NAMES, "other key")


def test_no_word_tells_place_size_number_or_order(texts: cap.Captions) -> None:
    vocabulary = {word for lines in texts for text in lines for word in split_words(text)}
    frame = {"a", "an", "photo", "of", "contains", "and", "in", "front", "flowers", "building", "something"}
    assert vocabulary == frame | set(CLASS_NAMES[1:])


def test_the_order_of_mention_is_random() -> None:
    both = np.isin(CLASS_NAMES, ["three", "seven"])
    lines = [describe(both, "flowers", CLASS_NAMES, i) for i in range(600)]
    for prompt in (0, 1):
        found = [re.findall("three|seven", line[prompt]) for line in lines]
        first = [order[0] == "three" for order in found if set(order) == {"three", "seven"}]
        assert len(first) > 350 and abs(np.mean(first) - 0.5) < 0.1


def test_wording() -> None:
    sure = cap.CaptionSource("sure", 1.0, 0.0)
    shown = np.isin(CLASS_NAMES, ["background", "three", "eight", "one"])
    photo_of, contains = describe(shown, "building", CLASS_NAMES, 0, source=sure)
    assert re.fullmatch(r"A photo of an? \w+ and an? \w+ in front of a building", photo_of)
    assert re.fullmatch(r"A photo contains an? \w+, an? \w+ and an? \w+", contains)
    assert "an eight" in contains and "a three" in contains and "background" not in contains
    nothing = describe(np.zeros(11, bool), "flowers", CLASS_NAMES, 0, source=sure)
    assert nothing == ("A photo of something", "A photo contains something")


def test_the_table_is_named_by_ids_and_texts(texts: cap.Captions) -> None:
    own = table(texts)
    assert own["train/3"] == texts[3] and len(own) == IMAGES and own.hash() == table(texts).hash()
    swapped = table((texts[1], texts[0], *texts[2:]))
    assert texts[0] != texts[1] and swapped.hash() != own.hash()


def test_controls() -> None:
    own = table(tuple((f"text {i}",) for i in range(50)))
    shuffled = own.variant("shuffled", seed=3)
    assert sorted(shuffled.values()) == sorted(own.values())
    assert all(shuffled[image] != own[image] for image in own), "no image keeps its own caption"
    assert shuffled.hash() == own.variant("shuffled", seed=3).hash() != own.variant("shuffled", seed=4).hash()
    assert set(own.variant("generic").values()) == {(GENERIC,)}
    assert set(own.variant("none").values()) == {()} and len(own.variant("none")) == 50
    assert own.variant("own") is own
    with pytest.raises(ValueError, match="allowed: own, shuffled, generic, none"):
        own.variant("shuffeld")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two images"):
        table((("one",),)).variant("shuffled")


# Words


def test_words_stay_apart(words: WordEncoder) -> None:
    assert words.vectors.shape == (len(words.vocabulary), WORDS_DIM) and words.vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(words.vectors, axis=1), 1, atol=1e-5)
    cosine = words.vectors @ words.vectors.T
    np.fill_diagonal(cosine, 0)
    classes = [words.vocabulary[name] for name in CLASS_NAMES[1:]]
    assert np.abs(cosine[np.ix_(classes, classes)]).max() < 0.9
    assert np.abs(cosine).max() < 0.999, "not even the words of every caption coincide"


def test_words_that_share_captions_are_closer() -> None:
    encoder = WordEncoder([("cat sofa",)] * 30 + [("car street",)] * 30 + [("cat street",)] * 2)
    cat, sofa, car = (encoder.vectors[encoder.vocabulary[word]] for word in ("cat", "sofa", "car"))
    assert cat @ sofa > cat @ car + 0.2


def test_words_are_deterministic_and_indifferent_to_the_order_of_images(
    texts: cap.Captions, words: WordEncoder
) -> None:
    again, reversed_ = WordEncoder(texts), WordEncoder(texts[::-1])
    assert again.fingerprint == words.fingerprint == reversed_.fingerprint
    np.testing.assert_array_equal(again.vectors, words.vectors)
    np.testing.assert_allclose(reversed_.vectors, words.vectors, atol=1e-4)
    assert WordEncoder(texts[:-500]).fingerprint != words.fingerprint


def test_more_words_than_dimensions() -> None:
    encoder = WordEncoder([(f"w{i} w{(i + 1) % 90}",) for i in range(90)])
    assert encoder.vectors.shape == (90, WORDS_DIM)
    np.testing.assert_allclose(np.linalg.norm(encoder.vectors, axis=1), 1, atol=1e-5)


def test_encoding(words: WordEncoder) -> None:
    tokens, mask, pooled = words.encode(["A three, and an ZEBRA!", "", "Seven"])
    assert tokens.shape == (3, 4, WORDS_DIM) and tokens.dtype == pooled.dtype == np.float32
    assert mask.tolist() == [[True] * 4 if i == 0 else [i == 2, False, False, False] for i in range(3)]
    np.testing.assert_array_equal(tokens[0, 1], words.vectors[words.vocabulary["three"]])
    assert not tokens[~mask].any() and not pooled[1].any()
    np.testing.assert_allclose(pooled[2], tokens[2, 0], atol=1e-6)
    assert words.unknown(["A zebra and a three", "zebra"]) == 2


def test_encoders_by_name(texts: cap.Captions) -> None:
    assert build_text_encoder("words", texts).name == "words"
    assert set(get_args(DataConfig.model_fields["text_encoder"].annotation)) == set(ENCODERS)
    with pytest.raises(ValueError, match=r"runtime\.text_model: must be set"):
        build_text_encoder("open_clip", texts)
    with pytest.raises(ValueError, match="did you mean 'words'"):
        build_text_encoder("word", texts)
    with pytest.raises(ValueError, match="no word to learn from"):
        build_text_encoder("words", [(), ("!",)])


# The bank


def test_the_bank_gives_back_what_was_encoded(texts: cap.Captions, words: WordEncoder, tmp_path: Path) -> None:
    few = (*texts[:20], (), ("zebra",), (texts[0][0],))
    bank = build_bank(table(few), words, tmp_path)
    assert len(bank) == 23 and bank.dim == WORDS_DIM and bank.tokens.dtype == np.float16
    assert bank.unknown == 1 and bank.source == str(SIMULATED) and bank.encoder == "words"
    batch = bank.batch([22, 5, 20, 21])
    assert batch.tokens.dtype == torch.float32 and batch.mask.dtype == torch.bool
    assert not batch.mask[2:].any() and not bank.pooled[20].any()
    for row, lines in ((0, few[22]), (1, few[5])):
        expected = np.concatenate([words.encode([text])[0][0] for text in lines])
        found = batch.tokens[row][batch.mask[row]].numpy()
        np.testing.assert_allclose(found, expected, atol=1e-3)
        assert not batch.tokens[row][~batch.mask[row]].any()
    np.testing.assert_allclose(np.linalg.norm(bank.pooled[:20].astype(float), axis=1), 1, atol=2e-3)


def test_the_bank_is_made_once_and_checked(
    texts: cap.Captions, words: WordEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = build_bank(table(texts[:10]), words, tmp_path)
    assert build_bank(table(texts[:11]), words, tmp_path).fingerprint != own.fingerprint
    assert build_bank(table(texts[:10]), WordEncoder(texts[:99]), tmp_path).fingerprint != own.fingerprint
    monkeypatch.setattr("viladiff.text.embedding_bank.encode_all", None)
    again = build_bank(table(texts[:10]), words, tmp_path)
    np.testing.assert_array_equal(again.tokens, own.tokens)
    path = tmp_path / own.fingerprint / "pooled.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"pooled\.npy: \d+ bytes found, \d+ expected"):
        open_bank(tmp_path / own.fingerprint)


def test_a_bank_outlives_its_file_and_processes_share_it(
    texts: cap.Captions, words: WordEncoder, tmp_path: Path
) -> None:
    bank = build_bank(CaptionTable({str(i): lines for i, lines in enumerate(texts[:40])}, "us"), words, tmp_path)
    expected = torch.from_numpy(np.array(bank.tokens)).float()
    assert torch.equal(bank.batch([-1, 0, -40]).tokens, expected[[-1, 0, 0]])
    assert bank.batch([]).tokens.shape == (0, *expected.shape[1:])
    for place in (40, -41):
        with pytest.raises(IndexError):
            bank.batch([place])
    (file,) = tmp_path.glob("*/tokens.npy")
    file.unlink()
    child = os.fork()
    if not child:  # reads other rows at the same time, of the same open file
        same = all(torch.equal(bank.batch([k % 40]).tokens[0], expected[k % 40]) for k in range(0, 400, 3))
        os._exit(0 if same else 1)
    assert all(torch.equal(bank.batch([k % 40]).tokens[0], expected[k % 40]) for k in range(400))
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(ValueError, match=re.escape(str(file.parent))):
        open_bank(file.parent)


def test_no_text_at_all(words: WordEncoder) -> None:
    arrays = encode_all(((), ()), words)
    assert arrays["tokens"].shape == (2, 1, WORDS_DIM) and not arrays["mask"].any()


def test_text_of_a_data_set_under_each_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from viladiff.data import registry

    monkeypatch.setenv("VILADIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(digits, "VARIANTS", {"digits": digits.Variant(digits.DIGITS, 100, 10, 10)})
    data = registry.load_dataset("digits", "92")
    pairs = {control: load_text(data, "words", control) for control in ("own", "shuffled", "generic", "none")}
    assert all((len(train), len(val)) == (100, 10) for train, val in pairs.values())
    assert len({bank.fingerprint for pair in pairs.values() for bank in pair}) == 8
    assert not any(bank.mask.any() for bank in pairs["none"])
    for bank in pairs["generic"]:
        assert (bank.tokens == bank.tokens[0]).all() and bank.mask[0].any()
    own, shuffled = pairs["own"][0], pairs["shuffled"][0]
    assert not np.array_equal(own.tokens, shuffled.tokens)
    assert sorted(own.pooled.sum(1).tolist()) == sorted(shuffled.pooled.sum(1).tolist())
