"""Image encoders in the layout of transformers' ``Blip2VisionModel``.

That module is a plain ViT: a CLS token, a table of learned positions, blocks with their norms in front. Many encoders
compute the same under other names. Three things beside the names are said otherwise, none of them changes a feature:
query, key and value are one matrix, the scales of DINOv2's layers are multiplied into the matrices before them, and the
positions are those of the image size in use.
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

from blip2.backbones.pretrained import empty_model
from blip2.backbones.vision import ImageEncoder, Layer, resize_positions
from blip2.errors import InputError
from blip2.interop.checkpoint import VISION
from blip2.interop.key_map import Table, listing, rename
from blip2.interop.lavis import EVA_NAMES, join_biases

LAYER = "encoder.layers.{}"
CLASS, POSITIONS, PATCHES = (f"embeddings.{part}_embedding" for part in ("class", "position", "patch"))
BLIP2: Table = (("embeddings.{...}", "embeddings.{...}"), (f"{LAYER}.{{...}}", f"{LAYER}.{{...}}"))
VIT: Table = (
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
DINOV2: Table = (
    *VIT[:3],
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
TIMM: Table = (
    *((theirs.removeprefix("visual_encoder."), ours.removeprefix(VISION)) for theirs, ours in EVA_NAMES),
    ("blocks.{}.ls1.gamma", f"{LAYER}.self_attn.scale"),
    ("blocks.{}.ls2.gamma", f"{LAYER}.mlp.scale"),
    ("blocks.{}.gamma_1", f"{LAYER}.self_attn.scale"),
    ("blocks.{}.gamma_2", f"{LAYER}.mlp.scale"),
)
FAMILIES = {
    "transformers.Blip2VisionModel": BLIP2,
    "transformers.ViTModel": VIT,
    "transformers.Dinov2Model": DINOV2,
    "timm.VisionTransformer": TIMM,
    "timm.Eva": TIMM,
}
UNUSED = ("post_layernorm.", "layernorm.", "pooler.", "embeddings.mask_token", "fc_norm.", "attn_pool.", "head.")
"""Beginnings of the names of what no feature depends on: what comes after the blocks, and what hides patches."""
OBSTACLES = (
    (r"\bpre_layrnorm\b|\bnorm_pre\.weight", "a norm before its first block"),
    (r"(?i)rope|rotary", "rotary positions (RoPE)"),
    (r"\bregister_tokens\b|\breg_token\b", "registers"),
    (r"dist_token\b|distillation_token\b", "a distillation token"),
    (r"(?i)glu(mlp|ffn|packed)?\b|gatedmlp|\bgate(_proj)?\b", "gates in its blocks (SwiGLU)"),
    (r"(?i)relative_?position|rel_pos|window", "attention with relative positions or in windows"),
    (r"\b[qk]_norm\.weight|\b(attn|mlp|patch_embed)\.norm\.weight", "norms in other places"),
)
"""What stands in the names of an encoder's weights and modules where it has something that the layout has not."""
PLAIN = {
    "VisionTransformer", "Eva", "PatchEmbed", "Conv2d", "Sequential", "ModuleList", "Block", "EvaBlock", "LayerNorm",
    "LayerNormFp32", "Attention", "EvaAttention", "Linear", "Mlp", "LayerScale", "Identity", "Dropout", "DropPath",
}  # fmt: skip
"""Modules of timm that compute what the layout's do: others may have weights of the same names."""
ACTIVATIONS = ("gelu", "quick_gelu", "gelu_pytorch_tanh", "relu", "silu")


def to_blip2(encoder: ImageEncoder, layer: Layer | None) -> tuple[Blip2VisionConfig, dict[str, Tensor]]:
    """An image encoder in the layout of transformers' ``Blip2VisionModel``.

    Args:
        encoder: as :func:`load_image_encoder` makes it.
        layer: that it was made with.

    Returns:
        The configuration, and the weights without ``post_layernorm``, which is the trained norm of the features
        (``image_norm``). With the identity in its place they give the features of `encoder`. The tensors have the
        encoder's dtypes, and some of them its memory.

    Raises:
        InputError: the encoder is one that the layout has no place for.
    """
    network: Any = encoder.network
    if obstacle := _obstacle(network, layer, encoder.preprocessing.bgr):
        raise _refusal(network, f"it has {obstacle}")
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(UNUSED)}
    join_biases(state)  # of timm's EVA
    state = {new: state[old] for old, new in rename(state, FAMILIES[_kind(network)], _kind(network)).items()}
    _join_attention(state)
    _fold_scales(state)

    width, _, height, patch = state[f"{PATCHES}.weight"].shape
    size = encoder.preprocessing.image_size
    grid = size // patch
    if encoder.tokens != grid**2 + 1:
        raise _refusal(network, f"{height} x {patch} pixels a patch make {encoder.tokens} tokens of a square of {size}")
    if getattr(network, "no_embed_class", False):  # in timm: its CLS token has no position
        state[POSITIONS] = F.pad(state[POSITIONS], (0, 0, 1, 0))
    if _kind(network).startswith("transformers."):  # these interpolate at each call, timm's have done so
        state[POSITIONS] = resize_positions(state[POSITIONS], grid)

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


def _kind(network: nn.Module) -> str:
    return f"{type(network).__module__.split('.')[0]}.{type(network).__name__}"


def _refusal(network: nn.Module, reason: str) -> InputError:
    return InputError(
        f"the image encoder, a {_kind(network)}, does not fit the layout of BLIP-2's own ({reason}): convert to"
        " blip2's own format instead"
    )


def _obstacle(network: Any, layer: Layer | None, bgr: bool) -> str | None:
    """Something that an encoder has and the layout has not."""
    kind = _kind(network)
    types = {name: type(m).__name__ for name, m in network.named_modules() if not f"{name}.".startswith(UNUSED)}
    names = " ".join([*(name for name in network.state_dict() if not name.startswith(UNUSED)), *types, *types.values()])
    if bgr:
        return "channels in the order blue, green, red"
    for pattern, reason in OBSTACLES:
        if re.search(pattern, names):
            return reason
    if sum(isinstance(module, nn.Conv2d) for module in network.modules()) > 1:
        return "convolutions beside that of its patches"
    if not re.search(r"\b(cls_token|class_embedding|class_token)\b", names):
        return "no CLS token"
    if not re.search(r"\b(pos_embed|position_embeddings?)\b", names):
        return "no learned positions"
    norm = getattr(network, "norm", getattr(network, "post_layernorm", None))
    if layer == "last" if norm is None else not isinstance(norm, nn.Identity):
        return "a final norm applied to its features (vision.layer last)"
    if kind not in FAMILIES:
        return "a type that is none of " + ", ".join(FAMILIES)
    odd = {of for name, of in types.items() if not name.endswith(".mlp.act")} - PLAIN
    return f"modules of other types ({listing(odd)})" if kind.startswith("timm.") and odd else None


def _settings(network: Any) -> dict[str, Any]:
    """What the weights do not say: number of heads, activation, and epsilon of the norms."""
    if _kind(network).startswith("transformers."):
        config = network.config
        found = {(config.num_attention_heads, config.hidden_act, config.layer_norm_eps)}
    else:
        found = {
            (block.attn.num_heads, _activation(block.mlp.act), norm.eps)
            for block in network.blocks
            for norm in (block.norm1, block.norm2)
        }
    if len(found) != 1:
        raise _refusal(network, f"its blocks are of {len(found)} kinds")
    heads, activation, eps = found.pop()
    if activation is None:
        raise _refusal(network, f"its activation {network.blocks[0].mlp.act} is none of {', '.join(ACTIVATIONS)}")
    return {"num_attention_heads": heads, "hidden_act": activation, "layer_norm_eps": eps}


def _activation(function: nn.Module) -> str | None:
    """The name that transformers has for an activation, by what it computes."""
    x = torch.linspace(-8, 8, 1001)
    return next((name for name in ACTIVATIONS if torch.allclose(function(x.clone()), ACT2FN[name](x), atol=1e-6)), None)


def _join_attention(state: dict[str, Tensor]) -> None:
    """Query, key and value to one matrix."""
    for name in [name for name in state if ".self_attn.q_proj." in name]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in ("q", "k", "v")]
        state[name.replace("q_proj", "qkv")] = torch.cat(parts)


def _fold_scales(state: dict[str, Tensor]) -> None:
    """The scale of what a layer adds, into the matrix and the bias that make it."""
    for name in [name for name in state if name.endswith(".scale")]:
        scale = state.pop(name).float()
        matrix = name.replace("self_attn.scale", "self_attn.projection").replace("mlp.scale", "mlp.fc2")
        for key, factor in ((f"{matrix}.weight", scale[:, None]), (f"{matrix}.bias", scale)):
            if key in state:
                state[key] = (state[key].float() * factor).to(state[key].dtype)


def _complete(state: dict[str, Tensor], config: Blip2VisionConfig, network: nn.Module) -> None:
    """Add zeros where the layout has a bias and the encoder has none; see that all the rest is there."""
    if config.hidden_size % config.num_attention_heads:
        raise _refusal(network, f"{config.num_attention_heads} heads do not divide its width {config.hidden_size}")
    empty = empty_model(config).state_dict()
    layout = {name: tuple(tensor.shape) for name, tensor in empty.items() if not name.startswith(UNUSED)}
    for name, shape in layout.items():
        if name.endswith(".bias") and name not in state:
            state[name] = state[f"{PATCHES}.weight"].new_zeros(shape)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(found.keys() | layout.keys()):
        if found.get(name) != layout.get(name):
            raise _refusal(network, f"its {name} is {found.get(name)}, expected {layout.get(name)}")
