"""Features of any modality: arrays [P, E] that another program computed, in place of an image.

The Q-Former reads P tokens of width E, whatever they describe: frames of audio, slices of a CT volume, patches of
video frames, atoms of a molecule. The number of tokens may differ between records. In a batch, shorter records are
padded with NaN. NaN is never a feature, because arrays that contain it are refused, so a tensor of features says by
itself which tokens are padding when it is sliced, joined, stored or sent to another process. A computation that forgets
the padding gives NaN, not a number that is slightly wrong.

Legend: B batch, P tokens, E width of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from blip2.errors import InputError


@dataclass(frozen=True)
class FeatureFormat:
    """The shape of the arrays that an encoder of ``vision.name: features`` reads."""

    hidden_size: int
    """E, the width of a token."""
    max_tokens: int
    """The maximum of P. Longer arrays are refused."""


def pad_tokens(features: Float[Tensor, "*batch P E"], num_tokens: int) -> Float[Tensor, "*batch {num_tokens} E"]:
    """Pad features with NaN to a number of tokens."""
    missing = num_tokens - features.shape[-2]
    return F.pad(features, (0, 0, 0, missing), value=torch.nan) if missing else features


def cat_tokens(parts: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "B ..."]:
    """Concatenate batches of features, padded with NaN to the longest if their numbers of tokens differ."""
    longest = max(part.shape[-2] for part in parts)
    return torch.cat([pad_tokens(part, longest) for part in parts])


def token_mask(features: Float[Tensor, "*batch P E"]) -> Bool[Tensor, "*batch P"]:
    """Return the mask of padded features: True for tokens, False for padding."""
    return ~features[..., 0].isnan()


def check_padded(features: Float[Tensor, "B P E"]) -> None:
    """Check features that a caller gives.

    Raises:
        InputError: a record has no tokens, a value is infinite, or NaN is anywhere but in whole tokens at the end.
    """
    mask = token_mask(features)
    is_padded = features.isnan().all(dim=2) == ~mask
    is_right = mask[:, 1:] <= mask[:, :-1]
    is_finite = features.isfinite().all(dim=2) | ~mask
    if not (len(features) == 0 or (is_padded.all() and is_right.all() and is_finite.all() and mask.any(dim=1).all())):
        raise InputError(
            "the features hold NaN or infinity, expected finite numbers, and NaN only as padding, in whole tokens at"
            " the end of a record that has at least one other token: compute them again"
        )
