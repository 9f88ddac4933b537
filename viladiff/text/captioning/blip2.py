"""BLIP-2 from a local directory: the paper's two prompts over a batch of images, one sentence each.

Nothing is downloaded, no code of the directory is run, and only safetensors are read. Decoding is greedy, so that the
same images in the same batches have the same captions on one machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from viladiff.data.cache import digest, fingerprint
from viladiff.data.captions.files import clean
from viladiff.data.captions.simulated import PROMPTS
from viladiff.data.files.images import read_image
from viladiff.data.sources.digits import open_pixels
from viladiff.text.encoders import model_name
from viladiff.text.pretrained import KINDS, first_line, quiet, require_weights

READERS = 4
"""Threads that decode images."""
LONGEST = 30
"""Tokens that the model may add to a prompt."""
FILES = ("config.json", "preprocessor_config.json or processor_config.json", "tokenizer.json or vocab.json")


class CaptionerSpec(NamedTuple):
    """The model and its prompts; all that decides a caption but the image."""

    directory: str
    model: str
    revision: str
    prompts: tuple[str, ...] = PROMPTS
    longest: int = LONGEST


class Caption(NamedTuple):
    """One row of a file of captions; ``text`` is None where ``error`` says why."""

    image: str
    prompt: str
    text: str | None
    model: str
    revision: str
    seconds: float
    """On the clock, an image's share of its batch."""
    error: str | None


class ImageRef(NamedTuple):
    """An image and where it is: a file, or ``part/number`` of a built-in data set."""

    image: str
    where: str


def writer(directory: Path | str, prompts: Sequence[str] = PROMPTS, longest: int = LONGEST) -> CaptionerSpec:
    """Describe the model in a directory without loading it.

    Its name is the directory's, or the folder's in a model hub's cache; its revision is that cache's, or a hash of the
    files. Raises ValueError if it is not a directory of BLIP-2 with weights and processor.
    """
    top = Path(directory).expanduser()
    if not top.is_dir():
        raise ValueError(f"--model {str(directory)!r}: there is no such directory")
    from transformers import AutoConfig

    for needed in FILES:
        if not any((top / name).is_file() for name in needed.split(" or ")):
            raise ValueError(f"{top}: has no {needed}, so it is no directory of BLIP-2")
    try:
        kind = AutoConfig.from_pretrained(top, local_files_only=True, trust_remote_code=False).model_type
    except Exception as error:  # whatever a foreign file makes a library raise
        raise ValueError(f"{top / 'config.json'}: cannot be read: {first_line(error)}") from error
    if kind != "blip-2":
        raise ValueError(f"{top}: holds a {kind!r}, not a 'blip-2'")
    require_weights(top)
    real = top.resolve()
    name = model_name(real)
    files = sorted(path for path in real.iterdir() if path.suffix in KINDS and path.is_file())
    hashed = fingerprint([(path.name, digest(path)) for path in files])
    revision = hashed if name == real.name else real.name[:12]
    return CaptionerSpec(str(real), name, revision, tuple(prompts), longest)


class Captioner:
    """The model in memory, on a GPU in half precision if there is one."""

    def __init__(self, who: CaptionerSpec) -> None:
        """Load the model. Raises ValueError if transformers cannot load the directory, or weights are missing."""
        import transformers

        self.who = who
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        try:
            kind: Any = transformers.Blip2ForConditionalGeneration
            self.processor: Any = transformers.Blip2Processor.from_pretrained(who.directory, **options)
            with quiet():
                model, told = kind.from_pretrained(
                    who.directory, use_safetensors=True, output_loading_info=True, dtype=dtype, **options
                )
        except Exception as error:  # whatever a foreign file makes a library raise
            raise ValueError(f"{who.directory}: transformers cannot load it: {first_line(error)}") from error
        if told["missing_keys"] or told["mismatched_keys"]:
            raise ValueError(
                f"{who.directory}: its weights are of another model: {len(told['missing_keys'])} are missing, "
                f"{len(told['mismatched_keys'])} have another shape"
            )
        self.model: Any = model.to(self.device).eval()
        if self.processor.num_query_tokens is None:  # directories saved by older versions do not say it
            self.processor.num_query_tokens = model.config.num_query_tokens
        if model.config.image_token_id is None:
            model.config.image_token_id = self.processor.tokenizer.convert_tokens_to_ids("<image>")

    @torch.inference_mode()
    def say(self, images: Sequence[np.ndarray]) -> list[list[str]]:
        """Return per image one text per prompt: the prompt and its continuation; the prompt alone if there is none."""
        pictures = [Image.fromarray(image) for image in images]
        pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.device, self.model.dtype)
        with _seen_once(self.model.vision_model):
            return [list(texts) for texts in zip(*(self._say(pixels, p) for p in self.who.prompts), strict=True)]

    def _say(self, pixels: torch.Tensor, prompt: str) -> list[str]:
        # The processor puts the places of image tokens before the text only where it is given an image.
        one = self.processor(images=Image.new("RGB", (8, 8)), text=prompt, return_tensors="pt")
        ids, shown = (one[name].to(self.device).expand(len(pixels), -1) for name in ("input_ids", "attention_mask"))
        found = self.model.generate(
            pixel_values=pixels, input_ids=ids, attention_mask=shown, do_sample=False, max_new_tokens=self.who.longest
        )
        if not self.model.language_model.config.is_encoder_decoder:
            found = found[:, ids.shape[1] :]
        said = self.processor.batch_decode(found, skip_special_tokens=True)
        return [join_prompt(prompt, clean(text)) for text in said]


def join_prompt(prompt: str, text: str) -> str:
    """Join the prompt and its continuation in one line; a model that repeats the prompt adds it once."""
    return text if text.lower().startswith(prompt.lower()) else f"{prompt} {text}".strip()


@contextmanager
def _seen_once(vision: Any) -> Iterator[None]:
    """Let the encoder compute once and then answer from memory, for one batch of images."""
    forward: Any = vision.forward
    seen: list[Any] = []

    def once(pixels: torch.Tensor, **words: Any) -> Any:
        if not seen:
            seen.append(forward(pixels, **words))
        return seen[0]

    vision.forward = once
    try:
        yield
    finally:
        vision.forward = forward


def reader(dataset: str) -> Callable[[str], np.ndarray]:
    """Return a function from ``ImageRef.where`` to (H, W, 3) uint8: of a file if ``dataset`` is empty."""
    if not dataset:
        return read_image
    arrays = open_pixels(dataset).arrays
    parts = {"train": arrays["images"], "dev": arrays["dev_images"], "test": arrays["test_images"]}

    def read(where: str) -> np.ndarray:
        part, _, number = where.partition("/")
        return np.asarray(parts[part][int(number)])

    return read


def caption_batch(
    captioner: Captioner, pictures: Sequence[ImageRef], read: Callable[[str], np.ndarray]
) -> list[Caption]:
    """Return a row for each image and prompt. A failure belongs to its image alone, and the others continue."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        opened = list(pool.map(lambda picture: _attempt(lambda: read(picture.where)), pictures))
    images = {place: found for place, found in enumerate(opened) if not isinstance(found, str)}
    said = _attempt(lambda: dict(zip(images, captioner.say(list(images.values())), strict=True)) if images else {})
    if isinstance(said, str):  # one by one, to know whose fault it is; or too little memory for so many
        said = {place: _attempt(partial(_alone, captioner, image)) for place, image in images.items()}
    share = (time.perf_counter() - begun) / (len(pictures) * len(captioner.who.prompts))
    rows = []
    for place, picture in enumerate(pictures):
        texts = said.get(place, opened[place])
        for number, prompt in enumerate(captioner.who.prompts):
            text, error = (None, texts) if isinstance(texts, str) else (texts[number], None)
            if text == prompt:
                text, error = None, "the model added nothing to the prompt"
            rows.append(Caption(picture.image, prompt, text, captioner.who.model, captioner.who.revision, share, error))
    return rows


def _alone(captioner: Captioner, image: np.ndarray) -> list[str]:
    return captioner.say([image])[0]


def _attempt(what: Callable[[], Any]) -> Any:
    """Return the result, or the error as one line."""
    try:
        return what()
    except Exception as error:  # an image that a library trips over is one image, not the end of the job
        return first_line(error)
