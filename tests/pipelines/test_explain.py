"""Explanations of texts: which queries, and which places of the image, each token depends on."""

import pytest
import torch

from blip2.data.arrays import blank_input
from blip2.errors import InputError
from blip2.pipelines import load
from conftest import draw
from fixtures.tiny import randomize

IMAGE = draw("disc", "red", 0)


@pytest.fixture(scope="module", params=["llama", "t5"])
def pipeline(request, runs):
    pipeline = load(runs[request.param], device="cpu")
    randomize(pipeline.model.qformer)
    return pipeline


@pytest.mark.parametrize("about", [{}, {"question": "what is it?"}, {"prompt": "here is"}])
def test_an_explanation_is_what_remains_without_the_image_or_one_query(pipeline, about):
    pipeline.batch_size = 4  # fewer than the passes
    found = pipeline.explain(IMAGE, "a red disc", **about)
    features = pipeline.encode_images(IMAGE)
    prompt = about.get("prompt", pipeline.config.language.prompt)
    if "question" in about:
        (prompt,) = pipeline.format_questions([about["question"]])
    blank = pipeline.encode_pixels(blank_input(pipeline.model.vision.input_format))
    for image, tokens in ((features, found.token_log_probs), (blank, found.blank_log_probs)):
        whole = pipeline.log_likelihood(image, [prompt], ["a red disc"])
        torch.testing.assert_close(torch.tensor(tokens).sum(), whole[0], rtol=1e-4, atol=1e-4)
    assert "".join(found.tokens[:-1]).strip() == "a red disc" and found.tokens[-1] == "</s>"
    # Without all queries but one, and without that one: by hand.
    seen, unseen = (pipeline.model.visual_prompt(each)[0] for each in (features, blank))
    for query in range(len(seen)):
        visual = seen.clone()
        visual[query] = unseen[query]
        batch = pipeline._continuations(["a red disc"], [prompt])
        states, labels = pipeline.model.language.hidden_states(visual[None], *batch)
        without = pipeline.model.language.lm_head(states).log_softmax(dim=-1).gather(1, labels[:, None])[:, 0]
        effect = torch.tensor(found.token_log_probs) - without.detach()
        torch.testing.assert_close(found.effects[:, query], effect, rtol=1e-4, atol=1e-4)
    assert found.effects.abs().max() > 1e-3


def test_tokens_are_explained_as_they_are(pipeline):
    text = pipeline.explain(IMAGE, "a red disc")
    prompt = pipeline.config.language.prompt
    whole = pipeline._continuations(["a red disc"], [prompt])[2][0]
    tokens = whole[whole >= 0].tolist()
    found = pipeline.explain(IMAGE, tokens)
    assert found.tokens == text.tokens and found.token_log_probs == text.token_log_probs
    assert torch.equal(found.effects, text.effects)
    letters = [pipeline.tokenizer(each, add_special_tokens=False)["input_ids"][-1] for each in "disc"]
    decoded = tuple(pipeline.tokenizer.decode([token]) for token in letters)
    assert pipeline.explain(IMAGE, letters).tokens == decoded  # not joined, and without an end token


def test_the_map_of_a_token_is_that_of_the_queries_that_speak_for_it(pipeline):
    found = pipeline.explain(IMAGE, "a red disc")
    torch.testing.assert_close(found.attention_map, pipeline.attention_maps(IMAGE)[0, -1])
    maps = found.token_maps()
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(len(maps)))
    found.effects[0] = torch.tensor([-1.0, 2.0, -3.0, 0.0])
    found.effects[1] = torch.tensor([1.0, 0.0, -1.0, 3.0])
    found.effects[2] = -1
    maps, attention = found.token_maps(), found.attention_map
    torch.testing.assert_close(maps[0], attention[1])
    torch.testing.assert_close(maps[1], attention[0] / 4 + attention[3] * 3 / 4)
    torch.testing.assert_close(maps[2], attention.mean(dim=0))


def test_what_cannot_be_explained_is_refused(pipeline, runs):
    with pytest.raises(InputError, match="text 1 of 1 is ' ', expected words"):
        pipeline.explain(IMAGE, " ")
    for tokens in ([], [-1], [0, pipeline.model.language.vocab_size]):
        with pytest.raises(InputError, match=r"the tokens are .*, expected ids from 0 to"):
            pipeline.explain(IMAGE, tokens)
    with pytest.raises(InputError, match="there are 2 images, expected one"):
        pipeline.explain([IMAGE, IMAGE], "a disc")
    with pytest.raises(InputError, match="found both prompt and question"):
        pipeline.explain(IMAGE, "a disc", "a photo of", question="what is it?")
    with pytest.raises(InputError, match="is of stage representation, which cannot explain a text"):
        load(runs["stage1"], device="cpu").explain(IMAGE, "a disc")


def test_a_text_that_the_llm_has_no_positions_for_is_refused(parts, tmp_path):
    from blip2.training.trainer import train

    short = {"max_steps": 1, "save_steps": 1, "device": "cpu", "precision": "fp32"}
    train(parts.recipe(tmp_path, stage="generation", language={"name": parts.opt}, training=short))
    with pytest.raises(InputError, match="of the LLM's 96 positions"):
        load(tmp_path, device="cpu").explain(IMAGE, "word " * 40)
