import json
import shutil

import numpy as np
import pytest
import torch
from transformers import BertModel

from blip2.builder import build, choose_device, choose_dtype, find_eos_token_id
from blip2.checkpoint import open_native
from blip2.data.collate import CausalLMCollator
from blip2.errors import InputError
from blip2.interop.checkpoint import load_tokenizer
from blip2.model.generation import GenerationModel
from blip2.model.representation import RepresentationModel
from conftest import byte_tokenizer, save_bert

CPU = torch.device("cpu")
NO_DRAWS = np.random.default_rng(0)
"""For texts of which nothing is drawn."""


def message(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# -- devices and dtypes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_there(wanted):
    kind = wanted.split(":")[0]
    if {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[kind]:
        pytest.skip(f"there is a {kind} device here")
    with pytest.raises(InputError) as raised:
        choose_device(wanted)
    assert message(raised).startswith(f"device '{wanted}' was requested, but PyTorch")
    assert message(raised).endswith("use cpu")


@pytest.mark.parametrize("wanted", ["gpu", "cpu:x", "cpu:-1", ""])
def test_what_is_no_device(wanted):
    with pytest.raises(InputError, match="choose cpu, cuda or mps"):
        choose_device(wanted)


def test_the_best_device_is_chosen():
    assert choose_device("cpu") == CPU
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    assert choose_device(None).type == next(kind for kind in is_there if is_there[kind])


@pytest.mark.parametrize(
    ("wanted", "kind", "expected"),
    [
        (None, "cpu", torch.float32),
        (None, "mps", torch.float32),
        (None, "cuda", torch.bfloat16),
        ("fp16", "cuda", torch.float16),
        ("bf16", "cpu", torch.bfloat16),
        ("fp32", "cuda", torch.float32),
    ],
)
def test_dtypes(wanted, kind, expected):
    assert choose_dtype(wanted, torch.device(kind)) == expected


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_frozen_parts_have_the_dtype_of_the_recipe_and_the_rest_has_fp32(parts, tmp_path, dtype):
    recipe = parts.recipe(
        tmp_path,
        stage="generation",
        vision={"dtype": dtype},
        language={"name": parts.opt, "dtype": dtype},
    )
    model = build(recipe.model, CPU).model
    assert model.vision.dtype == model.language.dtype == choose_dtype(dtype, CPU)
    assert model.vision.is_frozen and model.language.is_frozen
    assert {p.dtype for p in model.qformer.parameters()} == {torch.float32}
    assert model.projection.weight.dtype == torch.float32


# -- the Q-Former and its text -------------------------------------------------------------------------------------


def test_stage_one(parts, tmp_path):
    built = build(parts.recipe(tmp_path).model, CPU)
    assert isinstance(built.model, RepresentationModel)
    assert built.eos_token_id is None
    tokenizer, size = built.tokenizer, built.model.qformer.config.vocab_size
    assert len(tokenizer) == size
    assert tokenizer.convert_tokens_to_ids("[DEC]") == tokenizer.bos_token_id == size - 1
    assert built.model.qformer.decoder_start_token_id == size - 1


@pytest.mark.parametrize("stage", ["representation", "generation"])
def test_it_starts_from_bert(parts, tmp_path, stage):
    language = {"language": {"name": parts.llama}} if stage == "generation" else {}
    model = build(parts.recipe(tmp_path, stage=stage, **language).model, CPU).model
    bert = BertModel.from_pretrained(parts.bert, add_pooling_layer=False)
    ours = model.qformer.blocks[1].self_attention.query.weight
    assert torch.equal(ours, bert.encoder.layer[1].attention.self.query.weight)


def test_it_is_random_without_bert(parts, tmp_path):
    changes = {"bert": None, "tokenizer": parts.bert, "hidden_size": 40, "num_attention_heads": 5}
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(build(parts.recipe(tmp_path, qformer=changes).model, CPU).model)
    first, same, other = (model.qformer.blocks[0].self_attention.query.weight for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bert": None}, "qformer.tokenizer and qformer.bert are both null"),
        ({"bert": None, "tokenizer": "BERT", "vocab_size": 50}, "set qformer.vocab_size to 58"),
        ({"vocab_size": 50}, "(vocab_size 50): set qformer {vocab_size: 58}"),
        (
            {"hidden_size": 64, "num_hidden_layers": 3},
            "(hidden_size 64, num_hidden_layers 3): set qformer {hidden_size: 32, num_hidden_layers: 2}",
        ),
        ({"bert": "LLAMA"}, "is a llama model; the Q-Former starts from a model of type bert"),
        ({"bert": "NOWHERE"}, "to load the BERT from: check the path, or copy the BERT there"),
    ],
)
def test_a_bert_that_does_not_fit(parts, tmp_path, changes, expected):
    names = {"BERT": parts.bert, "LLAMA": parts.llama, "NOWHERE": str(tmp_path / "nowhere")}
    recipe = parts.recipe(tmp_path, qformer={key: names.get(value, value) for key, value in changes.items()})
    with pytest.raises(InputError) as raised:
        build(recipe.model, CPU)
    assert expected in message(raised)


def test_stage_two_needs_a_bert_that_fits_too(parts, tmp_path):
    wide = save_bert(tmp_path / "wide", hidden_size=48)
    recipe = parts.recipe(tmp_path, stage="generation", qformer={"bert": str(wide)}, language={"name": parts.llama})
    with pytest.raises(InputError, match=r"\(hidden_size 32\): set qformer \{hidden_size: 48\}"):
        build(recipe.model, CPU)


def test_the_checkpoint_s_tokenizer_is_used(parts, runs, tmp_path):
    """Nothing of BERT is read once there is a checkpoint."""
    folder = next((runs["stage1"] / "checkpoints").iterdir())
    recipe = parts.recipe(tmp_path, qformer={"bert": str(tmp_path / "gone")})
    tokenizer = build(recipe.model, CPU, open_native(folder)).tokenizer
    assert tokenizer.convert_tokens_to_ids("[DEC]") == 57
    assert tokenizer("a red disc")["input_ids"] == load_tokenizer(parts.bert)("a red disc")["input_ids"]


# -- LLMs and their tokenizers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt", "t5"])
def test_stage_two(parts, tmp_path, name):
    recipe = parts.recipe(tmp_path, stage="generation", language={"name": getattr(parts, name)})
    built = build(recipe.model, CPU)
    assert isinstance(built.model, GenerationModel)
    assert built.eos_token_id == 256
    assert built.model.language.is_encoder_decoder == (name == "t5")


def test_stop(parts):
    tokenizer = load_tokenizer(parts.opt)
    assert find_eos_token_id(tokenizer, None, parts.opt) == tokenizer.eos_token_id == 256
    newline = find_eos_token_id(tokenizer, "\n", parts.opt)
    assert tokenizer.decode([newline]) == "\n"
    for stop, count in (("ab", 2), ("", 0)):
        with pytest.raises(InputError) as raised:
            find_eos_token_id(tokenizer, stop, parts.opt)
        assert f"language.stop_string {stop!r} has {count} tokens" in message(raised)
        assert "expected exactly one" in message(raised)


def save_llm(source, folder, **tokens):
    """An LLM whose tokenizer has other special tokens (None: not this one)."""
    shutil.copytree(source, folder)
    tokenizer = byte_tokenizer()
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert all(settings.get(name) == token for name, token in tokens.items())
    return str(folder)


def prepare(built, images, texts, prompt=""):
    return CausalLMCollator(built.tokenizer, 32, prompt, built.eos_token_id)(
        images, texts, [""] * len(texts), torch.arange(len(texts)), NO_DRAWS
    )[0]


@torch.no_grad()
def test_without_a_padding_token(parts, tmp_path):
    """Padding is masked, so its id does not matter."""
    texts = ["a red disc", "the long stripe is blue"]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    together, weighted = [], []
    for name in (parts.llama, save_llm(parts.llama, tmp_path / "llm", pad_token=None)):
        recipe = parts.recipe(tmp_path, stage="generation", language={"name": name}, qformer={"dropout": 0.0})
        torch.manual_seed(0)
        built = build(recipe.model, CPU)
        together.append(float(built.model(prepare(built, images, texts)).losses["lm"]))
        alone = [prepare(built, images[i : i + 1], [text]) for i, text in enumerate(texts)]
        labels = float(sum(batch.num_labels for batch in alone))
        weighted.append(sum(float(built.model(batch, labels).losses["lm"]) for batch in alone))
    assert built.tokenizer.pad_token_id is None
    assert together[0] == together[1]
    assert weighted == pytest.approx(together, rel=1e-5)


def test_without_a_beginning_token(parts, tmp_path):
    """The visual prompt comes first. OPT's tokenizer puts one before every text, Llama's here has none."""
    for name, first in ((parts.llama, "a"), (parts.opt, "</s>")):
        built = build(parts.recipe(tmp_path, stage="generation", language={"name": name}).model, CPU)
        batch = prepare(built, torch.zeros(1, 3, 32, 32), ["a disc"])
        assert built.tokenizer.convert_ids_to_tokens(batch.ids[0].tolist())[0] == first
        assert (batch.labels[0, 0] == -100) == (first == "</s>")


def test_without_an_end(parts, tmp_path):
    name = save_llm(parts.llama, tmp_path / "llm", eos_token=None)
    recipe = parts.recipe(tmp_path, stage="generation", language={"name": name})
    with pytest.raises(InputError) as raised:
        build(recipe.model, CPU)
    assert "has no end-of-text token, so texts would never end: set language.stop_string" in message(raised)
    recipe = parts.recipe(tmp_path, stage="generation", language={"name": name, "stop_string": "\n"})
    assert build(recipe.model, CPU).eos_token_id == load_tokenizer(name)("\n")["input_ids"][0]


@pytest.mark.parametrize(("part", "name"), [("vision", "llama"), ("language", "vision"), ("language", "nowhere")])
def test_a_part_that_is_not_what_it_should_be(parts, tmp_path, part, name):
    there = getattr(parts, name, str(tmp_path / "nowhere"))
    changes = {"language": {"name": parts.llama}, part: {"name": there}}
    with pytest.raises(InputError) as raised:
        build(parts.recipe(tmp_path, stage="generation", **changes).model, CPU)
    assert there in message(raised)


def test_a_folder_without_tokenizer(parts, tmp_path):
    folder = tmp_path / "llm"
    shutil.copytree(parts.llama, folder)
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(InputError) as raised:
        build(parts.recipe(tmp_path, stage="generation", language={"name": str(folder)}).model, CPU)
    assert "no tokenizer could be loaded" in message(raised)
    assert "give a folder that contains tokenizer.json" in message(raised)


def test_a_package_that_there_is_not(parts, tmp_path):
    with pytest.raises(InputError, match="there is no package:vit: choose from package:"):
        build(parts.recipe(tmp_path, vision={"name": "package:vit"}).model, CPU)
