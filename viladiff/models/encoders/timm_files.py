"""timm's weights in the cache of the Hugging Face hub, and how to bring them to a machine without a network."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from pathlib import Path

PATIENCE = 5.0
"""Seconds in which the hub must answer; its own client tries for more than a minute."""
_FILES = ("model.safetensors", "pytorch_model.bin")


def cached_weights(name: str) -> Path | None:
    """Return timm's weights of a model in the hub's cache; None if they are not there, or come from elsewhere."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    found = timm.get_pretrained_cfg(name)
    if found is None or not found.hf_hub_id:
        return None
    for file in (found.hf_hub_filename, *_FILES):
        path = try_to_load_from_cache(found.hf_hub_id, file) if file else None
        if isinstance(path, str):
            return Path(path)
    return None


def missing_weights(name: str, fetch: bool) -> str | None:
    """Return why timm's weights of a model are not here, with what to do; None if they are, or no hub has them.

    ``fetch`` downloads them if the hub answers, and else there is no access to a network.
    """
    import timm

    found = timm.get_pretrained_cfg(name)
    if found is None or not found.hf_hub_id or cached_weights(name) is not None:
        return None  # from another place than the hub, whose cache timm keeps
    why = "are not in the cache of this machine, and a start would download them"
    if fetch:
        reason = _download(found.hf_hub_id, found.hf_hub_filename)
        if reason is None:
            return None
        why = f"are not in the cache of this machine and cannot be downloaded ({reason})"
    file = found.hf_hub_filename or _FILES[0]
    return (
        f"model.pretrained = 'timm': the weights of {name!r} ({found.hf_hub_id}) {why}; set model.weights to a file of "
        f"them, or HF_HOME to a cache that has them; where there is a network, `hf download {found.hf_hub_id} {file}` "
        "brings it"
    )


def _download(hub_id: str, file: str | None) -> str | None:
    """Download weights into the hub's cache; return the reason if that is impossible."""
    from huggingface_hub import constants
    from timm.models import load_state_dict_from_hf

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    reason = _unreachable(constants.ENDPOINT)
    if reason is not None:
        return reason
    try:
        load_state_dict_from_hf(hub_id, file or _FILES[1], weights_only=True)
    except Exception as error:
        return (str(error).splitlines() or [type(error).__name__])[0][:160]
    return None


def _unreachable(address: str) -> str | None:
    """Return why a server does not answer in time; None if it does, whatever it says."""
    answers: list[str | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE).close()
        except urllib.error.HTTPError:
            answers.append(None)  # an answer all the same
        except (OSError, ValueError) as error:
            answers.append(f"{address} does not answer: {getattr(error, 'reason', error)}")
        else:
            answers.append(None)

    # The look-up of a name has no time limit of its own, so it is left behind in a thread where it takes too long.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * PATIENCE)
    return answers[0] if answers else f"{address} does not answer in {2 * PATIENCE:g} s"
