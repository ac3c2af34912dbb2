import inspect
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionEmbeddings

from blip2.backbones.vision import CLIP_MEAN, CLIP_STD, Preprocessing
from blip2.backbones.vision_loaders import (
    interpolate_pos_embed,
    load_image_encoder,
    load_preprocessing,
    wrap_transformers,
)
from blip2.data.images import preprocess
from blip2.errors import InputError
from fixtures.tiny import randomize

NO_SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 14,
}
SIZES = {**NO_SIZE, "image_size": 28}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
TEXT |= {"max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
VITS: dict[str, Callable[[], nn.Module]] = {
    "CLIP": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SIZES)),
    "CLIP, with its text part": lambda: hf.CLIPModel(
        hf.CLIPConfig(vision_config=SIZES, text_config=TEXT, projection_dim=16)
    ),
    "SigLIP": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIZES)),
    "SigLIP 2": lambda: hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**NO_SIZE, num_patches=4)),
    "DINOv2": lambda: hf.Dinov2Model(hf.Dinov2Config(**SIZES, mlp_ratio=2)),
    "DINOv2, registers": lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2)),
    "DINOv3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SIZES, num_register_tokens=2)),
    "ViT": lambda: hf.ViTModel(hf.ViTConfig(**SIZES)),
}
OWN = {"BLIP-2": lambda: hf.Blip2VisionModel(hf.Blip2VisionConfig(**SIZES))}
CNNS: dict[str, Callable[[], nn.Module]] = {
    "ResNet": lambda: hf.ResNetModel(hf.ResNetConfig(embedding_size=8, **STAGES)),
    "ConvNeXt": lambda: hf.ConvNextModel(hf.ConvNextConfig(**STAGES)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], tuple[Any, str]]:
    """A function that returns a tiny random model by its name, and the folder that it is saved in."""
    made: dict[str, tuple[nn.Module, str]] = {}

    def save(name: str) -> tuple[nn.Module, str]:
        if name not in made:
            model: Any = randomize({**VITS, **CNNS, **OWN}[name]()).eval()
            folder = str(tmp_path_factory.mktemp("encoder"))
            model.save_pretrained(folder)
            made[name] = getattr(model, "vision_model", model), folder
        return made[name]

    return save


def pixels(size: int = 28) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def outputs(model: Any, images: Tensor) -> Any:
    """Return the outputs of transformers' own model."""
    given: dict[str, Any] = {"pixel_values": images, "output_hidden_states": True}
    if model.config.model_type == "siglip2_vision_model":
        side = images.shape[-1] // 14
        cut = [images[:, :, 14 * r : 14 * r + 14, 14 * c : 14 * c + 14] for r in range(side) for c in range(side)]
        given["pixel_values"] = torch.stack([patch.permute(0, 2, 3, 1).flatten(1) for patch in cut], dim=1)
        given["pixel_attention_mask"] = torch.ones(len(images), side * side, dtype=torch.long)
        given["spatial_shapes"] = torch.full((len(images), 2), side)
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        given["interpolate_pos_encoding"] = True
    return model(**given)


# -- features ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [28, 42])
@pytest.mark.parametrize("name", VITS)
def test_vits(saved, name, size):
    """Position embeddings are interpolated if the size is not the model's own."""
    model, folder = saved(name)
    expected = outputs(model, pixels(size))
    default = load_image_encoder(folder, image_size=size)
    torch.testing.assert_close(default.encode(pixels(size)), expected.hidden_states[-2])
    assert (default.num_tokens, default.hidden_size) == expected.last_hidden_state.shape[1:]
    last = load_image_encoder(folder, layer="last", image_size=size)
    torch.testing.assert_close(last.encode(pixels(size)), expected.last_hidden_state)
    assert default.preprocessing.image_size == size


@pytest.mark.parametrize("name", VITS)
def test_the_last_layer_is_removed(saved, name):
    model, folder = saved(name)
    networks = (model, load_image_encoder(folder).network)
    layers = [[len(m) for m in network.modules() if isinstance(m, nn.ModuleList)] for network in networks]
    assert layers == [[3], [2]]


@pytest.mark.parametrize("size", [28, 42])
def test_blip2_s_own_encoder_was_published_without_its_last_layer(saved, size):
    """Its final norm is the trained norm of the features, which the models apply."""
    model, folder = saved("BLIP-2")
    encoder = load_image_encoder(folder, image_size=size)
    expected = outputs(model, pixels(size))
    torch.testing.assert_close(model.post_layernorm(encoder.encode(pixels(size))), expected.last_hidden_state)
    assert (encoder.num_tokens, encoder.hidden_size) == expected.last_hidden_state.shape[1:]
    with pytest.raises(InputError, match=r"the last layer of BLIP-2's own image encoder has been removed: leave out"):
        load_image_encoder(folder, layer="last")


def test_a_vit_of_one_layer(tmp_path):
    hf.ViTModel(hf.ViTConfig(**{**SIZES, "num_hidden_layers": 1})).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"the image encoder has only one layer: set vision.layer to last"):
        load_image_encoder(str(tmp_path))
    assert load_image_encoder(str(tmp_path), layer="last").hidden_size == 32


@pytest.mark.parametrize("size", [364, 490])
def test_positions_of_the_paper_s_encoders(size):
    """EVA-CLIP ViT-g's table for 224 pixels, at the sizes of fine-tuning, as transformers interpolates it."""
    table = torch.randn(1, 257, 1408)
    places = Blip2VisionEmbeddings(hf.Blip2VisionConfig(hidden_size=1408, num_attention_heads=16))
    places.position_embedding.data.copy_(table)
    there = places.interpolate_pos_encoding(torch.empty(1, (size // 14) ** 2 + 1, 1408), size, size)
    torch.testing.assert_close(interpolate_pos_embed(table, size // 14), there, atol=0, rtol=0)
    assert torch.equal(interpolate_pos_embed(table, 16), table)


def bicubic(size: int, new_size: int) -> Tensor:
    """Return weights [new_size, size] of cubic interpolation on a line with Keys' kernel, a = -0.75."""
    weights = torch.zeros(new_size, size, dtype=torch.double)
    for new in range(new_size):
        center = (new + 0.5) * size / new_size - 0.5
        first = math.floor(center) - 1
        for old in range(first, first + 4):
            x = abs(center - old)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[new, min(max(old, 0), size - 1)] += near if x <= 1 else far
    return weights


@pytest.mark.parametrize("size", [364, 490])
@pytest.mark.parametrize("name", ["BLIP-2", "CLIP", "ViT", "DINOv2", "SigLIP"])
def test_positions_at_the_sizes_of_fine_tuning(tmp_path, name, size):
    """The features are those of a model that was made for this size and has the interpolated table."""
    kind, config = {
        "BLIP-2": (hf.Blip2VisionModel, hf.Blip2VisionConfig),
        "CLIP": (hf.CLIPVisionModel, hf.CLIPVisionConfig),
        "ViT": (hf.ViTModel, hf.ViTConfig),
        "DINOv2": (hf.Dinov2Model, hf.Dinov2Config),
        "SigLIP": (hf.SiglipVisionModel, hf.SiglipVisionConfig),
    }[name]
    small = randomize(kind(config(**NO_SIZE, image_size=224))).eval()
    small.save_pretrained(tmp_path)
    weights = small.state_dict()
    (key,) = (key for key in weights if "position_embedding" in key)
    table = weights[key].double().reshape(-1, 32)
    classes = len(table) - 256
    line = bicubic(16, size // 14)
    square = torch.einsum("ri,cj,ije->rce", line, line, table[classes:].view(16, 16, 32))
    table = torch.cat([table[:classes], square.flatten(0, 1)]).float()
    large: Any = kind(config(**NO_SIZE, image_size=size)).eval()
    large.load_state_dict(weights | {key: table.view_as(large.state_dict()[key])})
    last = -1 if name == "BLIP-2" else -2
    features = load_image_encoder(str(tmp_path), image_size=size).encode(pixels(size))
    with torch.no_grad():
        expected = large(pixel_values=pixels(size), output_hidden_states=True).hidden_states[last]
    assert features.shape[1] == (size // 14) ** 2 + classes
    torch.testing.assert_close(features, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", CNNS)
def test_cnns_give_their_grid_as_tokens(saved, name):
    model, folder = saved(name)
    grid = outputs(model, pixels(64)).last_hidden_state  # [B, E, h, w]
    encoder = load_image_encoder(folder, image_size=64)
    features = encoder.encode(pixels(64))
    assert (encoder.num_tokens, encoder.hidden_size) == (grid.shape[2] * grid.shape[3], 16)
    torch.testing.assert_close(features[:, grid.shape[3] + 1], grid[:, :, 1, 1])  # row after row
    torch.testing.assert_close(features, grid.flatten(2).mT)


def test_features_pass_through(saved):
    encoder = load_image_encoder(saved("ViT")[1])
    ready = torch.randn(2, 7, 32).bfloat16()
    torch.testing.assert_close(encoder.encode(ready), ready.float())


def test_efficientnet_lite0(tmp_path, monkeypatch):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    settings = {"image_size": 64, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.1]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "efficientnet-lite0", **settings}))
    encoder = load_image_encoder(str(tmp_path))
    assert (encoder.num_tokens, encoder.hidden_size, encoder.preprocessing.mean) == (4, 1280, (0.5, 0.4, 0.3))
    with torch.no_grad():
        grid = network.extract_features(pixels(64))
    torch.testing.assert_close(encoder.encode(pixels(64)), grid.flatten(2).mT, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match=r"vision\.layer"):
        load_image_encoder(str(tmp_path), layer="second-last")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(InputError, match=r"blip2\[demo\]"):
        load_image_encoder(str(tmp_path))


# -- frozen --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ViT", "ResNet"])
def test_frozen_encoders_do_not_change(saved, name):
    encoder = load_image_encoder(saved(name)[1], image_size=28)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    model = nn.Sequential(encoder, nn.Linear(2, 2)).train()
    assert model.training
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.encode(pixels()).requires_grad
    torch.testing.assert_close(encoder.state_dict(), before)  # including the ResNet's running statistics


def test_a_frozen_encoder_computes_in_its_own_dtype(saved):
    model, folder = saved("ViT")
    half, full = load_image_encoder(folder, dtype=torch.bfloat16), load_image_encoder(folder)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    exact = outputs(model, pixels()).hidden_states[-2]
    features = half.encode(pixels())
    assert features.dtype == torch.float32
    assert torch.equal(features, features.bfloat16().float())
    assert (features - exact).norm() < 0.05 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(full.encode(pixels()), exact)


def test_a_trained_encoder_learns_under_autocast(saved):
    encoder = load_image_encoder(saved("ViT")[1]).requires_grad_(True)
    assert all(module.training for module in nn.Sequential(encoder).train().modules())
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder.encode(pixels())
    assert not torch.equal(features, encoder.encode(pixels()))
    features.square().mean().backward()
    without = {key.split(".")[1] for key, p in encoder.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"layernorm", "pooler"}  # these come after the last layer
    with torch.no_grad():
        assert not encoder.encode(pixels()).requires_grad


# -- layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*VITS, *OWN])
def test_layer_ids(saved, name):
    encoder = load_image_encoder(saved(name)[1])
    depths = encoder.layer_ids()
    assert set(depths) == {key for key, _ in encoder.named_parameters()}
    last = 3 if name in OWN else 2
    for key, depth in depths.items():
        if block := re.search(r"\.layers?\.(\d)\.", key):
            assert depth == int(block[1]) + 1, key
        elif re.search(r"embeddings|pre_layrnorm", key):  # CLIP's norm before its first block
            assert depth == 0, key
        else:
            assert re.search(r"layernorm|\.norm\.|pooler|head", key) and depth == last, key
    assert set(depths.values()) == set(range(last + 1))


@pytest.mark.parametrize("name", CNNS)
def test_cnns_have_no_layer_ids(saved, name):
    encoder = load_image_encoder(saved(name)[1], image_size=28)
    for use in (encoder.layer_ids, lambda: encoder.set_drop_path(0.1)):
        with pytest.raises(InputError, match=r"is not a stack of equal blocks: set optimizer\.layer_decay to 1 and"):
            use()


@pytest.mark.parametrize("name", VITS)
def test_drop_path_by_hand(saved, name):
    """Of two blocks only the last is skipped; the mean of its output is that in evaluation mode."""
    model, folder = saved(name)
    before, after = outputs(model, pixels()).hidden_states[1:3]
    encoder = load_image_encoder(folder).requires_grad_(True)
    encoder.set_drop_path(0.25)
    torch.testing.assert_close(encoder.eval().encode(pixels()), after)
    for block in encoder.blocks:  # only the blocks: DINOv3 shifts its positions in training
        block.train()
    torch.manual_seed(0)
    many = encoder.encode(pixels().repeat(200, 1, 1, 1)).detach().view(200, *before.shape)
    kept = before + (after - before) / 0.75
    is_left_out = (many - before).abs().amax(dim=(2, 3)) < 1e-4
    assert is_left_out.float().mean() == pytest.approx(0.25, abs=0.06)
    assert not torch.equal(is_left_out[:, 0], is_left_out[:, 1])  # independently for each image
    torch.testing.assert_close(many, torch.where(is_left_out[:, :, None, None], before, kept), atol=1e-4, rtol=1e-4)


def test_drop_path_rises_evenly(tmp_path):
    randomize(hf.CLIPVisionModel(hf.CLIPVisionConfig(**{**SIZES, "num_hidden_layers": 6}))).save_pretrained(tmp_path)
    encoder = load_image_encoder(str(tmp_path)).requires_grad_(True).train()
    encoder.set_drop_path(0.4)
    left_out: list[float] = []
    for block in encoder.blocks:
        block.register_forward_hook(
            lambda _, given, put_out: left_out.append(float((given[0] == put_out).all(dim=(1, 2)).float().mean()))
        )
    torch.manual_seed(0)
    encoder.encode(torch.randn(3000, 3, 28, 28))
    assert left_out[0] == 0
    assert left_out == pytest.approx([0, 0.1, 0.2, 0.3, 0.4], abs=0.03)


def test_nothing_is_dropped_while_frozen(saved):
    encoder = load_image_encoder(saved("ViT")[1])
    encoder.set_drop_path(0.9)
    nn.Sequential(encoder).train()
    torch.testing.assert_close(encoder.encode(pixels()), outputs(saved("ViT")[0], pixels()).hidden_states[-2])


# -- preprocessing -------------------------------------------------------------------------------------------------

MEANS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


@pytest.mark.parametrize(
    ("file", "settings", "size"),
    [
        ("preprocessor_config.json", {"size": {"height": 42, "width": 42}, **MEANS}, 42),
        ("preprocessor_config.json", {"size": {"shortest_edge": 56}, "crop_size": {"height": 42, "width": 42}}, 42),
        ("preprocessor_config.json", {"size": {"shortest_edge": 42}, "crop_size": None, **MEANS}, 42),
        ("preprocessor_config.json", {"size": 42, **MEANS}, 42),
        ("preprocessor_config.json", MEANS, 28),
        ("processor_config.json", {"image_processor": {"size": {"height": 42, "width": 42}, **MEANS}}, 42),
        (None, {}, 28),
    ],
)
def test_preprocessing_is_the_models_own(saved, tmp_path, file, settings, size):
    shutil.copytree(saved("ViT")[1], tmp_path, dirs_exist_ok=True)
    if file:
        (tmp_path / file).write_text(json.dumps(settings))
    found = load_image_encoder(str(tmp_path)).preprocessing
    own = "image_mean" in settings.get("image_processor", settings)
    # Without values in the file those of the model's processor class are used, without a file CLIP's.
    assert found.mean == ((0.1, 0.2, 0.3) if own else (0.5,) * 3 if file else CLIP_MEAN)
    assert found.std == ((0.4, 0.5, 0.6) if own else (0.5,) * 3 if file else CLIP_STD)
    assert found.image_size == size
    assert load_image_encoder(str(tmp_path), image_size=70).preprocessing.image_size == 70


# -- errors --------------------------------------------------------------------------------------------------------


def no_config(folder: str, parts: Any) -> str:
    Path(folder, "config.json").unlink()
    return folder


def no_weights(folder: str, parts: Any) -> str:
    Path(folder, "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_config, "no image encoder could be loaded from"),
        (no_weights, r"no image encoder could be loaded from .*model\.safetensors"),
        (lambda folder, parts: parts.bert, "is a BertModel, which has no image encoder"),
        (lambda folder, parts: parts.llama, "is a LlamaModel, which has no image encoder"),
        (lambda folder, parts: f"{folder}/nowhere", "there is no folder .* to load the image encoder from"),
    ],
)
def test_models_that_are_no_image_encoder(saved, parts, tmp_path, spoil, message):
    shutil.copytree(saved("ViT")[1], tmp_path, dirs_exist_ok=True)
    with pytest.raises(InputError, match=message) as caught:
        load_image_encoder(spoil(str(tmp_path), parts))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["CLIP", "SigLIP 2", "DINOv2"])
def test_a_size_that_the_patches_do_not_divide(saved, name):
    with pytest.raises(InputError, match=r"image_size 30 is not a multiple .* patch size 14: set .* to 28 or 42"):
        load_image_encoder(saved(name)[1], image_size=30)


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"timm:vit_tiny needs timm.*blip2\[timm\]") as caught:
        load_image_encoder("timm:vit_tiny")
    assert "\n" not in str(caught.value)


# -- checks of the constructor -------------------------------------------------------------------------------------


def sam(**changes: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "mlp_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "output_channels": 16}
    shape = {"image_size": 64, "patch_size": 8, "global_attn_indexes": [1], "window_size": 4}
    return hf.SamVisionModel(hf.SamVisionConfig(**{**sizes, **shape, **changes}))


def intern() -> nn.Module:
    sizes = {**NO_SIZE, "patch_size": [14, 14], "image_size": [28, 28]}
    return hf.InternVLVisionModel(hf.InternVLVisionConfig(**sizes))


def pixtral() -> nn.Module:
    return hf.PixtralVisionModel(hf.PixtralVisionConfig(**SIZES, head_dim=16))


@torch.no_grad()
@pytest.mark.parametrize("layer", ["second-last", "last"])
def test_a_grid_whose_width_comes_last(tmp_path, layer):
    network: Any = randomize(sam()).eval()
    network.save_pretrained(tmp_path)
    encoder, images = load_image_encoder(str(tmp_path), layer), pixels(64)
    out = network(images, output_hidden_states=True)
    # The hidden states are [B, h, w, E], the neck after them returns [B, E, h, w].
    right = out.hidden_states[-2] if layer == "second-last" else out.last_hidden_state.permute(0, 2, 3, 1)
    assert (encoder.num_tokens, encoder.hidden_size) == (64, right.shape[-1])
    torch.testing.assert_close(encoder.encode(images), right.flatten(1, 2), atol=1e-5, rtol=1e-5)


def test_a_grid_whose_width_is_ambiguous(tmp_path):
    randomize(sam(hidden_size=8, num_attention_heads=2, window_size=0)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"\[2, 8, 8, 8\], and it is not clear .* set vision.image_size to"):
        load_image_encoder(str(tmp_path))


@torch.no_grad()
@pytest.mark.parametrize("make", [intern, pixtral])
def test_sizes_that_are_lists_and_images_in_one_sequence(tmp_path, make):
    network: Any = randomize(make()).eval()
    network.save_pretrained(tmp_path)
    encoder, images = load_image_encoder(str(tmp_path)), pixels()
    alone = torch.cat([network(each[None], output_hidden_states=True).hidden_states[-2] for each in images])
    torch.testing.assert_close(encoder.encode(images), alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.encode(images[:1]), alone[:1], atol=1e-5, rtol=1e-5)


def zeroed() -> nn.Module:
    network = hf.ViTModel(hf.ViTConfig(**SIZES))
    for parameter in network.parameters():
        parameter.data.zero_()
    return network


def vivit() -> nn.Module:
    """Return an encoder of videos, with a convolution over time."""
    return hf.VivitModel(hf.VivitConfig(**SIZES, num_frames=2, tubelet_size=[2, 14, 14]))


def not_finite() -> nn.Module:
    network = hf.ViTModel(hf.ViTConfig(**SIZES))
    network.layers[0].mlp.fc1.weight.data[0, 0] = torch.nan
    return network


@pytest.mark.parametrize(
    ("make", "size", "message"),
    [
        (sam, 32, r"cannot encode images of 32 x 32 .* set vision.image_size to the size that"),
        (vivit, None, r"a VivitModel, cannot encode images of 28 x 28"),
        (zeroed, None, "returns the same features for different images: copy or download"),
        (not_finite, None, "returns features that are not finite: copy or download its weights"),
    ],
)
def test_unusable_encoders_are_refused_when_they_are_loaded(tmp_path, make, size, message):
    make().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_image_encoder(str(tmp_path), image_size=size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["MobileViT", "GLPN", "EfficientNet", "ViT", "CLIP", "Beit"])
def test_pixels_are_those_of_the_model_s_own_processor(tmp_path, name):
    processor: Any = getattr(hf, f"{name}ImageProcessorPil")()
    processor.save_pretrained(tmp_path)
    image = Image.new("RGB", (300, 300), (200, 90, 20))  # of one color, so that size and crop do not matter
    theirs = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"])[0]
    ours = preprocess(image, load_preprocessing(str(tmp_path), hf.ViTConfig(), None))
    middle = [each[:, each.shape[1] // 2, each.shape[2] // 2] for each in (ours, theirs)]
    torch.testing.assert_close(*middle, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_processor_type": "Unheard", "size": 28}, "add image_mean, image_std and a known image_processor_type"),
        ({"image_processor_type": "Unheard", **MEANS, "do_flip_channel_order": True}, "do_flip_channel_order"),
        ({"image_processor_type": "Unheard", **MEANS}, None),
        ({"image_processor_type": "Unheard", "do_normalize": False}, None),
    ],
)
def test_an_unknown_processor_has_to_state_mean_and_std(tmp_path, settings, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    if message is None:
        found = load_preprocessing(str(tmp_path), hf.ViTConfig(), 28)
        assert found.mean == ((0.1, 0.2, 0.3) if "image_mean" in settings else (0.0, 0.0, 0.0))
        return
    with pytest.raises(InputError, match=message):
        load_preprocessing(str(tmp_path), hf.ViTConfig(), 28)


@pytest.mark.parametrize("text", ["[1]", "{", '"a"', "[" * 100_000])
def test_a_damaged_processor_is_refused(tmp_path, text):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(InputError, match=r"no image processor could be loaded from .* preprocessor_config.json"):
        load_preprocessing(str(tmp_path), hf.ViTConfig(), 28)


def test_encoders_are_tested_where_their_weights_are():
    """Within another default device the test images have to be made on the CPU, and then moved."""
    network = hf.ViTModel(hf.ViTConfig(**SIZES))
    with torch.device("meta"):
        encoder = wrap_transformers(network, Preprocessing(28))
    assert encoder.encode(pixels(28)).shape == (2, encoder.num_tokens, encoder.hidden_size)


def test_the_use_of_clip_s_mean_is_logged(saved, caplog):
    load_image_encoder(saved("ViT")[1])
    assert (
        "has no preprocessor_config.json: images are normalized with CLIP's mean and standard deviation" in caplog.text
    )
