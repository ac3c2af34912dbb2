"""Checkpoints of transformers: the same numbers, the same tokens, and one error for each thing that can be wrong."""

import json
import logging
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, Blip2Processor

import blip2
from blip2.checkpoint import open_checkpoint
from blip2.convert import convert
from blip2.data.collate import encode_prompts, encode_texts
from blip2.decoding.search import Decoding
from blip2.errors import InputError
from conftest import byte_tokenizer, draw
from fixtures.checkpoints import FLAVOURS, QUERIES, edit, processor, same, save_transformers, share_qformer

IMAGES = [draw("disc", "red", 0), draw("square", "blue", 7), draw("stripe", "green", 3)]
TEXTS = ["a red disc", "the square is blue here and there", "a"]
PROMPTS = {"none": ["", "", ""], "one": ["a photo of"] * 3, "several": ["a", "a photo of something", "what is it?"]}


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory):
    """Folders and models of transformers, by flavor; ``retrieval`` for that of stage 1."""
    root = tmp_path_factory.mktemp("transformers")
    flavors = {**{name: name for name in FLAVOURS}, "retrieval": None}
    return {name: (root / name, save_transformers(root / name, kind, parts.bert)) for name, kind in flavors.items()}


@pytest.fixture
def copy(saved, tmp_path):
    """A copy that may be damaged."""

    def make(name):
        shutil.copytree(saved[name][0], tmp_path / name)
        return tmp_path / name

    return make


def pixels(flavor, bert):
    return processor(flavor, bert)(images=IMAGES, return_tensors="pt")["pixel_values"]


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FLAVOURS, "retrieval"])
def test_it_says_what_it_found(saved, name, caplog):
    with caplog.at_level(logging.INFO, logger="blip2"):
        blip2.load(saved[name][0], device="cpu")
    assert "a ViT with 3 layers for 28 pixels, 4 queries" in caplog.text
    kind = "Blip2ForImageTextRetrieval" if name == "retrieval" else "Blip2ForConditionalGeneration"
    assert f"transformers' {kind}" in caplog.text
    assert (f"an LLM of type {name}" in caplog.text) == (name != "retrieval")


@torch.no_grad()
@pytest.mark.parametrize("name", FLAVOURS)
def test_logits(saved, parts, name):
    folder, theirs = saved[name]
    ours = blip2.load(folder, device="cpu")
    images = pixels(name, parts.bert)
    features = ours.encode_images(IMAGES)
    vision = theirs.vision_model(images)
    torch.testing.assert_close(ours.model.image_norm(features), vision.last_hidden_state, atol=1e-5, rtol=1e-5)

    ids, mask = encode_prompts(ours.tokenizer, PROMPTS["several"], "right")
    placeholders = torch.full((3, QUERIES), theirs.config.image_token_index)
    inputs = {"input_ids": torch.cat([placeholders, ids], 1), "pixel_values": images}
    inputs["attention_mask"] = torch.cat([torch.ones_like(placeholders), mask.long()], 1)
    if name == "t5":
        labels = torch.tensor([[5, 6, 256], [7, 256, -100], [8, 9, 10]])
        expected = theirs(**inputs, labels=labels).logits[labels != -100]
    else:
        labels = ids.masked_fill(~mask, -100)
        labels[:, 0] = -100
        expected = theirs(**inputs).logits[:, QUERIES - 1 : -1][labels != -100]
    states, targets = ours.model.language.hidden_states(ours.model.visual_prompt(features), ids, mask, labels)
    logits = ours.model.language.lm_head(states)
    assert torch.equal(targets, labels[labels != -100])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert logits.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("head", ["itc", "itm"])
def test_scores(saved, parts, head):
    folder, theirs = saved["retrieval"]
    ours = blip2.load(folder, device="cpu")
    words = processor(None, parts.bert)(images=IMAGES, text=TEXTS, padding=True, return_tensors="pt")
    # The class strips the placeholders from the ids, and for ITM expects them in the mask.
    out = theirs(**words, use_image_text_matching_head=head == "itm").logits_per_image
    if head == "itc":
        torch.testing.assert_close(ours.similarity(IMAGES, TEXTS), out, atol=1e-5, rtol=0)
    else:
        ids, mask, _ = encode_texts(ours.tokenizer, TEXTS, 40)
        logits = ours.model.match(ours.model.build_image_memory(ours.encode_images(IMAGES)), ids, mask)
        torch.testing.assert_close(logits, out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.match(IMAGES, TEXTS).diagonal(), out.softmax(1)[:, 1], atol=1e-5, rtol=0)
    assert out.std() > 0.01


@pytest.mark.parametrize("beams", [1, 5])
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("name", FLAVOURS)
def test_generated_tokens(saved, parts, name, prompts, beams):
    folder, theirs = saved[name]
    ours = blip2.load(folder, device="cpu")
    ours.batch_size = 3
    given = {"text": PROMPTS[prompts], "padding": True} if prompts != "none" else {}
    inputs = processor(name, parts.bert)(images=IMAGES, return_tensors="pt", **given)
    out = theirs.generate(**inputs, num_beams=beams, max_new_tokens=8, min_new_tokens=1)
    start = inputs["input_ids"].shape[1] if prompts != "none" else QUERIES + 1
    new = out[:, 1:] if name == "t5" else out[:, start:]
    expected = [text.strip() for text in ours.tokenizer.batch_decode(new, skip_special_tokens=True)]
    decoding = Decoding(num_beams=beams, max_new_tokens=8)
    assert ours.generate(IMAGES, PROMPTS[prompts], decoding) == expected
    alone = [ours.generate(one, [text], decoding)[0] for one, text in zip(IMAGES, PROMPTS[prompts], strict=True)]
    assert alone == expected
    assert len(set(expected)) > 1


def test_a_tokenizer_that_begins_with_nothing(parts, tmp_path):
    """Without a text transformers begins with the configuration's BOS all the same."""
    theirs = save_transformers(tmp_path / "llama", "llama", parts.bert)
    plain = byte_tokenizer()
    plain.add_special_tokens({"additional_special_tokens": ["<image>"]})
    plain.save_pretrained(tmp_path / "llama")
    ours = blip2.load(tmp_path / "llama", device="cpu")
    images = processor("llama", parts.bert)(images=IMAGES, return_tensors="pt")
    out = theirs.generate(**images, num_beams=5, max_new_tokens=8, min_new_tokens=1)[:, QUERIES + 1 :]
    expected = [text.strip() for text in plain.batch_decode(out, skip_special_tokens=True)]
    assert ours.caption(IMAGES, decoding=Decoding(max_new_tokens=8)) == expected


def test_the_llm_s_own_files_are_used_with_the_activation_of_the_checkpoint(parts, tmp_path):
    """Those of FlanT5 say gelu_new, the checkpoints of BLIP-2 were trained with gelu."""
    theirs = save_transformers(tmp_path / "there", "t5", parts.bert)
    own: Any = theirs.language_model
    own.config.dense_act_fn = "gelu_new"
    own.save_pretrained(tmp_path / "llm")
    byte_tokenizer(ends=True).save_pretrained(tmp_path / "llm")
    ours = blip2.load(tmp_path / "there", device="cpu", overrides={"language.name": str(tmp_path / "llm")})
    assert ours.config.language.activation == "gelu"
    assert ours.model.language.network.config.dense_act_fn == "gelu"


def test_several_ends(parts, tmp_path):
    """As chat models have them: the first of them that is written ends the text."""
    save_transformers(tmp_path / "llama", "llama", parts.bert)
    ours = blip2.load(tmp_path / "llama", device="cpu")
    decoding = Decoding(num_beams=1, max_new_tokens=8)
    whole = ours.generate(IMAGES, [""] * 3, decoding)
    ids, mask = encode_prompts(ours.tokenizer, [""] * 3, "left")
    prompt = ours.model.visual_prompt(ours.encode_images(IMAGES))
    also = int(ours.model.language.generate(prompt, ids, mask, decoding, ours.eos_token_id)[0, 2])
    edit(tmp_path / "llama" / "config.json", text_config__eos_token_id=[256, also])
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "llama")
    images = processor("llama", parts.bert)(images=IMAGES, return_tensors="pt")
    out = theirs.generate(**images, max_new_tokens=8, min_new_tokens=1)[:, QUERIES + 1 :]
    expected = [text.strip() for text in ours.tokenizer.batch_decode(out, skip_special_tokens=True)]
    assert blip2.load(tmp_path / "llama", device="cpu").generate(IMAGES, [""] * 3, decoding) == expected
    assert expected != whole


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FLAVOURS, "retrieval"])
def test_there_and_back(saved, tmp_path, name):
    """Through this project's own format."""
    folder = saved[name][0]
    convert(folder, tmp_path / "ours", "blip2")
    convert(tmp_path / "ours", tmp_path / "back", "transformers")
    assert same(folder, tmp_path / "back")
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "back"))
    assert before == after
    processors = [Blip2Processor.from_pretrained(f) for f in (folder, tmp_path / "back")]
    inputs = [p(images=IMAGES, text=TEXTS, padding=True, return_tensors="pt") for p in processors]
    assert all(torch.equal(inputs[0][key], inputs[1][key]) for key in ("pixel_values", "input_ids", "attention_mask"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["opt", "t5", "retrieval"])
def test_shards_and_half_precision(parts, tmp_path, name, dtype):
    flavor = None if name == "retrieval" else name
    save_transformers(tmp_path / "there", flavor, parts.bert, dtype, shard="40KB")
    assert len(list((tmp_path / "there").glob("model-*.safetensors"))) > 2
    convert(tmp_path / "there", tmp_path / "back", "transformers")
    assert same(tmp_path / "there", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == str(dtype).split(".")[1]


def test_text_normalization_goes_with_the_weights(saved, runs, tmp_path, copy):
    """Published checkpoints were trained with LAVIS's; what this project trained without it is loaded without."""
    assert open_checkpoint(str(saved["opt"][0])).config.text_normalization == "lavis"
    convert(saved["opt"][0], tmp_path / "ours", "blip2")
    assert open_checkpoint(str(tmp_path / "ours")).config.text_normalization == "lavis"
    assert open_checkpoint(str(runs["llama"])).config.text_normalization == "none"
    convert(runs["stage1"], tmp_path / "plain", "transformers")
    assert open_checkpoint(str(tmp_path / "plain")).config.text_normalization == "none"
    changed = open_checkpoint(str(tmp_path / "plain"), {"text_normalization": "lavis"})
    assert changed.config.text_normalization == "lavis"
    edit(copy("t5") / "config.json", text_normalization="upper")
    refuses(tmp_path / "t5", "config.json has text_normalization 'upper', expected one of none, lavis: correct")


@pytest.mark.parametrize("name", [*FLAVOURS, "retrieval"])
def test_transformers_loads_what_is_written(saved, tmp_path, name):
    """Nothing missing, nothing left over, nothing of another shape; the same outputs."""
    convert(saved[name][0], tmp_path / "out", "transformers")
    kind = Blip2ForImageTextRetrieval if name == "retrieval" else Blip2ForConditionalGeneration
    model, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    expected = saved[name][1].state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


def test_a_run_of_ours_for_transformers(runs, parts, tmp_path):
    """A ViT of transformers, a Llama, our own training: generation agrees with transformers' class."""
    convert(runs["llama"], tmp_path / "out", "transformers")
    model, info = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    processor = Blip2Processor.from_pretrained(tmp_path / "out")
    ours = blip2.load(runs["llama"], device="cpu")
    inputs = processor(images=IMAGES, text=PROMPTS["several"], padding=True, return_tensors="pt")
    assert processor.tokenizer.padding_side == "left"
    out = model.eval().generate(**inputs, num_beams=3, max_new_tokens=8, min_new_tokens=1)
    new = out[:, inputs["input_ids"].shape[1] :]
    expected = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    assert ours.generate(IMAGES, PROMPTS["several"], Decoding(num_beams=3, max_new_tokens=8)) == expected
    again = blip2.load(tmp_path / "out", device="cpu")
    assert again.generate(IMAGES, PROMPTS["several"], Decoding(num_beams=3, max_new_tokens=8)) == expected


@torch.no_grad()
def test_a_stage_1_of_ours_for_transformers(runs, tmp_path):
    """All that transformers has no place for is there too, so that it comes back whole."""
    convert(runs["stage1"], tmp_path / "out", "transformers")
    _, info = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert {"temp", "cls.predictions.bias"} <= set(info["unexpected_keys"])
    ours, again = blip2.load(runs["stage1"], device="cpu"), blip2.load(tmp_path / "out", device="cpu")
    torch.testing.assert_close(again.similarity(IMAGES, TEXTS), ours.similarity(IMAGES, TEXTS), atol=1e-4, rtol=0)
    here, there = ours.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(here[k], there[k]) for k in here if not k.startswith("vision."))


def test_both_classes_load_one_folder(saved, parts, tmp_path):
    """A stage 2 whose Q-Former is that of a stage 1."""
    first, second = saved["retrieval"][1], tmp_path / "second"
    model = save_transformers(second, "opt", parts.bert)
    share_qformer(model, first, second)
    convert(second, tmp_path / "both", "transformers", stage1=saved["retrieval"][0])
    for kind, twin in ((Blip2ForConditionalGeneration, model), (Blip2ForImageTextRetrieval, first)):
        loaded, info = kind.from_pretrained(tmp_path / "both", output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        expected = twin.state_dict()
        assert all(torch.equal(t, expected[k]) for k, t in loaded.state_dict().items() if k in expected)
    writer = blip2.load(tmp_path / "both", device="cpu")
    judge = blip2.load(tmp_path / "both", device="cpu", stage="representation")
    assert writer.caption(IMAGES) == blip2.load(second, device="cpu").caption(IMAGES)
    expected = blip2.load(saved["retrieval"][0], device="cpu").match(IMAGES, TEXTS)
    assert torch.equal(judge.match(IMAGES, TEXTS), expected)
    convert(tmp_path / "both", tmp_path / "again", "transformers")
    assert same(tmp_path / "both", tmp_path / "again")


def test_two_q_formers_do_not_go_into_one_folder(saved, tmp_path):
    with pytest.raises(
        InputError, match=r"have different Q-Formers \(\d+ weights differ, such as .*convert each to its"
    ):
        convert(saved["opt"][0], tmp_path / "out", "transformers", stage1=saved["retrieval"][0])
    assert not list(tmp_path.iterdir())


def test_train_on_from_it(saved, parts, tmp_path):
    """Stage 1 goes on from transformers' file, which transformers itself cannot train."""
    from blip2.training.trainer import train

    folder = str(saved["retrieval"][0])
    sizes = {"num_hidden_layers": 3, "bert": None, "tokenizer": parts.bert}
    recipe = parts.recipe(
        tmp_path / "run",
        vision={"name": folder},
        qformer=sizes,
        start_from=folder,
        training={"max_steps": 1, "device": "cpu"},
    )
    last = train(recipe)
    after = blip2.load(last, device="cpu").model.state_dict()
    before = blip2.load(folder, device="cpu").model.state_dict()
    moved = [k for k in before if not torch.allclose(before[k], after[k], atol=0.01)]
    assert not [k for k in moved if not k.startswith(("language_head", "temperature"))]
    with pytest.raises(
        InputError,
        match=r"trained with qformer\.num_attention_heads 4, but the recipe has 8: set qformer\.num_attention_heads to",
    ):
        train(
            parts.recipe(
                tmp_path / "other",
                vision={"name": folder},
                qformer={**sizes, "num_attention_heads": 8},
                start_from=folder,
            )
        )


# -- image size --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("size", [28, 42, 63])
def test_other_image_sizes(saved, tmp_path, size):
    """Position embeddings are interpolated once, as transformers does it at every call."""
    folder, theirs = saved["retrieval"]
    changes = {"vision.image_size": size}
    ours = blip2.load(folder, device="cpu", overrides=changes)
    features = ours.model.image_norm(ours.encode_images(IMAGES))
    images = torch.stack([torch.randn(3, size, size)] * 2)
    expected = theirs.vision_model(images, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(ours.model.image_norm(ours.model.vision.encode(images)), expected, atol=1e-5, rtol=1e-5)
    assert features.shape[1] == (size // 7) ** 2 + 1
    convert(folder, tmp_path / "resized", "transformers", changes)
    again = blip2.load(tmp_path / "resized", device="cpu")
    assert again.model.vision.preprocessing.image_size == size
    torch.testing.assert_close(again.encode_images(IMAGES), ours.encode_images(IMAGES))


# -- what can be wrong -------------------------------------------------------------------------------------------------


def refuses(folder, match, **options):
    with pytest.raises(InputError, match=match) as error:
        blip2.load(folder, device="cpu", **options)
    assert "\n" not in str(error.value)


def test_a_truncated_file(copy):
    folder = copy("opt")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refuses(folder, r"model.safetensors cannot be read \(.*\): check its permissions, or copy or download it again")
    file.write_bytes(b"")
    refuses(folder, "model.safetensors cannot be read")


def test_a_missing_shard(parts, tmp_path):
    save_transformers(tmp_path / "shards", "opt", parts.bert, shard="40KB")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    shards[1].unlink()
    refuses(tmp_path / "shards", rf"lacks 1 of its {len(shards)} shards \({shards[1].name}\)")


def test_no_weights(copy):
    folder = copy("opt")
    (folder / "model.safetensors").unlink()
    refuses(folder, r"contains no weights \(model.safetensors or pytorch_model.bin, or shards")


def test_another_architecture(copy, parts):
    refuses(parts.llama, "is a transformers model of type llama, not a BLIP-2")
    folder = copy("opt")
    edit(folder / "config.json", model_type="instructblipvideo")
    refuses(folder, "is a transformers model of type instructblipvideo, not a BLIP-2")


def test_another_image_encoder_in_the_configuration(copy):
    """transformers takes it for a Blip2VisionModel in silence."""
    folder = copy("opt")
    edit(folder / "config.json", vision_config__model_type="siglip_vision_model")
    refuses(folder, "the vision_config in its config.json is of type siglip_vision_model, expected blip_2_vision_model")


def test_another_llm_in_the_configuration(copy):
    folder = copy("opt")
    edit(folder / "config.json", text_config__num_hidden_layers=3)
    refuses(folder, "the weights in .* are not those of a OPTForCausalLM .16 are missing")
    edit(folder / "config.json", text_config__num_hidden_layers=1)
    refuses(folder, "has 16 weights that its language model, a OPTForCausalLM, does not have, such as")
    edit(folder / "config.json", text_config__num_hidden_layers=2, text_config__ffn_dim=64)
    refuses(folder, r"of the language model has the shape \(48,?.*\), but its config.json says \(64,?.*\): copy or")


def test_another_number_of_queries(copy):
    folder = copy("retrieval")
    edit(folder / "config.json", num_query_tokens=8)
    edit(folder / "processor_config.json", num_query_tokens=8)
    refuses(folder, "its config.json has num_query_tokens 8, but its weights have 4")


def test_another_number_of_heads(copy):
    folder = copy("retrieval")
    edit(folder / "config.json", qformer_config__num_attention_heads=5)
    refuses(folder, "qformer.hidden_size 32 is not a multiple of qformer.num_attention_heads 5")


def test_another_depth_of_the_q_former(copy):
    folder = copy("opt")
    edit(folder / "config.json", qformer_config__num_hidden_layers=2)
    refuses(folder, "does not fit the configuration .unknown: qformer.blocks.2")


@pytest.mark.parametrize(
    "left_out", ["query_tokens", "language_model.", "vision_model.", "vision_model.post", "qformer."]
)
def test_parts_that_are_not_there(copy, left_out):
    folder = copy("opt")
    weights = load_file(folder / "model.safetensors")
    save_file({k: t for k, t in weights.items() if not k.startswith(left_out)}, folder / "model.safetensors")
    refuses(folder, r"has no |is not a complete BLIP-2|does not fit|holds no weights of its language model|missing")


@pytest.mark.parametrize(
    "changes",
    [{"num_query_tokens": "4"}, {"qformer_config": [1]}, {"text_config": None}, {"vision_config": None}],
)
def test_odd_settings(copy, changes):
    folder = copy("opt")
    edit(folder / "config.json", **changes)
    refuses(folder, ".+")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
@pytest.mark.parametrize(
    "name", ["qformer.encoder.layer.0.attention.attention.query", "vision_model.encoder.layers.0.mlp.fc1"]
)
def test_weights_that_are_no_floating_point_numbers(copy, name, dtype):
    folder = copy("opt")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, f"{name}.weight": weights[f"{name}.weight"].to(dtype)}, folder / "model.safetensors")
    refuses(folder, f"holds values of type {dtype}, expected floating-point numbers".replace("torch.", ""))


def test_embeddings_of_nan(copy):
    folder = copy("opt")
    weights = load_file(folder / "model.safetensors")
    weights["language_model.model.decoder.embed_tokens.weight"][3, 4] = torch.nan
    save_file(weights, folder / "model.safetensors")
    refuses(folder, "the weight of the token embeddings in .* contains NaN")


def test_an_image_processor_for_another_size(copy, tmp_path):
    """The size stays that of the processor, in which the model is used here, in every format."""
    folder = copy("opt")
    edit(folder / "processor_config.json", image_processor__size={"height": 56, "width": 56})
    ours = blip2.load(folder, device="cpu")
    convert(folder, tmp_path / "out", "transformers")
    again = blip2.load(tmp_path / "out", device="cpu")
    assert again.model.vision.preprocessing == ours.model.vision.preprocessing
    assert torch.equal(again.encode_images(IMAGES), ours.encode_images(IMAGES))


def test_a_placeholder_in_a_text_for_the_q_former(saved):
    pipeline = blip2.load(saved["retrieval"][0], device="cpu")
    for call in (pipeline.match, pipeline.similarity, pipeline.embed):
        with pytest.raises(InputError, match="a text contains <image>, for which the Q-Former has no embedding"):
            call(IMAGES[0], ["a disc", "an <image>"])


@pytest.mark.parametrize("key", ["do_normalize", "do_resize", "do_rescale"])
def test_images_prepared_in_another_way(copy, key):
    folder = copy("opt")
    edit(folder / "processor_config.json", **{f"image_processor__{key}": False})
    refuses(folder, f"its image processor has {key} False, expected True, as in BLIP-2's training")


def test_weights_of_no_part(copy):
    folder = copy("opt")
    weights = load_file(folder / "model.safetensors")
    weights["adapter.down.weight"] = weights["adapter.up.weight"] = torch.zeros(2)
    save_file({k: t.clone() for k, t in weights.items()}, folder / "model.safetensors")
    refuses(folder, r"has 2 weights unknown in BLIP-2: adapter.down.weight, adapter.up.weight; give a BLIP-2")


def test_a_tokenizer_without_the_placeholder(copy):
    folder = copy("opt")
    byte_tokenizer(True).save_pretrained(folder)
    refuses(folder, "its tokenizer has no <image>, which is token 258 in its config.json: copy the tokenizer")


def test_another_placeholder(copy):
    folder = copy("opt")
    edit(folder / "config.json", image_token_index=57)
    refuses(folder, "<image> is token 258 of its tokenizer, but 57 in its config.json: set image_token_index to 258")


def test_too_few_placeholders(copy):
    """transformers gives the queries of one image to another text, in silence."""
    folder = copy("opt")
    edit(folder / "processor_config.json", num_query_tokens=2)
    refuses(
        folder,
        "its processor inserts 2 <image> tokens before a text, but the model has 4 queries: set num_query_tokens to 4",
    )


def test_a_tokenizer_of_another_model(copy):
    folder = copy("retrieval")
    byte_tokenizer().save_pretrained(folder)
    refuses(folder, "has tokens beyond the Q-Former's vocabulary of 58")


def test_placeholders_in_a_prompt(saved):
    with pytest.raises(InputError, match=r"the prompt '<image>a' contains <image>: remove <image>, because the image"):
        blip2.load(saved["opt"][0], device="cpu").caption(IMAGES[0], "<image>a")


def test_two_formats_in_one_folder(copy, runs):
    folder = copy("opt")
    shutil.copytree(runs["llama"] / "checkpoints", folder / "checkpoints")
    refuses(folder, r"contains checkpoints of two formats, blip2 and transformers")


def test_a_damaged_configuration(copy):
    folder = copy("opt")
    (folder / "config.json").write_text("{")
    refuses(folder, r"config.json is damaged or not JSON \(.*\): copy or download it again")


def test_a_stage_that_is_not_there(saved):
    refuses(
        saved["opt"][0], "contains only stage generation: load a model of stage representation", stage="representation"
    )
    refuses(saved["retrieval"][0], "contains only stage representation", stage="generation")


def test_the_dec_token(saved):
    """The last of the vocabulary, as LAVIS adds it to BERT's."""
    ours = blip2.load(saved["retrieval"][0], device="cpu")
    assert AutoTokenizer.from_pretrained(saved["retrieval"][0]).convert_tokens_to_ids("[DEC]") == 57
    assert ours.model.qformer.decoder_start_token_id == 57
