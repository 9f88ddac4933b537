"""Images held out of the labelled list: which, that nothing trains on them, and that runs without are as before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from viladiff.data.registry import load_dataset
from viladiff.data.splits import choose_holdout, hold_out
from viladiff.runs.config import ConfigError, RunConfig, override, run_id
from viladiff.training.fingerprints import name_runs
from viladiff.training.trainer import Trainer, fit

SHORT: dict[str, object] = {
    "train.steps": 2,
    "data.batch_labelled": 4,
    "eval.boundary": False,
    "runtime.threads": 1,
    "runtime.progress": False,
}
HELD: dict[str, object] = {**SHORT, "data.holdout": 0.25, "eval.split": "holdout"}


def test_names_of_runs_without_stay() -> None:
    plain = override(RunConfig(), {"train.steps": 2})
    assert run_id(plain) == run_id(override(plain, {"data.holdout": 0.0, "eval.split": "dev"}))
    others = [override(plain, {"data.holdout": 0.25}), override(plain, {"data.holdout": 0.25, "eval.split": "holdout"})]
    assert len({run_id(plain), *map(run_id, others)}) == 3
    assert len({one.run_id for one in name_runs([plain, *others])}) == 3
    assert len({one.fingerprints["data"] for one in name_runs([plain, *others])}) == 3


def test_held_out_images_are_in_no_role_and_keep_their_words() -> None:
    whole, held = load_dataset("digits", "183"), load_dataset("digits", "183", holdout=0.25, scored="holdout")
    out = set(whole.labelled) - set(held.labelled)
    assert len(out) == 46 == len(held.val_images) == len(held.val_masks) == len(held.val_captions)
    assert not out & set(held.unlabelled) and set(held.unlabelled) == set(whole.unlabelled)
    for place, image in enumerate(sorted(out, key=whole.labelled.tolist().index)):
        assert np.array_equal(held.val_images[place], whole.images[image])
        assert np.array_equal(held.val_masks[place], whole.target(image))
        assert held.val_captions[place] == whole.captions[image]
    with pytest.raises(ValueError, match="not among the 137 labelled"):
        held.target(min(out))


def test_without_scoring_the_reported_set_stays() -> None:
    whole, held = load_dataset("digits", "92"), load_dataset("digits", "92", holdout=0.25)
    assert len(held.labelled) == 69 and held.fingerprint != whole.fingerprint
    assert np.array_equal(held.val_images, whole.val_images)
    assert held.fingerprint != load_dataset("digits", "92", holdout=0.3).fingerprint


def test_every_class_stays_in_training_and_is_scored_where_two_show_it() -> None:
    for split in ("92", "183"):
        held = load_dataset("digits", split, holdout=0.25, scored="holdout")
        shown = {c for i in held.labelled for c in np.unique(held.target(i))}
        scored = {c for i in range(len(held.val_masks)) for c in np.unique(held.val_masks[i])}
        assert shown == scored == set(range(11))
    present = np.zeros((40, 3), bool)
    present[:, 0] = True
    present[7, 1] = True  # alone, so it must stay
    present[[11, 30], 2] = True
    for key in range(20):
        chosen = choose_holdout(present, 0.25, key)
        assert 7 not in chosen and len({11, 30} & set(chosen)) == 1 and len(chosen) == 10
    assert len(choose_holdout(np.ones((1, 1), bool), 0.5)) == 0


def test_a_list_too_short_is_refused() -> None:
    whole = load_dataset("digits", "92")
    object.__setattr__(whole, "labelled", whole.labelled[:1])
    with pytest.raises(ValueError, match=r"data.holdout = 0.5: none of the 1 labelled images of 'digits'"):
        hold_out(whole, 0.5, True)


def test_scoring_on_images_that_are_not_held_out_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"eval.split = 'holdout': .* data.holdout"):
        override(RunConfig(), {"eval.split": "holdout"})
    with pytest.raises(ConfigError, match=r"data.holdout = 1"):
        override(RunConfig(), {"data.holdout": 1})


def test_a_run_is_scored_on_them(tmp_path: Path) -> None:
    cfg = override(RunConfig(), {**HELD, "runtime.runs_dir": str(tmp_path)})
    record = fit(cfg).record
    assert record.scores[record.network][record.stream]["images"] == 46
    assert Trainer(cfg).name == record.run_id
