"""Records of different lengths in one batch give what each gives alone: nothing reads the padding."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blip2.backbones.features import FeatureFormat, cat_tokens, pad_tokens, token_mask
from blip2.backbones.vision import ImageEncoder
from blip2.config import ObjectivesConfig
from blip2.model.kernels.sdpa import sdpa, sdpa_shared_kv
from blip2.model.representation import Negatives, RepresentationBatch, RepresentationModel
from fixtures.tiny import QFORMER, randomize, texts

WIDTH, LENGTHS = 24, (7, 3, 1, 5)


def feature_encoder(width: int = WIDTH, longest: int = 9) -> ImageEncoder:
    return ImageEncoder(torch.nn.Identity(), torch.nn.Identity(), FeatureFormat(width, longest))


def records(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, length, WIDTH, generator=generator, dtype=torch.float64) for length in LENGTHS]


@pytest.fixture(autouse=True)
def features_in_float64(monkeypatch):
    monkeypatch.setattr(ImageEncoder, "encode", lambda self, images: images)


@pytest.fixture
def model() -> RepresentationModel:
    model = randomize(RepresentationModel(feature_encoder(), QFORMER, ObjectivesConfig())).double()
    model.temperature.data.fill_(0.3)
    return model


def batch() -> RepresentationBatch:
    ids, mask = texts(5, 7, 4, 9)
    return RepresentationBatch(cat_tokens(records()), ids, mask, torch.arange(4))


def test_padding_is_nan_and_nothing_else_is():
    features = cat_tokens(records())
    assert features.shape == (4, 7, WIDTH)
    assert token_mask(features).sum(dim=1).tolist() == list(LENGTHS)
    assert [torch.equal(row[: len(one[0])], one[0]) for row, one in zip(features, records(), strict=True)] == [True] * 4
    assert pad_tokens(features, 7) is features  # nothing is copied


@pytest.mark.parametrize("rows", [1, 3, torch.tensor([2, 0, 0, 3, 1])])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_attention_with_padding_is_the_formula(rows, p):
    torch.manual_seed(0)
    key, value = torch.randn(2, 4, 3, 7, 4, dtype=torch.float64)
    mask = token_mask(cat_tokens(records()))
    index = torch.arange(4).repeat(rows) if isinstance(rows, int) else rows
    query = torch.randn(len(index), 2, 12, dtype=torch.float64)
    found = sdpa_shared_kv(query, key, value, rows, 0.0, mask)
    for row, image in enumerate(index.tolist()):
        length = LENGTHS[image]
        q = query[row : row + 1].unflatten(2, (3, 4)).transpose(1, 2)
        alone = sdpa(q, key[image : image + 1, :, :length], value[image : image + 1, :, :length], None, 0.0)
        torch.testing.assert_close(found[row], alone.transpose(1, 2).flatten(2)[0])
    if p:
        assert sdpa_shared_kv(query, key, value, rows, p, mask).isfinite().all()


def test_image_and_text_embeddings_are_those_of_each_record_alone(model):
    together = model.embed_images(model.build_image_memory(cat_tokens(records())))
    alone = torch.cat([model.embed_images(model.build_image_memory(one)) for one in records()])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_a_batch_of_equal_lengths_needs_no_mask(model):
    features = torch.cat([records()[0], records(1)[0]])
    assert model.build_image_memory(features).layer_kv[0][0].mask is None
    padded = pad_tokens(features, 9)
    assert model.build_image_memory(padded).layer_kv[0][0].keys.shape[2] == 7


def test_matching_each_record_with_texts_of_its_own(model):
    ids, mask = texts(5, 7, 4, 9)
    candidates = torch.tensor([[0, 1], [3, 2], [1, 0], [2, 3]])
    together = model.match_candidates(cat_tokens(records()), ids, mask, candidates)
    alone = [model.match_candidates(one, ids, mask, row[None]) for one, row in zip(records(), candidates, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)


def losses_and_gradients(model, batch, negatives):
    model.zero_grad()
    losses = model.train()(batch, negatives=negatives).losses
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_three_losses_and_gradients_do_not_depend_on_the_padding(model):
    """More padding than the longest record needs, filled with something else than what a product with zero erases."""
    negatives = Negatives(torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 0, 1]))
    losses, gradients = losses_and_gradients(model, batch(), negatives)
    assert set(losses) == {"itc", "itm", "itg"}
    assert all(grad.isfinite().all() for grad in gradients.values())
    longer = replace(batch(), images=pad_tokens(batch().images, 9))
    others, again = losses_and_gradients(model, longer, negatives)
    torch.testing.assert_close(others, losses, rtol=0, atol=1e-12)
    torch.testing.assert_close(again, gradients, rtol=0, atol=1e-12)


def test_losses_of_a_ragged_batch_are_made_of_rows_alone(model):
    """ITC, ITM and ITG computed from records that go through the Q-Former one by one."""
    negatives = Negatives(torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 0, 1]))
    whole, _ = losses_and_gradients(model, batch(), negatives)
    ids, mask = batch().ids, batch().mask
    itg = [
        model.eval()(RepresentationBatch(one, ids[i : i + 1], mask[i : i + 1], torch.arange(1))).losses["itg"]
        * (mask[i].sum() - 1)
        for i, one in enumerate(records())
    ]
    torch.testing.assert_close(sum(itg) / (mask.sum() - 4), whole["itg"], rtol=0, atol=1e-6)
    images = torch.cat([model.embed_images(model.build_image_memory(one)) for one in records()])
    similarity = torch.einsum("iqc,tc->itq", images, model.embed_texts(ids, mask)).amax(dim=2) / 0.3
    targets = torch.full((4, 4), 0.1 / 4, dtype=torch.float64) + 0.9 * torch.eye(4, dtype=torch.float64)
    itc = [-(targets * side.log_softmax(dim=1)).sum(dim=1).mean() for side in (similarity, similarity.T)]
    torch.testing.assert_close((itc[0] + itc[1]) / 2, whole["itc"], rtol=0, atol=1e-6)
    pairs = [(i, i) for i in range(4)] + [(i, int(t)) for i, t in enumerate(negatives.text_for_image)]
    pairs += [(int(i), t) for t, i in enumerate(negatives.image_for_text)]
    logits = [
        model.match(
            model.build_image_memory(records()[i]), ids[t : t + 1, : mask[t].sum()], mask[t : t + 1, : mask[t].sum()]
        )
        for i, t in pairs
    ]
    labels = torch.tensor([1] * 4 + [0] * 8)
    torch.testing.assert_close(
        torch.nn.functional.cross_entropy(torch.cat(logits), labels), whole["itm"], rtol=0, atol=1e-6
    )


def test_attention_maps_give_padding_no_weight(model):
    maps = model.qformer.attention_maps(model.build_image_memory(cat_tokens(records())))
    for row, one in zip(maps, records(), strict=True):
        length = one.shape[1]
        assert not row[..., length:].any()
        alone = model.qformer.attention_maps(model.build_image_memory(one))[0]
        torch.testing.assert_close(row[..., :length], alone, rtol=0, atol=1e-12)
