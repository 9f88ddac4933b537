"""FixMatch with image tags: what captions say of an image, for a method without any network for language (ours).

``fixmatch`` with ``method.tags`` (``methods.common.tags``) at a weight that was not tuned: 2 within the halved total.
CutMix boxes lie on the patch grid unless ``data.cutmix_grid`` says otherwise, as in FixMatch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from viladiff.data.batch import Views
from viladiff.methods.common.tags import TagsConfig
from viladiff.methods.fixmatch import FixMatch, FixMatchConfig


class FixMatchTagsWeight(TagsConfig):
    weight: float = Field(2.0, ge=0)
    """Factor of the tags' cross-entropy, where the supervised loss has 1."""


class FixMatchTagsConfig(FixMatchConfig):
    """FixMatch and tags from captions."""

    name: Literal["fixmatch_tags"] = "fixmatch_tags"  # type: ignore[assignment]
    tags: FixMatchTagsWeight = FixMatchTagsWeight()


class FixMatchTags(FixMatch):
    Config = FixMatchTagsConfig
    views = Views(strong=1, cutmix=True, tags=True)
    paper = None  # type: ignore[assignment]  # ours
    extra_state = "teacher, tag head"
