"""Frozen image encoders behind one interface (paper §3.4); :mod:`blip2.backbones.vision_loaders` creates them.

An encoder may also read arrays of features in place of images (:mod:`blip2.backbones.features`).

Shapes: B batch, P image tokens, E width of the image encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from blip2.backbones.features import FeatureFormat, cat_tokens, token_mask
from blip2.backbones.frozen import Freezable
from blip2.backbones.pretrained import short_message
from blip2.errors import InputError
from blip2.model.kernels.linear import convert_linears

MAX_IMAGE_SIZE = 8192
"""Maximum height and width of an image encoder's input in pixels. A configuration file can claim any size, for which a
batch could need terabytes."""
WIDTH_KEYS = ("hidden_size", "hidden_sizes", "output_channels", "embed_dim", "num_features")
"""Names under which configurations of transformers and timm store the width of the features."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """The size and normalization of the pixels that an image encoder expects."""

    image_size: int
    """Height and width in pixels."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """Mean of each channel, subtracted from pixels in [0, 1]."""
    std: tuple[float, float, float] = CLIP_STD
    """Standard deviation of each channel, by which pixels are divided after the subtraction."""
    bgr: bool = False
    """Whether the channel order is blue, green, red; `mean` and `std` have the same order."""


class ImageEncoder(Freezable):
    """A pretrained network that maps pixels, or features of another program, to P features of width E.

    The constructor runs the network on two different images to find P and E and to check the features.

    Args:
        network: the module that has the weights.
        forward_features: maps pixels [B, 3, H, W] to features [B, P, E], or to a grid [B, E, h, w] or [B, h, w, E],
            which becomes P = h * w tokens. If `input_format` is a :class:`~blip2.backbones.features.FeatureFormat`, it
            maps arrays [B, P, E] without padding to features, whose P and E may differ from those of the arrays. It
            must not be a closure over `network`: a copy of this object (:func:`copy.deepcopy`) would still run the
            original network.
        input_format: size and normalization of the pixels, or the shape of the arrays.
        layer: name of the layer whose output `forward_features` returns, if the weights do not determine it.
        blocks: the blocks of a ViT in order; empty for other networks.

    Raises:
        InputError: the network cannot encode images of this size, or does not return separate features for each image.
    """

    def __init__(
        self,
        network: nn.Module,
        forward_features: Callable[[Tensor], Tensor],
        input_format: Preprocessing | FeatureFormat,
        layer: str = "",
        blocks: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.layer = layer
        self.network = network
        convert_linears(network)
        if not blocks and all(p.ndim < 5 for p in network.parameters()):  # a CNN: this memory format is fast
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.blocks = tuple(blocks)  # a ModuleList would register the parameters a second time
        if isinstance(input_format, Preprocessing) and not 0 < input_format.image_size <= MAX_IMAGE_SIZE:
            raise InputError(
                f"the image encoder is for images of {input_format.image_size} pixels per side, expected 1 to"
                f" {MAX_IMAGE_SIZE}: set vision.image_size, or correct the encoder's preprocessor_config.json"
            )
        self.input_format = input_format
        """The input of the network: images with this preprocessing, or arrays of features with this shape."""
        self.position_encoding: Literal["sine2d", "none"] = "none"
        """Position encoding that the models add to the output of :meth:`encode` (:mod:`blip2.model.image_memory`)."""
        self._forward_features = forward_features
        self._channels_last = False
        self.freeze()
        self.num_tokens, self.hidden_size = self._probe()

    @property
    def preprocessing(self) -> Preprocessing:
        """The size and normalization of the pixels.

        Raises:
            InputError: the encoder reads features.
        """
        if isinstance(self.input_format, FeatureFormat):
            raise InputError(
                "the model reads arrays of features (vision.name features), but this works on images only: load a model"
                " with an image encoder"
            )
        return self.input_format

    @property
    def has_padding(self) -> bool:
        """Whether tokens of NaN in the features are padding (:mod:`blip2.backbones.features`)."""
        return isinstance(self.input_format, FeatureFormat)

    def _probe(self) -> tuple[int, int]:
        """Run the network on two different images, check the features and return P and E."""
        form = self.input_format
        if isinstance(form, FeatureFormat) and isinstance(self.network, nn.Identity):
            return form.max_tokens, form.hidden_size
        if isinstance(form, FeatureFormat):
            shape, what = (
                (form.max_tokens, form.hidden_size),
                f"features of shape {form.max_tokens} x {form.hidden_size}",
            )
            advice = "correct vision.hidden_size, vision.max_tokens or the module"
        else:
            size = form.image_size
            shape, what = (3, size, size), f"images of {size} x {size} pixels"
            advice = "set vision.image_size to the size that it is made for, or vision.name to another image encoder"
        device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0), device="cpu")
        images[1] = 1 - images[1] * torch.linspace(0, 1, shape[-1], device="cpu")
        images = images.to(device)
        network_class = type(self.network).__name__
        try:
            with torch.no_grad(), self.autocast_context(device):
                output: Any = self._forward_features(images.to(self.dtype))
            if not isinstance(output, Tensor):
                raise TypeError(f"it returns a {type(output).__name__}, expected one tensor")
        except InputError:
            raise
        except Exception as error:  # networks raise any type of error for inputs that they do not support
            raise InputError(
                f"the image encoder, a {network_class}, cannot encode {what}"
                f" ({type(error).__name__}: {short_message(error)[:200]}): {advice}"
            ) from error
        if output.ndim == 4:
            self._channels_last = _is_channels_last(self.network, output)
        features = self._to_tokens(output, 2)
        if features.ndim != 3 or len(features) != 2 or not features.numel():
            raise InputError(
                f"the image encoder, a {network_class}, returns features of shape {list(output.shape)} for two images,"
                " expected [2, tokens, width]: use another image encoder (docs/models.md)"
            )
        if not features.isfinite().all():
            raise InputError(
                f"the image encoder, a {network_class}, returns features that are not finite: copy or download its"
                " weights again, or set vision.dtype to another data type"
            )
        if torch.equal(features[0], features[1]):
            raise InputError(
                f"the image encoder, a {network_class}, returns the same features for different images: copy or"
                " download its weights again, or set vision.name to another image encoder"
            )
        if output.ndim == 2 or len(output) == 1:  # one sequence of images that may attend to each other
            alone = self.encode(images[:1])
            if not torch.allclose(alone[0], features[0].float(), atol=1e-3 * float(features.abs().max())):
                raise InputError(
                    f"the image encoder, a {network_class}, returns features of an image that depend on the other"
                    " images of the batch: use another image encoder (docs/models.md)"
                )
        return features.shape[1], features.shape[2]

    def _to_tokens(self, output: Tensor, batch_size: int) -> Tensor:
        """Reshape the network's output to [B, P, E]."""
        if output.ndim == 4:
            return output.flatten(1, 2) if self._channels_last else output.flatten(2).transpose(1, 2)
        if output.ndim == 2:  # the tokens of all images in one sequence
            output = output[None]
        if batch_size > 1 and len(output) == 1 and output.shape[1] % batch_size == 0:
            return output[0].unflatten(0, (batch_size, -1))
        return output

    def compile_network(self) -> None:
        """Compile the network with torch.compile."""
        self._forward_features = torch.compile(self._forward_features)

    def layer_ids(self) -> dict[str, int]:
        """Return the number of the layer of each parameter, by parameter name.

        With N blocks this is 0 before the first block, 1 to N in the blocks, and N after the last block.

        Raises:
            InputError: the network has no blocks.
        """
        block_ids = {id(p): number for number, block in enumerate(self._get_blocks(), 1) for p in block.parameters()}
        layer_ids: dict[str, int] = {}
        default = 0
        for name, parameter in self.named_parameters():  # in the order of computation
            if id(parameter) in block_ids:
                default = len(self.blocks)
            layer_ids[name] = block_ids.get(id(parameter), default)
        return layer_ids

    def set_drop_path(self, rate: float) -> None:
        """Skip blocks at random while the network is in training mode (stochastic depth).

        For each image, the last block is skipped with probability `rate`, and earlier blocks with probabilities that
        decrease linearly to 0 at the first block. The residual of a block that is not skipped is scaled up, so that the
        mean of the output stays the same. Attention and feed-forward of a block are skipped together, whereas timm and
        LAVIS skip each of the two independently.

        Args:
            rate: probability of skipping the last block, in [0, 1).

        Raises:
            InputError: the network has no blocks.
        """
        for number, block in enumerate(self._get_blocks()):
            p = rate * number / max(len(self.blocks) - 1, 1)
            if p:
                # This hook must run before the hooks with which transformers records the hidden states.
                block.register_forward_hook(partial(_drop_path, p), prepend=True, with_kwargs=True)

    def _get_blocks(self) -> Sequence[nn.Module]:
        if not self.blocks:
            raise InputError(
                f"the image encoder, a {type(self.network).__name__}, is not a stack of equal blocks: set"
                " optimizer.layer_decay to 1 and vision.drop_path_rate to 0"
            )
        return self.blocks

    def encode(self, images: Shaped[Tensor, "B ..."]) -> Float[Tensor, "B P E"]:
        """Encode images.

        Args:
            images: pixels [B, 3, H, W], normalized as :attr:`preprocessing` says; or arrays [B, 1, P, E] that the
                network reads, padded with NaN; or features [B, P, E] that were encoded before, which are returned
                unchanged.

        Returns:
            Features in float32, without the position encoding of :attr:`position_encoding`. If :attr:`has_padding`,
            tokens of NaN are padding.
        """
        if images.ndim == 3:
            return images.float()
        needs_grad = torch.is_grad_enabled() and not self.is_frozen
        with torch.set_grad_enabled(needs_grad), self.autocast_context(images.device):
            if self.has_padding:
                return self._encode_arrays(images[:, 0])
            features = self._forward_features(images.to(self.dtype))
        return self._to_tokens(features, len(images)).float()

    def _encode_arrays(self, arrays: Float[Tensor, "B _ _"]) -> Float[Tensor, "B P E"]:
        """Run the network on each group of arrays of equal length, so that it needs no padding or mask."""
        if isinstance(self.network, nn.Identity):
            return arrays.float()
        lengths = token_mask(arrays).sum(dim=1)
        rows = [(lengths == length).nonzero().squeeze(1) for length in lengths.unique()]
        parts = [
            self._to_tokens(self._forward_features(arrays[each, : int(lengths[each[0]])].to(self.dtype)), len(each))
            for each in rows
        ]
        return cat_tokens([part.float() for part in parts])[torch.cat(rows).argsort()]


def _is_channels_last(network: nn.Module, grid: Tensor) -> bool:
    """Return whether the features of a square image are [B, h, w, E] rather than [B, E, h, w].

    Raises:
        InputError: neither the widths in the configuration nor the shape of the grid tells which dimension is E.
    """
    config: Any = getattr(network, "config", None)
    values = [getattr(config, name, None) for name in WIDTH_KEYS] + [getattr(network, "num_features", None)]
    widths = {width for value in values for width in (value if isinstance(value, list | tuple) else [value])}
    _, a, b, c = grid.shape
    for is_first, is_last in ((a in widths, c in widths), (b == c, a == b)):
        if is_first != is_last:
            return is_last
    raise InputError(
        f"the image encoder, a {type(network).__name__}, returns features of shape {list(grid.shape)}, and it is not"
        " clear which dimension is their width: set vision.image_size to another size"
    )


def _drop_path(p: float, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Replace a block's output by the block's input with probability `p` for each image (a forward hook)."""
    if not block.training:
        return output
    residual: Tensor = args[0] if args else kwargs["hidden_states"]
    hidden_states: Tensor = output[0] if isinstance(output, tuple) else output
    shape = (len(hidden_states), *[1] * (hidden_states.ndim - 1))
    keep = torch.rand(shape, device=hidden_states.device) >= p
    hidden_states = torch.where(keep, residual + (hidden_states - residual) / (1 - p), residual)
    return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states
