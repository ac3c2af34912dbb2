"""The Q-Former on windows of a long sequence: ``qformer.window`` and ``qformer.stride``."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from blip2.backbones.features import FeatureFormat, cat_tokens, pad_tokens
from blip2.backbones.language import VISUAL_PADDING, LanguageModel, load_language_model
from blip2.backbones.vision import ImageEncoder
from blip2.config import LanguageConfig, ModelConfig, ObjectivesConfig, QFormerConfig, VisionConfig
from blip2.decoding.search import Decoding
from blip2.errors import InputError
from blip2.model.generation import GenerationBatch, GenerationModel, Questions
from blip2.model.qformer import attention_mask
from fixtures.tiny import QFORMER, randomize, texts

WIDTH, LENGTHS = 24, (11, 4, 1, 8, 2)
WINDOW, STRIDE = 4, 3
STARTS = {11: (0, 3, 6, 9), 4: (0,), 1: (0,), 8: (0, 3, 6), 2: (0,)}
"""Where the windows of a sequence of each length begin."""
LLMS = ("llama", "opt", "t5", "gpt2")
QUERIES = QFORMER.num_query_tokens
GREEDY = Decoding(num_beams=1, max_new_tokens=6, min_new_tokens=6)


def records() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, length, WIDTH, generator=generator) for length in LENGTHS]


def gpt2() -> GPT2LMHeadModel:
    """An LLM whose positions are columns in training, whatever the attention mask says."""
    sizes = {"vocab_size": 258, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return randomize(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=256, eos_token_id=256)))


def build(parts, name: str, window: int | None = WINDOW, stride: int | None = STRIDE, **changes) -> GenerationModel:
    torch.manual_seed(0)
    encoder = ImageEncoder(torch.nn.Identity(), torch.nn.Identity(), FeatureFormat(WIDTH, 12))
    config = replace(QFORMER, window=window, stride=stride, **changes)
    language = LanguageModel(gpt2()) if name == "gpt2" else load_language_model(getattr(parts, name))
    model = GenerationModel(encoder, config, language, ObjectivesConfig(query_diversity=0.5))
    randomize(model.qformer)
    model.initialize_projection()
    return model.eval()


def questions() -> Questions:
    return Questions(*texts(5, 3, 7, 2, 6))


def by_hand(model: GenerationModel, record: Tensor, asked: Questions | None = None) -> Tensor:
    """Z of one record: the outputs for each window as a record of its own, one after the other."""
    outputs = []
    for start in STARTS[record.shape[1]]:
        memory = model.qformer.project_image(record[:, start : start + WINDOW], model.image_norm)
        if asked is None:
            outputs.append(model.qformer(memory).queries)
        else:
            mask = attention_mask("bidirectional", QUERIES, asked.mask)
            outputs.append(model.qformer(memory, asked.ids, mask).queries)
    return torch.cat(outputs, dim=1)


def captions(is_encoder_decoder: bool, rows: slice = slice(None)) -> dict[str, Tensor]:
    """Prompts of two tokens with captions of 5, 3, 6, 4 and 2 tokens."""
    ids = torch.randint(1, 250, (5, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(8) < torch.tensor([7, 5, 8, 6, 4])[:, None]
    labels = ids.where(mask, -100)
    labels[:, :2] = -100
    if is_encoder_decoder:
        ids, mask, labels = ids[:, :2], mask[:, :2], labels[:, 2:]
    return {"ids": ids[rows], "mask": mask[rows], "labels": labels[rows]}


# -- which windows there are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", range(1, 6))
def test_the_windows_of_a_sequence_cover_it_and_the_first_that_reaches_its_end_is_the_last(window):
    for stride in range(1, window + 1):
        config = QFormerConfig(window=window, stride=stride)
        for length in range(1, 14):
            ends = [start + window for start in range(0, config.count_windows(length) * stride, stride)]
            assert ends[-1] >= length and all(end < length for end in ends[:-1])
    assert QFormerConfig(window=window).count_windows(13) == -(-13 // window)
    assert QFormerConfig().count_windows(13) == 1


# -- the Q-Former ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asks", [False, True])
def test_outputs_are_those_of_each_window_by_hand(parts, asks):
    model = build(parts, "llama", use_qformer_text_input=asks)
    asked = questions() if asks else None
    found = model.query_outputs(cat_tokens(records()), asked)
    assert found.shape == (5, 4 * QUERIES, QFORMER.hidden_size)
    for i, record in enumerate(records()):
        own = None if asked is None else Questions(*(each[i : i + 1, : int(asked.mask[i].sum())] for each in asked))
        expected = by_hand(model, record, own)[0]
        torch.testing.assert_close(found[i, : len(expected)], expected, rtol=0, atol=1e-5)
        assert found[i, len(expected) :].isnan().all()
    prompt = model.visual_prompt(cat_tokens(records()), asked)
    assert torch.equal(prompt == VISUAL_PADDING, found[..., :1].isnan().expand_as(prompt))
    exists = ~found[..., 0].isnan()
    torch.testing.assert_close(prompt[exists], model.projection(found[exists]))


def test_several_questions_about_one_sequence(parts):
    model, asked, index = build(parts, "llama", use_qformer_text_input=True), questions(), torch.tensor([3, 1, 3, 0, 2])
    repeated = cat_tokens([records()[i] for i in index])
    found, expected = model.query_outputs(cat_tokens(records()), asked, index), model.query_outputs(repeated, asked)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, equal_nan=True)
    maps = [model.attention_maps(cat_tokens(records()), asked, index), model.attention_maps(repeated, asked)]
    torch.testing.assert_close(*maps, rtol=0, atol=1e-5)


def test_attention_of_a_query_is_within_its_window(parts):
    model = build(parts, "llama")
    maps = model.attention_maps(cat_tokens(records()), average_heads=False)
    assert maps.shape == (5, 2, QFORMER.num_attention_heads, 4 * QUERIES, max(LENGTHS))
    for row, record in zip(maps, records(), strict=True):
        length = record.shape[1]
        expected = torch.zeros(4 * QUERIES, max(LENGTHS), dtype=torch.bool)
        for window, start in enumerate(STARTS[length]):
            expected[window * QUERIES : (window + 1) * QUERIES, start : min(start + WINDOW, length)] = True
        assert torch.equal(row[0, 0] > 0, expected)
        torch.testing.assert_close(row.sum(dim=-1), expected.any(dim=-1).float().expand_as(row[..., 0]))
        memory = model.qformer.project_image(record[:, :WINDOW], model.image_norm)
        first = model.qformer.attention_maps(memory, average_heads=False)[0]
        torch.testing.assert_close(row[..., :QUERIES, : first.shape[-1]], first)


def test_one_window_for_all_is_no_window_bit_for_bit(parts):
    plain, windowed = build(parts, "llama", None, None), build(parts, "llama", 12, None)
    for inputs in (cat_tokens(records()), records()[0]):
        assert torch.equal(windowed.visual_prompt(inputs), plain.visual_prompt(inputs))
        batch = GenerationBatch(inputs, **captions(False, slice(len(inputs))))
        assert windowed(batch).losses == plain(batch).losses


# -- the LLM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LLMS)
def test_losses_of_sequences_together_are_those_alone(parts, name):
    model = build(parts, name)
    split = model.language.is_encoder_decoder
    together = model(GenerationBatch(cat_tokens(records()), **captions(split))).losses
    alone = []
    for i, record in enumerate(records()):
        batch = GenerationBatch(record, **captions(split, slice(i, i + 1)))
        alone.append(model(batch, num_labels=1.0).losses["lm"])
        # Without windows, from the outputs by hand.
        visual = model.projection(by_hand(model, record))
        states, labels = model.language.hidden_states(visual, batch.ids, batch.mask, batch.labels)
        expected = torch.nn.functional.cross_entropy(model.language.lm_head(states), labels, reduction="sum")
        torch.testing.assert_close(alone[-1], expected, rtol=1e-5, atol=0)
    count = sum(captions(split)["labels"].ne(-100).sum(dim=1)).item()
    torch.testing.assert_close(together["lm"], sum(alone) / count, rtol=1e-5, atol=0)
    assert together["query_diversity"].isfinite()


@pytest.mark.parametrize("name", LLMS)
def test_gradients_do_not_depend_on_padding(parts, name):
    model = build(parts, name)
    batch = GenerationBatch(cat_tokens(records()), **captions(model.language.is_encoder_decoder))
    found = []
    for images in (batch.images, pad_tokens(batch.images, 12)):
        model.zero_grad()
        sum(model(replace(batch, images=images)).losses.values()).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert {"projection.weight", "qformer.queries", "image_norm.weight"} <= set(found[0])
    assert all(grad.isfinite().all() for grad in found[0].values())
    assert found[0]["qformer.queries"].abs().sum() > 0
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("name", LLMS)
@pytest.mark.parametrize("beams", [1, 3])
def test_text_about_sequences_together_is_that_about_each_alone(parts, name, beams):
    model, decoding = build(parts, name), replace(GREEDY, num_beams=beams)
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0], [7, 0, 0]]), torch.ones(3, 3, dtype=torch.bool).tril().flip(0)
    visual = model.visual_prompt(cat_tokens(records()))
    index = torch.tensor([0, 1, 3])
    found = model.language.generate(visual, ids, mask, decoding, 256, image_index=index)
    for row, image in enumerate(index.tolist()):
        one = model.visual_prompt(records()[image])
        alone = model.language.generate(
            one, ids[row : row + 1, : 3 - row], mask[row : row + 1, : 3 - row], decoding, 256
        )
        assert found[row].tolist() == alone[0].tolist()
    # The padding of the batch is no token of the LLM: not even NaN in its place would change anything.
    assert model.language.prepare_prompts(visual[[1, 2]], ids[:2], mask[:2]).visual_prompts.shape[1] == QUERIES


def test_a_visual_prompt_that_diverged_reaches_the_loss(parts):
    model = build(parts, "llama")
    visual = model.visual_prompt(cat_tokens(records()))
    visual[0, QUERIES:] = torch.nan
    states, _ = model.language.hidden_states(visual, **captions(False))
    assert states.isnan().any()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "vision", "qformer", "message"),
    [
        ("generation", "features", {"stride": 2}, "qformer.stride is 2, but qformer.window is null"),
        ("generation", "features", {"window": 3, "stride": 4}, "qformer.stride is 4, expected 1 to 3, the value of"),
        ("generation", "features", {"window": 0}, "qformer.window is 0, expected"),
        ("generation", "features", {"window": 3, "stride": 0}, "qformer.stride is 0, expected"),
        ("generation", "a-vit", {"window": 3}, "vision.name is a-vit, and windows are for sequences of features"),
        ("representation", "features", {"window": 3}, "in stage representation a text belongs to one set of queries"),
    ],
)
def test_windows_that_do_not_fit_are_refused(stage, vision, qformer, message):
    sizes = {"hidden_size": WIDTH, "max_tokens": 12} if vision == "features" else {}
    language = LanguageConfig("llm") if stage == "generation" else None
    with pytest.raises(InputError, match=message):
        ModelConfig(stage, VisionConfig(vision, **sizes), QFormerConfig(**qformer), language)
