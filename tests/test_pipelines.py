import copy
import io
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import set_seed

from blip2 import pipelines as inference
from blip2.builder import choose_dtype
from blip2.data.collate import encode_texts
from blip2.decoding.options import ANSWER_DECODING, CAPTION_DECODING, Decoding
from blip2.errors import InputError
from blip2.pipelines import QUESTION_TEMPLATE, SHORT_QUESTION_TEMPLATE, load
from blip2.pipelines.base import as_list, check_image_index
from blip2.pipelines.likelihood import check_prompts
from conftest import draw
from fixtures.tiny import randomize

IMAGES = [draw("disc", "red", 0), draw("square", "blue", 7), draw("stripe", "green", 3)]
TEXTS = ["a red disc", "the square is blue here and there"]
GREEDY = Decoding(num_beams=1, max_new_tokens=6)


@pytest.fixture(scope="module")
def compare(runs):
    pipeline = load(runs["stage1"], device="cpu")
    randomize(pipeline.model.qformer)
    return pipeline


@pytest.fixture(scope="module", params=["llama", "t5"])
def writer(request, runs):
    """What three steps taught does not depend on the image; what this one writes does."""
    pipeline = load(runs[request.param], device="cpu")
    randomize(pipeline.model.qformer)
    for parameter in pipeline.model.language.parameters():
        if parameter.ndim > 1:
            parameter.data *= 2
    return pipeline


def message(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# -- loading -------------------------------------------------------------------------------------------------------


def test_a_run_is_its_last_checkpoint(runs):
    last = load(runs["stage1"], device="cpu")
    assert last.path == runs["stage1"] / "checkpoints" / "step-00000003"
    first = load(runs["stage1"] / "checkpoints" / "step-00000002", device="cpu")
    assert first.path.name == "step-00000002"
    assert not torch.equal(first.embed_texts(TEXTS), last.embed_texts(TEXTS))
    again = load(str(last.path), device="cpu")
    assert torch.equal(again.embed_images(IMAGES), last.embed_images(IMAGES))
    assert torch.equal(again.match(IMAGES, TEXTS), last.match(IMAGES, TEXTS))


def test_nothing_drops_out(compare, writer):
    for pipeline in (compare, writer):
        assert pipeline.config.qformer.dropout > 0
        assert not any(module.training for module in pipeline.model.modules())


def test_dtype_of_the_frozen_parts(runs):
    pipeline = load(runs["llama"], device="cpu", dtype="bf16")
    assert pipeline.model.vision.dtype == pipeline.model.language.dtype == torch.bfloat16
    assert pipeline.model.projection.weight.dtype == torch.float32
    assert pipeline.config.vision.dtype == "bf16"
    assert len(pipeline.caption(IMAGES, decoding=GREEDY)) == 3


@pytest.mark.parametrize("name", ["nothing", ""])
def test_where_there_is_no_checkpoint(tmp_path, name):
    with pytest.raises(InputError, match="give the folder of a run, a folder checkpoints/step-"):
        load(tmp_path / name, device="cpu")


def test_a_frozen_part_that_is_gone(runs, tmp_path, compare):
    shutil.copytree(compare.path, tmp_path / "copy")
    config = tmp_path / "copy" / "model.yaml"
    config.write_text(config.read_text().replace(compare.config.vision.name, "/nowhere/at/all"))
    with pytest.raises(InputError, match="there is no folder '/nowhere/at/all' to load the image encoder from"):
        load(tmp_path / "copy", device="cpu")


# -- comparing -----------------------------------------------------------------------------------------------------


def test_shapes_of_several_and_of_one(compare):
    queries, width = 4, 16
    assert compare.embed_images(IMAGES).shape == (3, queries, width)
    assert compare.embed_images(IMAGES[0]).shape == (1, queries, width)
    assert compare.embed_texts(TEXTS).shape == (2, width)
    assert compare.embed_texts(TEXTS[0]).shape == (1, width)
    for method in (compare.similarity, compare.match):
        assert method(IMAGES, TEXTS).shape == (3, 2)
        assert method(IMAGES[0], TEXTS[0]).shape == (1, 1)


def test_embeddings_are_unit_vectors(compare):
    for embeddings in (compare.embed_images(IMAGES), compare.embed_texts(TEXTS)):
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(embeddings.shape[:-1]))


def test_similarity_is_the_best_query_s_cosine(compare):
    similarity = compare.similarity(IMAGES, TEXTS)
    images, texts = compare.embed_images(IMAGES), compare.embed_texts(TEXTS)
    for i in range(3):
        for t in range(2):
            best = max(float(images[i, q] @ texts[t]) for q in range(4))
            assert float(similarity[i, t]) == pytest.approx(best, abs=1e-6)
    assert similarity.abs().max() <= 1


@torch.no_grad()
def test_match_is_the_model_s_own_pairwise_pass(compare):
    match = compare.match(IMAGES, TEXTS)
    model = compare.model
    for i, image in enumerate(IMAGES):
        for t, text in enumerate(TEXTS):
            ids, mask, _ = encode_texts(compare.tokenizer, [text], 32)
            logits = model.match(model.build_image_memory(compare.encode_images(image)), ids, mask)
            assert float(match[i, t]) == pytest.approx(float(logits.softmax(dim=1)[0, 1]), abs=1e-6)
    assert ((match >= 0) & (match <= 1)).all()
    assert match.std() > 0


def test_candidates_are_texts_of_each_image_s_own(compare):
    candidates = torch.tensor([[1, 0], [1, 1], [0, 1]])
    logits = compare.match_candidates(IMAGES, TEXTS, candidates)
    assert logits.shape == (3, 2, 2)
    probability, every = logits.softmax(dim=-1)[..., 1], compare.match(IMAGES, TEXTS)
    torch.testing.assert_close(probability, every.gather(1, candidates))


def test_results_do_not_depend_on_what_else_is_in_the_batch(compare, monkeypatch):
    together = [
        compare.embed_images(IMAGES), compare.embed_texts(TEXTS), compare.similarity(IMAGES, TEXTS),
        compare.match(IMAGES, TEXTS),
    ]  # fmt: skip
    one_by_one = [
        torch.cat([compare.embed_images(image) for image in IMAGES]),
        torch.cat([compare.embed_texts(text) for text in TEXTS]),
        *(
            torch.cat([torch.cat([method(image, text) for text in TEXTS], dim=1) for image in IMAGES])
            for method in (compare.similarity, compare.match)
        ),
    ]
    torch.testing.assert_close(together, one_by_one)
    monkeypatch.setattr(compare, "batch_size", 2)
    torch.testing.assert_close(compare.embed_images(IMAGES), together[0])
    many = TEXTS * 6  # more than one chunk of texts
    torch.testing.assert_close(compare.match(IMAGES, many), together[3].repeat(1, 6))
    torch.testing.assert_close(compare.embed_texts(many), together[1].repeat(6, 1))


def test_long_texts_are_cut(compare):
    assert compare.embed_texts("a disc " * 5000).shape == (1, 16)
    assert compare.match(IMAGES[0], "a disc " * 5000).shape == (1, 1)


# -- images --------------------------------------------------------------------------------------------------------


def test_images_of_every_kind(compare, tmp_path):
    shown = IMAGES[0]
    path, buffer = tmp_path / "shown.png", io.BytesIO()
    shown.save(path)
    shown.save(buffer, format="PNG")
    array = np.asarray(shown)
    kinds = [
        path, str(path), buffer.getvalue(), shown, array, array.astype(np.float32) / 255,
        torch.from_numpy(array.copy()), np.dstack([array, np.full(array.shape[:2], 255, np.uint8)]),
    ]  # fmt: skip
    expected = compare.embed_images(shown)
    for image in kinds:
        torch.testing.assert_close(compare.embed_images(image), expected)
    torch.testing.assert_close(compare.embed_images(kinds), expected.repeat(len(kinds), 1, 1))
    torch.testing.assert_close(compare.embed_images(tuple(kinds[:2])), expected.repeat(2, 1, 1))
    torch.testing.assert_close(compare.embed_images(np.stack([array, array])), expected.repeat(2, 1, 1))


def test_features_stand_for_images(compare):
    features = compare.encode_images(IMAGES)
    assert features.shape == (3, compare.model.vision.num_tokens, compare.model.vision.hidden_size)
    assert torch.equal(compare.embed_images(features), compare.embed_images(IMAGES))
    assert torch.equal(compare.match(features, TEXTS), compare.match(IMAGES, TEXTS))


def test_features_that_are_none(compare, writer):
    features = compare.encode_images(IMAGES)
    for damaged in (features * torch.nan, features * torch.inf, features.long()):
        for call in (lambda given=damaged: compare.match(given, TEXTS), lambda given=damaged: writer.caption(given)):
            with pytest.raises(InputError) as raised:
                call()
            assert "expected finite floating-point numbers: encode the images again" in message(raised)


def test_a_copy_runs_its_own_image_encoder(compare):
    features = compare.encode_images(IMAGES)
    copied = copy.deepcopy(compare)
    assert torch.equal(copied.encode_images(IMAGES), features)
    for parameter in copied.model.vision.parameters():
        parameter.data.zero_()
    assert not torch.equal(copied.encode_images(IMAGES), features)
    assert torch.equal(compare.encode_images(IMAGES), features)


def test_broken_images_are_named(compare, writer, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    for image in (tmp_path / "text.jpg", tmp_path / "missing.jpg"):
        for call in (
            lambda image=image: compare.embed_images([IMAGES[0], image]),
            lambda image=image: compare.similarity(image, TEXTS),
            lambda image=image: compare.match(image, TEXTS),
            lambda image=image: writer.caption(image),
            lambda image=image: writer.answer(image, "what is it?"),
        ):
            with pytest.raises(InputError) as raised:
                call()
            assert str(image) in message(raised)


# -- writing -------------------------------------------------------------------------------------------------------


def test_captions(writer):
    together = writer.caption(IMAGES, decoding=GREEDY)
    assert len(together) == 3
    assert all(isinstance(caption, str) for caption in together)
    assert together == [writer.caption(image, decoding=GREEDY)[0] for image in IMAGES]
    assert len(writer.caption(IMAGES)) == 3


def test_captions_look_at_the_image_and_go_on_from_the_prompt(writer):
    assert len(set(writer.caption(IMAGES, decoding=GREEDY))) > 1
    prompts = ["", "a photo of", "zzzz"]
    assert len({writer.caption(IMAGES[0], prompt, GREEDY)[0] for prompt in prompts}) > 1


def test_a_prompt_an_image(writer):
    prompts = ["a photo of", "", "one more of the many pictures of"]
    expected = [writer.caption(p, prompt, GREEDY)[0] for p, prompt in zip(IMAGES, prompts, strict=True)]
    assert writer.caption(IMAGES, prompts, GREEDY) == expected
    with pytest.raises(InputError) as raised:
        writer.caption(IMAGES, prompts[:2])
    assert "3 images and 2 prompts" in message(raised)


def test_captions_begin_as_the_model_was_trained(runs):
    pipeline = load(runs["llama"], device="cpu")
    assert pipeline.config.language is not None
    language = replace(pipeline.config.language, prompt="a photo of")
    pipeline.config = replace(pipeline.config, language=language)
    assert pipeline.caption(IMAGES) == pipeline.caption(IMAGES, "a photo of")
    assert pipeline.caption(IMAGES, "", GREEDY) != pipeline.caption(IMAGES, "a photo of", GREEDY)


QUESTIONS = ["what is it?", "is it red or blue, or of another color?", "how many?"]


def test_several_questions_on_one_image_are_answered_as_one_by_one(writer):
    """They are of different lengths, so that prompts are padded."""
    together = writer.answer(IMAGES[0], QUESTIONS)
    assert together == [writer.answer(IMAGES[0], question)[0] for question in QUESTIONS]
    # The tiny T5 may answer all questions alike.
    assert writer.model.language.is_encoder_decoder or len(set(together)) > 1


def test_one_question_on_several_images(writer):
    assert writer.answer(IMAGES, QUESTIONS[0]) == [writer.answer(p, QUESTIONS[0])[0] for p in IMAGES]


def test_a_question_an_image(writer):
    expected = [writer.answer(p, q)[0] for p, q in zip(IMAGES, QUESTIONS, strict=True)]
    assert writer.answer(IMAGES, QUESTIONS) == expected


def test_how_questions_are_put(writer):
    template = SHORT_QUESTION_TEMPLATE if writer.model.language.is_encoder_decoder else QUESTION_TEMPLATE
    prompt = template.format("what is it?")
    assert writer.answer(IMAGES[0], "what is it?") == writer.generate(IMAGES[0], [prompt], ANSWER_DECODING)
    assert (QUESTION_TEMPLATE, SHORT_QUESTION_TEMPLATE) == ("Question: {} Answer:", "Question: {} Short answer:")
    beams = [each.beam_width(1) for each in (CAPTION_DECODING, ANSWER_DECODING)]
    assert (*beams, ANSWER_DECODING.length_penalty) == (
        5,
        5,
        -1.0,
    )  # of the paper


def test_a_question_with_braces(writer):
    assert len(writer.answer(IMAGES[0], "what is {0} in {}?", GREEDY)) == 1


def test_batches_of_prompts(writer, monkeypatch):
    expected = writer.answer(IMAGES, QUESTIONS)
    monkeypatch.setattr(writer, "batch_size", 2)
    assert writer.answer(IMAGES, QUESTIONS) == expected
    expected = writer.answer(IMAGES[0], QUESTIONS)
    monkeypatch.setattr(writer, "batch_size", 1)
    assert writer.answer(IMAGES[0], QUESTIONS) == expected


def test_prompts_say_which_image_they_are_about(writer, monkeypatch):
    asked = [(1, QUESTIONS[1]), (0, QUESTIONS[0]), (1, QUESTIONS[2]), (2, ""), (1, QUESTIONS[0])]
    expected = [writer.generate(IMAGES[i], [prompt], GREEDY)[0] for i, prompt in asked]
    image_index, prompts = zip(*asked, strict=True)
    assert writer.generate(IMAGES, prompts, GREEDY, image_index=image_index) == expected
    assert len(set(expected)) > 2
    beams = [writer.generate(IMAGES[i], [prompt], ANSWER_DECODING, 2) for i, prompt in asked]
    monkeypatch.setattr(writer, "batch_size", 2)
    assert writer.generate(IMAGES, prompts, GREEDY, image_index=image_index) == expected
    assert writer.generate(IMAGES, prompts, ANSWER_DECODING, 2, image_index) == [
        text for pair in beams for text in pair
    ]


def test_an_image_of_several_questions_is_encoded_once(writer):
    rows = []
    hook = writer.model.projection.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    writer.answer(IMAGES[0], QUESTIONS, GREEDY)
    writer.answer(IMAGES, QUESTIONS, GREEDY)
    hook.remove()
    assert rows == [1, 3]


def test_prompts_of_like_length_are_written_together(writer, monkeypatch):
    widths = []
    language = writer.model.language
    original = type(language).generate

    def note(self, visual, ids, *rest):
        widths.append(ids.shape[1])
        return original(self, visual, ids, *rest)

    monkeypatch.setattr(type(language), "generate", note)
    monkeypatch.setattr(writer, "batch_size", 2)
    prompts = ["a", "a much longer one", "b", "another that is longer"]
    writer.generate([*IMAGES, IMAGES[0]], prompts, GREEDY)
    assert widths[0] < widths[1] == max(widths)
    assert widths[0] <= 3


def test_images_that_prompts_cannot_be_about(writer):
    with pytest.raises(InputError, match="image_index has 1 entries for 2 prompts: give one per prompt"):
        writer.generate(IMAGES, ["", ""], GREEDY, image_index=[0])
    with pytest.raises(InputError, match="image_index contains 3, expected 0 to 2"):
        writer.generate(IMAGES, ["", ""], GREEDY, image_index=[0, 3])
    assert check_image_index(np.array([2, 0]), 3) == [2, 0]
    for wrong in (1.0, None, "1", -1):
        with pytest.raises(InputError, match=f"image_index contains {wrong!r}, expected 0 to 2"):
            check_image_index([0, wrong], 3)
    with pytest.raises(InputError, match="num_return_sequences is 0, expected at least 1"):
        writer.generate(IMAGES, ["", "", ""], GREEDY, num_return_sequences=0)


def test_sampling_follows_the_seed(writer):
    sampled = Decoding(top_p=0.95, max_new_tokens=8)

    def sample(seed):
        set_seed(seed)
        return writer.generate(IMAGES[:2], ["", ""], sampled, num_return_sequences=3)

    first = sample(1)
    assert len(first) == 6
    assert sample(1) == first
    assert sample(2) != first
    assert len(set(first)) > 2


def test_length_is_limited(writer):
    for limit in (1, 3):
        (text,) = writer.generate(IMAGES[0], [""], Decoding(num_beams=1, max_new_tokens=limit))
        assert len(text.encode()) <= 4 * limit  # bytes that are no UTF-8 are written as a sign of three


# -- what cannot be used -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "arguments", "what"),
    [
        ("answer", [IMAGES, "what?"], "answer questions"),
    ],
)
def test_stage_one_cannot_write(compare, method, arguments, what):
    with pytest.raises(InputError) as raised:
        getattr(compare, method)(*arguments)
    assert message(raised) == (
        f"{compare.path} is of stage representation, which cannot {what}: load a model of stage generation"
    )


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("embed_images", [IMAGES]),
        ("embed_texts", [TEXTS]),
        ("similarity", [IMAGES, TEXTS]),
        ("match", [IMAGES, TEXTS]),
    ],
)
def test_stage_two_cannot_compare(writer, method, arguments):
    with pytest.raises(
        InputError, match=r"is of stage generation, which cannot .*: load a model of stage representation"
    ):
        getattr(writer, method)(*arguments)


@pytest.mark.parametrize("text", ["", "  ", "\n\t"])
def test_blank_texts(compare, writer, text):
    for call in (
        lambda: compare.embed_texts(["a disc", text]),
        lambda: compare.similarity(IMAGES, ["a disc", text]),
        lambda: compare.match(IMAGES, ["a disc", text]),
    ):
        with pytest.raises(InputError) as raised:
            call()
        assert message(raised) == f"text 2 of 2 is {text!r}, expected words: correct or remove it"
    with pytest.raises(InputError) as raised:
        writer.answer(IMAGES[0], text)
    assert message(raised) == f"question 1 of 1 is {text!r}, expected words: correct or remove it"


@pytest.mark.parametrize("prompt", [b"a", 5, ["a", None, "a"], [["a"]]])
def test_prompts_that_are_not_text(prompt):
    with pytest.raises(InputError, match=r"^a prompt is a \w+, .*, expected a str: give a text$"):
        check_prompts(as_list(prompt))


def test_names_of_dtypes():
    with pytest.raises(InputError, match=r"^dtype is 'float16', expected one of fp32, bf16, fp16"):
        choose_dtype("float16", torch.device("cpu"))


def test_nothing_at_all(compare, writer):
    for call, what in (
        (lambda: compare.embed_texts([]), "text"),
        (lambda: compare.match(IMAGES, []), "text"),
        (lambda: compare.embed_images([]), "image"),
        (lambda: compare.similarity([], TEXTS), "image"),
        (lambda: compare.match([], TEXTS), "image"),
        (lambda: writer.caption([]), "image"),
        (lambda: writer.answer([], "what is it?"), "image"),
        (lambda: writer.answer(IMAGES, []), "question"),
    ):
        with pytest.raises(InputError) as raised:
            call()
        assert message(raised) == f"no {what} was given: give at least one"


def test_counts_that_do_not_fit(writer):
    with pytest.raises(InputError, match="there are 3 images and 2 questions: give one question per image"):
        writer.answer(IMAGES, QUESTIONS[:2])
    with pytest.raises(InputError, match="there are 3 images and 2 prompts: give one prompt per image"):
        writer.generate(IMAGES, ["", ""], GREEDY)


def test_public_names_are_the_documented_ones():
    import blip2

    assert blip2.load is inference.load
    assert all(getattr(blip2, name) is not None for name in blip2.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = blip2.nothing


@pytest.mark.parametrize("text", ["a \udcff", "\ud800"])
def test_texts_that_are_not_unicode(compare, writer, text):
    for call in (
        lambda: compare.match(IMAGES, text),
        lambda: compare.embed_texts(["a disc", text]),
        lambda: writer.answer(IMAGES[0], text),
        lambda: writer.caption(IMAGES[0], text),
        lambda: writer.log_likelihood([IMAGES[0]], [""], [text]),
    ):
        with pytest.raises(InputError, match=r"which is not a character: write the text in UTF-8"):
            call()
