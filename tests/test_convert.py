"""Conversions of this project's own runs, and what is left when one fails."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Blip2Config,
    Blip2Processor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import blip2
from blip2.checkpoint import open_checkpoint, read_recipe
from blip2.convert import convert
from blip2.decoding.options import Decoding
from blip2.errors import InputError
from blip2.interop.weights import open_folder
from blip2.training.trainer import train
from conftest import byte_tokenizer, draw
from fixtures.checkpoints import lavis_state, save_transformers, share_qformer
from fixtures.tiny import randomize, save_writer

IMAGES = [draw("disc", "red", 0), draw("square", "blue", 7)]
GREEDY = Decoding(num_beams=1, max_new_tokens=8)
SHORT = {"max_steps": 1, "device": "cpu", "precision": "fp32"}
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    """A stage 2 of which everything was trained."""
    run = tmp_path_factory.mktemp("whole") / "run"
    optimizer = {"learning_rate": {"*": 1e-2}}
    train(parts.recipe(run, stage="generation", language={"name": parts.opt}, optimizer=optimizer, training=SHORT))
    return run


@torch.no_grad()
@pytest.mark.parametrize("to", ["transformers", "vllm", "blip2"])
def test_trained_encoder_and_llm_go_along(whole, parts, tmp_path, to):
    convert(whole, tmp_path / "out", to)
    ours, again = blip2.load(whole, device="cpu"), blip2.load(tmp_path / "out", device="cpu")
    torch.testing.assert_close(again.encode_images(IMAGES), ours.encode_images(IMAGES), atol=1e-5, rtol=1e-5)
    moved = ours.encode_images(IMAGES) - blip2.load(whole, overrides={"vision.name": parts.vision}).encode_images(
        IMAGES
    )
    assert torch.equal(moved, torch.zeros_like(moved))  # the checkpoint's weights, not those of the folder it names
    embeddings = [p.model.language.network.get_input_embeddings().weight[:258] for p in (ours, again)]
    assert torch.equal(*embeddings)
    assert again.caption(IMAGES) == ours.caption(IMAGES)


def test_a_conversion_invents_no_recipe(parts, runs, tmp_path):
    """It writes the model's config, and the recipe only of a model that was trained here."""
    save_transformers(tmp_path / "theirs", "opt", parts.bert)
    convert(tmp_path / "theirs", tmp_path / "ours", "blip2")
    written = {path.name for path in (tmp_path / "ours").iterdir()}
    assert written == {"README.md", "model.safetensors", "model.yaml"}
    values = yaml.safe_load((tmp_path / "ours" / "model.yaml").read_text())
    assert set(values) == {"stage", "vision", "qformer", "language", "text_normalization", "max_length", "calibration"}
    assert read_recipe(open_checkpoint(str(tmp_path / "ours"))) is None
    convert(runs["llama"], tmp_path / "copy", "blip2")
    run, copy = (open_checkpoint(str(path)) for path in (runs["llama"], tmp_path / "copy"))
    assert read_recipe(copy) == read_recipe(run) is not None
    assert copy.config == run.config == read_recipe(run).model


def test_an_embedding_for_the_placeholder(whole, tmp_path):
    """It has one more row than before, which no text makes."""
    convert(whole, tmp_path / "out", "transformers")
    network = blip2.load(tmp_path / "out", device="cpu").model.language.network
    rows = network.get_input_embeddings().weight
    assert len(rows) == network.config.vocab_size == 259
    torch.testing.assert_close(rows[258], rows[:258].mean(dim=0))
    logits = network(torch.arange(80)[None]).logits
    assert (logits[..., 258] < logits.max(dim=-1).values).all()


def test_a_tokenizer_that_appends_the_end_token(parts, tmp_path):
    """Training and generation leave the token out; transformers' processor would put it after each prompt."""
    shutil.copytree(parts.llama, tmp_path / "llm")
    byte_tokenizer(ends=True).save_pretrained(tmp_path / "llm")
    run, prompt = save_writer(parts, tmp_path / "run", str(tmp_path / "llm")), "a photo of"
    convert(run, tmp_path / "out", "transformers")
    processor = Blip2Processor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer(prompt)["input_ids"] == list(byte_tokenizer()(prompt)["input_ids"])
    ours, again = blip2.load(run, device="cpu"), blip2.load(tmp_path / "out", device="cpu")
    assert ours.model.language.generate_fn is again.model.language.generate_fn
    for text in ("", prompt):
        assert torch.equal(ours._tokenize_prompts([text], GREEDY)[0], again._tokenize_prompts([text], GREEDY)[0])


@pytest.mark.parametrize("gap", [50, 5])
def test_a_tokenizer_without_some_ids(parts, tmp_path, gap):
    """The tokenizers library gives <image> the number of tokens as its id, which may be that of another token."""
    state = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    state["model"]["vocab"] = {token: i if i < 200 else i + gap for token, i in state["model"]["vocab"].items()}
    for token in state["added_tokens"]:
        token["id"] += gap
    shutil.copytree(parts.llama, tmp_path / "llm")
    core = Tokenizer.from_str(json.dumps(state))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>").save_pretrained(
        tmp_path / "llm"
    )
    config = LlamaConfig.from_pretrained(tmp_path / "llm", vocab_size=258 + gap)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llm")
    run = save_writer(parts, tmp_path / "run", str(tmp_path / "llm"))
    used = {i + gap * (i >= 200) for i in range(258)}
    if 258 in used:
        with pytest.raises(InputError, match="leaves out some ids, so that <image> gets the id of another token"):
            convert(run, tmp_path / "out", "transformers")
        return
    convert(run, tmp_path / "out", "transformers")
    config = Blip2Config.from_pretrained(tmp_path / "out")
    assert config.image_token_index not in used
    assert config.image_token_index < config.text_config.vocab_size


@pytest.mark.parametrize("to", ["transformers", "vllm"])
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=32, patch_size=8)),
            "CLIP.*norm before its",
        ),
        (lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=32, patch_size=8)), "Siglip.*no CLS token"),
    ],
)
def test_other_encoders_are_refused_before_anything_is_written(parts, tmp_path, model, reason, to):
    randomize(model()).save_pretrained(tmp_path / "encoder")
    run = tmp_path / "run"
    vision = {"name": str(tmp_path / "encoder")}
    train(parts.recipe(run, stage="generation", vision=vision, language={"name": parts.opt}, training=SHORT))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=reason) as error:
        convert(run, tmp_path / "out", to)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before
    convert(run, tmp_path / "ours", "blip2")  # which holds anything
    assert blip2.load(tmp_path / "ours", device="cpu").caption(IMAGES) == blip2.load(run, "cpu").caption(IMAGES)


def test_a_conversion_is_found_from_anywhere(parts, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    torch.save({"model": lavis_state("opt")}, "blip2.pth")
    Path("opt").symlink_to(parts.opt)
    convert("blip2.pth", "ours", "blip2", {"language.name": "opt"})
    monkeypatch.chdir(tmp_path)
    assert len(blip2.load("here/ours", device="cpu").caption(IMAGES)) == 2


def test_nothing_is_left_of_a_conversion_that_fails(parts, tmp_path, small_disk):
    save_transformers(tmp_path / "there", "opt", parts.bert)
    disk = small_disk(100)
    with pytest.raises(InputError, match=r"cannot be written \(.*\): free disk space .* or give another path"):
        convert(tmp_path / "there", disk / "out", "transformers")
    assert not list(disk.iterdir())


def test_nothing_else_is_touched(parts, tmp_path):
    save_transformers(tmp_path / "there", "opt", parts.bert)
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "mine").write_bytes(b"precious")
    convert(tmp_path / "there", tmp_path / "out", "transformers")
    assert (tmp_path / "out.tmp" / "mine").read_bytes() == b"precious"
    assert {path.name for path in tmp_path.iterdir()} == {"there", "out", "out.tmp"}


@pytest.mark.parametrize("target", ["there/config.json/out", "o" * 300])
def test_places_that_cannot_be_written(parts, tmp_path, target):
    save_transformers(tmp_path / "there", "opt", parts.bert)
    with pytest.raises(InputError, match=r"cannot be written|already exists"):
        convert(tmp_path / "there", tmp_path / target, "blip2")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"to": "onnx"}, "there is no format 'onnx': choose one of transformers, vllm, lavis, blip2"),
        ({"to": "vllm", "stage1": "STAGE1"}, "included in the format transformers only, not in vllm: leave out stage1"),
        (
            {"to": "transformers", "stage1": "OTHER"},
            "contains only stage generation: load a model of stage repr",
        ),
        (
            {"to": "blip2", "overrides": {"vision.nme": "x"}},
            "vision.nme 'x': there is no key vision.nme",
        ),
        (
            {"to": "transformers", "overrides": {"vision.position_encoding": "sine2d"}},
            "was trained with vision.position_encoding sine2d, which the BLIP-2 of transformers does not add",
        ),
    ],
)
def test_options_that_do_not_go(whole, runs, tmp_path, options, match):
    if "stage1" in options:
        options = {**options, "stage1": runs["stage1" if options["stage1"] == "STAGE1" else "t5"]}
    with pytest.raises(InputError, match=match):
        convert(whole, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["transformers", "blip2"])
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"intermediate_size": 64}, r"qformer.* is \(.*\), but the configuration expects \(.*\): correct the sizes"),
        ({"num_hidden_layers": 2}, r"qformer.blocks.2.* is \(.*\), but the configuration expects no such weight"),
    ],
)
def test_sizes_that_are_not_those_of_the_weights(parts, tmp_path, to, changes, match):
    save_transformers(tmp_path / "there", "opt", parts.bert)
    settings = json.loads((tmp_path / "there" / "config.json").read_text())
    settings["qformer_config"] |= changes
    (tmp_path / "there" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=match):
        convert(tmp_path / "there", tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["num_attention_heads", "num_query_tokens", "layer_norm_eps"])
def test_what_the_weights_are_for_cannot_be_changed(whole, parts, tmp_path, key):
    save_transformers(tmp_path / "there", "opt", parts.bert)
    for source in (whole, tmp_path / "there"):
        with pytest.raises(InputError, match=rf"qformer.{key} is 1.*, but .* was trained with .*: leave out"):
            blip2.load(source, "cpu", overrides={f"qformer.{key}": 1})


def test_a_trained_llm_whose_old_file_holds_its_matrix_twice(parts, tmp_path):
    """The second is not left behind as it was."""
    model = save_transformers(tmp_path / "there", "opt", parts.bert)
    weights = {k: t.clone() for k, t in model.state_dict().items()}
    assert "language_model.lm_head.weight" in weights
    save_file(weights, tmp_path / "there" / "model.safetensors")
    name = str(tmp_path / "there")
    recipe = parts.recipe(
        tmp_path / "run", stage="generation", vision={"name": name}, language={"name": name, "stop_string": "\n"},
        optimizer={"learning_rate": {"vision.*": "frozen", "*": 1e-2}, "warmup_steps": 0}, training=SHORT,
    )  # fmt: skip
    train(recipe)
    expected = blip2.load(tmp_path / "run", "cpu").caption(IMAGES)
    for to in ("transformers", "vllm"):
        convert(tmp_path / "run", tmp_path / to, to)
        assert blip2.load(tmp_path / to, "cpu").caption(IMAGES) == expected
        names = open_folder(tmp_path / to)
        assert "language_model.lm_head.weight" not in names


@pytest.mark.parametrize(
    ("name", "prompts"), [("llama", ("a photo of", "Q: {} A:")), ("t5", ("Question: {} Short answer:", None))]
)
def test_prompts_stay_those_of_the_training(runs, tmp_path, name, prompts):
    """transformers has no place for them, but this library gives the same answers with its folder."""
    run = shutil.copytree(runs[name], tmp_path / "run")
    for file in run.rglob("*.yaml"):
        values = yaml.safe_load(file.read_text())
        values["language"] |= dict(zip(("prompt", "question_prompt"), prompts, strict=True))
        file.write_text(yaml.safe_dump(values))
    ours = blip2.load(run, "cpu")
    again = blip2.load(convert(run, tmp_path / "out", "transformers"), "cpu")
    assert (again.config.language.prompt, again.config.language.question_prompt) == prompts
    assert again.answer(IMAGES, "what?") == ours.answer(IMAGES, "what?")
    if "{}" not in prompts[0]:
        assert again.caption(IMAGES) == ours.caption(IMAGES)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "{}" not in card.split("## Training")[0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for key, value in (("prompt", 5), ("question_prompt", ["{}"]), ("max_caption_length", "32")):
        (tmp_path / "out" / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(InputError, match=rf"its config\.json has {key} .*, expected a value of type"):
            open_checkpoint(str(tmp_path / "out"))


def test_the_length_of_texts_stays_that_of_the_training(runs, tmp_path):
    run = shutil.copytree(runs["stage1"], tmp_path / "run")
    for file in run.rglob("*.yaml"):
        values = yaml.safe_load(file.read_text())
        values.get("data", values)["max_length"] = 4
        file.write_text(yaml.safe_dump(values))
    text = "a red disc on a white ground"
    expected = blip2.load(run, "cpu").embed_texts(text)
    assert not torch.allclose(expected, blip2.load(runs["stage1"], "cpu").embed_texts(text))  # it is truncated
    again = blip2.load(convert(run, tmp_path / "out", "transformers"), "cpu")
    assert again.config.max_length == 4
    torch.testing.assert_close(again.embed_texts(text), expected)


def test_a_stage_1_of_transformers_stays_usable(parts, tmp_path):
    """What its layout dropped begins anew, and is said to."""
    save_transformers(tmp_path / "there", None, parts.bert, width=64, heads=1, vision=176)
    expected = blip2.load(tmp_path / "there", "cpu").match(IMAGES, ["a", "b c"])
    for to, name in (("blip2", "ours"), ("lavis", "its.pth")):
        convert(tmp_path / "there", tmp_path / name, to)
        again = blip2.load(tmp_path / name, "cpu", overrides={"qformer.tokenizer": parts.bert})
        torch.testing.assert_close(again.match(IMAGES, ["a", "b c"]), expected, atol=2e-5, rtol=0)


def test_a_folder_of_both_stages_keeps_both(parts, tmp_path):
    judge = save_transformers(tmp_path / "first", None, parts.bert)
    writer = save_transformers(tmp_path / "second", "opt", parts.bert)
    share_qformer(writer, judge, tmp_path / "second")
    convert(tmp_path / "second", tmp_path / "both", "transformers", stage1=tmp_path / "first")
    convert(tmp_path / "both", tmp_path / "ours", "blip2")
    texts = [blip2.load(tmp_path / name, "cpu").caption(IMAGES) for name in ("ours", "second")]
    assert texts[0] == texts[1]
    scores = [blip2.load(tmp_path / n, "cpu", stage="representation").match(IMAGES, ["a"]) for n in ("ours", "first")]
    assert torch.equal(*scores)


def test_a_folder_has_one_normalization_of_texts(parts, tmp_path):
    judge = save_transformers(tmp_path / "first", None, parts.bert)
    writer = save_transformers(tmp_path / "second", "opt", parts.bert)
    share_qformer(writer, judge, tmp_path / "second")
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    (tmp_path / "second" / "config.json").write_text(json.dumps({**config, "text_normalization": "none"}))
    with pytest.raises(InputError, match=r"text_normalization none and .* lavis, but a folder has only one"):
        convert(tmp_path / "second", tmp_path / "both", "transformers", stage1=tmp_path / "first")


def test_other_frozen_parts_take_the_place_of_those_inside(parts, tmp_path):
    save_transformers(tmp_path / "there", "opt", parts.bert)
    save_transformers(tmp_path / "other", "opt", parts.bert, vision=32)
    model = save_transformers(tmp_path / "same", "llama", parts.bert)
    with pytest.raises(InputError, match="of width 24, but the config names an image encoder of width 32"):
        convert(tmp_path / "there", tmp_path / "out", "transformers", {"vision.name": str(tmp_path / "other")})
    with pytest.raises(InputError, match=r"other shapes|image encoder"):
        blip2.load(tmp_path / "there", "cpu", overrides={"vision.name": str(tmp_path / "other")})
    layer = model.vision_model.encoder.layers[0].mlp.fc1
    layer.weight.data *= 2
    model.save_pretrained(tmp_path / "same")
    changes = {
        "vision.name": str(tmp_path / "same"),
        "language.name": str(tmp_path / "same"),
        "language.stop_string": None,
    }
    convert(tmp_path / "there", tmp_path / "out", "transformers", changes)
    out = blip2.load(tmp_path / "out", "cpu").model
    assert torch.equal(out.vision.network.encoder.layers[0].mlp.fc1.weight, layer.weight)
    assert out.language.network.config.model_type == "llama"


def test_image_sizes_that_no_patches_fill(parts, tmp_path):
    save_transformers(tmp_path / "there", "opt", parts.bert)
    with pytest.raises(InputError, match=r"image_size 30 is not a multiple of .* patch size 7: set .* 28 or 35"):
        convert(tmp_path / "there", tmp_path / "out", "transformers", {"vision.image_size": 30})


SEQ2SEQ = {"vocab_size": 258, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
SEQ2SEQ |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
SEQ2SEQ |= {"decoder_start_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: BartForConditionalGeneration(BartConfig(**SEQ2SEQ)), "of type bart, .* builds BartForCausalLM"),
        (lambda: PegasusForConditionalGeneration(PegasusConfig(**SEQ2SEQ)), "of type pegasus, .* PegasusForCausalLM"),
        (
            lambda: OPTForCausalLM(
                OPTConfig(vocab_size=258, hidden_size=64, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=1,
                          num_attention_heads=4, max_position_embeddings=64, do_layer_norm_before=False)
            ),
            "whose embeddings are 32 wide and whose layers are 64 wide",
        ),
    ],
)  # fmt: skip
def test_an_llm_of_which_transformers_would_make_another(runs, tmp_path, make, reason):
    make().save_pretrained(tmp_path / "llm")
    byte_tokenizer().save_pretrained(tmp_path / "llm")
    with pytest.raises(InputError, match=reason) as error:
        convert(runs["llama"], tmp_path / "out", "transformers", {"language.name": str(tmp_path / "llm")})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
