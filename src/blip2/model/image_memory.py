"""Positions for image features that have none.

Cross-attention treats the image features as a set: a query can tell where a token lies only if the token says so. Those
of a ViT do, because position embeddings were added to its patches. Those of a CNN do not, which is why DETR (Carion et
al., 2020, §3.2) adds a fixed 2-D sine encoding to them; so does this project (``vision.position_encoding``).

Legend: B batch, P image tokens, E width of the image encoder.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from blip2.backbones.vision import ImageEncoder

POSITION_VARIANCE = 1e-3
"""Tokens tell their places if on a blank image they vary by more than this share of how much they vary on noise. CNNs
and Swin are below 1e-5, ViTs with position embeddings above 1e-2, untrained ones included."""


@lru_cache(maxsize=8)
def sine_position_encoding(num_tokens: int, width: int, device: torch.device) -> Float[Tensor, "P E"]:
    """Return a fixed 2-D sine encoding of the places of a square grid of tokens.

    For a token in row r of n, half of the channels hold sin(2 pi f (r + 1/2) / n) and the cosine, for frequencies f
    that fall geometrically from n / 2 to 1 / 4; the other half hold the same of its column.

    Args:
        num_tokens: P, a square number, or a square number of grid tokens behind a few others ([CLS], registers), which
            get zeros.
        width: E. Channels that do not fill a group of four are zero.
        device: the device of the result.

    Returns:
        float32, in [-1, 1].
    """
    side = math.isqrt(num_tokens)
    count = width // 4
    frequencies = side / 2 * (1 / (2 * side)) ** (torch.arange(count) / max(count - 1, 1))
    angles = 2 * math.pi * (torch.arange(side)[:, None] + 0.5) / side * frequencies  # [n, E/4]
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [n, E/2]
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    grid = torch.cat([rows, columns], dim=2).flatten(0, 1)  # [n * n, E]
    return F.pad(grid, (0, width - grid.shape[1], num_tokens - len(grid), 0)).to(device)


def add_positions(features: Float[Tensor, "B P E"]) -> Float[Tensor, "B P E"]:
    """Normalize each token to mean 0 and variance 1 along E, and add :func:`sine_position_encoding`.

    The normalization makes the encoding weigh the same for every encoder, whatever the scale of its features.
    """
    _, tokens, width = features.shape
    return F.layer_norm(features, (width,)) + sine_position_encoding(tokens, width, features.device)


def encode_images(encoder: ImageEncoder, images: Shaped[Tensor, "B ..."]) -> Float[Tensor, "B P E"]:
    """Return the features that the Q-Former reads, with positions where the encoder is to have them.

    Args:
        images: pixels [B, 3, H, W], or features [B, P, E] made beforehand, which hold no added positions.
    """
    features = encoder.features(images)
    return add_positions(features) if encoder.position_encoding == "sine2d" else features


@torch.no_grad()
def tells_positions(encoder: ImageEncoder) -> bool:
    """Return whether the tokens of an image encoder hold their positions.

    On a blank image of the mean color all patches are alike and zero padding is invisible, so tokens can differ only by
    position embeddings. Their variance between places is compared with that on an image of noise
    (:data:`POSITION_VARIANCE`).
    """
    size = encoder.preprocessing.image_size
    parameter = next(encoder.parameters())
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    blank, varied = (
        encoder.features(image.to(parameter.device)).double() for image in (torch.zeros_like(noise), noise)
    )
    side = math.isqrt(blank.shape[1])
    variance = [tokens[0, -side * side :].var(dim=0).sum() for tokens in (blank, varied)]  # without [CLS] and registers
    return bool(variance[0] > POSITION_VARIANCE * variance[1])
