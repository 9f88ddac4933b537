"""Files of weights as other programs leave them: read as tensors alone, out of their containers and prefixes."""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from viladiff.core.messages import names_file

State = dict[str, Tensor]

CONTAINERS = (
    "state_dict", "model_ema", "state_dict_ema", "ema_state_dict", "ema", "params_ema", "teacher", "teacher_state",
    "target_encoder", "model", "model_state_dict", "model_state", "network", "net", "module", "params", "weights",
    "backbone", "encoder", "student",
)  # fmt: skip
"""Keys of a checkpoint under which weights lie. Of a network and its average the average is read: it has the published
score. Those before others in this order."""
WRAPPERS = (
    "module", "_orig_mod", "model", "net", "network", "base_model", "backbone", "encoder", "image_encoder", "visual",
    "trunk", "teacher", "ema", "model_ema", "ema_model", "averaged_model", "encoder_q", "base_encoder",
    "online_encoder", "target_encoder", "student",
)  # fmt: skip
"""Parts of a program that a name of an encoder's weight may begin with. Of two networks in one file, the one whose part
comes first in this order is read: a teacher before its student, MoCo's encoder and not its momentum copy."""
_HEADS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`",
    b"<": "is a web page; download the file itself",
    b"\x1f\x8b": "is a compressed archive; unpack it and name the file in it",
    b"{": "is JSON, as an index of weights in several files is; name a file of all tensors",
    b"\x89HDF": "is HDF5, as of Keras; convert it with the program that it is of, and name the file of tensors",
    b"GGUF": "is GGUF, whose weights are quantised; name the original file",
}
"""What a file that holds no weights begins with, and what to do."""
_KEEP = "keep the tensors alone: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"


class Unwrapped(NamedTuple):
    """An encoder's weights without the prefix of their names."""

    prefix: str
    state: State


def weights_path(text: str) -> Path:
    """Return the path that ``model.weights`` names, with ``~`` expanded. Raises ValueError for a URL or no home."""
    if re.match(r"[a-z]+://", text):
        raise ValueError(f"model.weights = {text!r}: an address; download the file, and name it")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"model.weights = {text!r}: {error}; write the whole path") from error


@names_file
def read_file(path: Path) -> tuple[State, str]:
    """Return the tensors of a safetensors or torch file by name, and the key that they lay under, empty for none.

    No code that the file may carry is run. Raises ValueError in one line for a file that holds no such tensors.
    """
    if path.is_dir():
        raise ValueError(f"weights file {path} is a directory; name the file, or set model.encoder=transformers")
    if not path.is_file():
        raise ValueError(f"weights file {path} does not exist (model.weights)")
    with path.open("rb") as file:
        head = file.read(32)
    told = next((text for start, text in _HEADS.items() if head.startswith(start)), None if head else "is empty")
    if told is not None and head[8:9] != b"{":  # a safetensors file begins with a length, which may look like any
        raise ValueError(f"weights file {path} {told}")
    found: Any
    if head[8:9] == b"{":  # whatever its suffix
        try:
            found = load_file(path)
        except Exception as error:
            raise ValueError(
                f"weights file {path} is not a whole safetensors file ({error}); bring it again"
            ) from error
    else:
        found = _torch_file(path, head)
    return _contained(path, found)


def _torch_file(path: Path, head: bytes) -> Any:
    """Read a torch file; beside what torch allows, it may hold NumPy's numbers and the arguments of a program."""
    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # before and since NumPy 2
    kinds = [type(np.dtype(one)) for one in ("f2", "f4", "f8", "i4", "i8", "u1", "?")]
    plain: list[Any] = [np.dtype, *kinds, *((scalar, name) for name in names), argparse.Namespace]
    try:
        # As an open file, since torch goes by the suffix of a path.
        with path.open("rb") as file, torch.serialization.safe_globals(plain), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, "cpu", weights_only=True)
    except Exception as error:
        # What torch says ends in advice to load the file unsafely, and is not passed on.
        code = re.search(r"(?:GLOBAL |global[:\s]+)`?([A-Za-z_][\w.]*\.\w+)", str(error))
        if code is not None:
            why = f"cannot be read: it carries code ({code[1]}), which is not run; where it comes from, {_KEEP}"
        elif "TorchScript" in str(error):
            why = f"cannot be read: it is a program (TorchScript), which is not run; where it comes from, {_KEEP}"
        elif head.startswith(b"PK\3\4") and _holds_arrays(path):
            why = "is an archive of NumPy's arrays, as of JAX; name timm's or the authors' file for torch"
        elif head.startswith(b"PK\3\4") or head.startswith(b"\x80"):
            why = "cannot be read: it is cut off, damaged, or no file of torch.save; bring it again"
        else:
            why = "cannot be read: neither a safetensors file nor one of torch.save"
        raise ValueError(f"weights file {path} {why}") from error


def _holds_arrays(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _contained(path: Path, found: Any) -> tuple[State, str]:
    """Return the weights in a checkpoint, and the keys on the way to them."""
    way: list[str] = []
    while isinstance(found, Mapping) and len(way) < 4:
        key = next((key for key in CONTAINERS if _has_tensors(found.get(key))), None)
        if key is None:
            break
        found = found[key]
        way.append(key)
    state = {str(k): v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not state:
        keys = [repr(key) for key in found][:6] if isinstance(found, Mapping) else []
        what = f"the keys {', '.join(keys)}" if keys else f"a {type(found).__name__}"
        raise ValueError(f"weights file {path} holds no tensors by name, but {what}; {_KEEP}")
    return state, ".".join(way)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(
        isinstance(one, Tensor) or (isinstance(one, Mapping) and _has_tensors(one)) for one in value.values()
    )


def unwrapped(state: State) -> Iterator[Unwrapped]:
    """Yield the weights as they are, then those below each chain of ``WRAPPERS`` without it; shorter chains first."""
    yield Unwrapped("", state)
    chains: set[tuple[str, ...]] = set()
    for name in state:
        parts = name.split(".")
        count = next((i for i, part in enumerate(parts) if part not in WRAPPERS), 0)
        chains |= {tuple(parts[: i + 1]) for i in range(count)}
    for chain in sorted(chains, key=lambda one: (len(one), [WRAPPERS.index(part) for part in one])):
        prefix = ".".join(chain) + "."
        yield Unwrapped(prefix, {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)})
