"""Scores of images and texts: equal to plain recomputation and to transformers' losses, however they are shared."""

import pytest
import torch

import blip2
from blip2.builder import build
from blip2.data.collate import encode_texts
from blip2.data.images import preprocess, read_image
from blip2.errors import InputError
from blip2.model.generation import Questions
from blip2.model.qformer import attention_mask
from blip2.pipelines import Candidate, Scores, make_pipeline
from conftest import draw
from fixtures.checkpoints import FLAVOURS, QUERIES, processor, save_transformers
from fixtures.tiny import randomize

IMAGES = [draw("disc", "red", 0), draw("square", "blue", 7), draw("stripe", "green", 3)]
TEXTS = ["a red disc", "the square is blue here and there", "a", "two discs", "no"]
QUESTIONS = ["what is it", "is it red or blue or of another color", "how many"]
EVERY = [(i, t) for i in range(len(IMAGES)) for t in range(len(TEXTS))]


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory):
    """Folders and models of transformers, by flavor; ``retrieval`` for that of stage 1."""
    root = tmp_path_factory.mktemp("scoring")
    flavors = {**{name: name for name in FLAVOURS}, "retrieval": None}
    return {name: (root / name, save_transformers(root / name, kind, parts.bert)) for name, kind in flavors.items()}


@pytest.fixture(scope="module")
def compare(saved):
    return blip2.load(saved["retrieval"][0], device="cpu")


@pytest.fixture(scope="module", params=FLAVOURS)
def every_writer(request, saved):
    """A model of each kind of LLM, for what depends on the LLM."""
    return blip2.load(saved[request.param][0], device="cpu")


@pytest.fixture(scope="module")
def writer(saved):
    return blip2.load(saved["llama"][0], device="cpu")


@pytest.fixture(scope="module")
def reader(parts, tmp_path_factory):
    """A model whose Q-Former reads the questions."""
    recipe = parts.recipe(
        tmp_path_factory.mktemp("reader"), stage="generation", qformer={"use_qformer_text_input": True, "dropout": 0.0},
        language={"name": parts.llama, "prompt": "Question: {} Answer:"},
    )  # fmt: skip
    torch.manual_seed(0)
    built = build(recipe.model, torch.device("cpu"))
    randomize(built.model.qformer)
    built.model.initialize_projection()
    built.model.eval()
    return make_pipeline(built, recipe.model, tmp_path_factory.mktemp("reader"))


def message(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def one_by_one(pipeline, images, texts, prompts, questions=None):
    """Log-likelihoods of pairs by the pass of training, a pair at a time, with nothing shared."""
    out = []
    language, reading = pipeline.model.language, pipeline.config.qformer.use_qformer_text_input
    features = {id(image): pipeline.encode_images(image) for image in images[:: len(TEXTS)]}
    with torch.no_grad():
        for i, (image, text, prompt) in enumerate(zip(images, texts, prompts, strict=True)):
            asked = None
            if reading:
                ids, mask, _ = encode_texts(pipeline.qformer_tokenizer, [questions[i]], 40)
                asked = Questions(ids, mask)
            visual = pipeline.model.visual_prompt(features[id(image)], asked)
            tokens = pipeline.tokenizer(text if language.is_encoder_decoder or not prompt else f" {text}",
                                        add_special_tokens=False)["input_ids"]  # fmt: skip
            tokens = [*tokens, pipeline.eos_token_id]
            before = pipeline.tokenizer(prompt)["input_ids"]
            if language.is_encoder_decoder:
                ids, labels = before, tokens
            else:
                ids, labels = [*before, *tokens], [*(-100 for _ in before), *tokens]
            ids, labels = torch.tensor([ids], dtype=torch.long), torch.tensor([labels])
            states, labels = language.hidden_states(visual, ids, torch.ones_like(ids, dtype=torch.bool), labels)
            log_probs = language.lm_head(states).log_softmax(dim=-1)
            out.append((float(log_probs.gather(1, labels[:, None]).sum()), len(tokens)))
    values, counts = zip(*out, strict=True)
    return torch.tensor(values), torch.tensor(counts)


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=atol, rtol=1e-5)


# -- stage 1 ---------------------------------------------------------------------------------------------------------


def test_itc_and_itm_are_similarity_and_match(compare):
    close(compare.score(IMAGES, TEXTS, by="itc").values, compare.similarity(IMAGES, TEXTS))
    close(compare.score(IMAGES, TEXTS, by="itm").values, compare.match(IMAGES, TEXTS))
    close(compare.score(IMAGES, TEXTS).values, compare.match(IMAGES, TEXTS))  # the default


@torch.no_grad()
def test_itg_is_the_plain_sum_of_the_language_head_s_log_probabilities(compare):
    scores, model = compare.score(IMAGES, TEXTS, by="itg"), compare.model
    for i, t in EVERY:
        ids, mask, _ = encode_texts(compare.tokenizer, [TEXTS[t]], 40)
        written = ids.clone()
        written[:, 0] = model.qformer.decoder_start_token_id
        memory = model.build_image_memory(compare.encode_images(IMAGES[i]))
        text = model.qformer(memory, written, attention_mask("causal", QUERIES, mask)).text
        log_probs = model.language_head(text[0, :-1], model.qformer.word_embedding.weight).log_softmax(dim=-1)
        expected = log_probs.gather(1, ids[0, 1:, None]).sum()
        assert float(scores.values[i, t]) == pytest.approx(float(expected), abs=1e-4)
        assert int(scores.num_tokens[i, t]) == ids.shape[1] - 1
    close(scores.per_token, scores.values / scores.num_tokens)
    assert scores.values.std(dim=0).min() > 1e-3  # images matter


@torch.no_grad()
def test_itg_is_the_loss_of_training(compare):
    """The mean over all tokens of the batch, without label smoothing."""
    from blip2.config import ObjectivesConfig
    from blip2.model.representation import RepresentationBatch

    model, texts = compare.model, TEXTS[:3]
    ids, mask = compare.tokenize(texts)
    before, model.objectives = model.objectives, ObjectivesConfig(itc=0.0, itm=0.0, label_smoothing=0.0)
    loss = model(RepresentationBatch(compare.encode_images(IMAGES), ids, mask, torch.arange(3))).losses["itg"]
    model.objectives = before
    scores = compare.score(IMAGES, texts, by="itg", pairs=True)
    close(-scores.values.sum() / scores.num_tokens.sum(), loss)


@pytest.mark.parametrize("by", ["itc", "itm", "itg"])
def test_pairs_are_the_diagonal_whatever_the_batches(compare, by, monkeypatch):
    every = compare.score(IMAGES, TEXTS[:3], by=by)
    pairs = compare.score(IMAGES, TEXTS[:3], by=by, pairs=True)
    assert pairs.values.shape == (3,)
    close(pairs.values, every.values.diag())
    monkeypatch.setattr(compare, "batch_size", 1)
    close(compare.score(IMAGES, TEXTS[:3], by=by, pairs=True).values, pairs.values)
    close(compare.score(IMAGES, TEXTS, by=by).values[:, :3], every.values)


def test_keys_and_values_of_an_image_are_computed_once(compare):
    rows = []
    attention = compare.model.qformer.blocks[0].cross_attention
    original = attention.project_image
    attention.project_image = lambda *arguments: rows.append(arguments) or original(*arguments)
    try:
        compare.score(IMAGES, TEXTS * 30, by="itm")
    finally:
        del attention.project_image
    assert len(rows) == 1  # of one batch of images, though there are several passes


# -- stage 2 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", ["a photo of", "", "this is"]])
def test_lm_is_the_sum_of_log_probabilities_computed_one_by_one(every_writer, prompt):
    writer = every_writer
    scores = writer.score(IMAGES, TEXTS, prompt=prompt)
    prompts = [prompt] * 3 if isinstance(prompt, str) else prompt
    expected, counts = one_by_one(
        writer, [IMAGES[i] for i, _ in EVERY], [TEXTS[t] for _, t in EVERY], [prompts[i] for i, _ in EVERY]
    )
    close(scores.values.flatten(), expected, 2e-5)
    assert torch.equal(scores.num_tokens.flatten(), counts)
    close(scores.per_token.flatten(), expected / counts, 2e-5)
    assert scores.values.std(dim=0).min() > 1e-3  # images matter


def test_shared_prompts_equal_unshared(every_writer, monkeypatch):
    writer = every_writer
    shared = writer.score(IMAGES, TEXTS, questions=QUESTIONS)
    assert writer.model.language.shares_prompts
    monkeypatch.setattr(writer.model.language, "_shares_prompts", False)
    close(writer.score(IMAGES, TEXTS, questions=QUESTIONS).values, shared.values)


def test_a_prompt_is_read_once(every_writer):
    """Of 100 answers to a question the LLM reads the image and the question once."""
    writer = every_writer
    reader = writer.model.language.network
    reader = reader.get_encoder() if writer.model.language.is_encoder_decoder else reader.get_decoder()
    lengths = []
    hook = reader.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append((kwargs.get("inputs_embeds"), kwargs.get("input_ids"))),
        with_kwargs=True,
    )
    try:
        writer.score(IMAGES[0], [f"answer {n}" for n in range(100)], questions="how many")
    finally:
        hook.remove()
    with_visual = [embeds.shape for embeds, _ in lengths if embeds is not None]
    question = writer.tokenizer(writer.format_questions(["how many"])[0])["input_ids"]
    question = question[: -1 if writer.model.language.is_encoder_decoder and question[-1] == 256 else None]
    assert len(with_visual) == 1 and with_visual[0][0] == 1
    assert with_visual[0][1] >= QUERIES + len(question)


@torch.no_grad()
def test_lm_is_the_loss_of_transformers(saved, parts, every_writer):
    """Its mean over the tokens of the text, when the prompt has no label."""
    ours, name = every_writer, every_writer.path.name
    theirs = saved[name][1]
    images = processor(name, parts.bert)(images=IMAGES, return_tensors="pt")["pixel_values"]
    scores = ours.score(IMAGES, TEXTS, prompt="a photo of")
    before = ours.tokenizer("a photo of")["input_ids"]
    placeholders = [theirs.config.image_token_index] * QUERIES
    for i, t in EVERY[::2]:
        text = TEXTS[t] if name == "t5" else f" {TEXTS[t]}"
        tokens = [*ours.tokenizer(text, add_special_tokens=False)["input_ids"], ours.eos_token_id]
        ids = [*placeholders, *before] if name == "t5" else [*placeholders, *before, *tokens]
        labels = tokens if name == "t5" else [*(-100 for _ in [*placeholders, *before]), *tokens]
        ids, labels = torch.tensor([ids]), torch.tensor([labels])
        loss = theirs(pixel_values=images[[i]], input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        assert float(scores.per_token[i, t]) == pytest.approx(-float(loss), abs=1e-4)


def test_pairs_are_the_diagonal_of_every_image_with_every_text(writer, monkeypatch):
    for by in ("lm", "pmi"):
        every = writer.score(IMAGES, TEXTS[:3], by=by, questions=QUESTIONS)
        pairs = writer.score(IMAGES, TEXTS[:3], by=by, questions=QUESTIONS, pairs=True)
        close(pairs.values, every.values.diag())
        assert torch.equal(pairs.num_tokens, every.num_tokens.diag())
        monkeypatch.setattr(writer, "batch_size", 1)
        close(writer.score(IMAGES, TEXTS[:3], by=by, questions=QUESTIONS).values, every.values)
        monkeypatch.undo()


def test_pmi_subtracts_the_likelihood_given_an_image_of_the_mean_color(writer):
    mean = torch.tensor(writer.model.vision.preprocessing.mean)
    blank = mean.expand(40, 40, 3).clone()
    preprocessed = preprocess(read_image(blank), writer.model.vision.preprocessing)
    assert preprocessed.abs().max() < 0.02  # not 0, because an array becomes an 8-bit image
    lm, pmi = (writer.score(IMAGES, TEXTS, by=by, prompt="a photo of").values for by in ("lm", "pmi"))
    features = writer.encode_pixels(torch.zeros(1, 3, 28, 28))
    close(pmi, lm - writer.score(features, TEXTS, prompt="a photo of").values, 2e-5)


def test_one_image_with_several_questions(writer):
    together = writer.score(IMAGES[0], TEXTS, questions=QUESTIONS)
    assert together.values.shape == (3, 5)
    for number, question in enumerate(QUESTIONS):
        close(writer.score(IMAGES[0], TEXTS, questions=question).values[0], together.values[number], 2e-5)


def test_a_qformer_that_reads_questions(reader, monkeypatch):
    scores = reader.score(IMAGES, TEXTS, questions=QUESTIONS)
    pairs = [(IMAGES[i], TEXTS[t], reader.format_questions([QUESTIONS[i]])[0], QUESTIONS[i]) for i, t in EVERY]
    images, texts, prompts, questions = zip(*pairs, strict=True)
    expected, _ = one_by_one(reader, images, texts, prompts, questions)
    close(scores.values.flatten(), expected, 2e-5)
    rows = []
    hook = reader.model.projection.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    reader.score(IMAGES[0], TEXTS * 20, questions=QUESTIONS)
    hook.remove()
    assert rows == [3]  # an image is read once per question, not once per answer
    close(reader.score(IMAGES, TEXTS[:3], by="pmi", questions=QUESTIONS, pairs=True).values,
          reader.score(IMAGES, TEXTS[:3], by="pmi", questions=QUESTIONS).values.diag())  # fmt: skip


def test_answers_are_taken_as_they_are_and_captions_as_in_training(saved):
    writer = blip2.load(saved["opt"][0], device="cpu", overrides={"text_normalization": "lavis"})
    close(writer.score(IMAGES, ["A disc!", "Two."]).values, writer.score(IMAGES, ["a disc", "two"]).values)
    asked = writer.score(IMAGES, ["A disc!", "a disc"], questions="what is it").values
    assert (asked[:, 0] - asked[:, 1]).abs().min() > 1e-3


# -- ranking and classification ----------------------------------------------------------------------------------------


def test_rank_sorts_by_score(compare, writer):
    for pipeline, by in ((compare, "itc"), (compare, "itm"), (compare, "itg"), (writer, "lm"), (writer, "pmi")):
        values = pipeline.score(IMAGES, TEXTS, by=by).values
        for ranked, row in zip(pipeline.rank(IMAGES, TEXTS, by=by), values, strict=True):
            assert all(isinstance(each, Candidate) for each in ranked)
            order = row.argsort(descending=True).tolist()
            assert [each.text for each in ranked] == [TEXTS[t] for t in order]
            assert [each.score for each in ranked] == pytest.approx(row[order].tolist(), abs=1e-4)
            chances = [each.probability for each in ranked]
            assert sum(chances) == pytest.approx(1) and chances == sorted(chances, reverse=True)


def test_ranking_keeps_no_graph(compare):
    enabled = []
    hook = compare.model.qformer.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    compare.rank(IMAGES[0], TEXTS)
    hook.remove()
    assert enabled and not any(enabled)


def test_probabilities(compare, writer):
    (ranked,) = compare.rank(IMAGES[0], TEXTS, by="itm")
    total = sum(each.score for each in ranked)
    assert [each.probability for each in ranked] == pytest.approx([each.score / total for each in ranked], abs=1e-5)
    (ranked,) = compare.rank(IMAGES[0], TEXTS, by="itc")
    logits = torch.tensor([each.score for each in ranked]) / compare.model.temperature.detach()
    assert [each.probability for each in ranked] == pytest.approx(logits.softmax(0).tolist(), abs=1e-4)
    (ranked,) = writer.rank(IMAGES[0], TEXTS)
    values = torch.tensor([each.score for each in ranked])
    assert [each.probability for each in ranked] == pytest.approx(values.softmax(0).tolist(), abs=1e-5)


def test_each_question_may_have_its_own_choices(writer, compare):
    choices = [["red", "blue"], ["a disc", "a square", "none of both"], ["one"]]
    ranked = writer.rank(IMAGES, choices, QUESTIONS)
    for i, own in enumerate(choices):
        (alone,) = writer.rank(IMAGES[i], own, QUESTIONS[i])
        assert [each.text for each in ranked[i]] == [each.text for each in alone]
        assert [each.score for each in ranked[i]] == pytest.approx([each.score for each in alone], abs=2e-5)
    assert ranked[2][0].probability == 1
    ranked = compare.rank(IMAGES, choices)
    assert [sorted(each.text for each in row) for row in ranked] == [sorted(own) for own in choices]


def test_ranking_per_token(writer):
    scores = writer.score(IMAGES, TEXTS)
    for ranked, row in zip(writer.rank(IMAGES, TEXTS, per_token=True), scores.per_token, strict=True):
        assert [each.score for each in ranked] == pytest.approx(row.sort(descending=True).values.tolist(), abs=1e-5)


def test_classes(compare, writer):
    templates = ["a {}", "it is a {} here"]
    classes = ["disc", "square"]
    (embeds,) = compare.embed_texts([each.format(name) for name in classes for each in templates]).view(1, 2, 2, 16)
    embeds = torch.nn.functional.normalize(embeds.mean(dim=1), dim=-1)
    expected = (compare.embed_images(IMAGES) @ embeds.T).amax(dim=1)
    for ranked, row in zip(compare.classify(IMAGES, classes, templates, by="itc"), expected, strict=True):
        assert {each.text: each.score for each in ranked} == pytest.approx(
            dict(zip(classes, row.tolist(), strict=True)), abs=1e-5
        )
    for pipeline, by in ((compare, "itm"), (compare, "itg"), (writer, "lm")):
        texts = [each.format(name) for name in classes for each in templates]
        expected = pipeline.score(IMAGES, texts, by=by).values.view(3, 2, 2).mean(dim=2)
        for ranked, row in zip(pipeline.classify(IMAGES, classes, templates, by=by), expected, strict=True):
            assert ranked[0].score == pytest.approx(float(row.max()), abs=1e-4)
    for pipeline in (compare, writer):
        alone = pipeline.classify(IMAGES, classes)
        named = pipeline.classify(IMAGES, classes, pipeline.class_template)
        assert alone == named and len(alone) == 3
    calls = (writer.classify, writer.rank)
    asked, ranked = (call(IMAGES[0], ["red", "blue"], questions="what color") for call in calls)
    assert asked == ranked


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_scores_that_a_stage_does_not_have(compare, writer):
    with pytest.raises(InputError) as error:
        compare.score(IMAGES, TEXTS, by="lm")
    assert "which cannot score by lm: use itm or itc or itg, or load a model of stage generation" in message(error)
    with pytest.raises(InputError) as error:
        writer.rank(IMAGES, TEXTS, by="itm")
    assert "which cannot score by itm: use lm or pmi, or load a model of stage representation" in message(error)
    for pipeline in (compare, writer):
        with pytest.raises(InputError) as error:
            pipeline.classify(IMAGES, TEXTS, by="clip")
        assert message(error) == "by is 'clip', expected one of itc, itm, itg, lm, pmi"


@pytest.mark.parametrize("name", ["compare", "writer"])
def test_texts_and_counts_that_do_not_fit(request, name):
    pipeline = request.getfixturevalue(name)
    cases = [
        (lambda: pipeline.score(IMAGES, []), "no text was given"),
        (lambda: pipeline.score([], TEXTS), "no image was given"),
        (lambda: pipeline.score(IMAGES, ["a", " "]), "text 2 of 2 is ' ', expected words"),
        (lambda: pipeline.score(IMAGES, TEXTS, pairs=True), "there are 3 images and 5 texts, but pairs need equal"),
        (lambda: pipeline.rank(IMAGES, []), "no candidate was given"),
        (lambda: pipeline.rank(IMAGES, [["a"], ["b"]]), "there are 2 lists of candidates for 3 images or questions"),
        (lambda: pipeline.rank(IMAGES, [["a"], ["b"], []]), "no candidate was given"),
        (lambda: pipeline.classify(IMAGES, []), "no class was given"),
        (lambda: pipeline.classify(IMAGES, ["a"], "a photo"), "the template 'a photo' has no {}: put {} in the place"),
        (lambda: pipeline.score(IMAGES, ["a \udcff"]), "which is not a character"),
    ]
    for call, expected in cases:
        with pytest.raises(InputError) as error:
            call()
        assert expected in message(error)


def test_prompts_and_questions_that_do_not_fit(compare, writer, reader):
    cases = [
        (lambda: compare.score(IMAGES, TEXTS, prompt="a"), "reads no prompt: leave out prompt"),
        (lambda: compare.rank(IMAGES, TEXTS, "what?"), "reads no questions: leave out questions"),
        (lambda: writer.score(IMAGES, TEXTS, prompt="a", questions="b"), "found both prompt and questions"),
        (lambda: writer.score(IMAGES, TEXTS, questions=["a", "b"]), "there are 3 images and 2 questions"),
        (lambda: writer.score(IMAGES, TEXTS, prompt=["a", "b"]), "there are 3 images and 2 prompts"),
        (lambda: writer.score(IMAGES[0], TEXTS, prompt=[]), "no prompt was given"),
        (lambda: writer.score(IMAGES[0], TEXTS, prompt="<image> a"), "contains <image>: remove <image>"),
        (lambda: writer.score(IMAGES, TEXTS, questions=" "), "question 1 of 1 is ' ', expected words"),
        (lambda: reader.score(IMAGES, TEXTS), "was trained to answer questions: give questions"),
        (lambda: writer.log_likelihood(IMAGES, [""] * 2, TEXTS[:3]), "there are 3 texts and 2 prompts"),
        (lambda: writer.log_likelihood(IMAGES, [""] * 2, TEXTS[:2]), "there are 2 texts and 3 images"),
        (lambda: writer.log_likelihood(IMAGES, [""], TEXTS[:1], [0, 1]), "1 texts and 2 entries in image_index"),
        (lambda: writer.log_likelihood(IMAGES, [""], TEXTS[:1], [3]), "image_index contains 3, expected 0 to 2"),
        (lambda: writer.log_likelihood(IMAGES, [""] * 3, TEXTS[:3], None, ["a"]), "3 texts and 1 questions"),
        (lambda: writer.log_likelihood(IMAGES, [], []), "no text was given"),
    ]
    for call, expected in cases:
        with pytest.raises(InputError) as error:
            call()
        assert expected in message(error), message(error)


def test_texts_that_are_too_long_for_the_llm(saved):
    writer = blip2.load(saved["opt"][0], device="cpu")  # 96 positions
    for texts in (["a" * 100], ["a" * 100, "b"]):
        with pytest.raises(InputError) as error:
            writer.score(IMAGES, texts)
        assert "of the LLM's 96 positions, 4 of them for the image: shorten" in message(error)


def test_scores_per_token_need_tokens(compare):
    scores = compare.score(IMAGES, TEXTS, by="itm")
    assert isinstance(scores, Scores) and scores.num_tokens is None
    with pytest.raises(InputError, match="these scores are not sums over tokens"):
        _ = scores.per_token
    with pytest.raises(InputError, match="per_token divides a likelihood by the number of tokens, but itc is not one"):
        compare.rank(IMAGES, TEXTS, by="itc", per_token=True)


def test_texts_about_given_images(compare, writer):
    index = [1, 0, 1, 2, 2]
    for pipeline in (compare, writer):
        every = pipeline.score(IMAGES, TEXTS).values
        own = pipeline.score(IMAGES, TEXTS, image_index=index).values
        close(own, every[index, range(5)], 2e-5)
        for given, expected in (
            ([0], "image_index has 1 entries for 5 texts"),
            ([0, 1, 2, 3, 0], "image_index contains 3, expected 0 to 2"),
        ):
            with pytest.raises(InputError) as error:
                pipeline.score(IMAGES, TEXTS, image_index=given)
            assert expected in message(error)
        with pytest.raises(InputError, match="found both pairs and image_index"):
            pipeline.score(IMAGES, TEXTS, pairs=True, image_index=index)
