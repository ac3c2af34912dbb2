"""The fast Q-Former and stage 1 give the values and gradients of the plain ones, over random shapes in float64."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from blip2.backbones.vision import ImageEncoder
from blip2.config import ObjectivesConfig, QFormerConfig
from blip2.model.qformer import attention_mask
from blip2.model.representation import Negatives, RepresentationBatch, RepresentationModel
from fixtures.tiny import no_encoder, randomize
from reference.qformer import ReferenceModel
from reference.qformer import attention_mask as reference_mask

KINDS = ("unimodal", "causal", "bidirectional")


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


def make_case(
    seed: int, heads: int, head_width: int, layers: int, frequency: int, intermediate: int, queries: int,
    contrastive: int, vocabulary: int, images: int, image_tokens: int, image_width: int, texts: list[tuple[int, int]],
    padding: int, positions: int,
) -> Case:  # fmt: skip
    """Return a case of these :data:`SIZES`: `texts` has the length and the image of each text."""
    torch.manual_seed(seed)
    lengths = torch.tensor([length for length, _ in texts])
    length = max(2, int(lengths.max())) + padding
    config = QFormerConfig(
        hidden_size=heads * head_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        num_query_tokens=queries,
        cross_attention_frequency=frequency,
        image_text_hidden_size=contrastive,
        vocab_size=vocabulary,
        max_position_embeddings=length + positions,
        dropout=0.0,
        layer_norm_eps=1e-6,
    )
    fast = randomize(RepresentationModel(no_encoder(3, image_width), config, ObjectivesConfig()), seed).double()
    fast.temperature.data.fill_(0.3)
    plain = ReferenceModel(config, image_width).double()
    weights = {name: tensor for name, tensor in fast.state_dict().items() if not name.startswith("vision.")}
    plain.load_state_dict(weights)
    return Case(
        config, fast, plain,
        features=torch.randn(images, image_tokens, image_width, dtype=torch.float64),
        ids=torch.randint(0, vocabulary - 1, (len(texts), length)),
        mask=torch.arange(length) < lengths[:, None],
        images=torch.tensor([image % images for _, image in texts]),
    )  # fmt: skip


SIZES = st.fixed_dictionaries({
    "seed": st.integers(0, 2**32 - 1), "heads": st.integers(1, 3), "head_width": st.sampled_from([2, 4, 6]),
    "layers": st.integers(1, 4), "frequency": st.integers(1, 3), "intermediate": st.integers(1, 16),
    "queries": st.integers(1, 5), "contrastive": st.integers(2, 8), "vocabulary": st.integers(8, 20),
    "images": st.integers(1, 5), "image_tokens": st.integers(1, 9), "image_width": st.integers(2, 12),
    "texts": st.lists(st.tuples(st.integers(1, 7), st.integers(0, 4)), min_size=2, max_size=7),
    "padding": st.integers(0, 2), "positions": st.integers(0, 7),
})  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def features_in_float64():
    """The image encoder returns cached features in float32."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ImageEncoder, "encode", lambda self, images: images)
        yield


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


@pytest.mark.parametrize("kind", KINDS)
@given(sizes=SIZES)
def test_outputs_and_gradients_of_queries_and_text(kind, sizes):
    """Texts are padded and share images; of the text a random part of the outputs is asked for."""
    case = make_case(**sizes)
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


@pytest.mark.parametrize("kind", ("unimodal", "causal"))
@given(sizes=SIZES)
def test_outputs_and_gradients_of_text_alone(kind, sizes):
    case = make_case(**sizes)
    text = case.fast.qformer(None, case.ids, attention_mask(kind, 0, case.mask)).text[case.mask]
    plain = case.plain.qformer(kind, None, case.ids, case.mask)[1][case.mask]
    torch.testing.assert_close(text, plain, rtol=1e-9, atol=1e-9)
    text.sin().sum().backward()
    plain.sin().sum().backward()
    assert_same_gradients(case.fast, case.plain, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("repeats", [1, 2])
@given(sizes=SIZES)
def test_outputs_and_gradients_of_queries_alone(repeats, sizes):
    """All images, each of them `repeats` times, and then the images of the texts, in one memory."""
    case = make_case(**sizes)
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


def test_losses_and_gradients_of_stage_1():
    """Some pairs share an image, and so belong together; logits of words are float32 in the fast model."""
    has_itm: list[bool] = []

    @given(sizes=SIZES)
    def check(sizes: dict[str, Any]) -> None:
        case = make_case(**sizes)
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
        has_itm.append("itm" in losses)

    check()
    assert sum(has_itm) >= max(4, len(has_itm) / 4)  # the other cases have texts without a negative
