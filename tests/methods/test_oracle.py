"""Oracle controls: where true labels replace pseudo-labels, and where they are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from viladiff.data import registry
from viladiff.data.batch import IGNORE, Views
from viladiff.data.dataset import Dataset
from viladiff.data.loader import BatchLoader
from viladiff.methods.common.oracle import OraclePseudoConfig, with_truth
from viladiff.runs.config import ConfigError, RunConfig, override

KINDS = ("everywhere", "edges", "teacher_edges", "wrong_and_unsure", "grid")


def maps() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Confidence, labels and truth (2, 8, 8): a square that the teacher shifts by one pixel, padding at the right."""
    truth = torch.zeros(2, 8, 8, dtype=torch.int64)
    truth[:, 2:6, 1:5] = 3
    labels = truth.roll(1, 2)
    truth[:, :, 7] = IGNORE
    confidence = torch.full((2, 8, 8), 0.5)
    confidence[1] = 0.99
    return confidence, labels, truth


def neighbours_differ(labels: np.ndarray) -> np.ndarray:
    """Pixels beside one of another class, padding aside, by loops."""
    found = np.zeros(labels.shape, bool)
    for (y, x), value in np.ndenumerate(labels):
        for other_y, other_x in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= other_y < labels.shape[0] and 0 <= other_x < labels.shape[1]:
                other = labels[other_y, other_x]
                found[y, x] |= value != other and IGNORE not in (value, other)
    return found


def expected_place(kind: str, confidence: np.ndarray, labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    if kind in ("everywhere", "grid"):
        return truth != IGNORE
    if kind == "wrong_and_unsure":
        return (truth != IGNORE) & (labels != truth) & (confidence < 0.95)
    edges = neighbours_differ(truth if kind == "edges" else np.where(truth == IGNORE, IGNORE, labels))
    cells = edges.reshape(4, 2, 4, 2).any((1, 3)).repeat(2, 0).repeat(2, 1)
    return cells & (truth != IGNORE)


@pytest.mark.parametrize("kind", KINDS)
def test_true_labels_stand_where_the_oracle_says_with_full_confidence(kind: str) -> None:
    confidence, labels, truth = maps()
    cfg = OraclePseudoConfig(oracle=kind)  # type: ignore[arg-type]
    got_confidence, got = with_truth(cfg, 0.0, confidence, labels, truth, stride=2)
    for i in range(2):
        place = expected_place(kind, confidence[i].numpy(), labels[i].numpy(), truth[i].numpy())
        assert np.array_equal(got_confidence[i].numpy(), np.where(place, 1.0, confidence[i].numpy()).astype(np.float32))
        if kind != "grid":
            assert np.array_equal(got[i].numpy(), np.where(place, truth[i].numpy(), labels[i].numpy()))
    if kind == "grid":
        assert not torch.equal(got, truth) and (got[:, :, :7] == truth[:, :, :7]).float().mean() > 0.7, (
            "corners are lost"
        )


def test_it_is_off_by_default_and_until_its_share_of_training() -> None:
    confidence, labels, truth = maps()
    for cfg, progress in ((OraclePseudoConfig(), 0.9), (OraclePseudoConfig(oracle="edges", oracle_from=0.5), 0.49)):
        got = with_truth(cfg, progress, confidence, labels, truth, 2)
        assert got[0] is confidence and got[1] is labels
    assert with_truth(OraclePseudoConfig(oracle="edges", oracle_from=0.5), 0.5, *maps(), 2)[1] is not labels


def test_masks_of_unlabelled_images_are_read_for_an_oracle_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = override(RunConfig(), {"data.batch_labelled": 2, "data.batch_unlabelled": 2})
    data = registry.load_dataset("digits", "183")
    device = torch.device("cpu")
    with_masks = BatchLoader(cfg, data, Views(strong=1, truth=True), None, 8, device).micro_batches(3)[0]
    monkeypatch.setattr(Dataset, "oracle_masks", None)
    without = BatchLoader(cfg, data, Views(strong=1), None, 8, device).micro_batches(3)[0]
    assert without.truth_u is None and torch.equal(without.weak[0], with_masks.weak[0]), "the same crops"
    truth = with_masks.truth_u
    assert truth is not None and truth.shape == (2, 48, 48) and torch.equal(truth == IGNORE, ~with_masks.valid)
    assert truth[truth != IGNORE].max() > 0


@pytest.mark.parametrize("method", ["semibaseline", "viladiff"])
def test_real_data_sets_refuse_it(method: str) -> None:
    changes = {"data.dataset": "voc", "method.name": method, "method.pseudo.oracle": "edges"}
    with pytest.raises(ConfigError, match=r"method\.pseudo\.oracle = 'edges': .* only digits and dense"):
        override(RunConfig(), changes)
    override(RunConfig(), {**changes, "data.dataset": "dense"})
