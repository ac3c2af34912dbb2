"""The same weights and inputs give the reference implementation's numbers; fixtures/README.md says what is stored."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from blip2.backbones.language import LanguageModel
from blip2.backbones.vision import ImageEncoder
from blip2.config import ObjectivesConfig, QFormerConfig
from blip2.interop.lavis import OPT_KEYS, QFORMER_KEYS, drop_tied
from blip2.interop.weights import Weights
from blip2.model import representation
from blip2.model.generation import GenerationBatch, GenerationModel
from blip2.model.qformer import attention_mask
from blip2.model.representation import Negatives, RepresentationBatch, RepresentationModel
from fixtures.tiny import no_encoder

NAMES = QFORMER_KEYS + OPT_KEYS
FIXTURES = Path(__file__).parents[1] / "fixtures"
CONFIG = QFormerConfig(
    hidden_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=96,
    num_query_tokens=8,
    image_text_hidden_size=32,
    vocab_size=201,
    max_position_embeddings=64,
    dropout=0.0,
)
# The random model's cosines are nearly all equal, so the gradient of ITC with respect to these is the small rest of
# large terms that cancel, and the fixture's own float32 rounding is up to .7 % of it.
CANCELLED = {
    "image_projection.weight",
    "image_projection.bias",
    "text_projection.weight",
    "text_projection.bias",
    "temperature",
}


def tensors(arrays: np.lib.npyio.NpzFile, kind: str) -> dict[str, Tensor]:
    """All arrays named kind/NAME, under our names."""
    state = {k.removeprefix(kind): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith(kind)}
    drop_tied(state, Path(kind))
    # The output matrix of the LLM is its embedding; the fixture's image encoder is none.
    state = {k: t for k, t in state.items() if "lm_head" not in k and "visual_encoder" not in k}
    return dict(Weights(state).rename_keys(NAMES, "the fixture"))


def check_gradients(model: nn.Module, expected: dict[str, Tensor], loose: Collection[str] = ()) -> None:
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        if name.endswith("key.bias"):
            # A softmax does not change when all of its scores are shifted: what is left is rounding.
            assert max(ours[name].abs().max(), gradient.abs().max()) < 1e-9, name
        else:
            limit = 5e-3 if name in loose else 1e-4
            assert (ours[name] - gradient).norm() < limit * gradient.norm(), name


# -- stage 1 -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage1() -> np.lib.npyio.NpzFile:
    return np.load(FIXTURES / "stage1.npz")


@pytest.fixture
def model(stage1) -> RepresentationModel:
    model = RepresentationModel(no_encoder(50, 64), CONFIG, ObjectivesConfig())
    weights = tensors(stage1, "param/")
    assert weights.keys() == model.state_dict().keys() - {"vision.network.weight"}
    model.load_state_dict(weights, strict=False)
    return model


def batch(stage1, dtype: torch.dtype = torch.float32) -> RepresentationBatch:
    image, ids, mask = (torch.from_numpy(stage1[f"input/{k}"]) for k in ("image", "input_ids", "attention_mask"))
    return RepresentationBatch(image.to(dtype), ids, mask.bool(), torch.arange(4))


def losses(model: RepresentationModel, stage1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    drawn = Negatives(*(torch.from_numpy(stage1[k]) for k in ("neg_image_for_text", "neg_text_for_image")))
    return model(batch(stage1, dtype), negatives=drawn).losses


def test_losses_of_stage_1(model, stage1):
    ours = losses(model, stage1)
    for here, there in (("itc", "loss_itc"), ("itm", "loss_itm"), ("itg", "loss_lm")):
        assert ours[here].item() == pytest.approx(stage1[f"loss/{there}"].item(), abs=1e-5)
    assert sum(ours.values()).item() == pytest.approx(stage1["loss/loss"].item(), abs=1e-5)


def test_gradients_of_stage_1(model, stage1, monkeypatch):
    monkeypatch.setattr(representation, "all_gather", Tensor.detach)
    sum(losses(model, stage1).values()).backward()
    check_gradients(model, tensors(stage1, "grad/"), CANCELLED)


def test_gradients_of_the_contrastive_heads_in_double_precision(model, stage1, monkeypatch):
    monkeypatch.setattr(representation, "all_gather", Tensor.detach)
    monkeypatch.setattr(ImageEncoder, "encode", lambda self, images: images)
    losses(model.double(), stage1, torch.float64)["itc"].backward()
    expected = tensors(stage1, "grad/")
    ours = dict(model.named_parameters())
    for name in CANCELLED:
        assert (ours[name].grad - expected[name]).norm() < 1e-2 * expected[name].norm(), name


@torch.no_grad()
def test_outputs_of_stage_1(model, stage1):
    given = batch(stage1)
    memory = model.build_image_memory(given.images)
    hidden = {
        "query_hidden": model.qformer(memory).queries,
        "text_cls": model.qformer(None, given.ids, attention_mask("unimodal", 0, given.mask)).text[:, 0],
        "itm_logit": model.match(memory, given.ids, given.mask)[:, 1],
    }
    for name, ours in hidden.items():
        torch.testing.assert_close(ours, torch.from_numpy(stage1[f"out/{name}"]), atol=1e-5, rtol=0)


# -- stage 2 -------------------------------------------------------------------------------------------------------


def test_stage_2_with_opt():
    stage2 = np.load(FIXTURES / "stage2_opt.npz")
    weights = tensors(stage2, "param/")
    sizes = {"vocab_size": 260, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    opt = OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=4, max_position_embeddings=128))
    model = GenerationModel(no_encoder(50, 64), CONFIG, LanguageModel(opt))
    assert weights.keys() == model.state_dict().keys() - {"vision.network.weight", "language.network.lm_head.weight"}
    model.load_state_dict(weights, strict=False)

    image, ids, mask = (torch.from_numpy(stage2[f"input/{k}"]) for k in ("image", "ids", "mask"))
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : int(stage2["prompt_length"][0])] = -100
    loss = model(GenerationBatch(image, ids, mask.bool(), labels)).losses["lm"]
    assert loss.item() == pytest.approx(stage2["loss"].item(), abs=1e-5)
    loss.backward()
    check_gradients(model, tensors(stage2, "grad/"))
