import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blip2.backbones.vision_loaders import load_image_encoder
from blip2.config import ObjectivesConfig
from blip2.model.losses import query_diversity, query_statistics
from blip2.model.qformer import attention_mask
from blip2.model.representation import Negatives, RepresentationBatch, RepresentationModel
from fixtures.tiny import QFORMER, no_encoder, randomize, texts

WIDTH = 24
LENGTHS = (6, 4, 3, 5)


def build(**enabled: float) -> RepresentationModel:
    model = RepresentationModel(no_encoder(5, WIDTH), QFORMER, ObjectivesConfig(**enabled))
    randomize(model)
    # The random weights spread cosines less than trained ones do.
    model.temperature.data.fill_(0.3)
    return model


def pairs(lengths: tuple[int, ...] = LENGTHS, seed: int = 2) -> RepresentationBatch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(lengths), 5, WIDTH, generator=generator)
    return RepresentationBatch(images, *texts(*lengths), torch.arange(len(lengths)))


# -- losses --------------------------------------------------------------------------------------------------------


def matched(model: RepresentationModel, batch: RepresentationBatch, image: int, text: int) -> Tensor:
    """ITM logits of one pair by itself."""
    row = slice(text, text + 1)
    length = int(batch.mask[text].sum())
    return model.match(
        model.build_image_memory(batch.images[image][None]), batch.ids[row, :length], batch.mask[row, :length]
    )[0]


def test_losses_gradients_and_metrics_equal_separate_passes():
    model, batch = build(), pairs()
    negatives = Negatives(torch.tensor([1, 0, 0, 2]), torch.tensor([3, 2, 1, 0]))
    losses, metrics = model(batch, negatives=negatives)
    memory, own, separate = model.build_image_memory(batch.images), torch.arange(4), {}

    queries, cls = model.embed_images(memory), model.embed_texts(batch.ids, batch.mask)
    scores = (queries @ cls.T).amax(dim=1) / model.temperature
    separate["itc"] = sum(F.cross_entropy(rows, own, label_smoothing=0.1) for rows in (scores, scores.T)) / 2
    right = [(rows.argmax(dim=1) == own).float().mean() for rows in (scores, scores.T)]
    torch.testing.assert_close(metrics["itc_r1"], sum(right) / 2)

    shown = [(b, b, 1) for b in range(4)]
    shown += [(image, b, 0) for b, image in enumerate(negatives.image_for_text.tolist())]
    shown += [(b, text, 0) for b, text in enumerate(negatives.text_for_image.tolist())]
    logits = torch.stack([matched(model, batch, image, text) for image, text, _ in shown])
    labels = torch.tensor([label for *_, label in shown])
    separate["itm"] = F.cross_entropy(logits, labels)
    torch.testing.assert_close(metrics["itm_accuracy"], (logits.argmax(dim=1) == labels).float().mean())

    begun = batch.ids.clone()
    begun[:, 0] = QFORMER.vocab_size - 1  # [DEC]
    hidden = model.qformer(memory, begun, attention_mask("causal", QFORMER.num_query_tokens, batch.mask)).text
    logits = model.language_head(hidden[:, :-1].flatten(0, 1), model.qformer.word_embedding.weight)
    labels = batch.ids.where(batch.mask, -100)[:, 1:].flatten()
    separate["itg"] = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(metrics["itg_perplexity"], F.cross_entropy(logits, labels).exp())

    torch.testing.assert_close(losses, separate)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = (torch.autograd.grad(sum(found.values()), trained) for found in (losses, separate))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_negatives_are_the_hardest_of_each_direction():
    model, batch = build(itc=0.0, itg=0.0).train(), pairs(seed=17)
    scores = model.embed_images(model.build_image_memory(batch.images)) @ model.embed_texts(batch.ids, batch.mask).T
    scores = scores.amax(dim=1)
    hardest = Negatives(image_for_text=scores.argmax(dim=0), text_for_image=scores.argmax(dim=1))
    assert not any((drawn == torch.arange(4)).any() for drawn in hardest)
    model.temperature.data.fill_(1e-3)  # nothing but the hardest is drawn
    torch.testing.assert_close(model(batch).losses, model(batch, negatives=hardest).losses)


def test_every_trained_parameter_learns_and_the_encoder_does_not():
    model = build().train()
    losses, metrics = model(pairs())
    sum(losses.values()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # A softmax does not change when all of its scores are shifted, so their gradient is rounding, or zero.
    assert {name for name in without if not name.endswith("key.bias")} == {"vision.network.weight"}
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("on", [{"itc"}, {"itm"}, {"itg"}, {"itc", "itm"}, {"itc", "itg"}, {"itm", "itg"}])
def test_objectives_can_be_switched_off(on):
    everything, batch = build(), pairs()
    some = build(**dict.fromkeys({"itc", "itm", "itg"} - on, 0.0))
    negatives = Negatives(torch.tensor([1, 0, 0, 2]), torch.tensor([3, 2, 1, 0]))
    losses, metrics = some(batch, negatives=negatives)
    assert losses.keys() == on
    assert {name.split("_")[0] for name in metrics} - {"query"} == on
    expected = everything(batch, negatives=negatives).losses
    torch.testing.assert_close(losses, {name: expected[name] for name in on})


def test_label_count_divides_the_language_modeling_loss():
    model, batch = build(itc=0.0, itm=0.0), pairs()
    assert batch.num_labels == sum(length - 1 for length in LENGTHS)
    torch.testing.assert_close(model(batch).losses["itg"], model(batch, float(batch.num_labels)).losses["itg"])
    torch.testing.assert_close(model(batch, 7.0).losses["itg"] * 7, model(batch, 14.0).losses["itg"] * 14)


def test_metrics_are_in_range_while_training():
    torch.manual_seed(0)
    metrics = build().train()(pairs()).metrics
    assert 0 <= metrics["itc_r1"] <= 1
    assert 0 <= metrics["itm_accuracy"] <= 1
    assert metrics["itg_perplexity"] >= 1


def test_a_batch_of_one_has_nothing_to_contrast():
    model, batch = build().train(), pairs((5,))
    losses, _ = model(batch)
    assert losses["itc"] == 0
    torch.testing.assert_close(losses["itm"], F.cross_entropy(matched(model, batch, 0, 0)[None], torch.tensor([1])))
    assert losses["itg"].isfinite()
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("shared", ["image", "text"])
def test_pairs_that_share_an_image_or_a_text_are_not_negatives(shared):
    """Pairs 0 and 1 belong together, so each has only pair 2 as a negative; pair 2 has both."""
    batch = pairs((5, 5, 4))
    if shared == "image":
        batch = replace(batch, image_ids=torch.tensor([8, 8, 9]))
    else:
        batch = replace(batch, ids=batch.ids[[0, 0, 2]])
    model = build(itg=0.0).train()
    allowed = []
    for image, text in itertools.product((0, 1), repeat=2):
        negatives = Negatives(torch.tensor([2, 2, image]), torch.tensor([2, 2, text]))
        allowed.append(model(batch, negatives=negatives).losses["itm"].item())
    for seed in range(20):
        torch.manual_seed(seed)
        drawn = model(batch).losses["itm"].item()
        assert min(abs(drawn - loss) for loss in allowed) < 1e-6

    queries, cls = model.embed_images(model.build_image_memory(batch.images)), model.embed_texts(batch.ids, batch.mask)
    scores = (queries @ cls.T).amax(dim=1) / 0.3
    target = 0.9 * torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]) + 0.1 / 3
    expected = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
    torch.testing.assert_close(model(batch).losses["itc"], expected)


def test_a_batch_without_any_negative():
    model, batch = build().train(), pairs((5, 4))
    losses = model(replace(batch, image_ids=torch.tensor([3, 3]))).losses
    logits = torch.stack([matched(model, batch, row, row) for row in (0, 1)])
    torch.testing.assert_close(losses["itm"], F.cross_entropy(logits, torch.tensor([1, 1])))


@pytest.mark.parametrize("temperature", [0.0, -0.1])
def test_a_temperature_that_ran_away_keeps_losses_finite(temperature):
    model = build().train()
    model.temperature.data.fill_(temperature)
    assert all(loss.isfinite() for loss in model(pairs()).losses.values())


# -- encoding ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_embeddings_are_unit_vectors():
    model, batch = build(), pairs()
    images, text = model.embed_images(model.build_image_memory(batch.images)), model.embed_texts(batch.ids, batch.mask)
    assert (images.shape, text.shape) == ((4, 4, 16), (4, 16))
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(4, 4))
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(4))


@torch.no_grad()
def test_similarities_are_computed_in_full_precision_under_autocast():
    model, batch = build(), pairs()
    with torch.autocast("cpu", torch.bfloat16):
        text = model.embed_texts(batch.ids, batch.mask)
        loss = model(batch).losses["itc"]
    assert text.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(4), atol=1e-6, rtol=0)


@torch.no_grad()
def test_matching_and_embedding_do_not_see_padding():
    model, batch = build(), pairs()
    memory = model.build_image_memory(batch.images)
    ids, mask = F.pad(batch.ids, (0, 5), value=7), F.pad(batch.mask, (0, 5))
    logits = model.match(memory, batch.ids, batch.mask)
    assert logits.shape == (4, 2)
    torch.testing.assert_close(model.match(memory, ids, mask), logits)
    torch.testing.assert_close(torch.stack([matched(model, batch, row, row) for row in range(4)]), logits)
    torch.testing.assert_close(model.embed_texts(ids, mask), model.embed_texts(batch.ids, batch.mask))


def test_pixels_and_ready_features_give_the_same(parts):
    torch.manual_seed(0)
    model = RepresentationModel(load_image_encoder(parts.vision), QFORMER, ObjectivesConfig())
    randomize(model.qformer)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    negatives = Negatives(torch.tensor([1, 0, 0, 2]), torch.tensor([3, 2, 1, 0]))
    batch = replace(pairs(), images=pixels)
    ready = replace(batch, images=model.vision.encode(pixels))
    torch.testing.assert_close(model(batch, negatives=negatives).losses, model(ready, negatives=negatives).losses)


def test_query_diversity_is_one_more_loss_and_changes_no_other():
    plain, diverse, batch = build(), build(query_diversity=0.5), pairs()
    negatives = Negatives(torch.tensor([1, 0, 0, 2]), torch.tensor([3, 2, 1, 0]))
    expected, found = plain(batch, negatives=negatives), diverse(batch, negatives=negatives)
    assert "query_diversity" not in expected.losses
    for name, loss in expected.losses.items():
        assert torch.equal(found.losses[name], loss)
    queries = diverse.qformer(diverse.build_image_memory(batch.images)).queries
    torch.testing.assert_close(found.losses["query_diversity"], query_diversity(queries))
    torch.testing.assert_close(found.metrics["query_similarity"], query_statistics(queries)["query_similarity"])
