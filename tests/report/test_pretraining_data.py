"""A page says what the models behind its numbers were trained on, and where that holds the very data set."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from record_kit import made

from viladiff.data.sources import DATASETS
from viladiff.report import provenance
from viladiff.report.sections import pretraining_data
from viladiff.runs.config import RunConfig, flatten, override
from viladiff.runs.record import RunRecord

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = made("supervised-92-0")


def like(dataset: str = "voc", **changes: object) -> RunRecord:
    fields = {"data.dataset": dataset, "data.captions": changes.pop("control", "own")}
    config = flatten(override(RunConfig(), fields))
    plain = {"encoder": "vit_base_patch16_224", "pretrained": "timm vit_base_patch16_224.augreg2_in21k_ft_in1k (x)"}
    return RunRecord(**{**EXAMPLE.model_dump(), **plain, "captions": "no captions", "config": config, **changes})


@pytest.mark.parametrize(
    ("dataset", "pretrained", "words"),
    [
        ("voc", "timm vit_base_patch14_dinov2.lvd142m", "LVD-142M: .*; of voc it saw training images, without masks"),
        ("coco", "timm vit_base_patch14_dinov2.lvd142m", "LVD-142M[^;]*$"),
        ("voc", "timm vit_base_patch16_224.augreg2_in21k_ft_in1k (timm/x)", "ImageNet-21k .* ImageNet-1k, with labels"),
        ("voc", "timm resnet18.a1_in1k (timm/resnet18.a1_in1k)", "ImageNet-1k, with labels"),
        ("voc", "timm vit_base_patch16_clip_224.openai", "400 million"),
        ("voc", "timm vit_base_patch16_clip_224.laion2b_ft_in1k", "LAION-2B"),
        ("voc", "timm vit_base_patch16_224.mae", "ImageNet-1k, without labels"),
        ("voc", "own.safetensors", "not known"),
        ("voc", "none", "nothing"),
        ("digits", "shipped", "built-in data sets, .* without masks"),
    ],
)
def test_image_encoders(dataset: str, pretrained: str, words: str) -> None:
    found = pretraining_data.pretraining_overlap(like(dataset, pretrained=pretrained, encoder="x"))
    assert list(found) == ["Image encoder was trained on"]
    assert re.search(words, found["Image encoder was trained on"])


def test_captioner_and_text_encoder() -> None:
    blip = "captions of Salesforce/blip2-opt-2.7b 0123 (c.parquet)"
    found = pretraining_data.pretraining_overlap(
        like("coco", captions=blip, text_encoder="open_clip CLIP-ViT-B-16-laion2B-s34B-b88K")
    )
    assert "of coco it saw training images with captions written by people" in found["Captioner was trained on"]
    assert found["Text encoder was trained on"].startswith("LAION-2B")
    found = pretraining_data.pretraining_overlap(like("voc", captions=blip, text_encoder="transformers mine"))
    assert "it saw" not in found["Captioner was trained on"] and found["Text encoder was trained on"] == "not known"
    found = pretraining_data.pretraining_overlap(
        like("coco", captions="captions of a file (c.csv)", text_encoder="minilm")
    )
    assert (
        found["Captioner was trained on"] == "not known" and "COCO's captions" in found["Text encoder was trained on"]
    )
    simulated = pretraining_data.pretraining_overlap(
        like("digits", captions="simulated captions (recall 0.85)", text_encoder="words")
    )
    assert "all masks, of unlabelled images too" in simulated["Captioner was trained on"]
    for control in ("none", "generic"):
        assert (
            len(pretraining_data.pretraining_overlap(like("digits", captions="simulated captions", control=control)))
            == 1
        )


def test_a_page_counts_the_runs_of_each() -> None:
    records = [like(pretrained=name) for name in ("none", "none", "timm resnet18.a1_in1k")]
    facts = {fact.name: str(fact) for fact in provenance.shared_facts(records)}
    assert facts["Image encoder was trained on"] == "nothing (2 runs); ImageNet-1k, with labels (1 run)"
    assert "Captioner was trained on" not in facts


def test_a_page_says_what_runs_said() -> None:
    noted = [like(), like(notes=["guided by words", "guided by words"]), like(notes=["guided by words", "3 cut"])]
    facts = {fact.name: str(fact) for fact in provenance.shared_facts(noted)}
    assert facts["Said by runs"] == "guided by words (2 runs); 3 cut (1 run)"
    assert (
        str(next(f for f in provenance.shared_facts(noted[:2]) if f.name == "Said by runs"))
        == "guided by words (1 run)"
    )
    assert not any(fact.mixed for fact in provenance.shared_facts(noted) if fact.name == "Said by runs")
    assert "Said by runs" not in {fact.name for fact in provenance.shared_facts(noted[:1])}


def test_the_table_names_our_data_sets_only() -> None:
    tables = (*pretraining_data.MODELS, *pretraining_data.CAPTIONERS, *pretraining_data.TEXT)
    assert {name for known in tables for name in known.seen} <= set(DATASETS)
