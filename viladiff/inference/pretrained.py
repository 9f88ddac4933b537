"""A network with all that it needs, from a run, a model folder or a model hub, and to one again.

>>> import viladiff
>>> segmenter = viladiff.Segmenter.from_pretrained("model")  # doctest: +SKIP
>>> labels, confidence = segmenter.predict("holiday.jpg")  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from viladiff.core.atomic import write_atomically
from viladiff.evaluation.complexity import cost_facts, costs
from viladiff.inference.card import CARD, EXPORTED, METRICS_FILE, card, changed_card, metrics
from viladiff.inference.load import load_method, load_run, text_dim
from viladiff.inference.model_folder import (
    CLASSES,
    CONFIG,
    MANIFEST,
    PREPROCESSING,
    WEIGHTS,
    ModelFolder,
    read_folder,
    write_folder,
)
from viladiff.inference.predict import Model
from viladiff.runs.config import override
from viladiff.runs.record import load_record, strip_local_paths
from viladiff.training.launch import select_device

FETCHED = [WEIGHTS, CONFIG, PREPROCESSING, CLASSES, MANIFEST, CARD, METRICS_FILE]
"""What is fetched from a model hub, and no other file."""


@dataclass(eq=False)
class Segmenter(Model, ModelHubMixin, library_name="viladiff", pipeline_tag="image-segmentation"):
    """A network that predicts, saves itself as a model folder, and is pushed to a model hub.

    ``from_pretrained`` makes it, and so does ``load_model``.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    """The run's configuration by dotted path, without what belongs to a machine."""
    source: Path | None = None
    """The run's directory or the model folder that it was read from."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: str = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Self:
        """Load a model folder, the directory of a finished run, or a model folder of a hub by its id, ``USER/NAME``.

        A folder of this machine goes before an id of the same name. device: auto, cpu or cuda; the other arguments are
        those of ``huggingface_hub.snapshot_download``. No file that can carry code is fetched or read. Raises
        ValueError as ``load_model``, and where a hub has no such folder or cannot be reached.
        """
        place = Path(pretrained_model_name_or_path).expanduser()
        name = str(pretrained_model_name_or_path)
        if not place.exists() and not place.is_absolute() and name.count("/") == 1 and not name.startswith((".", "~")):
            try:
                found = snapshot_download(
                    name,
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    force_download=force_download,
                    allow_patterns=FETCHED,
                )
            except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
                reason = " ".join(str(error).split("\n")[0].split())
                raise ValueError(f"{name}: no such folder here, and no model hub gives it: {reason}") from error
            place = Path(found)
        return cls(**_loaded(place, device))

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: object = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the model folder, with the arguments of ``ModelHubMixin.save_pretrained``.

        All is made before the first file is written, and files of an earlier folder there are replaced. ``config`` is
        the hub's own and not used. Raises ValueError as ``write``, for a place that is a file or a run's directory, and
        for ``model_card_kwargs``: the card is made of the run's record.
        """
        place = Path(save_directory).expanduser()
        if place.is_file():
            raise ValueError(f"{save_directory}: a file; a model folder is a directory, so name another place")
        if (place / "record.json").is_file():
            raise ValueError(f"{save_directory}: the directory of a run, which a model folder would hide; name another")
        if model_card_kwargs:
            raise ValueError("model_card_kwargs: the card is made of the run's record; edit README.md in the folder")
        self.write(place)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or place.name, **push_to_hub_kwargs)

    def write(self, into: Path, facts: dict[str, str] | None = None, exported: Sequence[str] = ()) -> None:
        """Write the files of a model folder into a directory, which is made if it is missing.

        facts: what the card says of the cost of an image, ``cost()`` if None; exported: names of further files that are
        there already. Raises ValueError where ``source`` is None or gone, and then nothing is written.
        """
        if self.source is None or not self.source.is_dir():
            gone = "it was made from a network alone" if self.source is None else f"{self.source} is gone"
            raise ValueError(f"nothing to write a model card from: {gone}")
        people = self._for_people(self.source, facts, exported)
        into.mkdir(parents=True, exist_ok=True)
        for name in {METRICS_FILE, *EXPORTED} - {*people, *exported}:
            (into / name).unlink(missing_ok=True)  # of another network that was here
        write_folder(into, ModelFolder(self.network, self.fields, self.class_names, self.palette, self.precision))
        for name, content in people.items():
            write_atomically(into / name, content)

    def _for_people(self, source: Path, facts: dict[str, str] | None, exported: Sequence[str]) -> dict[str, bytes]:
        """Return the card, the scores and exported networks, by name of their files.

        The card is made from the run's record. Where ``source`` is itself a model folder, its files are copied, unless
        the weights are others now: then the card says so, and there is nothing else.
        """
        kept = _loaded(source, "cpu")["network"].state_dict()
        if not all(torch.equal(value.cpu(), kept[name]) for name, value in self.network.state_dict().items()):
            return {CARD: changed_card(self, str(self.fields["method.name"])).encode()}
        if (source / "record.json").is_file():
            record = strip_local_paths(load_record(source / "record.json"))
            text = card(self, record, self.cost() if facts is None else facts, exported)
            return {CARD: text.encode(), METRICS_FILE: metrics(record)}
        found = [source / name for name in (CARD, METRICS_FILE, *EXPORTED) if (source / name).is_file()]
        return {path.name: path.read_bytes() for path in found}

    def cost(self) -> dict[str, str]:
        """Return parameters, arithmetic and time of an image of a crop's size, a fact a line."""
        found = costs(self.network, self.crop, text_dim(self.network.state_dict()))
        return cost_facts(found, self.crop, self.device)


def load_model(path: Path | str, device: str = "auto") -> Segmenter:
    """Load the network of a finished run's directory, or of a folder that ``viladiff export`` made.

    No data set is opened, and no file is unpickled but a run's own checkpoint, as tensors alone. device: auto, cpu or
    cuda. Raises ValueError that names the file if there is neither, or one is damaged or does not fit.
    """
    return Segmenter(**_loaded(Path(path), device))


def _loaded(folder: Path, device: str) -> dict[str, Any]:
    """Return the fields of the segmenter in a folder."""
    if (folder / WEIGHTS).is_file():
        contents = read_folder(folder)
    elif (folder / "record.json").is_file():
        run = load_run(folder)
        config = strip_local_paths(run.record).config
        fields = {path: value for path, value in config.items() if not path.startswith("runtime.")}
        network, palette = load_method(run).eval_network(), run.record.palette
        names, colours = tuple(run.record.class_names), tuple(palette) if palette else None
        contents = ModelFolder(network, fields, names, colours, run.record.scoring)
    else:
        wrong = "there is no such directory" if not folder.is_dir() else f"no {WEIGHTS} and no record.json in it"
        raise ValueError(f"{folder}: {wrong}; give a model folder (viladiff export) or the directory of a finished run")
    cfg = contents.cfg
    place = select_device(override(cfg, {"runtime.device": device}))
    return {
        "network": contents.network.requires_grad_(False).eval().to(place),
        "class_names": contents.class_names,
        "crop": cfg.data.crop,
        "protocol": cfg.eval.protocol,
        "device": place,
        "tf32": cfg.train.tf32,
        "pixels": cfg.data.pixels,
        "palette": contents.palette,
        "precision": contents.precision,
        "fields": contents.fields,
        "source": folder.resolve(),
    }
