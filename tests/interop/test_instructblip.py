"""InstructBLIP of transformers and LAVIS: the same numbers, the same tokens, and bit for bit there and back."""

import json
import shutil
from copy import copy as copy_shallow
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

import blip2
from blip2.builder import build_collator
from blip2.checkpoint import load_start_from, open_checkpoint
from blip2.convert import convert
from blip2.data.collate import encode_prompts
from blip2.decoding.options import Decoding
from blip2.errors import InputError
from blip2.interop.weights import open_folder
from blip2.model.generation import GenerationBatch, Questions
from conftest import byte_tokenizer, draw
from fixtures.checkpoints import QUERIES, edit, instruct_processor, lavis_state, same, save_instructblip

FLAVORS = ("llama", "t5")
IMAGES = [draw("disc", "red", 0), draw("square", "blue", 7), draw("stripe", "green", 3)]
QUESTIONS = ["a", "what is it?", "is the square red or blue here and there?"]


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory):
    """Folders and models of transformers, by flavor."""
    root = tmp_path_factory.mktemp("instruct")
    return {name: (root / name, save_instructblip(root / name, name, parts.bert)) for name in FLAVORS}


@pytest.fixture(scope="module")
def ours(saved):
    return {name: blip2.load(folder, device="cpu") for name, (folder, _) in saved.items()}


@pytest.fixture
def copy(saved, tmp_path):
    """A copy that may be damaged."""

    def make(name="llama"):
        shutil.copytree(saved[name][0], tmp_path / name)
        return tmp_path / name

    return make


def same_files(first, second):
    here, there = (torch.load(path, weights_only=True)["model"] for path in (first, second))
    assert set(here) == set(there)
    return all(here[n].dtype == there[n].dtype and torch.equal(here[n], there[n]) for n in here)


def prepare(processor, texts):
    """The processor's inputs for a batch. The processor pads the text of the Q-Former on the LLM's side, which is the
    left for Llama and numbers the positions of short texts otherwise than alone; here it is on the right, as in LAVIS.
    """
    inputs = processor(images=IMAGES[: len(texts)], text=texts, padding=True, return_tensors="pt")
    words = processor.qformer_tokenizer(texts, padding=True, return_tensors="pt")
    return inputs | {f"qformer_{key}": words[key] for key in ("input_ids", "attention_mask")}


def batch_of(pipeline, flavor, processor):
    """A batch of this project with questions and answers of different lengths, and transformers' inputs for it."""
    inputs = prepare(processor, QUESTIONS)
    assert len(set(inputs["qformer_attention_mask"].sum(1).tolist())) == 3
    words = Questions(inputs["qformer_input_ids"], inputs["qformer_attention_mask"].bool())
    ids, mask = encode_prompts(pipeline.tokenizer, QUESTIONS, "right")
    images = torch.full((3, QUERIES), processor.tokenizer.convert_tokens_to_ids("<image>"))
    theirs = {
        **{key: inputs[key] for key in ("pixel_values", "qformer_input_ids", "qformer_attention_mask")},
        "input_ids": torch.cat([images, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(images), mask.long()], 1),
    }
    if flavor == "t5":
        labels = torch.tensor([[5, 6, 256], [7, 256, -100], [8, 9, 10]])
        theirs["labels"] = labels
    else:
        labels = ids.masked_fill(~mask, -100)
        labels[:, 0] = -100
        theirs["labels"] = torch.cat([torch.full_like(images, -100), labels], 1)
    return GenerationBatch(inputs["pixel_values"], ids, mask, labels, words), theirs


# -- transformers: numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavor", FLAVORS)
def test_logits_loss_and_gradients(saved, ours, parts, monkeypatch, flavor):
    """In one batch of questions of different lengths; the gradients are those of the Q-Former and the projection."""
    folder, theirs = saved[flavor]
    pipeline = ours[flavor]
    batch, inputs = batch_of(pipeline, flavor, instruct_processor(flavor, parts.bert))
    expected = theirs(**inputs)
    model = pipeline.model
    out = model(batch)
    torch.testing.assert_close(out.losses["lm"], expected.loss, atol=1e-5, rtol=1e-5)
    visual = model.visual_prompt(batch.images, batch.questions)
    states, targets = model.language.hidden_states(visual, batch.ids, batch.mask, batch.labels)
    logits = model.language.lm_head(states)
    has_label = batch.labels != -100
    found = expected.logits[has_label] if flavor == "t5" else expected.logits[:, QUERIES - 1 : -1][has_label]
    scale = found.detach().abs().max()
    torch.testing.assert_close(logits / scale, found / scale, atol=1e-5, rtol=0)
    torch.testing.assert_close(F.cross_entropy(logits, targets), expected.loss, atol=1e-5, rtol=1e-5)
    assert logits.std() > 0.1

    # In float64, except for the LLMs' norms and the loss.
    theirs, model = deepcopy(theirs).double(), deepcopy(model).double()
    encode = model.vision.encode
    monkeypatch.setattr(model.vision, "encode", lambda images: encode(images).double())  # it returns float32
    theirs(**inputs | {"pixel_values": inputs["pixel_values"].double()}).loss.backward()
    model(replace(batch, images=batch.images.double())).losses["lm"].backward()
    weights = open_checkpoint(str(folder)).weights
    for name, parameter in theirs.named_parameters():
        new = next(new for new, source in weights.sources.items() if source[1] == name)
        if new.startswith(("qformer.", "image_norm.", "projection.")):
            mine = model.get_parameter(new).grad
            mine, other = [torch.zeros_like(parameter) if each is None else each for each in (mine, parameter.grad)]
            difference = (mine - other).abs().max() / max(1e-2, float(other.abs().max()))
            # With T5 the measured difference is 1.0e-4. transformers computes the variance in T5's norms in float32,
            # also in a float64 model, but with norms in float64 it is still 8.6e-5: the cause of the rest is not known.
            assert difference < (2e-4 if flavor == "t5" else 1e-5), (name, difference)
    moved = model.qformer.blocks[0].text_feed_forward.expand.weight.grad
    assert moved is not None and moved.abs().max() > 1e-4


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("flavor", FLAVORS)
def test_generated_tokens(saved, ours, parts, flavor, beams):
    """In a batch of questions of different lengths and one by one, by answer() and by caption() with a prompt."""
    theirs, pipeline = saved[flavor][1], ours[flavor]
    processor = instruct_processor(flavor, parts.bert)

    def write(inputs):
        out = theirs.generate(**inputs, num_beams=beams, max_new_tokens=8, min_new_tokens=1)
        new = out[:, 1:] if flavor == "t5" else out[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in pipeline.tokenizer.batch_decode(new, skip_special_tokens=True)]

    expected = write(prepare(processor, QUESTIONS))
    plain = (processor(images=one, text=text, return_tensors="pt") for one, text in zip(IMAGES, QUESTIONS, strict=True))
    assert [write(each)[0] for each in plain] == expected
    decoding = Decoding(num_beams=beams, max_new_tokens=8)
    assert pipeline.answer(IMAGES, QUESTIONS, decoding) == expected
    assert pipeline.caption(IMAGES, QUESTIONS, decoding) == expected  # the Q-Former reads the prompt
    alone = [pipeline.answer(one, text, decoding)[0] for one, text in zip(IMAGES, QUESTIONS, strict=True)]
    assert alone == expected
    assert len(set(expected)) > 1


def test_what_is_read(saved, ours):
    config = ours["llama"].config
    assert config.qformer.use_qformer_text_input and config.qformer.text_input == "prompt"
    assert config.language.prompt == "{}" and config.text_normalization == "none"
    for flavor in FLAVORS:
        found = open_checkpoint(str(saved[flavor][0])).description
        assert found.startswith("transformers' InstructBlipForConditionalGeneration: a ViT with 3 layers for 28 pixels")
        assert found.endswith(f"an LLM of type {flavor}")


def test_the_q_former_reads_the_whole_prompt(ours):
    """The prompt has words around the question, as in LAVIS's evaluations."""
    template = "Q: {} A:"
    asked = copy_shallow(ours["llama"])
    asked.config = replace(asked.config, language=replace(asked.config.language, prompt=template))
    decoding = Decoding(num_beams=1, max_new_tokens=8)
    whole = [template.replace("{}", question) for question in QUESTIONS]
    expected = ours["llama"].answer(IMAGES, whole, decoding)
    assert asked.answer(IMAGES, QUESTIONS, decoding) == expected != ours["llama"].answer(IMAGES, QUESTIONS, decoding)


def test_a_question_longer_than_the_q_former_s_positions(ours):
    """Not every tokenizer states a maximum length."""
    pipeline = ours["llama"]
    assert pipeline.qformer_tokenizer.model_max_length == pipeline.config.qformer.max_position_embeddings == 40
    assert len(pipeline.answer(IMAGES[0], "a " * 60, Decoding(num_beams=1, max_new_tokens=3))) == 1


def test_the_collator_gives_the_q_former_the_prompt(saved, parts):
    from blip2.builder import build

    recipe = parts.recipe(
        saved["llama"][0].parent / "run", stage="generation",
        qformer={"use_qformer_text_input": True}, language={"name": parts.llama, "prompt": "Q {}"},
    )  # fmt: skip
    built = build(recipe.model, torch.device("cpu"))
    for text_input, expected in (("prompt", "q a b"), ("question", "a b")):
        config = replace(recipe.model, qformer=replace(recipe.qformer, text_input=text_input))
        batch, _ = build_collator(config, built)(
            torch.zeros(1, 3, 32, 32), ["x"], ["a b"], torch.zeros(1).long(), np.random.default_rng(0)
        )
        assert built.question_tokenizer is not None and batch.questions is not None
        read = built.question_tokenizer.decode(batch.questions.ids[0], skip_special_tokens=True)
        assert read.replace(" ", "") == expected.replace(" ", "")


# -- transformers: there and back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavor", FLAVORS)
def test_there_and_back(saved, ours, tmp_path, flavor):
    """Through this project's format, and once more; transformers loads it whole and its processor makes the same."""
    folder, theirs = saved[flavor]
    convert(folder, tmp_path / "ours", "blip2")
    convert(tmp_path / "ours", tmp_path / "back", "transformers")
    assert same(folder, tmp_path / "back")
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "back"))
    assert before == after
    model, info = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    processors = [InstructBlipProcessor.from_pretrained(f) for f in (folder, tmp_path / "back")]
    inputs = [p(images=IMAGES, text=QUESTIONS, padding=True, return_tensors="pt") for p in processors]
    assert all(torch.equal(inputs[0][key], inputs[1][key]) for key in inputs[0])
    again = blip2.load(tmp_path / "ours", device="cpu")
    assert again.config.qformer.text_input == "prompt"
    assert again.answer(IMAGES, QUESTIONS) == ours[flavor].answer(IMAGES, QUESTIONS)


def test_shards_in_half_precision_with_the_buffers_of_old_files(parts, tmp_path):
    """The buffers are in a shard of their own, and are not written again."""
    folder = tmp_path / "there"
    save_instructblip(folder, "llama", parts.bert, torch.bfloat16, shard="40KB")
    index = folder / "model.safetensors.index.json"
    plain = index.read_text()
    buffers = {
        "qformer.embeddings.position_ids": torch.arange(40)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file(buffers, folder / "old.safetensors")
    edit(index, weight_map={**json.loads(plain)["weight_map"], **dict.fromkeys(buffers, "old.safetensors")})
    convert(folder, tmp_path / "back", "transformers")
    assert set(buffers) <= set(open_folder(folder))
    (folder / "old.safetensors").unlink()
    index.write_text(plain)
    assert same(folder, tmp_path / "back")


def test_an_output_matrix_of_its_own(copy, parts):
    """As the published FlanT5 have it, although transformers ties it to the embeddings when it makes a T5."""
    folder = copy("t5")
    weights = load_file(folder / "model.safetensors")
    words = weights["language_model.shared.weight"]
    weights["language_model.lm_head.weight"] = words.flip(0).clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    theirs = InstructBlipForConditionalGeneration.from_pretrained(folder)
    inputs = prepare(instruct_processor("t5", parts.bert), QUESTIONS)
    out = theirs.generate(**inputs, num_beams=2, max_new_tokens=6, min_new_tokens=1)
    here = blip2.load(folder, device="cpu")
    expected = [text.strip() for text in here.tokenizer.batch_decode(out[:, 1:], skip_special_tokens=True)]
    assert here.answer(IMAGES, QUESTIONS, Decoding(num_beams=2, max_new_tokens=6)) == expected
    convert(folder, folder.parent / "back", "transformers")
    assert same(folder, folder.parent / "back")


def test_published_token_ids_of_vicuna(ours, copy):
    """In the LLM's configuration they are wrong; texts begin and end with the tokenizer's tokens, as in training."""
    folder = copy()
    wrong = {"architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    edit(folder / "config.json", **{f"text_config__{key}": value for key, value in wrong.items()})
    plain = byte_tokenizer()  # which, unlike the fixture's, does not put </s> first by itself
    plain.add_special_tokens({"bos_token": "</s>", "additional_special_tokens": ["<image>"]})
    plain.save_pretrained(folder)
    here, there = blip2.load(folder, device="cpu"), ours["llama"]
    assert here.config.language.bos_token == "</s>" and there.config.language.bos_token is None
    assert here.eos_token_id == there.eos_token_id == 256 and here.config.language.stop_string is None
    assert here.answer(IMAGES, QUESTIONS) == there.answer(IMAGES, QUESTIONS)


def test_a_question_conditioned_model_of_ours(parts, tmp_path):
    """Its prompt and what its Q-Former reads go along, so that it answers the same."""
    from blip2.training.trainer import train

    table = tmp_path / "questions.jsonl"
    IMAGES[0].save(tmp_path / "red.png")
    table.write_text(json.dumps({"image": "red.png", "question": "what?", "answer": "red"}) + "\n")
    run = tmp_path / "run"
    eva = {key.removeprefix("visual_encoder."): each for key, each in lavis_state("1").items() if "visual" in key}
    torch.save(eva, tmp_path / "eva.pth")
    train(
        parts.recipe(
            run, stage="generation", vision={"name": str(tmp_path / "eva.pth")},
            qformer={
                "use_qformer_text_input": True, "hidden_size": 64, "num_attention_heads": 1, "bert": None,
                "tokenizer": parts.bert,
            },
            language={"name": parts.llama, "prompt": "Question: {} Answer:"},
            data={"train": str(table), "batch_size": 1, "text_normalization": "lavis"},
            training={"max_steps": 1, "device": "cpu", "precision": "fp32"},
        )
    )  # fmt: skip
    convert(run, tmp_path / "out", "transformers")
    here, there = blip2.load(run, device="cpu"), blip2.load(tmp_path / "out", device="cpu")
    assert there.config.qformer.text_input == "question" and there.config.text_normalization == "lavis"
    assert there.config.language.prompt == "Question: {} Answer:"
    decoding = Decoding(num_beams=2, max_new_tokens=6)
    expected = here.answer(IMAGES, QUESTIONS, decoding)
    assert there.answer(IMAGES, QUESTIONS, decoding) == expected

    model, info = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    processor = InstructBlipProcessor.from_pretrained(tmp_path / "out")
    prompts = here.format_questions(QUESTIONS)
    inputs = processor(images=IMAGES, text=prompts, padding=True, return_tensors="pt")
    asked = processor.qformer_tokenizer([q.rstrip(".!") for q in QUESTIONS], padding=True, return_tensors="pt")
    inputs["qformer_input_ids"], inputs["qformer_attention_mask"] = asked["input_ids"], asked["attention_mask"]
    out = model.eval().generate(**inputs, num_beams=2, max_new_tokens=6, min_new_tokens=1)
    new = out[:, inputs["input_ids"].shape[1] :]
    assert [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)] == expected
    card = (tmp_path / "out" / "README.md").read_text()
    assert "InstructBlipForConditionalGeneration" in card and 'processor.qformer_tokenizer("what is it?"' in card

    convert(run, tmp_path / "lavis.pth", "lavis")
    named = {"qformer.tokenizer": parts.bert, "qformer.num_attention_heads": 1, "language.name": parts.llama}
    trained = {"language.prompt": "Question: {} Answer:", "qformer.text_input": "question"}
    trained |= {"language.bos_token": None, "text_normalization": "lavis"}  # which a .pth file does not contain
    asked = blip2.load(tmp_path / "lavis.pth", device="cpu", overrides=named | trained)
    assert asked.answer(IMAGES, QUESTIONS, decoding) == expected
    with pytest.raises(InputError, match="reads questions, which the BLIP-2 of vllm does not support: convert"):
        convert(run, tmp_path / "served", "vllm")
    with pytest.raises(InputError, match="becomes an InstructBLIP, which has no place for a stage-1 model: leave out"):
        convert(run, tmp_path / "both", "transformers", stage1=run)


def test_training_starts_from_it(saved, ours, parts, tmp_path):
    """All of the Q-Former, with its text transformer and the projection, is where transformers' file has it."""
    from blip2.builder import build

    folder = str(saved["llama"][0])
    recipe = parts.recipe(
        tmp_path / "run", stage="generation", vision={"name": folder}, start_from=folder,
        qformer={
            "bert": None, "tokenizer": f"{folder}/qformer_tokenizer", "num_hidden_layers": 3,
            "use_qformer_text_input": True, "text_input": "prompt", "image_norm_eps": 1e-6,
        },
        language={"name": folder, "prompt": "{}"},
    )  # fmt: skip
    built = build(recipe.model, torch.device("cpu"))
    assert load_start_from(recipe, built, print) is False
    expected = ours["llama"].model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in built.model.state_dict().items())


# -- LAVIS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(parts):
    return {"qformer.tokenizer": parts.bert, "qformer.num_attention_heads": 1}


@pytest.mark.parametrize("flavor", FLAVORS)
def test_lavis_there_and_back(parts, bert, tmp_path, flavor):
    """The same answers through every format, and bit for bit back in LAVIS's."""
    file = tmp_path / "instruct.pth"
    torch.save({"model": lavis_state(f"instruct-{flavor}")}, file)
    named = {**bert, "language.name": getattr(parts, flavor)}
    here = blip2.load(file, device="cpu", overrides=named)
    kind = {"llama": "Vicuna", "t5": "T5"}[flavor]
    assert f"LAVIS's InstructBLIP with {kind}" in open_checkpoint(str(file), named).description
    assert here.config.qformer.text_input == "prompt" and here.config.text_normalization == "none"
    assert here.config.language.activation == ("gelu" if flavor == "t5" else None)
    assert here.config.language.bos_token == ("</s>" if flavor == "llama" else None)
    starts = here.tokenizer("a")["input_ids"][0] == here.tokenizer.eos_token_id
    assert starts == (flavor == "llama")
    decoding = Decoding(num_beams=2, max_new_tokens=6)
    expected = here.answer(IMAGES, QUESTIONS, decoding)
    assert len(set(expected)) > 1
    for step, (source, to) in {"a": (file, "blip2"), "b": ("a", "transformers"), "c.pth": ("b", "lavis")}.items():
        source, overrides = (file, named) if source is file else (tmp_path / source, None)
        convert(source, tmp_path / step, to, overrides)
        more = {**bert, "language.name": str(tmp_path / "b")} if step == "c.pth" else None
        assert blip2.load(tmp_path / step, device="cpu", overrides=more).answer(IMAGES, QUESTIONS, decoding) == expected
    assert same_files(file, tmp_path / "c.pth")


def test_lavis_notes(parts, bert, tmp_path, saved, caplog):
    """What LAVIS does otherwise is said: the token before Vicuna's texts, the text that the Q-Former reads."""
    torch.save({"model": lavis_state("instruct-llama")}, tmp_path / "instruct.pth")
    named = {**bert, "language.name": parts.llama}
    convert(tmp_path / "instruct.pth", tmp_path / "same.pth", "lavis", named)
    assert "begins each text" not in caplog.text
    convert(tmp_path / "instruct.pth", tmp_path / "a.pth", "lavis", {**named, "language.bos_token": None})
    assert "begins each text of Vicuna with </s>, but this model does not" in caplog.text
    with pytest.raises(InputError, match=r"an LLM of type opt; LAVIS's InstructBLIP supports Llama .Vicuna. and T5"):
        convert(tmp_path / "instruct.pth", tmp_path / "b.pth", "lavis", {**named, "language.name": parts.opt})


# -- what can be wrong -------------------------------------------------------------------------------------------------


def refuses(folder, match, **options):
    with pytest.raises(InputError, match=match) as error:
        blip2.load(folder, device="cpu", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_query_tokens": 8}, "its processor inserts 4 <image> tokens before a text, but the model has 8 queries"),
        (
            {"vision_config__model_type": "blip_2_vision_model"},
            "of type blip_2_vision_model, expected instructblip_vis",
        ),
        ({"qformer_config__model_type": "blip_2_qformer"}, "of type blip_2_qformer, expected instructblip_qformer"),
        ({"model_type": "instructblipvideo"}, "a transformers model of type instructblipvideo, not a BLIP-2"),
        ({"model_type": "blip-2"}, "of type instructblip_vision_model, expected blip_2_vision_model"),
        ({"text_config__num_hidden_layers": 3}, "are not those of a LlamaForCausalLM .9 are missing"),
        ({"qformer_config__num_hidden_layers": 2}, "does not fit the configuration .unknown: qformer.blocks.2"),
        ({"image_token_index": 57}, "<image> is token 258 of its tokenizer, but 57 in its config.json: set"),
        ({"prompt": "no question"}, r"use_qformer_text_input is true, which needs an LLM with questions: put \{\}"),
        (
            {"text_input": "all"},
            "config.json has text_input 'all', expected one of question, prompt: correct or remove",
        ),
        ({"qformer_config": [1]}, ".+"),
    ],
    ids=str,
)
def test_damaged_settings(copy, changes, match):
    folder = copy()
    edit(folder / "config.json", **changes)
    refuses(folder, match)


def test_damaged_files(copy):
    folder = copy()
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "adapter.weight": torch.zeros(2)}, folder / "model.safetensors")
    refuses(folder, "has 1 weight unknown in BLIP-2: adapter.weight; give a BLIP-2 checkpoint without other weights")
    words = "qformer.embeddings.word_embeddings.weight"
    save_file({key: each for key, each in weights.items() if key != words}, folder / "model.safetensors")
    refuses(folder, "does not fit the configuration .missing: qformer.word_embedding.weight")
    save_file(weights, folder / "model.safetensors")
    byte_tokenizer().save_pretrained(folder / "qformer_tokenizer")
    refuses(folder, "has tokens beyond the Q-Former's vocabulary of 58")
    shutil.rmtree(folder / "qformer_tokenizer")
    refuses(folder, "there is no folder .*qformer_tokenizer' to load the tokenizer from")


def test_the_first_token_of_a_text(parts):
    """Wrong values of language.bos_token are refused."""
    from blip2.builder import build

    for llm, token, match in (
        (parts.llama, "no token", "bos_token 'no token' has 8 tokens in the tokenizer of .*, expected exactly one"),
        (parts.t5, "</s>", "is an encoder-decoder, whose texts begin with no such token: leave out language.bos_token"),
    ):
        recipe = parts.recipe(parts.llama, stage="generation", language={"name": llm, "bos_token": token})
        with pytest.raises(InputError, match=match):
            build(recipe.model, torch.device("cpu"))


def test_the_text_of_a_q_former_that_reads_none(parts):
    with pytest.raises(InputError, match="use_qformer_text_input is false, so that the Q-Former reads no text: set"):
        parts.recipe(parts.llama, qformer={"text_input": "prompt"})
