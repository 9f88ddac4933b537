"""The validation experiment behind Figure 1: what captions do to features and masks (paper, section 3.2).

L = cross-entropy (Eq. 10) of the labelled images alone. Tokens of the encoder read the caption by cross-attention, and
the maps with which class queries attend to the tokens are the masks: scores before the softmax, brought to pixels
bilinearly. ``probe.text=false`` leaves the cross-attention out; with ``data.captions=none`` it is there and reads a
learned null token, so that both networks have the same parameters. Of the built-in data the encoder is trained;
``model.encoder_frozen=true`` is for one that has seen much. All of this is ours but for what section 3.2 says: that
attention between features and text is computed and that its maps predict masks.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from viladiff.data.batch import Batch, Losses, Step, TextBatch, Views
from viladiff.methods.base import Method, MethodConfig, StepCost
from viladiff.models.baselines.text_probe import Probe, ProbeConfig, probe
from viladiff.models.fused.pixel_logits import PixelLogits
from viladiff.models.segmenter import NetworkFactory, Segmenter


class TextProbeConfig(MethodConfig):
    name: Literal["textprobe"] = "textprobe"
    probe: ProbeConfig = ProbeConfig()


class TextProbe(Method):
    Config = TextProbeConfig
    views = Views(weak=0, text=True)
    step_cost = StepCost(1, 1)
    student: Probe

    def build_student(self, build: NetworkFactory) -> Segmenter:
        return build(kind=probe(build.text_dim, self.cfg.probe))

    def required_views(self) -> Views:
        return Views(weak=0, text=self.cfg.probe.text)

    def eval_stream(self) -> str:
        return self.student.names[-1]

    def forward(self, batch: Batch, step: Step) -> Losses:
        features, stream = self.student.encode(batch.image), self.eval_stream()
        maps = self.student.decode(features, batch.text, (stream,))[stream].logits
        loss = self.supervised(PixelLogits(maps, batch.target.shape[-2:]), batch.target)
        # Finer maps of the encoder are not read, but a norm of their own, as timm's have, must get a gradient.
        unread = sum(level.float().mean() for level in features[:-1])
        return Losses(loss + 0 * unread, {"sup": loss.detach()}, {"sup": loss})

    def token_features(self, images: Tensor, text: TextBatch | None) -> dict[str, Tensor]:
        return self.student.decoder.tokens(self.student.encode(images)[-1], text)
