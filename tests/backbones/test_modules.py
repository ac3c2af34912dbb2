"""A torch module of the caller's own is the encoder, of pixels or of arrays."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from blip2 import InputError
from blip2.backbones.features import FeatureFormat, token_mask
from blip2.backbones.vision import ImageEncoder, Preprocessing
from blip2.backbones.vision_loaders import wrap_module
from blip2.builder import build_image_encoder
from blip2.config import VisionConfig
from blip2.data.arrays import stack_inputs

FEATURES = VisionConfig("features", hidden_size=6, max_tokens=8)


class Recurrent(nn.Module):
    """Half as many tokens as it is given, each of which depends on all tokens before: padding would change them."""

    def __init__(self, form=lambda output: output):
        super().__init__()
        self.rnn, self.form = nn.GRU(6, 5, batch_first=True), form

    def forward(self, x):
        return self.form(self.rnn(x.flip(1))[0][:, ::2])


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 8, stride=8)

    def forward(self, x):
        return SimpleNamespace(last_hidden_state=self.conv(x).flatten(2).mT)


def test_arrays_of_different_lengths_are_encoded_without_their_padding():
    torch.manual_seed(0)
    encoder = build_image_encoder(FEATURES, torch.float32, encoder=Recurrent())
    assert (encoder.num_tokens, encoder.hidden_size, encoder.is_frozen) == (4, 5, True)
    arrays = [torch.randn(1, length, 6) for length in (3, 8, 1, 3)]
    found = encoder.encode(stack_inputs(arrays))
    assert token_mask(found).sum(dim=1).tolist() == [2, 4, 1, 2]
    for row, array in zip(found, arrays, strict=True):
        alone = encoder.encode(array[None])[0]
        torch.testing.assert_close(row[: len(alone)], alone)
    again = encoder.encode(found)  # what is encoded is encoded once
    torch.testing.assert_close(again, found, rtol=0, atol=0, equal_nan=True)


def test_a_module_that_trains_gets_gradients_through_the_padding():
    encoder = build_image_encoder(FEATURES, torch.float32, encoder=Recurrent())
    encoder.requires_grad_(True)
    features = encoder.encode(stack_inputs([torch.randn(1, length, 6) for length in (3, 8)]))
    features.masked_fill(~token_mask(features)[..., None], 0).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in encoder.parameters())


def test_pixels_and_an_output_of_transformers():
    encoder = build_image_encoder(VisionConfig("module", image_size=16), torch.float32, encoder=Patches())
    assert (encoder.num_tokens, encoder.hidden_size, encoder.position_encoding) == (4, 7, "sine2d")
    assert encoder.encode(torch.rand(2, 3, 16, 16)).shape == (2, 4, 7)
    mine = ImageEncoder(nn.Conv2d(3, 7, 8, stride=8), nn.Conv2d(3, 7, 8, stride=8), Preprocessing(16))
    assert build_image_encoder(VisionConfig("module"), torch.float32, encoder=mine) is mine


def test_without_a_module_arrays_are_the_features():
    encoder = build_image_encoder(FEATURES, torch.float32)
    assert (encoder.num_tokens, encoder.hidden_size, encoder.is_frozen) == (8, 6, True)
    assert encoder.dtype == torch.float32
    with pytest.raises(InputError, match=r"reads arrays of features .vision.name features., but this works on images"):
        _ = encoder.preprocessing


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Recurrent(lambda x: x.mean(dim=(1, 2))), "returns features of shape"),
        (Recurrent(lambda x: x * torch.nan), "returns features that are not finite"),
        (Recurrent(torch.zeros_like), "returns the same features for different"),
        (
            Recurrent(lambda x: (x, x)),
            r"cannot encode features of shape 8 x 6 \(Type.*Error.*: correct vision.hidden_size",
        ),
        (nn.Linear(4, 4), r"cannot encode features of shape 8 x 6 \(.*Error.*: correct vision.hidden_size"),
        ("len", "encoder is a str, expected a torch.nn.Module"),
    ],
)
def test_what_a_module_returns_is_checked_once(module, message):
    with pytest.raises(InputError, match=message) as error:
        wrap_module(module, FeatureFormat(6, 8))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "module", "message"),
    [
        (VisionConfig("module"), None, "vision.name is module, but no module was given: pass it in Python"),
        (VisionConfig("some/vit"), Patches(), "encoder is given, but vision.name is 'some/vit'"),
        (
            VisionConfig("module"),
            ImageEncoder(nn.Identity(), nn.Identity(), FeatureFormat(6, 8)),
            "another kind of input",
        ),
        (
            FEATURES,
            ImageEncoder(nn.Identity(), nn.Identity(), FeatureFormat(6, 9)),
            r"for FeatureFormat\(hidden_size=6, max_tokens=9\), but the config says .*max_tokens=8\): set",
        ),
        (
            VisionConfig("module", image_size=32),
            ImageEncoder(nn.Conv2d(3, 7, 8, stride=8), nn.Conv2d(3, 7, 8, stride=8), Preprocessing(16)),
            "vision.image_size is 32, but encoder is an ImageEncoder for images of 16 pixels per side: leave out",
        ),
    ],
)
def test_name_and_module_must_fit(config, module, message):
    with pytest.raises(InputError, match=message):
        build_image_encoder(config, torch.float32, encoder=module)
