"""Image features as the Q-Former reads them: with positions, and as keys and values.

Cross-attention treats the image features as a set, so the position of an image token has to be encoded in the features
of the token. The features of a ViT encode positions, because position embeddings were added to the patches. The
features of a CNN do not. DETR (Carion et al., 2020, §3.2) therefore adds a fixed 2-D sine encoding to the features of a
CNN, and so does this project (``vision.position_encoding``).

Legend: B images, N rows that attend to them, Q queries, P image tokens, E width of the image encoder, D width of the
Q-Former, H heads, d = D / H.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from blip2.backbones.features import token_mask
from blip2.backbones.vision import ImageEncoder

# -- keys and values -------------------------------------------------------------------------------------------------


class CrossAttentionKV(NamedTuple):
    """Keys and values of B images in one cross-attention, and the N rows that attend to them."""

    keys: Float[Tensor, "B H P d"]
    values: Float[Tensor, "B H P d"]
    row_to_image: Int[Tensor, "N"] | int = 1
    """Index of the image of each row. An int n means that all images repeat n times, in order (N = n * B)."""
    mask: Bool[Tensor, "B P"] | None = None
    """True for tokens, False for padding. None: there is no padding, as for all images."""

    @property
    def num_rows(self) -> int:
        return self.row_to_image * len(self.keys) if isinstance(self.row_to_image, int) else len(self.row_to_image)

    @property
    def row_keys(self) -> Float[Tensor, "N H P d"]:
        """The keys of the image of each row, copied."""
        if isinstance(self.row_to_image, int):
            return self.keys.repeat(self.row_to_image, 1, 1, 1)
        return self.keys[self.row_to_image]

    @property
    def row_mask(self) -> Bool[Tensor, "N P"]:
        """The mask of the image of each row: True for tokens, False for padding."""
        mask = (
            self.keys.new_ones(len(self.keys), self.keys.shape[2], dtype=torch.bool) if self.mask is None else self.mask
        )
        return mask.repeat(self.row_to_image, 1) if isinstance(self.row_to_image, int) else mask[self.row_to_image]


@dataclass(frozen=True)
class ImageMemory:
    """Keys and values of image features in all cross-attentions, for N rows that attend to them.

    Keys and values depend on the image alone, not on queries or text. They are therefore computed once per image and
    shared by all passes over the image: ITC, ITG and the three parts of ITM in training, all candidates in re-ranking,
    and all questions about the image.
    """

    layer_kv: tuple[tuple[CrossAttentionKV, ...], ...]
    """One entry per block with cross-attention, in order. An entry has one or more groups of rows; the N rows are those
    of the first group, then those of the second, and so on."""

    def __len__(self) -> int:
        """Return N, the number of rows."""
        return sum(kv.num_rows for kv in self.layer_kv[0])

    def select(self, row_to_image: Int[Tensor, "N"]) -> ImageMemory:
        """Return a memory of N rows, whose row i attends to image ``row_to_image[i]``. Keys and values are not copied.

        Args:
            row_to_image: indices in [0, len(self)), which may repeat. This memory must have one row per image.
        """
        return ImageMemory(
            tuple(tuple(kv._replace(row_to_image=row_to_image) for kv in layer) for layer in self.layer_kv)
        )

    def repeat(self, repeats: int) -> ImageMemory:
        """Return a memory that has all rows `repeats` times, in the order 0, 1, 2, 0, 1, 2 ..."""
        return ImageMemory(
            tuple(
                tuple(
                    CrossAttentionKV(k, v, rows * repeats if isinstance(rows, int) else rows.repeat(repeats), mask)
                    for k, v, rows, mask in layer
                )
                for layer in self.layer_kv
            )
        )

    def split_windows(self, num_windows: Sequence[int], window: int, stride: int) -> ImageMemory:
        """Return a memory that has the windows of all sequences as its rows, sequence by sequence.

        The keys and values of a token are those of this memory, also if the token is in several windows.

        Args:
            num_windows: number of windows of each sequence (:meth:`~blip2.config.QFormerConfig.count_windows`). This
                memory must have one row per sequence.
            window: number of tokens of a window. The last window of a sequence may have fewer.
            stride: distance in tokens between the beginnings of successive windows.
        """
        keys, _, _, mask = self.layer_kv[0][0]
        num_tokens = keys.shape[2]
        window = min(window, num_tokens)
        missing = (max(num_windows) - 1) * stride + window - num_tokens
        counts = torch.tensor(num_windows, device=keys.device)
        exists = torch.arange(max(num_windows), device=keys.device) < counts[:, None]  # [B, windows]
        if mask is None:
            mask = keys.new_ones(len(keys), num_tokens, dtype=torch.bool)
        mask = F.pad(mask, (0, missing)).unfold(1, window, stride)[exists]
        window_mask = None if bool(mask.all()) else mask

        def split(tokens: Float[Tensor, "B H P d"]) -> Float[Tensor, "N H _ d"]:
            windows = F.pad(tokens, (0, 0, 0, missing)).unfold(2, window, stride)  # [B, H, windows, d, window]
            return windows.transpose(1, 2)[exists].mT

        return ImageMemory(
            tuple(
                tuple(CrossAttentionKV(split(kv.keys), split(kv.values), mask=window_mask) for kv in layer)
                for layer in self.layer_kv
            )
        )

    def cat(self, other: ImageMemory) -> ImageMemory:
        """Return a memory that has the rows of this memory, followed by the rows of `other`."""
        return ImageMemory(tuple(a + b for a, b in zip(self.layer_kv, other.layer_kv, strict=True)))


# -- positions -------------------------------------------------------------------------------------------------------

POSITION_VARIANCE = 1e-3
"""Smallest ratio of variances for which :func:`encodes_positions` returns True.

The ratio is the variance between the tokens of a blank image, divided by the variance between the tokens of an image of
noise. It is below 1e-5 for CNNs and Swin, and above 1e-2 for ViTs with position embeddings, even with random weights.
"""


@lru_cache(maxsize=8)
def sine_position_encoding(num_tokens: int, width: int, device: torch.device) -> Float[Tensor, "P E"]:
    """Return a fixed 2-D sine encoding of the positions in a square grid of tokens.

    For a token in row r of n rows, half of the channels are the sines and cosines of 2 pi f (r + 1/2) / n, where the
    frequencies f decrease geometrically from n / 2 to 1 / 4. The other half are the same functions of the column.

    Args:
        num_tokens: P. The grid is the last n * n tokens, row by row, where n is the integer square root of P. The
            encoding of tokens before the grid ([CLS], registers) is zero.
        width: E. If E is not a multiple of 4, the last E % 4 channels are zero.
        device: the device of the result.

    Returns:
        The encoding in float32, with values in [-1, 1].
    """
    side = math.isqrt(num_tokens)
    count = width // 4
    frequencies = side / 2 * (1 / (2 * side)) ** (torch.arange(count) / max(count - 1, 1))
    angles = 2 * math.pi * (torch.arange(side)[:, None] + 0.5) / side * frequencies  # [n, E/4]
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [n, E/2]
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    grid = torch.cat([rows, columns], dim=2).flatten(0, 1)  # [n * n, E]
    return F.pad(grid, (0, width - grid.shape[1], num_tokens - len(grid), 0)).to(device)


def add_position_encoding(features: Float[Tensor, "B P E"]) -> Float[Tensor, "B P E"]:
    """Normalize each token to mean 0 and variance 1 along E, and add :func:`sine_position_encoding`.

    Without the normalization, the weight of the encoding would depend on the scale of the features, which differs
    between image encoders.
    """
    _, tokens, width = features.shape
    return F.layer_norm(features, (width,)) + sine_position_encoding(tokens, width, features.device)


def encode_images(encoder: ImageEncoder, images: Shaped[Tensor, "B ..."]) -> Float[Tensor, "B P E"]:
    """Return the features that the Q-Former reads.

    Args:
        encoder: the image encoder. If its ``position_encoding`` is ``sine2d``, :func:`add_position_encoding` is applied
            to the features.
        images: an input of the encoder (:meth:`~blip2.backbones.vision.ImageEncoder.encode`), or cached features
            [B, P, E] to which no position encoding has been added.
    """
    features = encoder.encode(images)
    return add_position_encoding(features) if encoder.position_encoding == "sine2d" else features


def padding_mask(encoder: ImageEncoder, features: Float[Tensor, "B P E"]) -> Bool[Tensor, "B P"] | None:
    """Return True for tokens and False for padding; None if the encoder never pads its features."""
    return token_mask(features) if encoder.has_padding else None


@torch.no_grad()
def encodes_positions(encoder: ImageEncoder) -> bool:
    """Return whether the features of an image encoder encode the positions of the tokens.

    All pixels of a blank image of the mean color are zero, like the padding of convolutions, so its tokens differ only
    by position embeddings. The variance between its tokens is compared with the variance between the tokens of an image
    of noise (:data:`POSITION_VARIANCE`).
    """
    size = encoder.preprocessing.image_size
    device = next((parameter.device for parameter in encoder.parameters()), torch.device("cpu"))
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    blank, varied = (encoder.encode(image.to(device)).double() for image in (torch.zeros_like(noise), noise))
    side = math.isqrt(blank.shape[1])
    variance = [tokens[0, -side * side :].var(dim=0).sum() for tokens in (blank, varied)]  # without [CLS] and registers
    return bool(variance[0] > POSITION_VARIANCE * variance[1])
