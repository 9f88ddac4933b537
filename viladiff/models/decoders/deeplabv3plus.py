"""DeepLabV3+: atrous pyramid on the coarsest map, joined by the map of stride 4, with BatchNorm.

Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", ECCV 2018, in the
form of the semi-supervised methods with ResNet-101 (UniMatch@0324f3d, model/semseg/deeplabv3plus.py): plain
convolutions in place of separable ones, corners aligned wherever a map is enlarged, no dropout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viladiff.models.decoders.base import Decoder

RATES = {16: (6, 12, 18), 8: (12, 24, 36)}
"""Dilations of the pyramid by the stride of the coarsest map."""
SKIP_STRIDE, SKIP_WIDTH, WIDTH = 4, 48, 256


class ConvNorm(nn.Sequential):
    """Convolution that keeps the size, without a bias; BatchNorm; ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, rate: int = 1) -> None:
        padding = rate * (kernel // 2)
        conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=rate, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class ImagePooling(ConvNorm):
    """The mean over the image, through ConvNorm, at every cell."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, D, h, w) to (B, width, h, w). Raises ValueError for one image in training, which has no variance."""
        if self.training and x.shape[0] == 1 and not isinstance(self[1], nn.SyncBatchNorm):
            raise ValueError(
                "model.decoder = 'deeplabv3plus': BatchNorm of the pooled image needs two images or more in each "
                "training pass of a worker, got 1; raise data.batch_labelled, or lower runtime.workers or "
                "train.grad_accum_steps"
            )
        # One value enlarged with any alignment is that value everywhere.
        return super().forward(F.adaptive_avg_pool2d(x, 1)).expand(-1, -1, *x.shape[-2:])


class AtrousPyramid(nn.Module):
    """ASPP: a 1 x 1 and three dilated 3 x 3 convolutions and the pooled image side by side, projected to one map."""

    def __init__(self, inputs: int, width: int, rates: tuple[int, int, int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [ConvNorm(inputs, width), *(ConvNorm(inputs, width, kernel=3, rate=rate) for rate in rates)]
        )
        self.pooling = ImagePooling(inputs, width)
        self.project = ConvNorm(5 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, D, h, w) to (B, width, h, w)."""
        return self.project(torch.cat([*(branch(x) for branch in self.branches), self.pooling(x)], dim=1))


class PointClassifier(nn.Module):
    """Scores of each cell of the decoder's map alone."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.score = nn.Conv2d(width, num_classes, 1)

    def forward(self, mid: Tensor, top: Tensor) -> Tensor:
        return self.score(mid)


class DeepLabV3PlusDecoder(Decoder):
    """The pyramid's map, an eighth as wide as the coarsest one (256 of 2048), enlarged to cells of 4 pixels, beside the
    map of stride 4 reduced to 48 channels; two 3 x 3 convolutions bring them to 256.

    The reduced map does not depend on the stream. The two maps between are not read.
    """

    align_corners, any_size = True, True

    def __init__(self, channels: tuple[int, ...], strides: tuple[int, ...], width: int = WIDTH) -> None:
        """Build the decoder; ``width`` is not used, since the widths are published.

        Raises ValueError for maps without stride 4, or whose coarsest stride is neither 16 nor 8.
        """
        super().__init__()
        if SKIP_STRIDE not in strides[:3] or strides[-1] not in RATES:
            raise ValueError(
                f"model.decoder = 'deeplabv3plus': needs a map of stride {SKIP_STRIDE} and a coarsest one of 16 or 8, "
                f"got strides {', '.join(map(str, strides))}; use a convolutional model.encoder, as resnet101s, with "
                "model.encoder_stride=16, or model.decoder=light"
            )
        self.stride, self.width = SKIP_STRIDE, WIDTH
        self.skip = strides.index(SKIP_STRIDE)
        self.pyramid = AtrousPyramid(channels[-1], channels[-1] // 8, RATES[strides[-1]])
        self.reduce = ConvNorm(channels[self.skip], SKIP_WIDTH)
        self.fuse = nn.Sequential(
            ConvNorm(channels[-1] // 8 + SKIP_WIDTH, WIDTH, kernel=3), ConvNorm(WIDTH, WIDTH, kernel=3)
        )

    def laterals(self, features: list[Tensor]) -> list[Tensor]:
        """Reduce the map of stride 4: one map (B, 48, H / 4, W / 4)."""
        return [self.reduce(features[self.skip])]

    def forward(self, top: Tensor, laterals: list[Tensor]) -> Tensor:
        """Decode top (k * B, D, h, w) for k streams with one lateral (B, 48, ...): (k * B, 256, H / 4, W / 4)."""
        (fine,) = laterals
        copies = top.shape[0] // fine.shape[0]  # not len(), which an export would keep as a constant
        fine = fine if copies == 1 else fine.repeat(copies, 1, 1, 1)
        coarse = F.interpolate(self.pyramid(top), fine.shape[-2:], mode="bilinear", align_corners=True)
        return self.fuse(torch.cat([fine, coarse], dim=1))

    def classifier(self, num_classes: int) -> PointClassifier:
        """Return a new classifier of the decoder's map."""
        return PointClassifier(self.width, num_classes)
