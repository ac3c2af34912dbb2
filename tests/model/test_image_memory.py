"""Positions of image tokens: which encoders have them, and what is added to those that have none."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from blip2.backbones.vision import Preprocessing
from blip2.backbones.vision_loaders import wrap_transformers
from blip2.model.image_memory import add_position_encoding, encode_images, encodes_positions, sine_position_encoding
from fixtures.tiny import no_encoder

CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
ENCODERS = {
    "vit": (lambda: ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8)), 32, True),
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=32, patch_size=8)), 32, True),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**SIZES, image_size=28, patch_size=7)), 28, True),
    "resnet": (lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])), 64, False),
    "convnext": (lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)), 64, False),
    "swin": (
        lambda: SwinModel(SwinConfig(image_size=64, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4)),
        64,
        False,
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_it_is_found_out_which_encoders_tell_positions(name):
    make, size, tells = ENCODERS[name]
    torch.manual_seed(0)
    assert encodes_positions(wrap_transformers(make(), Preprocessing(size))) is tells


def test_the_encoding_is_bounded_and_tells_every_two_places_apart():
    encoding = sine_position_encoding(49, 64, CPU)
    assert encoding.shape == (49, 64) and encoding.abs().max() <= 1
    apart = torch.cdist(encoding, encoding) + 9 * torch.eye(49)
    assert apart.min() > 0.5
    grid = encoding.view(7, 7, 64)
    torch.testing.assert_close(grid[3, :, :32], grid[3, :1, :32].expand(7, -1))  # a row's half does not know its column
    torch.testing.assert_close(grid[:, 2, 32:], grid[:1, 2, 32:].expand(7, -1))


def test_neighbors_are_more_alike_than_distant_places():
    grid = sine_position_encoding(49, 64, CPU).view(7, 7, 64)
    assert (grid[3, 3] - grid[3, 4]).norm() < (grid[3, 3] - grid[3, 6]).norm()
    assert (grid[0, 0] - grid[1, 0]).norm() < (grid[0, 0] - grid[6, 0]).norm()


@pytest.mark.parametrize(("tokens", "width"), [(17, 32), (21, 30), (16, 33)])
def test_tokens_before_the_grid_and_channels_that_are_left_over_get_zeros(tokens, width):
    encoding = sine_position_encoding(tokens, width, CPU)
    assert encoding.shape == (tokens, width)
    assert not encoding[: tokens - 16].any() and not encoding[:, width - width % 4 :].any()
    assert encoding[tokens - 16 :].any(dim=1).all()


@pytest.mark.parametrize("scale", [0.1, 1.0, 300.0])
def test_the_encoding_weighs_the_same_whatever_the_scale_of_the_features(scale):
    features = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    expected = F.layer_norm(features, (32,)) + sine_position_encoding(9, 32, CPU)
    torch.testing.assert_close(add_position_encoding(scale * features), expected, atol=5e-3, rtol=0)


def test_features_are_added_to_only_where_the_encoder_says_so():
    encoder, features = no_encoder(9, 32), torch.randn(2, 9, 32)
    assert torch.equal(encode_images(encoder, features), features)
    encoder.position_encoding = "sine2d"
    assert torch.equal(encode_images(encoder, features), add_position_encoding(features))
    assert torch.equal(encoder.encode(features), features)  # what is cached never holds positions
