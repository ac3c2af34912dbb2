import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from blip2.backbones.language import load_language_model
from blip2.backbones.vision_loaders import load_image_encoder
from blip2.decoding.search import Decoding
from blip2.model.generation import GenerationBatch, GenerationModel
from fixtures.tiny import QFORMER, randomize

END = 256
LLMS = ("llama", "opt", "t5")
PROMPTS = ("a photo of", "the", "Question: what color is it? Answer:")


@pytest.fixture
def build(parts) -> Callable[..., GenerationModel]:
    def build(name: str, dtype: torch.dtype = torch.float32) -> GenerationModel:
        torch.manual_seed(0)
        language = load_language_model(getattr(parts, name), dtype)
        model = GenerationModel(load_image_encoder(parts.vision), QFORMER, language)
        randomize(model.qformer)
        model.initialize_projection()
        return model

    return build


def pixels(count: int, seed: int = 7) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def pairs(count: int = 3) -> GenerationBatch:
    """Captions of 5, 4, 3 ... tokens; the first two tokens are a prompt."""
    ids = torch.randint(0, 255, (count, 5), generator=torch.Generator().manual_seed(8))
    mask = torch.arange(5) < 5 - torch.arange(count)[:, None]
    labels = ids.where(mask, -100)
    labels[:, :2] = -100
    return GenerationBatch(pixels(count), ids, mask, labels)


# -- the visual prompt ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LLMS)
def test_the_visual_prompt_begins_at_the_scale_of_token_embeddings(build, parts, name):
    torch.manual_seed(0)
    new = GenerationModel(load_image_encoder(parts.vision), QFORMER, load_language_model(getattr(parts, name)))
    other = build(name)
    norm = other.qformer.blocks[-1].query_feed_forward.norm
    norm.weight.data.mul_(3.0)
    norm.bias.data.fill_(2.0)
    other.initialize_projection()
    for model in (new, other):
        prompt = model.visual_prompt(pixels(8))
        assert prompt.shape == (8, QFORMER.num_query_tokens, 32)
        scale = prompt.square().mean().sqrt().item()
        assert scale == pytest.approx(model.language.embedding_scale(), rel=0.25)


def test_pixels_and_ready_features_give_the_same(build):
    model, batch = build("llama"), pairs()
    ready = replace(batch, images=model.vision.encode(batch.images))
    torch.testing.assert_close(model(ready).losses, model(batch).losses)


def test_the_visual_prompt_depends_on_the_image(build):
    prompt = build("llama").visual_prompt(pixels(2))
    assert (prompt[0] - prompt[1]).norm() > 0.05 * prompt[0].norm()


# -- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LLMS)
def test_exactly_what_is_not_frozen_learns(build, name):
    model = build(name).train()
    model(pairs()).losses["lm"].backward()
    learns = {key for key, p in model.named_parameters() if p.grad is not None}
    assert learns == {key for key, p in model.named_parameters() if p.requires_grad}
    assert {key.split(".")[0] for key in learns} == {"image_norm", "qformer", "projection"}
    # A softmax does not change when all of its scores are shifted: the gradient of a key's bias is rounding, or zero.
    still = {key for key in learns if not model.get_parameter(key).grad.any()}
    assert all(key.endswith("key.bias") for key in still)
    assert not model.vision.training
    assert not model.language.training


@pytest.mark.parametrize("name", LLMS)
def test_loss_and_metrics(build, name):
    model, batch = build(name), pairs()
    losses, metrics = model(batch)
    visual = model.visual_prompt(batch.images)
    states, labels = model.language.hidden_states(visual, batch.ids, batch.mask, batch.labels)
    logits = model.language.lm_head(states)
    surprise = [-row.log_softmax(dim=0)[label].item() for row, label in zip(logits, labels, strict=True)]
    assert batch.num_labels == len(surprise) == 3 + 2 + 1
    assert losses["lm"].item() == pytest.approx(sum(surprise) / 6, abs=1e-5)
    assert model(batch, 4.0).losses["lm"].item() == pytest.approx(sum(surprise) / 4, abs=1e-5)
    assert metrics["lm_perplexity"].item() == pytest.approx(math.exp(sum(surprise) / 6), rel=1e-5)

    # Labels that the model gets right, but for one.
    right = batch.labels.clone()
    right[right != -100] = logits.argmax(dim=1)
    right[0, 2] = (right[0, 2] + 1) % 255
    if not model.language.is_encoder_decoder:  # whose decoder would read the new labels
        assert model(replace(batch, labels=right)).metrics["lm_accuracy"].item() == pytest.approx(5 / 6)
    assert 0 <= metrics["lm_accuracy"] <= 1
    assert not any(metric.requires_grad for metric in metrics.values())


def test_a_batch_of_one(build):
    model, batch = build("llama").train(), pairs()
    first = GenerationBatch(batch.images[:1], batch.ids[:1], batch.mask[:1], batch.labels[:1])
    loss = model(first).losses["lm"]
    loss.backward()
    assert loss.isfinite()
    rest = GenerationBatch(batch.images[1:], batch.ids[1:], batch.mask[1:], batch.labels[1:])
    parts = [model(part, 1.0).losses["lm"] for part in (first, rest)]
    torch.testing.assert_close(sum(parts), model(batch, 1.0).losses["lm"])


@pytest.mark.parametrize("name", LLMS)
def test_an_llm_in_bfloat16_behind_a_qformer_in_float32(build, name):
    half, full = build(name, torch.bfloat16), build(name)
    full.projection.load_state_dict(half.projection.state_dict())
    losses = [model(pairs()).losses["lm"] for model in (half, full)]
    assert losses[0].dtype == torch.float32
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.02)
    losses[0].backward()
    gradients = [p.grad for p in half.parameters() if p.requires_grad]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients)
    with torch.autocast("cpu", torch.bfloat16):
        assert half(pairs()).losses["lm"].item() == pytest.approx(losses[1].item(), rel=0.05)


# -- generation ----------------------------------------------------------------------------------------------------


def encode(tokenizer, texts: tuple[str, ...], side: str) -> tuple[Tensor, Tensor]:
    tokenizer.padding_side = side
    encoded = tokenizer(list(texts), return_tensors="pt", padding=True)
    return encoded["input_ids"], encoded["attention_mask"].bool()


@torch.no_grad()
def generate(
    model: GenerationModel, images: Tensor, ids: Tensor, mask: Tensor, decoding: Decoding, n: int = 1
) -> Tensor:
    return model.language.generate(model.visual_prompt(images), ids, mask, decoding, END, n)


@pytest.mark.parametrize("beams", [1, 5])
@pytest.mark.parametrize("name", LLMS)
def test_a_list_of_different_prompts(build, parts, name, beams):
    model, tokenizer = build(name).eval(), AutoTokenizer.from_pretrained(getattr(parts, name))
    side = "right" if model.language.is_encoder_decoder else "left"
    images, decoding = pixels(1).expand(3, -1, -1, -1), Decoding(num_beams=beams, max_new_tokens=6)
    together = generate(model, images, *encode(tokenizer, PROMPTS, side), decoding)
    alone = [generate(model, images[:1], *encode(tokenizer, (p,), side), decoding) for p in PROMPTS]
    texts = tokenizer.batch_decode(together, skip_special_tokens=True)
    assert texts == [tokenizer.batch_decode(ids, skip_special_tokens=True)[0] for ids in alone]
    assert len(set(texts)) > 1
    assert not together.requires_grad


def test_copies(build, parts):
    model = build("llama").eval()
    ids, mask = encode(AutoTokenizer.from_pretrained(parts.llama), PROMPTS, "left")
    torch.manual_seed(0)
    assert len(generate(model, pixels(3), ids, mask, Decoding(top_p=0.9, max_new_tokens=4), 2)) == 6
