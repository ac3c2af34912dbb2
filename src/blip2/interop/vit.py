"""Convert image encoders to the layout of transformers' ``Blip2VisionModel``.

This layout is a plain pre-norm ViT with a CLS token and learned position embeddings. Many image encoders compute the
same function with other names of their weights. Besides renaming, the conversion merges the query, key and value
projections into one matrix, multiplies DINOv2's layer scales into the preceding matrices and interpolates the position
embeddings to the image size in use. The features stay the same.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2VisionConfig, Blip2VisionModel
from transformers.activations import ACT2FN

from blip2.backbones.pretrained import init_empty_model
from blip2.backbones.vision import ImageEncoder
from blip2.backbones.vision_loaders import Layer, interpolate_pos_embed
from blip2.errors import InputError
from blip2.interop.checkpoint import VISION_PREFIX
from blip2.interop.key_map import KeyMap, format_names, rename_keys
from blip2.interop.lavis import EVA_KEYS, merge_qkv_bias

LAYER = "encoder.layers.{}"
CLASS, POSITIONS, PATCHES = (f"embeddings.{part}_embedding" for part in ("class", "position", "patch"))
BLIP2_KEYS: KeyMap = (("embeddings.{...}", "embeddings.{...}"), (f"{LAYER}.{{...}}", f"{LAYER}.{{...}}"))
VIT_KEYS: KeyMap = (
    ("embeddings.cls_token", CLASS),
    ("embeddings.position_embeddings", POSITIONS),
    ("embeddings.patch_embeddings.projection", PATCHES),
    ("layers.{}.layernorm_before", f"{LAYER}.layer_norm1"),
    ("layers.{}.attention.q_proj", f"{LAYER}.self_attn.q_proj"),
    ("layers.{}.attention.k_proj", f"{LAYER}.self_attn.k_proj"),
    ("layers.{}.attention.v_proj", f"{LAYER}.self_attn.v_proj"),
    ("layers.{}.attention.o_proj", f"{LAYER}.self_attn.projection"),
    ("layers.{}.layernorm_after", f"{LAYER}.layer_norm2"),
    ("layers.{}.mlp.{...}", f"{LAYER}.mlp.{{...}}"),
)
DINOV2_KEYS: KeyMap = (
    *VIT_KEYS[:3],
    ("encoder.layer.{}.norm1", f"{LAYER}.layer_norm1"),
    ("encoder.layer.{}.attention.q_proj", f"{LAYER}.self_attn.q_proj"),
    ("encoder.layer.{}.attention.k_proj", f"{LAYER}.self_attn.k_proj"),
    ("encoder.layer.{}.attention.v_proj", f"{LAYER}.self_attn.v_proj"),
    ("encoder.layer.{}.attention.o_proj", f"{LAYER}.self_attn.projection"),
    ("encoder.layer.{}.layer_scale1.lambda1", f"{LAYER}.self_attn.scale"),
    ("encoder.layer.{}.norm2", f"{LAYER}.layer_norm2"),
    ("encoder.layer.{}.mlp.{...}", f"{LAYER}.mlp.{{...}}"),
    ("encoder.layer.{}.layer_scale2.lambda1", f"{LAYER}.mlp.scale"),
)
# LAVIS's EVA-CLIP has timm's names.
TIMM_KEYS: KeyMap = (
    *((theirs.removeprefix("visual_encoder."), ours.removeprefix(VISION_PREFIX)) for theirs, ours in EVA_KEYS),
    ("blocks.{}.ls1.gamma", f"{LAYER}.self_attn.scale"),
    ("blocks.{}.ls2.gamma", f"{LAYER}.mlp.scale"),
    ("blocks.{}.gamma_1", f"{LAYER}.self_attn.scale"),
    ("blocks.{}.gamma_2", f"{LAYER}.mlp.scale"),
)
KEY_MAPS = {
    "transformers.Blip2VisionModel": BLIP2_KEYS,
    "transformers.ViTModel": VIT_KEYS,
    "transformers.Dinov2Model": DINOV2_KEYS,
    "timm.VisionTransformer": TIMM_KEYS,
    "timm.Eva": TIMM_KEYS,
}
UNUSED_PREFIXES = (
    "post_layernorm.",
    "layernorm.",
    "pooler.",
    "embeddings.mask_token",
    "fc_norm.",
    "attn_pool.",
    "head.",
)
"""Name prefixes of weights that do not affect the features: those after the blocks, and the mask token."""
UNSUPPORTED = (
    (r"\bpre_layrnorm\b|\bnorm_pre\.weight", "a norm before its first block"),
    (r"(?i)rope|rotary", "rotary positions (RoPE)"),
    (r"\bregister_tokens\b|\breg_token\b", "registers"),
    (r"dist_token\b|distillation_token\b", "a distillation token"),
    (r"(?i)glu(mlp|ffn|packed)?\b|gatedmlp|\bgate(_proj)?\b", "gates in its blocks (SwiGLU)"),
    (r"(?i)relative_?position|rel_pos|window", "attention with relative positions or in windows"),
    (r"\b[qk]_norm\.weight|\b(attn|mlp|patch_embed)\.norm\.weight", "norms in other places"),
)
"""Pairs (pattern of the names of weights and modules, feature that the layout does not support)."""
SUPPORTED_TIMM_MODULES = {
    "VisionTransformer", "Eva", "PatchEmbed", "Conv2d", "Sequential", "ModuleList", "Block", "EvaBlock", "LayerNorm",
    "LayerNormFp32", "Attention", "EvaAttention", "Linear", "Mlp", "LayerScale", "Identity", "Dropout", "DropPath",
}  # fmt: skip
"""Modules of timm that compute the same as the modules of the layout. Other modules may compute something else with
weights of the same names."""
ACTIVATIONS = ("gelu", "quick_gelu", "gelu_pytorch_tanh", "relu", "silu")


def to_blip2_vision(encoder: ImageEncoder, layer: Layer | None) -> tuple[Blip2VisionConfig, dict[str, Tensor]]:
    """Convert an image encoder to the layout of transformers' ``Blip2VisionModel``.

    Args:
        encoder: an encoder returned by :func:`load_image_encoder`.
        layer: the layer that was given to :func:`load_image_encoder`.

    Returns:
        The configuration and the weights. There is no ``post_layernorm`` in the weights, because the trained norm of
        the features (``image_norm``) takes its place; a model with an identity as ``post_layernorm`` returns the
        features of `encoder`. Tensors keep their data types and may share memory with the encoder.

    Raises:
        InputError: the layout does not support the encoder.
    """
    network: Any = encoder.network
    if obstacle := _find_unsupported(network, layer, encoder.preprocessing.bgr):
        raise _unsupported_error(network, f"it has {obstacle}")
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(UNUSED_PREFIXES)}
    merge_qkv_bias(state)  # of timm's EVA
    state = {
        new: state[old] for old, new in rename_keys(state, KEY_MAPS[_class_name(network)], _class_name(network)).items()
    }
    _merge_qkv(state)
    _fold_scales(state)

    width, _, height, patch = state[f"{PATCHES}.weight"].shape
    size = encoder.preprocessing.image_size
    grid = size // patch
    if encoder.num_tokens != grid**2 + 1:
        raise _unsupported_error(
            network,
            f"patches of {height} x {patch} pixels give {encoder.num_tokens} tokens for {size} x {size} pixels",
        )
    if getattr(network, "no_embed_class", False):  # timm: the CLS token has no position embedding
        state[POSITIONS] = F.pad(state[POSITIONS], (0, 0, 1, 0))
    if _class_name(network).startswith("transformers."):  # timm has interpolated already
        state[POSITIONS] = interpolate_pos_embed(state[POSITIONS], grid)

    config: Any
    if isinstance(network, Blip2VisionModel):
        config = copy.deepcopy(network.config)
    else:
        config = Blip2VisionConfig(**_settings(network), qkv_bias=any(name.endswith(".qkv.bias") for name in state))
    config.hidden_size, config.image_size, config.patch_size = width, size, patch
    config.num_hidden_layers = sum(name.endswith(".mlp.fc1.weight") for name in state)
    config.intermediate_size = len(state["encoder.layers.0.mlp.fc1.weight"])
    _complete(state, config, network)
    return config, state


def _class_name(network: nn.Module) -> str:
    return f"{type(network).__module__.split('.')[0]}.{type(network).__name__}"


def _unsupported_error(network: nn.Module, reason: str) -> InputError:
    return InputError(
        f"the image encoder, a {_class_name(network)}, does not fit the layout of BLIP-2's image encoder"
        f" ({reason}): convert to the format blip2 instead"
    )


def _find_unsupported(network: Any, layer: Layer | None, bgr: bool) -> str | None:
    """Return a feature of the encoder that the layout does not support; None if the layout supports all features."""
    kind = _class_name(network)
    types = {
        name: type(m).__name__ for name, m in network.named_modules() if not f"{name}.".startswith(UNUSED_PREFIXES)
    }
    names = " ".join(
        [*(name for name in network.state_dict() if not name.startswith(UNUSED_PREFIXES)), *types, *types.values()]
    )
    if bgr:
        return "channels in BGR order"
    for pattern, reason in UNSUPPORTED:
        if re.search(pattern, names):
            return reason
    if sum(isinstance(module, nn.Conv2d) for module in network.modules()) > 1:
        return "convolutions besides the patch embedding"
    if not re.search(r"\b(cls_token|class_embedding|class_token)\b", names):
        return "no CLS token"
    if not re.search(r"\b(pos_embed|position_embeddings?)\b", names):
        return "no learned position embeddings"
    norm = getattr(network, "norm", getattr(network, "post_layernorm", None))
    if layer == "last" if norm is None else not isinstance(norm, nn.Identity):
        return "a final norm applied to its features (vision.layer last)"
    if kind not in KEY_MAPS:
        return "a type other than " + ", ".join(KEY_MAPS)
    other = {kind for name, kind in types.items() if not name.endswith(".mlp.act")} - SUPPORTED_TIMM_MODULES
    return f"modules of other types ({format_names(other)})" if kind.startswith("timm.") and other else None


def _settings(network: Any) -> dict[str, Any]:
    """Return the settings that the weights do not determine: number of heads, activation and epsilon of the norms."""
    if _class_name(network).startswith("transformers."):
        config = network.config
        found = {(config.num_attention_heads, config.hidden_act, config.layer_norm_eps)}
    else:
        found = {
            (block.attn.num_heads, _activation(block.mlp.act), norm.eps)
            for block in network.blocks
            for norm in (block.norm1, block.norm2)
        }
    if len(found) != 1:
        raise _unsupported_error(network, "its blocks differ in their number of heads, activation or norms")
    heads, activation, eps = found.pop()
    if activation is None:
        raise _unsupported_error(
            network, f"its activation {network.blocks[0].mlp.act} is not one of {', '.join(ACTIVATIONS)}"
        )
    return {"num_attention_heads": heads, "hidden_act": activation, "layer_norm_eps": eps}


def _activation(function: nn.Module) -> str | None:
    """Return transformers' name of an activation, found by comparing values; None if no name in ACTIVATIONS fits."""
    x = torch.linspace(-8, 8, 1001)
    return next((name for name in ACTIVATIONS if torch.allclose(function(x.clone()), ACT2FN[name](x), atol=1e-6)), None)


def _merge_qkv(state: dict[str, Tensor]) -> None:
    """Merge the query, key and value projections into one."""
    for name in [name for name in state if ".self_attn.q_proj." in name]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in ("q", "k", "v")]
        state[name.replace("q_proj", "qkv")] = torch.cat(parts)


def _fold_scales(state: dict[str, Tensor]) -> None:
    """Multiply each layer scale into the matrix and the bias of the preceding linear layer."""
    for name in [name for name in state if name.endswith(".scale")]:
        scale = state.pop(name).float()
        matrix = name.replace("self_attn.scale", "self_attn.projection").replace("mlp.scale", "mlp.fc2")
        for key, factor in ((f"{matrix}.weight", scale[:, None]), (f"{matrix}.bias", scale)):
            if key in state:
                state[key] = (state[key].float() * factor).to(state[key].dtype)


def _complete(state: dict[str, Tensor], config: Blip2VisionConfig, network: nn.Module) -> None:
    """Add zeros for the biases that the encoder does not have, and check that all other weights are present."""
    if config.hidden_size % config.num_attention_heads:
        raise _unsupported_error(
            network, f"{config.num_attention_heads} heads do not divide its width {config.hidden_size}"
        )
    empty = init_empty_model(config).state_dict()
    layout = {name: tuple(tensor.shape) for name, tensor in empty.items() if not name.startswith(UNUSED_PREFIXES)}
    for name, shape in layout.items():
        if name.endswith(".bias") and name not in state:
            state[name] = state[f"{PATCHES}.weight"].new_zeros(shape)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(found.keys() | layout.keys()):
        if found.get(name) != layout.get(name):
            raise _unsupported_error(
                network, f"its {name} is {found.get(name, 'missing')}, expected {layout.get(name, 'none')}"
            )
