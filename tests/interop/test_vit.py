import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from blip2.backbones.vision import ImageEncoder, Preprocessing
from blip2.backbones.vision_loaders import Layer, load_image_encoder, wrap_transformers
from blip2.errors import InputError
from blip2.interop.vit import to_blip2_vision
from fixtures.tiny import randomize

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 28,
    "patch_size": 7,
}
DINO = {**SIZES, "mlp_ratio": 2}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
SIGLIP_2 = {key: value for key, value in SIZES.items() if key != "image_size"} | {"num_patches": 16}
KEY_MAPS: dict[str, Callable[[], nn.Module]] = {
    "BLIP-2": lambda: hf.Blip2VisionModel(hf.Blip2VisionConfig(**SIZES, hidden_act="quick_gelu", layer_norm_eps=1e-3)),
    "BLIP-2, no biases": lambda: hf.Blip2VisionModel(hf.Blip2VisionConfig(**SIZES, qkv_bias=False)),
    "ViT": lambda: hf.ViTModel(hf.ViTConfig(**SIZES, layer_norm_eps=1e-2)),
    "ViT, no biases": lambda: hf.ViTModel(hf.ViTConfig(**SIZES, qkv_bias=False), add_pooling_layer=False),
    "ViT, quick GELU": lambda: hf.ViTModel(hf.ViTConfig(**SIZES, hidden_act="quick_gelu"), use_mask_token=True),
    "DINOv2": lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO, layerscale_value=0.5)),
    "DINOv2, no mask": lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO, use_mask_token=False, hidden_act="gelu_new")),
}
REFUSED: dict[str, tuple[Callable[[], nn.Module], int, Layer | None, str]] = {
    "CLIP": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SIZES)), 28, None, "a norm before its first block"),
    "SigLIP": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIZES)), 28, None, "no CLS token"),
    "SigLIP 2": (lambda: hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**SIGLIP_2)), 28, None, "no CLS token"),
    "registers": (
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**DINO)), 28, None, "registers"
    ),
    "SwiGLU": (lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO, use_swiglu_ffn=True)), 28, None, r"gates .*\(SwiGLU\)"),
    "DINOv3": (
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SIZES, num_register_tokens=2)),
        28, None, r"rotary positions \(RoPE\)",
    ),
    "Swin": (lambda: hf.SwinModel(hf.SwinConfig(**SWIN)), 32, None, "in windows"),
    "BEiT": (
        lambda: hf.BeitModel(hf.BeitConfig(**SIZES, use_relative_position_bias=True)), 28, None, "relative positions"
    ),
    "DeiT": (lambda: hf.DeiTModel(hf.DeiTConfig(**SIZES)), 28, None, "a distillation token"),
    "ConvNeXt": (lambda: hf.ConvNextModel(hf.ConvNextConfig(**STAGES)), 64, None, "convolutions besides"),
    "ResNet": (
        lambda: hf.ResNetModel(hf.ResNetConfig(embedding_size=8, **STAGES)), 64, None, "convolutions besides"
    ),
    "MSN": (lambda: hf.ViTMSNModel(hf.ViTMSNConfig(**SIZES)), 28, None, "a type other than .*ViTModel"),
    "ViT, last": (lambda: hf.ViTModel(hf.ViTConfig(**SIZES)), 28, "last", r"a final norm .*\(vision\.layer last\)"),
    "DINOv2, last": (lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO)), 28, "last", "a final norm"),
}  # fmt: skip


def pixels(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def features(config: Any, weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """What transformers' own module makes of images, without its last norm."""
    network = hf.Blip2VisionModel(config)
    network.register_module("post_layernorm", nn.Identity())
    network.load_state_dict(weights)
    return network.to(images.dtype).eval()(images).last_hidden_state


def check(encoder: ImageEncoder, layer: Layer | None = None) -> tuple[Any, dict[str, Tensor]]:
    images = pixels(encoder.preprocessing.image_size)
    config, weights = to_blip2_vision(encoder, layer)
    expected = encoder.encode(images)
    assert expected.std() > 0.3
    torch.testing.assert_close(features(config, weights, images), expected, atol=2e-6, rtol=0)
    return config, weights


@pytest.mark.parametrize("size", [28, 42])
@pytest.mark.parametrize("name", KEY_MAPS)
def test_the_features_stay(name, size):
    encoder = wrap_transformers(randomize(KEY_MAPS[name]()), Preprocessing(size))
    config, weights = check(encoder)
    assert config.num_hidden_layers == (3 if name.startswith("BLIP-2") else 2)
    assert (config.image_size, config.patch_size, config.num_attention_heads) == (size, 7, 4)
    assert config.qkv_bias == ("no biases" not in name)
    assert {t.dtype for t in weights.values()} == {torch.float32}
    assert not any(t.requires_grad for t in weights.values())


def test_blip2_stays_as_it_is():
    network = randomize(KEY_MAPS["BLIP-2"]())
    before = {k: v.clone() for k, v in network.state_dict().items() if not k.startswith("post_layernorm")}
    config, weights = to_blip2_vision(wrap_transformers(network, Preprocessing(28)), "second-last")
    torch.testing.assert_close(weights, before, atol=0, rtol=0)
    assert config is not network.config and config.to_dict() == network.config.to_dict()


def test_an_encoder_is_not_changed():
    encoder = wrap_transformers(randomize(KEY_MAPS["DINOv2"]()), Preprocessing(42))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    to_blip2_vision(encoder, None)
    torch.testing.assert_close(dict(encoder.state_dict()), before, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["ViT", "DINOv2"])
def test_dtypes_stay(name):
    encoder = wrap_transformers(randomize(KEY_MAPS[name]()).bfloat16(), Preprocessing(42))
    config, weights = to_blip2_vision(encoder, None)
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    expected = encoder.encode(pixels(42))
    assert (features(config, weights, pixels(42).bfloat16()).float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_layout_cannot_hold(name):
    make, size, layer, reason = REFUSED[name]
    network: Any = make()
    network = getattr(network, "vision_model", network)
    encoder = wrap_transformers(network, Preprocessing(size), layer)
    what = f"a transformers.{type(network).__name__}, does not fit"
    with pytest.raises(InputError, match=rf"{what}.*{reason}.*: convert to the format blip2 instead$") as caught:
        to_blip2_vision(encoder, layer)
    assert "\n" not in str(caught.value)


def test_patches_that_are_not_square():
    network = hf.ViTModel(hf.ViTConfig(**{**SIZES, "patch_size": [14, 7]}))
    encoder = ImageEncoder(network, lambda images: network(images).last_hidden_state, Preprocessing(28))
    with pytest.raises(InputError, match="patches of 14 x 7 pixels give 9 tokens for 28 x 28 pixels"):
        to_blip2_vision(encoder, None)


@pytest.mark.parametrize(
    ("heads", "reason"),
    [
        (4, r"its encoder\.layers\.0\.self_attn\.projection\.weight is \(32, 16\), expected \(32, 32\)"),
        (5, "5 heads do not divide its width 32"),
    ],
)
def test_narrow_heads(heads, reason):
    config = hf.ViTConfig(**{**SIZES, "num_attention_heads": heads}, head_dim=4)
    encoder = wrap_transformers(hf.ViTModel(config), Preprocessing(28))
    with pytest.raises(InputError, match=reason):
        to_blip2_vision(encoder, None)


def test_weights_of_unknown_meaning_are_listed():
    encoder = wrap_transformers(KEY_MAPS["ViT"](), Preprocessing(28))
    encoder.network.register_parameter("temperature", nn.Parameter(torch.ones(1)))
    with pytest.raises(InputError, match=r"transformers\.ViTModel has 1 weight .*: temperature"):
        to_blip2_vision(encoder, None)


# -- timm --------------------------------------------------------------------------------------------------------------

TIMM: dict[str, Any] = {
    "patch_size": 7,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 1.5,
    "num_classes": 0,
}


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # the latter of a torchvision for another torch
        pytest.skip(f"timm cannot be imported: {error}")
    return timm


def load(timm: Any, monkeypatch: Any, kind: str, size: int, layer: Layer | None = None, **options: Any) -> ImageEncoder:
    """A tiny random model of timm, loaded as one of its own would be."""

    def create_model(name: str, img_size: int, **_: Any) -> nn.Module:
        return randomize(getattr(timm.models, kind)(**{**TIMM, "img_size": img_size, **options})).eval()

    monkeypatch.setattr(timm, "create_model", create_model)
    return load_image_encoder("timm:tiny", layer, size)


@pytest.mark.parametrize("size", [28, 42])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("VisionTransformer", {}),
        ("VisionTransformer", {"init_values": 1e-5}),  # DINOv2
        ("VisionTransformer", {"no_embed_class": True, "init_values": 1e-5}),  # DeiT III
        ("VisionTransformer", {"qkv_bias": False, "proj_bias": False}),
        ("VisionTransformer", {"act_layer": "quick_gelu", "global_pool": "avg"}),
        ("VisionTransformer", {"act_layer": "gelu_tanh"}),
        ("VisionTransformer", {"dynamic_img_size": True}),
        ("Eva", {"global_pool": "token"}),  # EVA-CLIP
        ("Eva", {"qkv_bias": False}),
        ("Eva", {"init_values": 1e-5}),
    ],
)
def test_timm(timm, monkeypatch, kind, options, size):
    encoder = load(timm, monkeypatch, kind, size, **options)
    config, _ = check(encoder)
    act = {"quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}.get(options.get("act_layer", ""), "gelu")
    assert (config.num_hidden_layers, config.image_size, config.hidden_act) == (2, size, act)


def test_timm_s_last_layer_without_a_norm(timm, monkeypatch):
    encoder = load(timm, monkeypatch, "VisionTransformer", 28, "last", global_pool="avg")  # normed after pooling
    assert check(encoder, "last")[0].num_hidden_layers == 3


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("VisionTransformer", {"pre_norm": True}, "a norm before its first block"),
        ("VisionTransformer", {"class_token": False, "global_pool": "avg"}, "no CLS token"),
        ("VisionTransformer", {"reg_tokens": 2}, "registers"),
        ("VisionTransformer", {"pos_embed": "none"}, "no learned position embeddings"),
        ("VisionTransformer", {"qk_norm": True}, "norms in other places"),
        ("VisionTransformer", {"scale_mlp_norm": True}, "norms in other places"),
        ("VisionTransformer", {"patch_size": (14, 7)}, "patches of 14 x 7 pixels give 9 tokens"),
        ("VisionTransformer", {"act_layer": "mish"}, r"activation Mish\(\) is not one of gelu"),
        ("VisionTransformer", {"norm_layer": "rmsnorm"}, "RmsNorm"),
        ("VisionTransformer", {"block_fn": "ResPostBlock"}, "ResPostBlock"),
        ("VisionTransformer", {"mlp_layer": "SwiGLU"}, "gates"),
        ("VisionTransformer", {"dynamic_img_size": True, "dynamic_img_pad": True}, "26 tokens for 30 x 30 pixels"),
        ("VisionTransformer", {"layer": "last"}, "a final norm"),
        ("VisionTransformerDistilled", {}, "a distillation token"),
        ("Beit", {"use_rel_pos_bias": True}, "relative positions"),
        ("Eva", {"use_rot_pos_emb": True}, "rotary positions"),
        ("Eva", {"swiglu_mlp": True}, "gates"),
        ("Eva", {"scale_mlp": True, "scale_attn_inner": True}, "norms in other places"),
        ("Eva", {"use_post_norm": True}, "EvaBlockPostNorm"),
    ],
)
def test_timm_that_the_layout_cannot_hold(timm, monkeypatch, kind, options, reason):
    options = dict(options)
    for name in ("block_fn", "mlp_layer"):
        if name in options:
            home = sys.modules["timm.models.vision_transformer"]
            options[name] = getattr(home, options[name], None) or getattr(timm.layers, options[name])
    encoder = load(timm, monkeypatch, kind, 30 if "dynamic_img_pad" in options else 28, **options)
    with pytest.raises(InputError, match=rf"a timm\.{kind}, does not fit.*{reason}.*convert to") as caught:
        to_blip2_vision(encoder, options.get("layer"))
    assert "\n" not in str(caught.value)
