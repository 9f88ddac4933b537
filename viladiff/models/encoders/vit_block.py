"""timm's plain transformer blocks with joined norms, and attention whose gradient needs no second copy."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from viladiff.models.fused.norms import added_and_normed, joins_norms, normed


class JoinedBlock(Block):
    """``Block`` that adds and normalises in one operation where ``fused.norms`` has one; the numbers are its own.

    Its last sum is normalised at once for the block that follows, which takes the norm if it is given that sum.
    """

    following: tuple[JoinedBlock, ...] = ()
    """The next block, or none; in a tuple, since it is no part of this one."""
    ahead: tuple[Tensor, Tensor] | None = None
    """Tokens and their first norm, from the block before."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return (B, N, D) of tokens (B, N, D)."""
        ahead, joins = self.ahead, joins_norms(self.norm1, x)
        if joins:
            self.ahead = None
        inner = ahead[1] if joins and ahead is not None and ahead[0] is x else normed(self.norm1, x)
        read = self.drop_path1(self.ls1(self.attn(inner, attn_mask=attn_mask, is_causal=is_causal)))
        x, inner = added_and_normed(self.norm2, x, read)
        read = self.drop_path2(self.ls2(self.mlp(inner)))
        if not joins or not self.following:
            return x + read
        total, inner = added_and_normed(self.following[0].norm1, x, read)
        self.following[0].ahead = total, inner
        return total


class JoinedAttention(Attention):
    """``Attention`` of plain heads: queries, keys and values are taken apart along the axis that keeps their order.

    Their gradients are then joined in the order in which the layer before them is laid out.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return (B, N, D) of tokens (B, N, D)."""
        parts = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        dropped = self.attn_drop.p if self.training else 0.0
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropped, is_causal=is_causal)
        found: Tensor = self.proj_drop(self.proj(read.transpose(1, 2).flatten(2)))
        return found


def join_norms(network: nn.Module) -> None:
    """Let the plain blocks of a timm network use ``JoinedBlock`` and ``JoinedAttention``; weights keep their names."""
    before: JoinedBlock | None = None
    for module in network.modules():
        if type(module) is Block:
            module.__class__ = JoinedBlock
            assert isinstance(module, JoinedBlock)
            if before is not None:
                before.following = (module,)
            before = module
        elif type(module) is Attention and module.fused_attn and _plain(module):
            module.__class__ = JoinedAttention


def _plain(attention: Attention) -> bool:
    between = (attention.q_norm, attention.k_norm, attention.norm)
    return attention.gate is None and all(type(part) is nn.Identity for part in between)
