"""Probabilities, alternatives and attention of generated texts; the Q-Former's own outputs; captions of stage 1."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import blip2
from blip2.decoding.options import ANSWER_DECODING, CAPTION_DECODING, Decoding
from blip2.decoding.text import INCOMPLETE_CHARACTER
from blip2.errors import InputError
from blip2.model.generation import GenerationModel
from blip2.model.losses import IGNORE_INDEX
from blip2.model.qformer import attention_mask
from blip2.pipelines import Generated, GenerationPipeline, draw_attention, load
from conftest import draw
from fixtures.tiny import randomize

IMAGES = [draw("disc", "red", 0), draw("square", "blue", 7), draw("stripe", "green", 3)]
TEXTS = ["a red disc", "the square is blue here and there", "green"]
QUESTIONS = ["what is it?", "is it red or blue, or of another color?", "how many?"]
GREEDY = Decoding(num_beams=1, max_new_tokens=6)
BEAMS = Decoding(num_beams=3, max_new_tokens=6)


@pytest.fixture(scope="module")
def compare(runs):
    pipeline = load(runs["stage1"], device="cpu")
    randomize(pipeline.model)
    return pipeline


@pytest.fixture(scope="module", params=["llama", "t5"])
def writer(request, runs):
    pipeline = load(runs[request.param], device="cpu")
    randomize(pipeline.model.qformer)
    for parameter in pipeline.model.language.parameters():
        if parameter.ndim > 1:
            parameter.data *= 2
    return pipeline


@pytest.fixture(scope="module")
def reader(runs, bert):
    """A model whose Q-Former reads questions."""
    made = load(runs["llama"], device="cpu")
    assert made.config.language is not None
    config = replace(
        made.config,
        qformer=replace(made.config.qformer, use_qformer_text_input=True),
        language=replace(made.config.language, prompt="Question: {} Answer:"),
    )
    model = GenerationModel(made.model.vision, config.qformer, made.model.language).eval()
    randomize(model.qformer)
    model.initialize_projection()
    return GenerationPipeline(model, made.tokenizer, config, made.path, made.eos_token_id, bert)


def message(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# -- probabilities and alternatives ----------------------------------------------------------------------------------


@torch.no_grad()
def log_probs(pipeline, image, prompt, tokens):
    """The log-probability of each token, with one pass of the LLM without padding."""
    language, visual = pipeline.model.language, pipeline.model.visual_prompt(pipeline.encode_images(image))
    ids = pipeline.tokenizer(prompt)["input_ids"]
    ids = ids if language.is_encoder_decoder else [*ids, *tokens]
    embeds = torch.cat([visual, language.embed(torch.tensor([ids], dtype=torch.long))], dim=1)
    if language.is_encoder_decoder:
        logits = language.network(inputs_embeds=embeds, labels=torch.tensor([tokens])).logits[0]
    else:
        logits = language.network(inputs_embeds=embeds).logits[0, -len(tokens) - 1 : -1]
    return logits.log_softmax(dim=-1)[range(len(tokens)), tokens].tolist()


@pytest.mark.parametrize("decoding", [GREEDY, BEAMS, replace(BEAMS, length_penalty=-1.0, repetition_penalty=1.3)])
def test_captions_with_details(writer, decoding, monkeypatch):
    monkeypatch.setattr(writer, "batch_size", 2)
    plain = writer.caption(IMAGES, "a photo of", decoding)
    made = writer.caption(IMAGES, "a photo of", decoding, details=True)
    assert [each.text for each in made] == plain
    end = writer.tokenizer.decode([writer.eos_token_id])
    for image, each in zip(IMAGES, made, strict=True):
        assert len(each.tokens) <= decoding.max_new_tokens and end not in each.tokens[:-1]
        assert each.log_prob == pytest.approx(sum(each.token_log_probs)) and each.log_prob < 0
        assert len(each.alternatives) <= decoding.num_beams - 1
        assert each.text not in [other.text for other in each.alternatives]
        assert all(other.log_prob < 0 for other in each.alternatives)
        assert each.confidence == pytest.approx(math.exp(each.log_prob / len(each.tokens)))
        assert each.is_unsure(min(each.confidence * 1.01, 1)) and not each.is_unsure(each.confidence * 0.99)
        torch.testing.assert_close(each.attention_map, writer.attention_maps(image)[0, -1])
    assert decoding.num_beams == 1 or all(each.alternatives for each in made)


def test_probabilities_are_those_of_the_llm(writer, monkeypatch):
    """Against the LLM without a batch; the tokens are those that generation returned."""
    seen = []
    make = Generated.make.__func__
    monkeypatch.setattr(
        Generated, "make", classmethod(lambda cls, *given: seen.append(given[2:4]) or make(cls, *given))
    )
    prompts = [writer.format_questions([question])[0] for question in QUESTIONS]
    writer.answer(IMAGES, QUESTIONS, replace(ANSWER_DECODING, num_beams=3, max_new_tokens=5), details=True)
    for image, prompt, (sequences, values) in zip(IMAGES, prompts, seen, strict=True):
        assert len(sequences) == 3
        for tokens, found in zip(sequences, values, strict=True):
            assert found == pytest.approx(log_probs(writer, image, prompt, tokens), abs=1e-4)


def test_answers_with_details(writer):
    plain = writer.answer(IMAGES[:2], [QUESTIONS], GREEDY)
    made = writer.answer(IMAGES[:2], [QUESTIONS], GREEDY, details=True)
    assert [[each.text for each in answers] for answers in made] == plain
    (sampled,) = writer.answer(IMAGES[0], QUESTIONS[0], Decoding(top_p=0.9, max_new_tokens=4), details=True)
    assert sampled.alternatives == () and isinstance(sampled, blip2.Generated)


def test_a_stop_string_ends_a_text_alone_and_in_a_batch(writer):
    """The padding after it, which is the end token, is not a token of the text."""
    longest = replace(GREEDY, max_new_tokens=12)
    stop = next(each for each in writer.caption(IMAGES, TEXTS, longest)[0][2:] if each != INCOMPLETE_CHARACTER)
    for decoding in (replace(longest, stop_strings=[stop]), replace(BEAMS, max_new_tokens=12, stop_strings=[stop])):
        made = writer.caption(IMAGES, TEXTS, decoding, details=True)
        alone = [writer.caption(*each, decoding, details=True)[0] for each in zip(IMAGES, TEXTS, strict=True)]
        assert [each.tokens for each in made] == [each.tokens for each in alone]
        assert decoding.num_beams > 1 or len({len(each.tokens) for each in made}) > 1  # so that there is padding
        assert [each.log_prob for each in made] == pytest.approx([each.log_prob for each in alone], abs=1e-4)
        for one, other in zip(made, alone, strict=True):
            assert [each.log_prob for each in one.alternatives] == pytest.approx(
                [each.log_prob for each in other.alternatives], abs=1e-4
            )


def test_thresholds_outside_zero_and_one(writer):
    (made,) = writer.caption(IMAGES[0], "", GREEDY, details=True)
    with pytest.raises(InputError, match=r"threshold is 50.0, expected a number from 0 to 1: correct it"):
        made.is_unsure(50.0)


# -- attention -----------------------------------------------------------------------------------------------------


def test_attention_of_stage_1(compare):
    maps, heads = compare.attention_maps(IMAGES), compare.attention_maps(IMAGES, average=False)
    tokens = compare.model.vision.num_tokens
    assert maps.shape == (3, 1, 4, tokens) and heads.shape == (3, 1, 4, 4, tokens)
    torch.testing.assert_close(heads.mean(dim=2), maps)
    torch.testing.assert_close(heads.sum(dim=-1), torch.ones(heads.shape[:-1]))
    assert (maps[0] - maps[1]).abs().max() > 1e-3


def test_attention_of_pairs(compare, reader, monkeypatch):
    """Repeated and selected images, in batches and one by one."""
    for pipeline, texts in ((compare, TEXTS), (reader, QUESTIONS)):
        monkeypatch.setattr(pipeline, "batch_size", 2)
        pairs = pipeline.attention_maps(IMAGES, texts)
        several, shared = pipeline.attention_maps(IMAGES[1], texts), pipeline.attention_maps(IMAGES, texts[0])
        for i, image in enumerate(IMAGES):
            for j, text in enumerate(texts):
                alone = pipeline.attention_maps(image, text)[0]
                for found in ([pairs[i]] * (i == j), [several[j]] * (i == 1), [shared[i]] * (j == 0)):
                    torch.testing.assert_close([*found], [alone] * len(found), atol=1e-5, rtol=0)
        assert (pairs - pipeline.attention_maps(IMAGES)).abs().max() > 1e-3  # the text matters
        changed = pipeline.attention_maps(list(reversed(IMAGES)), list(reversed(texts)))
        torch.testing.assert_close(changed.flip(0), pairs, atol=1e-5, rtol=0)


def test_details_of_a_q_former_that_reads_questions(reader):
    made = reader.answer(IMAGES, QUESTIONS, GREEDY, details=True)
    maps = reader.attention_maps(IMAGES, QUESTIONS)[:, -1]
    torch.testing.assert_close([each.attention_map for each in made], list(maps), atol=1e-5, rtol=0)
    assert [each.text for each in made] == reader.answer(IMAGES, QUESTIONS, GREEDY)
    z = reader.query_outputs(IMAGES, QUESTIONS)
    for image, question, expected in zip(IMAGES, QUESTIONS, z, strict=True):
        torch.testing.assert_close(reader.query_outputs(image, question)[0], expected, atol=1e-5, rtol=0)


def test_questions_for_a_q_former_that_reads_none(writer):
    for call in (writer.attention_maps, writer.query_outputs):
        with pytest.raises(InputError) as raised:
            call(IMAGES, QUESTIONS)
        assert message(raised) == f"the Q-Former of {writer.path} does not read questions: leave out questions"


def test_drawing():
    image = Image.new("RGB", (60, 30), "white")
    attention = torch.zeros(17)  # [CLS] and a grid of 4 x 4
    attention[0], attention[1 + 4 * 1 + 3] = 5.0, 0.5  # the second row, the last column
    drawn = draw_attention(image, attention)
    assert drawn.size == image.size and drawn.mode == "RGB"
    pixels = np.asarray(drawn)[..., 0]
    assert pixels[11, 52] > 200 and pixels[11, 7] < 80 and pixels[26, 52] < 80
    several = draw_attention(image, torch.stack([attention, attention]))
    assert np.array_equal(np.asarray(several), np.asarray(drawn))
    for wrong in (torch.zeros(2, 3, 4), torch.tensor([torch.nan] * 4), torch.zeros(0)):
        with pytest.raises(InputError, match="expected finite weights"):
            draw_attention(image, wrong)


# -- outputs of the queries ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_outputs_of_the_queries(compare, writer):
    z = compare.query_outputs(IMAGES)
    projected = torch.nn.functional.normalize(compare.model.image_projection(z), dim=-1)
    torch.testing.assert_close(projected, compare.embed_images(IMAGES))
    z = writer.query_outputs(IMAGES)
    assert z.shape == (3, 4, 32)
    torch.testing.assert_close(z, writer.model.query_outputs(writer.encode_images(IMAGES)))


@torch.no_grad()
def test_multimodal_outputs(compare, monkeypatch):
    """As LAVIS's: the outputs that ITM reads."""
    monkeypatch.setattr(compare, "batch_size", 2)
    z = compare.embed(IMAGES, TEXTS)
    assert z.shape == (3, 4, 32)
    for image, text, found in zip(IMAGES, TEXTS, z, strict=True):
        ids, mask = compare.tokenize([text])
        both = attention_mask("bidirectional", 4, mask)
        memory = compare.model.build_image_memory(compare.encode_images(image))
        torch.testing.assert_close(found, compare.model.qformer(memory, ids, both).queries[0], atol=1e-5, rtol=1e-5)
    matched = compare.model.matching_head(z).mean(dim=1).softmax(dim=-1)[:, 1]
    torch.testing.assert_close(matched, compare.match(IMAGES, TEXTS).diagonal(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compare.embed(IMAGES[0], TEXTS)[0], z[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="text 2 of 2 is '', expected words"):
        compare.embed(IMAGES[0], ["a", ""])


def test_stage_two_has_no_multimodal_outputs(writer):
    with pytest.raises(InputError, match="cannot embed pairs of an image and a text: load a model of stage"):
        writer.embed(IMAGES, TEXTS)


# -- captions of stage 1 ---------------------------------------------------------------------------------------------


def test_captions_of_stage_1(compare, monkeypatch):
    for decoding in (replace(GREEDY, max_new_tokens=3), BEAMS):
        captions = compare.caption(IMAGES, decoding=decoding)
        assert captions == [compare.caption(image, decoding=decoding)[0] for image in IMAGES]
        monkeypatch.setattr(compare, "batch_size", 2)
        assert compare.caption(IMAGES, decoding=decoding) == captions
        made = compare.caption(IMAGES, decoding=decoding, details=True)
        assert [each.text for each in made] == captions and len(set(captions)) == 3
        for image, each in zip(IMAGES, made, strict=True):
            assert len(each.alternatives) <= decoding.num_beams - 1
            torch.testing.assert_close(each.attention_map, compare.attention_maps(image)[0, -1])


@torch.no_grad()
def test_probabilities_of_captions_of_stage_1(compare, monkeypatch):
    seen = []
    make = Generated.make.__func__
    monkeypatch.setattr(
        Generated, "make", classmethod(lambda cls, *given: seen.append(given[2:4]) or make(cls, *given))
    )
    compare.caption(IMAGES, decoding=BEAMS, details=True)
    for image, (sequences, values) in zip(IMAGES, seen, strict=True):
        memory = compare.model.build_image_memory(compare.encode_images(image))
        for tokens, found in zip(sequences, values, strict=True):
            ids = torch.tensor([[0, *tokens]])
            total = compare.model.log_likelihood(memory, ids, torch.ones_like(ids).bool())
            assert float(total) == pytest.approx(sum(found), abs=1e-4)
    assert IGNORE_INDEX not in seen[0][0][0]


def test_what_captions_of_stage_1_cannot_do(compare):
    for call, found in (
        (lambda: compare.caption.__wrapped__(compare, IMAGES, "a photo of"), "continues no prompt: leave out prompt"),
        (lambda: compare.caption(IMAGES, decoding=replace(CAPTION_DECODING, max_new_tokens=41)), "has 40 positions"),
        (lambda: compare.caption(IMAGES, decoding=replace(GREEDY, stop_strings=["a"])), "do not support: leave it out"),
    ):
        with pytest.raises(InputError) as raised:
            call()
        assert found in message(raised)
