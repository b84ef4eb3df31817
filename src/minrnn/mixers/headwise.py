"""Maps of channels in equal groups, each group by itself: what xLSTM's heads are made of. D is the width."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MERGED = 64  # channels in the blocks that are really multiplied: many tiny ones cost more than zeros between them


class HeadwiseLinear(nn.Module):
    """y = W x, W block-diagonal: each block of channels is mapped to itself.

    It begins from N(0, 2 / (5 channels of a block)).

    Args:
        width: D.
        blocks: how many, a divisor of D.
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        if blocks < 1 or width % blocks:
            raise ValueError(f"HeadwiseLinear: blocks must divide width = {width}, got {blocks}")
        self.weight = nn.Parameter(torch.empty(blocks, width // blocks, width // blocks))
        small_init_(self.weight, width // blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        blocks, size, _ = self.weight.shape
        merge = max(r for r in range(1, blocks + 1) if blocks % r == 0 and (r == 1 or r * size <= MERGED))
        weight = self.weight
        if merge > 1:
            weight = weight.view(-1, merge, size, size)
            diagonal = torch.eye(merge, dtype=torch.bool, device=weight.device)[:, None, :, None]
            weight = torch.where(diagonal, weight[:, :, :, None], 0).reshape(blocks // merge, merge * size, -1)
        rows = x.reshape(-1, len(weight), weight.shape[1]).transpose(0, 1)
        return torch.bmm(rows, weight.mT).transpose(0, 1).reshape(x.shape)

    def extra_repr(self) -> str:
        blocks, size, _ = self.weight.shape
        return f"{blocks * size}, blocks={blocks}"


class HeadwiseNorm(nn.Module):
    """LayerNorm over the channels of each head, then a weight per channel, from 1.

    Args:
        width: D.
        heads: how many, a divisor of D.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"HeadwiseNorm: heads must divide width = {width}, got {heads}")
        self.heads = heads
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        size = x.shape[-1] // self.heads
        return F.layer_norm(x.unflatten(-1, (self.heads, size)), (size,)).flatten(-2) * self.weight

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, heads={self.heads}"


def small_init_(weight: Tensor, width: int) -> None:
    """Draw from N(0, 2 / (5 width)).

    Args:
        weight: to fill.
        width: of what it reads.

    Source: Nguyen and Salazar, "Transformers without Tears" (2019), section 2.2.
    """
    nn.init.normal_(weight, std=math.sqrt(2 / (5 * width)))
