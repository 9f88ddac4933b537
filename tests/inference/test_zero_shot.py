"""What a frozen CLIP says by itself is scored beside the method that it labels for."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from method_kit import CLASSES, SIDE, make, make_batch
from torch import Tensor, nn

from viladiff.data.batch import EvalBatch
from viladiff.evaluation.pixel_counts import evaluate_network, to_scores
from viladiff.methods.semivl import SemiVl


class Dense(nn.Module):
    """Stands for CLIP: a linear map of a picture's mean colours, 8 pixels a place."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv2d(3, 12, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.map(images), dim=1)


def test_without_clip_there_is_nothing_to_score() -> None:
    assert "clip" not in make("semivl").eval_networks()


def test_each_place_has_the_class_of_the_concept_that_it_is_most_like() -> None:
    method = make("semivl")
    assert isinstance(method, SemiVl)
    torch.manual_seed(3)
    dense = Dense().requires_grad_(False)
    method._clip = (dense,)  # type: ignore[assignment]
    network, images = method.eval_networks()["clip"], make_batch().image
    maps = dense(images).numpy()
    concepts, owner = method.concepts.numpy(), method.owner.numpy()
    grid = np.full((4, CLASSES, SIDE // 8, SIDE // 8), -np.inf)
    for m, c in enumerate(owner):
        grid[:, c] = np.maximum(grid[:, c], 100 * np.einsum("bthw,t->bhw", maps, concepts[m]))
    wanted = F.interpolate(torch.from_numpy(grid).float(), (SIDE, SIDE), mode="bilinear", align_corners=False)
    found = network(images)["visual"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    score = to_scores(evaluate_network(network, [EvalBatch(images, wanted.argmax(1))], ("visual",), CLASSES))["visual"]
    assert score.values["miou"] == 1.0
    assert not {name for name in method.state_dict() if "clip" in name} and len(list(network.parameters())) == 2
