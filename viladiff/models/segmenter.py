"""The segmenter that all methods share: encoder, decoder, classifier; with ViLa, two streams through one decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from viladiff.data.batch import CutMix, TextBatch
from viladiff.data.transforms.mixing import apply_cutmix
from viladiff.models.blocks import upsample
from viladiff.models.decoders.build import build_decoder
from viladiff.models.decoders.light import output_stride
from viladiff.models.encoders.base import Encoder
from viladiff.models.encoders.build import build_encoder
from viladiff.models.fused.pixel_logits import PixelLogits
from viladiff.models.public_weights import load_head
from viladiff.models.stream import StreamOutput
from viladiff.models.vila import ViLa, VilaConfig

if TYPE_CHECKING:
    from viladiff.config.sections import ModelConfig


class _Last:
    """A segmenter's results for its last images, by identity of the input tensors."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.images: Tensor | None = None
        self.maps: list[Tensor] = []
        self.streams: list[tuple[TextBatch | None, dict[str, StreamOutput]]] = []
        self._weights = [(x, _sum(x)) for x in (*segmenter.parameters(), *segmenter.buffers())]
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._changed: list[Tensor] = []

    def encoded(self, images: Tensor, encoder: Encoder) -> list[Tensor]:
        if self.images is not images:
            self._let_go()
            self.maps = encoder(images)
            self.images = images
            self._keep(images, *self.maps)
        return list(self.maps)

    def add(self, text: TextBatch | None, streams: dict[str, StreamOutput]) -> None:
        self.streams.append((text, dict(streams)))
        if text is not None:
            self._keep(text.tokens, text.mask)

    def found(self, text: TextBatch | None, names: tuple[str, ...]) -> dict[str, StreamOutput] | None:
        for words, streams in self.streams:
            if words is text and set(names) <= set(streams):
                return {name: streams[name] for name in names}
        return None

    def check(self) -> None:
        """Check for in-place writes with a single look at the device; raise RuntimeError if there was one."""
        self._let_go()
        if self._changed and bool(torch.stack(self._changed).any()):
            raise RuntimeError("remembered: images, words or maps were changed in place; change copies of them")
        if bool(torch.stack([_sum(x) != before for x, before in self._weights]).any()):
            raise RuntimeError("remembered: weights were changed in place; change them before or after")

    def _keep(self, *tensors: Tensor) -> None:
        self._kept += [(x, _sum(x)) for x in tensors]

    def _let_go(self) -> None:
        self._changed += [_sum(x) != before for x, before in self._kept]
        self.images, self.maps, self.streams, self._kept = None, [], [], []


def _sum(x: Tensor) -> Tensor:
    """Sum the numbers' bits as integers, so that it is exact, in any order and for NaN too."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().contiguous().view(kinds[x.element_size()]).sum()


@contextmanager
def remembered(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Let segmenters in ``networks`` reuse the maps and streams of the last images within the context.

    For evaluation, where several scores read one prediction. One batch of maps is stored for each segmenter, until the
    next one. In training mode and with gradients nothing is reused. Raises RuntimeError at the end if images, texts,
    maps or weights were changed in place meanwhile, since older maps may have been read then.
    """
    found = {module for network in networks for module in network.modules() if isinstance(module, Segmenter)}
    try:
        for segmenter in found:
            segmenter.last = _Last(segmenter)
        yield
        for segmenter in found:
            if segmenter.last is not None:
                segmenter.last.check()
    finally:
        for segmenter in found:
            segmenter.last = None


class Segmenter(nn.Module):
    """``forward`` gives full-size logits per stream; methods that need more call ``streams``."""

    last: _Last | None = None
    """Set by ``remembered``."""

    def __init__(self, encoder: Encoder, model: ModelConfig, num_classes: int, vila: ViLa | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.encoder = encoder
        self.decoder = build_decoder(model, encoder)
        self.classifier = self.decoder.classifier(num_classes)
        self.vila = vila
        self.classifier_fusion = None if vila is None else self.decoder.classifier(num_classes)

    @property
    def patch(self) -> int:
        """Pixels a cell of the coarsest map is wide."""
        return self.encoder.patch

    @property
    def side_multiple(self) -> int:
        """Image sides must be multiples of this: the patch, or 1 where encoder and decoder take any size."""
        return 1 if self.encoder.any_size and self.decoder.any_size else self.patch

    @property
    def label_stride(self) -> int:
        """Pixels a cell of the label grid is wide, that of MixE: the light decoder's, whatever the decoder's own."""
        return output_stride(self.encoder.strides)

    @property
    def label_aligned(self) -> bool:
        """Whether the label grid's corners are aligned with pixels': as the decoder's, where the two are one."""
        return self.decoder.stride == self.label_stride and self.decoder.align_corners

    @property
    def names(self) -> tuple[str, ...]:
        """Streams that this network has; the first needs no text."""
        return ("visual",) if self.vila is None else ("visual", "fusion")

    def streams(
        self, images: Tensor, text: TextBatch | None = None, names: tuple[str, ...] | None = None
    ) -> dict[str, StreamOutput]:
        """Map images (B, 3, H, W) to the named streams, all by default; encoder and fine decoder levels run once."""
        features, names, last = self.encode(images), self.names if names is None else names, self._last()
        found = None if last is None else last.found(text, names)
        if found is None:
            found = self.decode(features, text, names)
            if last is not None:
                last.add(text, found)
        return found

    def encode(self, images: Tensor) -> list[Tensor]:
        """Map images (B, 3, H, W) to the encoder's four maps (B, D_i, h_i, w_i), coarsest last, for ``decode``."""
        last = self._last()
        return self.encoder(images) if last is None else last.encoded(images, self.encoder)

    def _last(self) -> _Last | None:
        """Return the stored maps; None if branches may be dropped or a gradient is needed, which change the result."""
        return None if self.training or torch.is_grad_enabled() else self.last

    def decode(
        self, features: list[Tensor], text: TextBatch | None = None, names: tuple[str, ...] | None = None
    ) -> dict[str, StreamOutput]:
        """Perform the second half of ``streams``; a method may change every map of ``features`` before."""
        names = self.names if names is None else names
        top = features[-1]
        if self.vila is None:
            tokens, tops = [top.flatten(2).transpose(1, 2)], top
        else:
            found = self.vila(top, text, names)
            tokens, tops = [found[name].features for name in names], torch.cat([found[name].top for name in names])
        tops = tops.contiguous()  # tokens are channels-last; in the decoder that form makes norms and softmax slow
        # Not chunk(): an exported graph would be held to one batch size by it.
        mids = self.decoder(tops, self.decoder.laterals(features)).unflatten(0, (len(names), -1))
        return {
            name: StreamOutput(t, mid, self.classify(mid, top, name))
            for name, t, mid, top in zip(names, tokens, mids, tops.unflatten(0, (len(names), -1)), strict=True)
        }

    def classify(self, mid: Tensor, top: Tensor, name: str = "visual") -> Tensor:
        """Map the decoder's (B, width, h, w) and coarse (B, D, H / patch, W / patch) to logits (B, C, h, w) float32."""
        head = self.classifier_fusion if name == "fusion" else self.classifier
        assert head is not None
        return head(mid, top).float()

    def logits(self, features: list[Tensor], size: torch.Size | tuple[int, ...]) -> Tensor:
        """Map features of ``encode``, unchanged or not, to the visual stream's full-size logits (B, C, H, W)."""
        return self.upsample(self.grid_logits(features), size)

    def upsample(self, maps: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
        """Resize maps (B, C, h, w) on the decoder's grid to pixels (B, C, H, W), aligned as the decoder's are."""
        return upsample(maps, size, self.decoder.align_corners)

    def at_pixels(self, grid: Tensor, size: torch.Size | tuple[int, ...]) -> PixelLogits:
        """Return grid logits (B, C, h, w) as those of pixels, for losses and labels."""
        return PixelLogits(grid, size, self.decoder.align_corners)

    def predicted(self, images: Tensor) -> PixelLogits:
        """Map images (B, 3, H, W) to the visual stream's logits at their pixels."""
        return self.at_pixels(self.grid_logits(self.encode(images)), images.shape[-2:])

    def grid_logits(self, features: list[Tensor]) -> Tensor:
        """Map features of ``encode`` to the visual stream's logits (B, C, h, w) on the decoder's grid."""
        return self.decode(features, names=("visual",))["visual"].logits

    def forward(self, images: Tensor, text: TextBatch | None = None) -> dict[str, Tensor]:
        """Map images (B, 3, H, W) to {stream: (B, C, H, W) logits}."""
        found, size = self.streams(images, text), images.shape[-2:]
        return {name: self.upsample(stream.logits, size) for name, stream in found.items()}


def cutmix_stream(stream: StreamOutput, mix: CutMix, h: int, w: int, patch: int, stride: float) -> StreamOutput:
    """Paste the boxes of the strong view into the tokens, map and logits of a teacher's stream."""
    tokens = stream.features.transpose(1, 2).unflatten(2, (h, w))
    tokens = apply_cutmix(tokens, mix, patch).flatten(2).transpose(1, 2)
    return StreamOutput(tokens, stream.mid, apply_cutmix(stream.logits, mix, stride))


class DualNetwork(nn.Module):
    """Two networks that predict together, by the mean of their logits; what ships one network ships this as well."""

    vila: ViLa | None = None

    def __init__(self, first: Segmenter, second: Segmenter) -> None:
        super().__init__()
        self.members = nn.ModuleList([first, second])

    def __getitem__(self, place: int) -> Segmenter:
        network = self.members[place]
        assert isinstance(network, Segmenter)
        return network

    @property
    def patch(self) -> int:
        """Pixels a cell of the coarsest map is wide."""
        return self[0].patch

    @property
    def side_multiple(self) -> int:
        """Image sides must be multiples of this."""
        return self[0].side_multiple

    def upsample(self, maps: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
        """Resize maps (B, C, h, w) on the decoders' grid to pixels (B, C, H, W)."""
        return self[0].upsample(maps, size)

    @property
    def encoder(self) -> Encoder:
        """The first network's; both are of one kind."""
        return self[0].encoder

    def encode(self, images: Tensor) -> list[Tensor]:
        """Map images (B, 3, H, W) to the four maps of the first encoder followed by those of the second."""
        return [*self[0].encode(images), *self[1].encode(images)]

    def logits(self, features: list[Tensor], size: torch.Size | tuple[int, ...]) -> Tensor:
        """Map features of ``encode`` to mean full-size logits (B, C, H, W)."""
        half = len(features) // 2
        return (self[0].logits(features[:half], size) + self[1].logits(features[half:], size)) / 2

    def grid_logits(self, features: list[Tensor]) -> Tensor:
        """Return mean logits (B, C, h, w) of the two decoders on the same four maps, of any encoder of their kind."""
        return (self[0].decode(features)["visual"].logits + self[1].decode(features)["visual"].logits) / 2

    def forward(self, images: Tensor, text: TextBatch | None = None) -> dict[str, Tensor]:
        """Map images (B, 3, H, W) to {"visual": (B, C, H, W) logits}."""
        return {"visual": self.logits(self.encode(images), images.shape[-2:])}


Network = Segmenter | DualNetwork
"""What is evaluated and shipped."""


@dataclass(frozen=True)
class NetworkFactory:
    """The factory of a method's networks: called once per independently initialised student."""

    model: ModelConfig
    num_classes: int
    text_dim: int
    dataset: str = ""
    """Name of the data set, for a method that knows more of its classes than their number."""
    class_names: tuple[str, ...] = ()
    crop: int = 0
    """Side of a training crop in pixels."""
    texts: Callable[[Sequence[str]], Tensor] | None = None
    """Texts to their vectors (n, D) by the run's text encoder; none where a checkpoint brings what was made of them."""
    inputs: int = 3
    """Channels of an image."""

    def __call__(
        self,
        vila: VilaConfig | None = None,
        drop_path: float | None = None,
        kind: Callable[[Encoder, ModelConfig, int], Segmenter] = Segmenter,
    ) -> Segmenter:
        """Build a network; ``drop_path`` replaces the configured rate, for a method that is defined by its own.

        ``kind`` builds the network from encoder, fields of ``model`` and number of classes, for one with other parts.
        """
        rate = self.model.drop_path if drop_path is None else drop_path
        model = self.model
        norm = model.map_norm or ("authors" if model.decoder == "dpt" else "group")
        encoder = build_encoder(
            model.encoder, model.pretrained, model.weights, rate, model.encoder_stride, norm, self.inputs
        )
        network = kind(encoder, model, self.num_classes)
        if model.encoder != "transformers":
            load_head(network, model)
        if vila is not None:
            # Made after the rest, so that the shared part starts from the same weights with and without it.
            network.vila = ViLa(encoder.channels[-1], self.text_dim, vila)
            network.classifier_fusion = network.decoder.classifier(self.num_classes)
        if model.encoder_frozen:
            encoder.requires_grad_(False)
            encoder.frozen = True
        return network
