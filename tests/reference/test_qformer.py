"""The fast Q-Former and stage 1 give the values and gradients of the plain ones, over random shapes in float64."""

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from blip2.backbones.vision import ImageEncoder
from blip2.config import ObjectivesConfig, QFormerConfig
from blip2.model.qformer import attention_mask
from blip2.model.representation import Negatives, RepresentationBatch, RepresentationModel
from fixtures.tiny import no_encoder, randomize
from reference.qformer import ReferenceModel
from reference.qformer import attention_mask as reference_mask

KINDS = ("unimodal", "causal", "bidirectional")
SEEDS = range(8)


@dataclass(frozen=True)
class Case:
    """Random sizes, both models with the same random weights, and B image-text pairs."""

    config: QFormerConfig
    fast: RepresentationModel
    plain: ReferenceModel
    features: Tensor
    ids: Tensor
    mask: Tensor
    images: Tensor
    """The image of each text: some texts share one, some images have none."""


def make_case(seed: int) -> Case:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    heads, image_width = rng.choice([1, 2, 3]), rng.choice([5, 8, 12])
    num_images, num_texts, length = rng.randint(1, 5), rng.randint(2, 7), rng.randint(2, 7)
    config = QFormerConfig(
        hidden_size=heads * rng.choice([2, 4, 6]),
        num_hidden_layers=rng.randint(1, 4),
        num_attention_heads=heads,
        intermediate_size=rng.choice([5, 16]),
        num_query_tokens=rng.randint(1, 5),
        cross_attention_frequency=1 + seed % 3,
        image_text_hidden_size=rng.choice([3, 8]),
        vocab_size=rng.randint(8, 20),
        max_position_embeddings=rng.randint(length, 2 * length),
        dropout=0.0,
        layer_norm_eps=1e-6,
    )
    fast = randomize(RepresentationModel(no_encoder(3, image_width), config, ObjectivesConfig()), seed).double()
    fast.temperature.data.fill_(0.3)
    plain = ReferenceModel(config, image_width).double()
    weights = {name: tensor for name, tensor in fast.state_dict().items() if not name.startswith("vision.")}
    plain.load_state_dict(weights)
    lengths = torch.tensor([rng.randint(1, length) for _ in range(num_texts)])
    return Case(
        config, fast, plain,
        features=torch.randn(num_images, rng.randint(1, 9), image_width, dtype=torch.float64),
        ids=torch.randint(0, config.vocab_size - 1, (num_texts, length)),
        mask=torch.arange(length) < lengths[:, None],
        images=torch.randint(0, num_images, (num_texts,)),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def features_in_float64(monkeypatch):
    """The image encoder returns cached features in float32."""
    monkeypatch.setattr(ImageEncoder, "encode", lambda self, images: images)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of parameters that have one other than zero."""
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-12}


def assert_same_gradients(fast: nn.Module, plain: nn.Module, rtol: float, atol: float) -> None:
    found, expected = gradients(fast), gradients(plain)
    # The gradient of a key's bias is rounding: a softmax does not change when all of its scores are shifted.
    for name in found.keys() | expected.keys():
        zero = torch.zeros(1, dtype=torch.float64)
        if name.endswith("key.bias"):
            assert max(found.get(name, zero).abs().max(), expected.get(name, zero).abs().max()) < 1e-6, name
        else:
            assert torch.allclose(found.get(name, zero), expected.get(name, zero), rtol=rtol, atol=atol), name


# -- the Q-Former --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_queries", [0, 1, 3])
def test_masks(kind, num_queries):
    text_mask = torch.arange(4) < torch.tensor([[4], [1], [3]])
    for real in (text_mask, text_mask[:, :0]):
        assert torch.equal(attention_mask(kind, num_queries, real), reference_mask(kind, num_queries, real))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_of_queries_and_text(seed, kind):
    """Texts are padded and share images; of the text a random part of the outputs is asked for."""
    case = make_case(seed)
    wanted = torch.rand(case.mask.shape) < 0.7
    fast_mask = attention_mask(kind, case.config.num_query_tokens, case.mask)
    memory = case.fast.build_image_memory(case.features).select(case.images)
    queries, text = case.fast.qformer(memory, case.ids, fast_mask, output_tokens=wanted)
    images = case.plain.image_norm(case.features[case.images])
    plain_queries, plain_text = case.plain.qformer(kind, images, case.ids, case.mask)

    wanted = wanted & case.mask
    torch.testing.assert_close(queries, plain_queries, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(text[wanted], plain_text[wanted], rtol=1e-9, atol=1e-9)
    (queries.sin().sum() + text[wanted].cos().sum()).backward()
    (plain_queries.sin().sum() + plain_text[wanted].cos().sum()).backward()
    assert_same_gradients(case.fast, case.plain, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ("unimodal", "causal"))
def test_outputs_and_gradients_of_text_alone(seed, kind):
    case = make_case(seed)
    text = case.fast.qformer(None, case.ids, attention_mask(kind, 0, case.mask)).text[case.mask]
    plain = case.plain.qformer(kind, None, case.ids, case.mask)[1][case.mask]
    torch.testing.assert_close(text, plain, rtol=1e-9, atol=1e-9)
    text.sin().sum().backward()
    plain.sin().sum().backward()
    assert_same_gradients(case.fast, case.plain, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("repeats", [1, 2])
def test_outputs_and_gradients_of_queries_alone(seed, repeats):
    """All images, each of them `repeats` times, and then the images of the texts, in one memory."""
    case = make_case(seed)
    memory = case.fast.build_image_memory(case.features)
    queries = case.fast.qformer(memory.repeat(repeats).cat(memory.select(case.images))).queries
    rows = torch.cat([torch.arange(len(case.features)).repeat(repeats), case.images])
    images, empty = case.plain.image_norm(case.features[rows]), torch.zeros(len(rows), 0, dtype=torch.long)
    plain, _ = case.plain.qformer("unimodal", images, empty, empty.bool())
    torch.testing.assert_close(queries, plain, rtol=1e-9, atol=1e-9)
    queries.sin().sum().backward()
    plain.sin().sum().backward()
    assert_same_gradients(case.fast, case.plain, rtol=1e-7, atol=1e-9)


# -- the losses of stage 1 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_losses_and_gradients_of_stage_1(seed):
    """Some pairs share an image, and so belong together; logits of words are float32 in the fast model."""
    case = make_case(seed)
    case.mask[0, :2] = True  # ITG predicts one token at least
    num_texts = len(case.ids)
    wrong = Negatives(torch.randint(0, num_texts, (num_texts,)), torch.randint(0, num_texts, (num_texts,)))
    features, ids = case.features[case.images], case.ids.masked_fill(~case.mask, 0)
    positive = case.images[:, None] == case.images
    positive |= (ids[:, None] == ids).all(dim=2)
    if bool(positive.all(dim=1).any()):  # such rows have no negative, and ITM does not count them
        case.fast.objectives = ObjectivesConfig(itm=0.0)
    losses = case.fast(RepresentationBatch(features, ids, case.mask, case.images), negatives=wrong).losses
    expected = {
        "itc": case.plain.itc(features, ids, case.mask, positive),
        "itm": case.plain.itm(features, ids, case.mask, wrong.image_for_text, wrong.text_for_image),
        "itg": case.plain.itg(features, ids, case.mask),
    }
    assert {"itc", "itg"} <= losses.keys() <= expected.keys()
    expected = {name: expected[name] for name in losses}
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-5, abs=1e-6), name
    torch.stack([loss.double() for loss in losses.values()]).sum().backward()
    torch.stack(list(expected.values())).sum().backward()
    assert_same_gradients(case.fast, case.plain, rtol=1e-4, atol=1e-5)


def test_some_cases_have_negatives():
    cases = [make_case(seed) for seed in SEEDS]
    assert sum(len(case.images.unique()) > 1 for case in cases) >= 4
