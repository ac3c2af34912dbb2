"""Questions about images, from a table to answers: the question-conditioned Q-Former (paper §4.3, Figure 7)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration, BertForMaskedLM

from blip2 import checkpoint
from blip2.backbones.language import load_language_model
from blip2.backbones.vision_loaders import load_image_encoder
from blip2.checkpoint import open_checkpoint
from blip2.convert import convert
from blip2.data.collate import CausalLMCollator, encode_questions
from blip2.data.sources import open_records
from blip2.decoding.search import Decoding
from blip2.errors import InputError
from blip2.model.generation import GenerationBatch, GenerationModel, Questions
from blip2.model.qformer import attention_mask
from blip2.pipelines import load
from blip2.training.metrics import read_metrics
from blip2.training.trainer import train
from conftest import COLORS, SHAPES, draw
from fixtures.checkpoints import lavis_state, save_transformers
from fixtures.tiny import QFORMER, randomize, texts

PROMPT = "Question: {} Answer:"
READING = replace(QFORMER, use_qformer_text_input=True)
GREEDY = Decoding(num_beams=1, max_new_tokens=6)


@pytest.fixture
def model(parts):
    torch.manual_seed(0)
    made = GenerationModel(load_image_encoder(parts.vision), READING, load_language_model(parts.llama))
    randomize(made.qformer)
    made.initialize_projection()
    return made


@pytest.fixture(scope="module")
def table(parts, tmp_path_factory):
    """Two questions about each of twelve images, one of whose answers was given more often than the other."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for shape in SHAPES:
        for color in COLORS:
            draw(shape, color, 0).save(folder / f"{color}-{shape}.png")
            for question, answers in (("what color?", [color] * 8 + ["dark", ""]), ("what shape?", [shape])):
                rows.append({"image": f"{color}-{shape}.png", "question": question, "answers": answers})
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def recipe(parts, table, tmp_path_factory):
    def make(output, **changes):
        sections = {
            "stage": "generation",
            "language": {"name": parts.llama, "prompt": PROMPT},
            "qformer": {"use_qformer_text_input": True, "dropout": 0.0},
            "data": {
                "train": table,
                "batch_size": 4,
                "num_workers": 0,
                "horizontal_flip": False,
                "min_crop_scale": 1.0,
            },
        }
        return parts.recipe(output, **{**sections, **changes})

    return make


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "vqa"
    train(recipe(folder))
    return folder


def pixels(count):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(7))


# -- the model -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_queries_look_for_what_is_asked(model):
    images, (ids, mask) = pixels(2), texts(6, 4)
    prompt = model.visual_prompt(images, Questions(ids, mask))
    memory = model.qformer.project_image(model.vision.encode(images), model.image_norm)
    seen = model.qformer(memory, ids, attention_mask("bidirectional", QFORMER.num_query_tokens, mask)).queries
    torch.testing.assert_close(prompt, model.projection(seen))
    other = model.visual_prompt(images, Questions(ids.flip(0), mask.flip(0)))
    assert (other - prompt).abs().amax(dim=(1, 2)).min() > 0.01
    assert not torch.allclose(prompt, model.visual_prompt(images), atol=0.01)


@torch.no_grad()
def test_several_questions_about_one_image_encode_it_once(model, monkeypatch):
    images, (ids, mask) = pixels(2), texts(6, 4, 5)
    alone = [model.visual_prompt(images[[i]], Questions(ids[[n]], mask[[n]])) for n, i in enumerate([1, 0, 1])]
    encoded = []
    features = model.vision.encode
    monkeypatch.setattr(model.vision, "encode", lambda given: encoded.append(len(given)) or features(given))
    together = model.visual_prompt(images, Questions(ids, mask), torch.tensor([1, 0, 1]))
    torch.testing.assert_close(together, torch.cat(alone))
    assert encoded == [2]


def test_the_text_transformer_learns(model):
    (questions, mask), ids = texts(6, 4), torch.randint(0, 255, (2, 5), generator=torch.Generator().manual_seed(8))
    batch = GenerationBatch(pixels(2), ids, torch.ones_like(ids).bool(), ids, Questions(questions, mask))
    model(batch).losses["lm"].backward()
    idle = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    # A question goes no further than the queries of the last block look; keys have no use for a bias.
    last = f"qformer.blocks.{QFORMER.num_hidden_layers - 1}.text_feed_forward."
    assert {name for name in idle if not name.endswith(".key.bias")} == {
        name for name, _ in model.named_parameters() if name.startswith(last)
    }


# -- training --------------------------------------------------------------------------------------------------------


def test_answers_are_drawn_as_often_as_they_were_given(recipe, tmp_path):
    asked = recipe(tmp_path)
    records = open_records(asked.data.train, asked.data)
    assert [record.question for record in records][:2] == ["what color?", "what shape?"]
    assert records[0].captions == ("red",) * 8 + ("dark",)
    assert records[1].captions == ("square",)


def test_training_resumes_and_the_model_answers(recipe, run, tmp_path):
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(checkpoint.latest_checkpoint(again))
    train(recipe(again), resume=True)
    mine, theirs = (load_file(checkpoint.latest_checkpoint(folder) / "model.safetensors") for folder in (run, again))
    assert mine.keys() == theirs.keys() and "qformer.word_embedding.weight" in mine
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)

    pipeline = load(run, device="cpu")
    randomize(pipeline.model.qformer)
    for parameter in pipeline.model.language.parameters():
        if parameter.ndim > 1:
            parameter.data *= 2
    images, questions = [draw("disc", "red", 0), draw("square", "blue", 7)], ["what color?", "is it a disc or not?"]
    answers = pipeline.answer(images, questions, GREEDY)
    assert pipeline.question_template == PROMPT
    features = pipeline.encode_images(images)
    for image in range(2):
        seen = encode_questions(pipeline.qformer_tokenizer, questions[image : image + 1])
        prompt = pipeline.model.visual_prompt(features[[image]], seen)
        ids = pipeline.tokenizer(PROMPT.format(questions[image]), return_tensors="pt")["input_ids"]
        new = pipeline.model.language.generate(prompt, ids, torch.ones_like(ids).bool(), GREEDY, pipeline.eos_token_id)
        assert pipeline.tokenizer.decode(new[0], skip_special_tokens=True).strip() == answers[image]
    both = pipeline.answer(images[0], questions, GREEDY)
    assert both[0] == answers[0] and pipeline.answer(images[0], questions[1], GREEDY) == both[1:]


def test_the_text_transformer_comes_from_stage_one(parts, recipe, runs, tmp_path):
    train(recipe(tmp_path / "run", start_from=str(runs["stage1"]), optimizer={"learning_rate": {"*": 0.0}}))
    before = load_file(checkpoint.latest_checkpoint(runs["stage1"]) / "model.safetensors")
    after = load_file(checkpoint.latest_checkpoint(tmp_path / "run") / "model.safetensors")
    text = [name for name in after if "word_embedding" in name or "text_feed_forward" in name]
    assert len(text) > 8
    assert all(torch.equal(before[name], after[name]) for name in text)


def test_after_a_stage_two_that_read_no_questions_it_comes_from_bert(parts, recipe, runs, tmp_path):
    train(recipe(tmp_path / "run", start_from=str(runs["llama"]), optimizer={"learning_rate": {"*": 0.0}}))
    after = load_file(checkpoint.latest_checkpoint(tmp_path / "run") / "model.safetensors")
    before = load_file(checkpoint.latest_checkpoint(runs["llama"]) / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    words = BertForMaskedLM.from_pretrained(parts.bert).bert.embeddings.word_embeddings.weight
    assert torch.equal(after["qformer.word_embedding.weight"][:-1], words)


def started(folder):
    """The weights of a run that learned nothing."""
    return load_file(checkpoint.latest_checkpoint(folder) / "model.safetensors")


STILL = {"learning_rate": {"vision.*": "frozen", "language.*": "frozen", "*": 0.0}}


def test_two_starts(parts, recipe, runs, tmp_path, capsys):
    """The former wins where both have a weight, and no BERT is read."""
    first, second = started(runs["stage1"]), started(runs["llama"])
    both = {name for name in first if name in second and not torch.equal(first[name], second[name])}
    assert any(".self_attention." in name for name in both) and "qformer.queries" in both
    for starts, winner in ((["llama", "stage1"], second), (["stage1", "llama"], first)):
        names = [str(runs[name]) for name in starts]
        train(
            recipe(
                tmp_path / starts[0], start_from=names, optimizer=STILL, training={"max_steps": 1},
                qformer={"use_qformer_text_input": True, "bert": None, "tokenizer": parts.bert},
            )
        )  # fmt: skip
        after = started(tmp_path / starts[0])
        assert {name for name in after if not torch.equal(after[name], {**first, **second, **winner}[name])} == set()
        said = " ".join(capsys.readouterr().err.split())
        of = {name: f"starting from {runs[name]}/checkpoints/step-00000003 (" for name in starts}
        assert said.index(of[starts[0]]) < said.index(of[starts[1]])
        if starts[0] == "llama":
            assert "step-00000003): image_norm, projection, qformer starting" in said
            assert "step-00000003): qformer (text transformer) " in said
        else:
            assert "step-00000003): image_norm, qformer, qformer (text transformer) starting" in said
            assert "step-00000003): projection " in said
        assert "new weights" not in said and "no checkpoint contains them" not in said


def test_what_no_start_has(parts, recipe, runs, tmp_path):
    rest = save_rest(runs["llama"], tmp_path / "rest", lambda name: not name.startswith("projection."))
    for starts, bert, expected in (
        ([runs["llama"], runs["llama"]], parts.bert, "is not needed, because .* contain all of its weights: remove it"),
        ([rest, runs["llama"]], parts.bert, r"contains all weights of qformer \(text transformer\) .* stage 1; or"),
        ([runs["llama"]], None, r"weights of qformer \(text transformer\) \(qformer\.blocks\.0\.text_feed"),
    ):
        qformer = {"use_qformer_text_input": True, "bert": bert, "tokenizer": parts.bert}
        with pytest.raises(InputError, match=expected) as raised:
            train(recipe(tmp_path / "run", start_from=[str(start) for start in starts], qformer=qformer))
        assert "\n" not in str(raised.value)


def save_rest(run, folder, keep):
    """A checkpoint without some of its weights."""
    shutil.copytree(checkpoint.latest_checkpoint(run), folder)
    save_file({k: t for k, t in started(run).items() if keep(k)}, folder / "model.safetensors")
    return folder


def test_one_start_and_bert(parts, recipe, runs, tmp_path, capsys):
    train(recipe(tmp_path / "run", start_from=str(runs["llama"]), training={"max_steps": 1}))
    said = " ".join(capsys.readouterr().err.split())
    assert f"from {parts.bert}, because no checkpoint contains them: weights of qformer (text transformer)" in said


@pytest.mark.parametrize("form", ["transformers", "lavis"])
def test_two_starts_of_other_formats(parts, recipe, tmp_path, form):
    if form == "transformers":
        names = [str(tmp_path / name) for name in ("opt", "itm")]
        for name, flavor in zip(names, ("opt", None), strict=True):
            save_transformers(Path(name), flavor, parts.bert)
        first, second = (open_checkpoint(name).weights for name in names)
        sizes = {}
    else:
        names = [str(tmp_path / f"{stage}.pth") for stage in ("opt", "1")]
        for name, stage in zip(names, ("opt", "1"), strict=True):
            torch.save({"model": lavis_state(stage, seed=len(stage))}, name)
        first = open_checkpoint(names[0], {"vision.name": names[1], "language.name": parts.opt}).weights
        second = open_checkpoint(names[1]).weights
        sizes = {"hidden_size": 64, "num_attention_heads": 1}
    train(
        recipe(
            tmp_path / "run", start_from=names, optimizer=STILL, training={"max_steps": 1}, vision={"name": names[1]},
            language={"name": parts.opt, "prompt": PROMPT},
            qformer={"use_qformer_text_input": True, "bert": None, "tokenizer": parts.bert, "num_hidden_layers": 3,
                     **sizes},
        )
    )  # fmt: skip
    after = started(tmp_path / "run")
    of = {name: "first" if name in first else "second" for name in after}
    assert {"first", "second"} == set(of.values()) and of["projection.weight"] == of["qformer.queries"] == "first"
    assert {"qformer.word_embedding.weight", "qformer.blocks.0.text_feed_forward.expand.weight"} <= {
        name for name in of if of[name] == "second"
    }
    assert not torch.equal(first["qformer.queries"], second["qformer.queries"]) or form == "transformers"
    held = {"first": first, "second": second}
    assert [name for name, tensor in after.items() if not torch.equal(tensor, held[of[name]][name].float())] == []


def test_any_llm_learns_to_answer_without_a_question_for_the_qformer(parts, recipe, tmp_path):
    for name in ("llama", "t5"):
        language = {"name": getattr(parts, name), "prompt": PROMPT}
        train(recipe(tmp_path / name, language=language, qformer={"dropout": 0.0}))
        assert load(tmp_path / name, device="cpu").answer(draw("disc", "red", 0), "what?", GREEDY)


# -- what cannot be --------------------------------------------------------------------------------------------------


def test_a_question_needs_a_place(parts, tmp_path):
    for changes in ({}, {"stage": "generation", "language": {"name": parts.llama, "prompt": "a photo of"}}):
        with pytest.raises(InputError, match=r"put \{\} into language.prompt in the place of the question"):
            parts.recipe(tmp_path, qformer={"use_qformer_text_input": True}, **changes)


def test_records_without_questions_are_named(parts, recipe, tmp_path):
    with pytest.raises(InputError, match=r"no usable image.*it has no question, .* language.prompt contains \{\}"):
        train(recipe(tmp_path / "run", data={"train": parts.images, "batch_size": 4, "num_workers": 0}))


def test_a_question_without_answers_is_left_out(recipe, table, tmp_path):
    rows = [json.loads(line) for line in Path(table).read_text().splitlines()]
    folder = tmp_path / "some"
    folder.mkdir()
    for row in rows:
        draw("disc", "red", 0).save(folder / row["image"])
    rows[0]["answers"] = [""]
    (folder / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(folder / "some.jsonl"), "batch_size": 24, "num_workers": 0}
    train(recipe(tmp_path / "run", data=data))
    assert {row["skipped"] for row in read_metrics(tmp_path / "run")} == {1, 2, 3, 4}


def test_a_model_that_answers_needs_a_prompt_for_captions(run):
    pipeline = load(run, device="cpu")
    with pytest.raises(InputError, match=r"was trained to answer questions: use answer\(\) \(blip2 ask\)"):
        pipeline.caption(draw("disc", "red", 0))
    assert len(pipeline.caption(draw("disc", "red", 0), "a photo of", GREEDY)) == 1


def test_other_formats_have_no_place_for_it(run, tmp_path):
    """But for InstructBLIP's, which tests/interop/test_instructblip.py converts to."""
    with pytest.raises(InputError, match="reads questions, which the BLIP-2 of vllm does not support"):
        convert(run, tmp_path / "out.pth", "vllm")
    convert(run, tmp_path / "own", "blip2")
    image = draw("disc", "red", 0)
    answers = [load(path, device="cpu").answer(image, "what is it?", GREEDY) for path in (run, tmp_path / "own")]
    assert answers[0] == answers[1]


def test_the_tokenizer_of_questions_is_saved(parts, run):
    saved = AutoTokenizer.from_pretrained(checkpoint.latest_checkpoint(run) / "tokenizer")
    assert saved.convert_ids_to_tokens([57]) == ["[DEC]"]


# -- captions and questions in one run -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(recipe, parts, table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    captions = folder / "captions.jsonl"
    shown = [(color, shape) for color in COLORS for shape in SHAPES]
    root = Path(table).parent
    rows = [{"image": str(root / f"{color}-{shape}.png"), "caption": f"a {color} {shape}"} for color, shape in shown]
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    language = {"name": parts.llama, "prompt": "Caption:", "question_prompt": PROMPT}
    data = {"train": {str(captions): 1.0, table: 1.0}, "batch_size": 4, "num_workers": 0}
    train(recipe(folder / "run", language=language, data=data, qformer={"dropout": 0.0}))
    return folder / "run"


def test_captions_and_questions_have_prompts_of_their_own(both):
    pipeline = load(both, device="cpu")
    assert pipeline.question_template == PROMPT
    randomize(pipeline.model.qformer)
    image = draw("disc", "red", 0)
    assert pipeline.caption(image, decoding=GREEDY) == pipeline.caption(image, "Caption:", decoding=GREEDY)
    asked = pipeline.answer(image, "what shape?", decoding=GREEDY)
    assert asked == pipeline.generate([image], [PROMPT.replace("{}", "what shape?")], GREEDY)


def test_each_record_is_learned_behind_its_own_prompt(parts):
    tokenizer = AutoTokenizer.from_pretrained(parts.llama)
    texts_of = CausalLMCollator(tokenizer, 99, "Caption:", tokenizer.eos_token_id, None, PROMPT)
    images = torch.zeros(2, 3, 4)
    batch, _ = texts_of(images, ["a disc", "disc"], ["", "what shape?"], torch.arange(2), np.random.default_rng(0))
    rows = zip(batch.ids, batch.mask, strict=True)
    said = [tokenizer.decode(row[mask], skip_special_tokens=True) for row, mask in rows]
    assert [text.strip() for text in said] == ["Caption: a disc", "Question: what shape? Answer: disc"]


@pytest.mark.parametrize(
    "language",
    [{"prompt": "Caption:", "question_prompt": "Answer:"}, {"prompt": PROMPT, "question_prompt": PROMPT}],
    ids=["no place for the question", "two prompts of questions"],
)
def test_prompts_that_contradict_each_other_are_refused(recipe, parts, tmp_path, language):
    with pytest.raises(InputError, match=r"language.question_prompt is .* expected {} in language.question_prompt"):
        recipe(tmp_path, language={"name": parts.llama, **language}, qformer={})


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_log_likelihood_of_a_text_is_the_sum_of_its_tokens(runs, name):
    pipeline = load(runs[name], device="cpu")
    randomize(pipeline.model.qformer)
    images = [draw("disc", "red", 0), draw("square", "blue", 7)]
    likely = ["a red disc", "a blue square on a large image"]
    together = pipeline.log_likelihood(images, ["x", "a longer prompt"], likely)
    for i in (0, 1):
        alone = pipeline.log_likelihood([images[i]], [["x", "a longer prompt"][i]], [likely[i]])
        torch.testing.assert_close(together[i], alone[0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        together, pipeline.log_likelihood(images[::-1], ["x", "a longer prompt"], likely, [1, 0]), atol=1e-4, rtol=1e-5
    )
    # What greedy search writes is likelier than the same with another word at its beginning.
    best = pipeline.generate(images[:1], ["x"], Decoding(num_beams=1, max_new_tokens=3))
    assert together.max() < 0 and torch.isfinite(pipeline.log_likelihood(images[:1], ["x"], best)).all()


def test_the_log_likelihood_of_an_answer_depends_on_what_the_qformer_reads(run):
    pipeline = load(run, device="cpu")
    randomize(pipeline.model.qformer)
    images, texts = [draw("disc", "red", 0), draw("square", "blue", 7)], ["red", "blue", "red"]
    questions, image_of = ["what color is it?", "which shape?", "is it large?"], [0, 1, 0]
    prompts = pipeline.format_questions(questions)
    together = pipeline.log_likelihood(images, prompts, texts, image_of, questions)
    for i, image in enumerate(image_of):
        alone = pipeline.log_likelihood([images[image]], [prompts[i]], [texts[i]], questions=[questions[i]])
        torch.testing.assert_close(together[i], alone[0], atol=1e-4, rtol=1e-5)
    other = pipeline.log_likelihood(images, prompts, texts, image_of, questions[::-1])
    assert (together - other).abs().max() > 1e-3


# -- what the LLM has positions for ------------------------------------------------------------------------------------


def test_a_question_that_is_too_long_is_a_skipped_record(parts, recipe, table, tmp_path):
    rows = Path(table).read_text().splitlines()
    long = json.loads(rows[0])
    long["question"] = "what " * 30
    folder = tmp_path / "data"
    shutil.copytree(Path(table).parent, folder)
    (folder / "questions.jsonl").write_text("\n".join([json.dumps(long), *rows[1:]]))
    training = {"max_steps": 6, "save_steps": 6, "device": "cpu", "precision": "fp32"}
    data = {
        "train": str(folder / "questions.jsonl"),
        "batch_size": 4,
        "num_workers": 0,
        "max_length": 12,
        "max_bad_fraction": 1.0,
    }
    opt = {"name": parts.opt, "prompt": PROMPT}  # of 96 positions
    train(recipe(tmp_path / "run", language=opt, data=data, training=training))
    skipped = (tmp_path / "run" / "skipped.jsonl").read_text()
    assert "the prompt with its question has" in skipped and "positions for at most 80" in skipped


@pytest.mark.parametrize("name", ["opt", "bart"])
def test_limits_that_the_llm_has_no_positions_for(parts, recipe, tmp_path, name):
    folder = parts.opt
    if name == "bart":
        folder = str(tmp_path / "bart")
        part = {"layers": 1, "ffn_dim": 48, "attention_heads": 4}
        sizes = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in part.items()}
        config = BartConfig(vocab_size=258, d_model=32, max_position_embeddings=96, decoder_start_token_id=256, **sizes)
        BartForConditionalGeneration(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(parts.t5).save_pretrained(folder)
    data = {"max_length": 100, "train": parts.images, "num_workers": 0}
    made = recipe(tmp_path / "run", language={"name": folder, "prompt": "a "}, data=data,
                  qformer={"use_qformer_text_input": False})  # fmt: skip
    with pytest.raises(InputError, match="the LLM has 96 positions, too few for 4 queries, a prompt of") as error:
        train(made)
    assert "\n" not in str(error.value)
