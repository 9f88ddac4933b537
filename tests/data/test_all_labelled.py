"""The split under which every training image that has a mask is labelled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from viladiff.data.all_labelled import base_split
from viladiff.data.registry import load_dataset
from viladiff.data.sources import DATASETS
from viladiff.data.sources.base import ALL
from viladiff.data.sources.digits import POOL
from viladiff.runs.config import RunConfig, override


def test_every_scene_of_the_embedded_data_is_labelled_once() -> None:
    few, every = load_dataset("digits", "1464"), load_dataset("digits", ALL)
    assert sorted(every.labelled.tolist()) == list(range(POOL)) and len(every.unlabelled) == 0
    assert every.labelled[:1464].tolist() == few.labelled.tolist() and every.fingerprint != few.fingerprint
    assert every.target(int(few.unlabelled[0])).shape == few.masks[0].shape
    held = load_dataset("digits", ALL, holdout=0.25, scored="holdout")
    assert len(held.labelled) + len(held.val_images) == POOL and len(held.val_images) == POOL // 4


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "folder"])
def test_every_published_data_set_has_it_in_place_of_a_list_that_exists(name: str) -> None:
    source, fields_of = DATASETS[name], DATASETS[name].config.model_fields
    lists = get_args(fields_of["split"].annotation)
    assert lists.count(ALL) == 1
    for family in get_args(getattr(fields_of.get("split_family"), "annotation", None)) or ("",):
        fields = {"data.split_family": family} if family else {}
        override(RunConfig(), {"data.dataset": name, "data.split": ALL, **fields})
        base = base_split(source, ALL, family)
        assert base in lists and base != ALL
        override(RunConfig(), {"data.dataset": name, "data.split": base, **fields})
        assert base_split(source, base, family) == base
    assert base_split(DATASETS["folder"], ALL) == ALL, "a list of one's own may have that name"


def test_of_images_in_files_those_that_have_a_mask(photo_folder: Callable[..., Path]) -> None:
    root = photo_folder(12, "voc", split="1464", unlabelled_masks=True)
    few, every = (load_dataset("voc", split, root=str(root)) for split in ("1464", ALL))
    assert (len(few.labelled), len(few.unlabelled)) == (3, 6)
    assert (len(every.labelled), len(every.unlabelled), len(every.val_images)) == (9, 0, 3)
    assert every.split_name == "all 9 of 9 training images that have a mask"
    assert every.files is not None and few.files is not None and every.files.ids == few.files.ids
    labels = np.unique(np.concatenate([every.target(i).ravel() for i in range(9)]))
    assert len(labels) > 1
    gone = few.files.masks[int(few.unlabelled[1])]
    gone.unlink()
    fewer = load_dataset("voc", ALL, root=str(root))
    assert len(fewer.labelled) == 8 and fewer.fingerprint != every.fingerprint
    with pytest.raises(ValueError, match="not among the 8 labelled"):
        fewer.target(int(few.unlabelled[1]))
