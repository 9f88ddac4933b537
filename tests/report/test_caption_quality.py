"""How reliable simulated captions are, which images have any, and tags of them in the mean teacher's loss."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from method_kit import STEP, make_batch, make_uneven

from viladiff.data import scenes
from viladiff.data.captions.simulated import SIMULATED, SYNONYMS, Captions, describe
from viladiff.data.captions.tags import caption_tags, dataset_tags
from viladiff.data.captions.words import split_words
from viladiff.data.dataset import Dataset
from viladiff.data.registry import dataset_spec, load_dataset
from viladiff.data.sources import digits
from viladiff.data.sources.digits import CLASS_NAMES
from viladiff.data.splits import classes_present
from viladiff.runs.config import ConfigError, RunConfig, non_default_fields, override
from viladiff.text.embedding_bank import load_text, uneven_notes
from viladiff.training.fingerprints import name_runs
from viladiff.training.trainer import fit

RATES = (0.3, 0.5, 0.7, 0.85, 1.0)


@pytest.fixture(scope="module", autouse=True)
def few(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A pool of 400 scenes and 20 of each other part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VILADIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(digits, "VARIANTS", {"digits": digits.Variant(digits.DIGITS, 400, 20, 20)})
        yield


def opened(**fields: object) -> Dataset:
    """The data set of a run; ``caption_recall=0.3`` for ``data.caption_recall``."""
    cfg = override(RunConfig(), {"data.split": "92", **{f"data.{name}": value for name, value in fields.items()}})
    return load_dataset(*dataset_spec(cfg))


def of_classes(captions: Captions) -> np.ndarray:
    """(N, 10) bool, classes that an image's texts name by either word."""
    words = [{word for text in texts for word in split_words(text)} for texts in captions]
    return np.array([[bool({name, SYNONYMS[name]} & one) for name in CLASS_NAMES[1:]] for one in words])


def test_todays_rates_are_the_defaults_and_change_no_run() -> None:
    plain, same = opened(), opened(caption_recall=0.85, caption_false=0.02, caption_synonyms=0.0, captions_on="both")
    assert plain.captions == same.captions and plain.fingerprint == same.fingerprint
    assert plain.caption_source == str(SIMULATED)
    behind = [scenes.SCENES[scenes.scene_kind("digits", "train", i)] for i in range(400)]
    shown = classes_present(plain.masks, 11)
    assert plain.captions[7] == describe(shown[7], behind[7], CLASS_NAMES, "digits", "train", 7)
    told = override(RunConfig(), {"data.caption_recall": 0.85, "data.captions_on": "both"})
    assert non_default_fields(told) == non_default_fields(RunConfig())


def test_each_rate_is_met_and_more_recall_mentions_all_that_less_does() -> None:
    truth = classes_present(opened().masks, 11)[:, 1:]
    before = np.zeros_like(truth)
    for rate in RATES:
        found = of_classes(opened(caption_recall=rate).captions)
        assert (found | ~before).all(), "a superset"
        for among, stated in ((truth, rate), (~truth, 0.02)):
            error = np.sqrt(stated * (1 - stated) / among.sum())
            assert abs(found[among].mean() - stated) <= 4 * error
        before = found
    few_false, many = (of_classes(opened(caption_false=rate).captions) for rate in (0.02, 0.1))
    assert (many | ~few_false).all() and np.array_equal(few_false[truth], many[truth])
    assert 0.07 < many[~truth].mean() < 0.13


def test_only_validation_and_pool_captions_follow_the_rates() -> None:
    plain, more = opened(), opened(caption_recall=1.0, caption_false=0.0)
    truth = classes_present(plain.val_masks, 11)[:, 1:]
    assert np.array_equal(of_classes(more.val_captions), truth)
    assert np.array_equal(of_classes(more.captions), classes_present(plain.masks, 11)[:, 1:])
    assert plain.fingerprint != more.fingerprint and np.array_equal(plain.labelled, more.labelled)
    assert "recall 1, false mentions 0" in more.caption_source


def test_synonyms_are_other_words_of_the_same_mentions() -> None:
    plain, half, all_of_them = (opened(caption_synonyms=share) for share in (0.0, 0.5, 1.0))
    assert np.array_equal(of_classes(plain.captions), of_classes(half.captions))
    by_name = [caption_tags(one.captions, CLASS_NAMES)[:, 1:] > 0 for one in (plain, half, all_of_them)]
    assert not by_name[2].any() and not (by_name[1] & ~by_name[0]).any()
    assert 0.45 < by_name[1].sum() / by_name[0].sum() < 0.55
    undo = {f"{other}": name for name, other in SYNONYMS.items()}
    back = [[" ".join(undo.get(word, word) for word in split_words(text)) for text in one] for one in half.captions]
    same = [[" ".join(split_words(text)) for text in one] for one in plain.captions]
    articles = {"a", "an"}
    strip = lambda texts: [[w for w in text.split() if w not in articles] for one in texts for text in one]  # noqa: E731
    assert strip(back) == strip(same), "nothing but the words differs"
    told = " ".join(text for one in all_of_them.captions for text in one)
    assert "an octet" in told and "an ace" in told and "a nought" in told and "a octet" not in told
    assert not set(SYNONYMS.values()) & set(CLASS_NAMES) and "synonyms 0.5" in half.caption_source


def test_a_class_without_a_synonym_is_named() -> None:
    source = replace(SIMULATED, synonyms=1.0)
    with pytest.raises(ValueError, match=r"data\.caption_synonyms = 1: no synonym is known of cat"):
        describe(np.array([True, True]), "flowers", ("background", "cat"), 0, source=source)


@pytest.mark.parametrize("on", ["labelled", "unlabelled"])
def test_the_other_images_have_no_words_as_under_none(on: str) -> None:
    data = opened()
    kept = data.labelled if on == "labelled" else data.unlabelled
    silent = np.setdiff1d(np.arange(400), kept)
    (whole, val), (some, same_val), (none, _) = (
        load_text(data, "words", control, on=images)  # type: ignore[arg-type]
        for control, images in (("own", "both"), ("own", on), ("none", "both"))
    )
    assert np.array_equal(some.tokens[kept], whole.tokens[kept][:, : some.tokens.shape[1]])
    assert whole.mask[kept].any(1).all() and not some.mask[silent].any() and not some.tokens[silent].any()
    assert np.array_equal(some.pooled[silent], none.pooled[silent])
    assert val.fingerprint == same_val.fingerprint, "validation images keep theirs"
    tags, own = dataset_tags(data, "own", on), dataset_tags(data)  # type: ignore[arg-type]
    assert (tags[silent] == -1).all() and np.array_equal(tags[kept], own[kept])
    shuffled = dataset_tags(data, "shuffled", on)  # type: ignore[arg-type]
    assert np.array_equal(shuffled[kept], dataset_tags(data, "shuffled")[kept])


def test_a_run_says_that_one_kind_of_image_alone_has_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = r"captions: 100% of the labelled and 0% of the unlabelled images have one, and .* set method.pseudo.source=v"
    fields: dict[str, object] = {
        "method.name": "viladiff",
        "method.mixe.enabled": False,
        "data.captions_on": "labelled",
    }
    fields |= {"data.split": "92", "model.pretrained": "none", "train.steps": 1, "eval.max_images": 2}
    fields |= {"runtime.runs_dir": str(tmp_path), "runtime.threads": 1, "runtime.progress": False}
    record = fit(override(RunConfig(), fields)).record
    assert re.search(f"note: {told}", capsys.readouterr().err) and re.match(told, record.notes[-1])
    for quiet in ({"data.captions_on": "both"}, {"method.pseudo.source": "visual"}, {"method.vila.enabled": False}):
        assert not fit(override(RunConfig(), fields | quiet)).record.notes
        assert "captions" not in capsys.readouterr().err
    data = opened()
    bank, _ = load_text(data, "words", "own", on="unlabelled")
    assert "captions: 0% of the labelled and 100% of" in uneven_notes(bank, data, True)[0]
    assert uneven_notes(bank, replace(data, unlabelled=data.unlabelled[:0]), True) == (), "all labelled"


def test_runs_are_named_by_which_images_have_words_and_by_whose_list() -> None:
    fields = [
        {"data.captions_on": on, "data.split": split}
        for split in ("92", "183")
        for on in ("both", "labelled", "unlabelled")
    ]
    found = name_runs(override(RunConfig(), one) for one in fields)
    assert len({one.run_id for one in found}) == 6
    assert found[0].fingerprints["text"] == found[3].fingerprints["text"], "the words of all images"
    assert len({one.fingerprints["text"] for one in found}) == 5
    alone = name_runs([override(RunConfig(), fields[4])])[0]
    assert alone.fingerprints == found[4].fingerprints, "not those of another list that was named before"


def test_fields_are_refused_where_they_mean_nothing(tmp_path: object) -> None:
    for changes, said in (
        ({"data.dataset": "voc", "data.caption_recall": 0.5}, "data.caption_recall: not a field of this data set"),
        ({"data.caption_recall": 1.5}, "data.caption_recall = 1.5: must be ≤ 1"),
        ({"data.captions_on": "labeled"}, "allowed: both, labelled, unlabelled; nearest|labelled"),
        ({"data.captions": "none", "data.captions_on": "labelled"}, "not with data.captions = 'none'"),
        ({"data.captions": "generic", "data.caption_recall": 0.5}, "data.caption_recall = 0.5: .* leaves out"),
        ({"runtime.captions": "c.csv", "data.caption_false": 0.1}, "data.caption_false = 0.1: of simulated captions"),
    ):
        with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
            override(RunConfig(), changes)
    override(RunConfig(), {"runtime.captions": "c.csv", "data.captions_on": "labelled"})
    override(RunConfig(), {"data.dataset": "folder", "data.captions_on": "unlabelled"})


def test_semibaseline_adds_the_tags_that_fixmatch_has() -> None:
    """Half of SemiBaseline's total with weight w is FixMatch's with the same weight, and both add w times the tags."""
    mine, halved = (make_uneven(name, **{"tags.weight": 0.6}) for name in ("semibaseline", "fixmatch"))
    plain = make_uneven("semibaseline")
    for method in (halved, plain):
        method.load_state_dict(mine.state_dict(), strict=False)
    batch = make_batch(views=mine.required_views())
    found, half, without = (method(batch, STEP) for method in (mine, halved, plain))
    assert found.terms["tags"] > 0
    torch.testing.assert_close(found.total, without.total + 0.6 * found.terms["tags"])
    torch.testing.assert_close(half.total, found.total / 2)
    assert halved.state_dict().keys() == mine.state_dict().keys() > plain.state_dict().keys()


def test_without_weight_there_is_no_head_and_no_term() -> None:
    plain, off = make_uneven("semibaseline"), make_uneven("semibaseline", **{"tags.weight": 0.0})
    assert plain.state_dict().keys() == off.state_dict().keys() and not off.required_views().tags
    batch = make_batch(views=plain.required_views())
    assert "tags" not in off(batch, STEP).terms and plain(batch, STEP).total.equal(off(batch, STEP).total)
    assert non_default_fields(
        override(RunConfig(), {"method.name": "semibaseline", "method.tags.weight": 0.0})
    ) == non_default_fields(override(RunConfig(), {"method.name": "semibaseline"}))
    with pytest.raises(ConfigError, match=r"now method\.tags\.weight|method\.tags\.weight"):
        override(RunConfig(), {"method.name": "fixmatch_tags", "method.tag_weight": 1.0})
