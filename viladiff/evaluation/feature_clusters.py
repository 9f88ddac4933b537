"""Clustering of image tokens' features by class, and by image: scores in feature space, drawn by t-SNE."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from viladiff.core import keyed_random
from viladiff.core.atomic import write_atomically
from viladiff.core.distributed import autocast, summed_over_workers
from viladiff.data.batch import EvalBatch
from viladiff.data.constants import IGNORE
from viladiff.data.loading.eval_loader import Size, decoding_threads, images_together, plan_batches, validation
from viladiff.evaluation.context import EvalContext
from viladiff.evaluation.protocols import nearest_multiple
from viladiff.methods.base import Method

TOKENS = 100
"""Of each class, at most; all classes have equally many."""
FEWEST = 5
"""A class with fewer tokens is left out."""
CLASSES = 12
"""At most; of more, those with the most tokens."""
PERPLEXITY = 30.0
"""Of t-SNE, or a third of the tokens where that is less."""


class TokenSample(NamedTuple):
    """Some tokens of the validation images, image by image; the same for every run on these images and this grid."""

    image: np.ndarray
    """(n,) int64 place of the image."""
    cell: np.ndarray
    """(n,) int64 place on the image's grid, row by row."""
    label: np.ndarray
    """(n,) int64 class that most pixels of the cell have."""


def cell_labels(mask: np.ndarray, patch: int) -> np.ndarray:
    """Return the most frequent class of each patch x patch cell of (H, W) labels, row by row; 255 is not counted.

    255 if a cell has nothing else; in a tie the lower class. Raises ValueError for sides that are no multiples.
    """
    height, width = mask.shape
    if height % patch or width % patch:
        raise ValueError(f"mask of {height} x {width} pixels: both sides must be multiples of {patch}")
    cells = mask.reshape(height // patch, patch, width // patch, patch).swapaxes(1, 2).reshape(-1, patch * patch)
    found = np.full(len(cells), IGNORE)
    most = np.zeros(len(cells), int)
    for label in np.setdiff1d(mask, [IGNORE]):
        count = (cells == label).sum(1)
        more = count > most
        found[more], most[more] = label, count[more]
    return found


def sample(labels: Sequence[np.ndarray]) -> TokenSample | None:
    """Sample equally many tokens of each class without replacement, with a fixed seed; None below two classes.

    ``labels`` has ``cell_labels`` of each image.
    """
    every = np.concatenate(labels) if labels else np.empty(0, int)
    image = np.repeat(np.arange(len(labels)), [len(one) for one in labels])
    cell = np.concatenate([np.arange(len(one)) for one in labels]) if labels else every
    classes, counts = np.unique(every[every != IGNORE], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:CLASSES]
    kept = {int(classes[i]): int(counts[i]) for i in order if counts[i] >= FEWEST}
    if len(kept) < 2:
        return None
    size = min(TOKENS, *kept.values())
    chosen = np.sort(np.concatenate([_drawn(np.flatnonzero(every == label), size, label) for label in kept]))
    return TokenSample(image[chosen], cell[chosen], every[chosen])


def _drawn(places: np.ndarray, size: int, label: int) -> np.ndarray:
    return keyed_random.numpy_generator("tokens", label).choice(places, size, replace=False)


def cluster_scores(features: np.ndarray, label: np.ndarray, image: np.ndarray) -> dict[str, float]:
    """Measure how well features (n, W) cluster, each scaled to length 1; Euclidean distances.

    ``silhouette``: mean silhouette coefficient by class, in [-1, 1], more is better. ``davies_bouldin``: the index by
    class, ≥ 0, less is better. ``image_silhouette``: by image in place of class, over tokens that are not alone in
    theirs. Undefined scores, as of one image or of equal features, are left out.
    """
    from sklearn.metrics import davies_bouldin_score, silhouette_score

    unit = _unit(features)
    if unit is None:
        return {}
    found = {}
    if 1 < len(np.unique(label)) < len(label):
        found["silhouette"] = float(silhouette_score(unit, label))
        found["davies_bouldin"] = float(davies_bouldin_score(unit, label))
    images, counts = np.unique(image, return_counts=True)
    together = np.isin(image, images[counts > 1])
    if 1 < len(np.unique(image[together])) < together.sum():
        found["image_silhouette"] = float(silhouette_score(unit[together], image[together]))
    return found


def tsne(features: np.ndarray) -> np.ndarray | None:
    """Return t-SNE of features (n, W), each scaled to length 1: (n, 2) float32; seed and start are fixed.

    None for features that are all equal or not finite: scikit-learn's implementation can end the whole process on them.
    """
    from sklearn.manifold import TSNE

    unit = _unit(features)
    if unit is None:
        return None
    return TSNE(perplexity=min(PERPLEXITY, len(unit) / 3), init="pca", random_state=0).fit_transform(unit)


def _unit(features: np.ndarray) -> np.ndarray | None:
    """Scale features (n, W) to length 1; None if they are all equal or not finite."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    return unit if np.isfinite(unit).all() and np.ptp(unit, axis=0).max() >= 1e-6 else None


class TokenLabels:
    """``cell_labels`` of all validation images, from masks that another pass over them has read."""

    def __init__(self, run: EvalContext) -> None:
        self.wanted = type(run.method).token_features is not Method.token_features
        self._patch = run.method.student.patch
        self._found: dict[str, torch.Tensor] = {}

    def add(self, batch: EvalBatch) -> None:
        """Look at the masks of a batch; nothing for a method without such features."""
        if not self.wanted:
            return
        for place, mask in zip(batch.places, batch.target.cpu().numpy(), strict=True):
            labels = cell_labels(_fitted(mask, self._patch), self._patch)
            self._found[str(place)] = torch.from_numpy(labels.astype(np.uint8))

    def gathered(self) -> list[np.ndarray]:
        """Return the labels of the images of all workers, in their order; all workers must call it."""
        if not self.wanted:
            return []
        found = summed_over_workers({"": self._found}).get("", {})
        return [found[place].numpy().astype(int) for place in sorted(found, key=int)]


@torch.inference_mode()
def collect_features(
    run: EvalContext, labels: Sequence[np.ndarray]
) -> tuple[TokenSample, dict[str, np.ndarray]] | None:
    """Sample tokens of a run's validation images and their features (n, W) float32 by stage; None without a sample.

    labels: of ``TokenLabels``. Images are read whole, at the nearest multiples of the patch, whatever the protocol.
    Workers share the batches, which are those of a single worker; all must call it.
    """
    chosen = sample(labels)
    if chosen is None:
        return None
    run.method.eval()
    dataset, patch = run.dataset, run.method.student.patch

    def together(size: Size) -> int:
        return 25 if dataset.uniform else images_together(size, dataset.num_classes, run.device)

    bank = run.val_bank if run.method.required_views().text else None
    planned = plan_batches(dataset, np.unique(chosen.image).tolist(), together)[run.rank :: run.world]
    found: dict[str, dict[str, torch.Tensor]] = {}
    for batch in validation(dataset, bank, run.device, planned, decoding_threads(run.cfg, run.device)):
        run.alive()
        pixels = batch.images
        fitted = tuple(nearest_multiple(side, patch) for side in pixels.shape[-2:])
        pixels = pixels if pixels.shape[-2:] == fitted else F.interpolate(pixels, fitted, mode="bilinear")
        with autocast(run.device, run.scoring):
            stages = run.method.token_features(pixels, batch.text)
        for k, image in enumerate(batch.places):
            cells = torch.from_numpy(chosen.cell[chosen.image == image]).to(run.device)
            for name, features in stages.items():
                found.setdefault(name, {})[str(image)] = features[k, cells].float().cpu()
    return chosen, {
        name: np.concatenate([parts[place].numpy() for place in sorted(parts, key=int)])
        for name, parts in summed_over_workers(found).items()
    }


def _fitted(mask: np.ndarray, patch: int) -> np.ndarray:
    """Resize the mask to the network's image: the nearest pixel at each position of the patch's nearest multiples."""
    rows, columns = (
        (2 * np.arange(fitted) + 1) * side // (2 * fitted)
        for side, fitted in ((side, nearest_multiple(side, patch)) for side in mask.shape)
    )
    return np.asarray(mask)[np.ix_(rows, columns)]


def measure_clusters(run: EvalContext, labels: Sequence[np.ndarray]) -> dict[str, float | int | None]:
    """Return the scores of the headline's clusters; write the features, and with pictures the t-SNE plane, to the run.

    Names of the stage before the texts are read end in ``_before``. ``tokens`` and ``token_classes`` count the sample.
    labels: of ``TokenLabels``. Empty for a method without such features, and on all workers but the first, who must
    call it all the same; scores are None without a sample.
    """
    if type(run.method).token_features is Method.token_features:
        return {}
    names = ("silhouette", "davies_bouldin", "image_silhouette")
    out: dict[str, float | int | None] = dict.fromkeys((*names, *(f"{name}_before" for name in names)))
    found = collect_features(run, labels)
    if run.rank:
        return {}
    if found is None:
        return {**out, "tokens": 0, "token_classes": 0}
    chosen, stages = found
    for stage, features in stages.items():
        ending = "" if stage == "after" else f"_{stage}"
        out |= {
            f"{name}{ending}": value for name, value in cluster_scores(features, chosen.label, chosen.image).items()
        }
    about: dict[str, np.ndarray] = {"image": chosen.image.astype(np.int32), "label": chosen.label.astype(np.uint8)}
    _save(run, "features.npz", {**about, **{name: x.astype(np.float16) for name, x in stages.items()}})
    if run.cfg.runtime.visualizations:
        planes = {name: tsne(x) for name, x in stages.items()}
        drawn = {name: places.astype(np.float16) for name, places in planes.items() if places is not None}
        _save(run, "plane.npz", {**about, **drawn})
    return {**out, "tokens": len(chosen.label), "token_classes": len(np.unique(chosen.label))}


def _save(run: EvalContext, name: str, arrays: dict[str, np.ndarray]) -> None:
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **arrays)
    write_atomically(run.directory / name, packed.getvalue())
