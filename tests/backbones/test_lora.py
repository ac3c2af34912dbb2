import copy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import blip2
from blip2 import checkpoint
from blip2.backbones.language import LanguageModel, load_language_model
from blip2.backbones.lora import add_adapters, merge_adapters
from blip2.config import LanguageConfig, LoraConfig
from blip2.convert import convert
from blip2.errors import InputError
from blip2.training.trainer import train
from fixtures.runs import assert_same_run, cut_short
from fixtures.tiny import randomize

peft = pytest.importorskip("peft")
LLMS = ("llama", "opt", "t5")
RATES = {"language.*lora_*": 1e-2, "vision.*": "frozen", "language.*": "frozen", "*": 1e-3}


def tune(parts, run, name="llama", rates=RATES, dtype=None, **changes):
    language = {"name": getattr(parts, name), "lora": LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1), "dtype": dtype}
    optimizer = {"learning_rate": rates, "warmup_steps": 0}
    return parts.recipe(run, stage="generation", language=language, optimizer=optimizer, **changes)


@pytest.fixture(scope="module")
def tuned(parts, tmp_path_factory):
    """A folder with a run of four steps for each LLM."""
    root = tmp_path_factory.mktemp("lora")
    for name in LLMS:
        train(tune(parts, root / name, name))
    return root


@pytest.mark.parametrize("name", LLMS)
def test_only_adapters_are_kept(tuned, name):
    kept = load_file(checkpoint.latest_checkpoint(tuned / name) / "model.safetensors")
    adapters = {key for key in kept if key.startswith("language.")}
    ends = {"q.", "v."} if name == "t5" else {"q_proj.", "v_proj."}
    assert {key.split(".lora_")[0].split(".")[-1] + "." for key in adapters} == ends
    assert all(".lora_" in key and kept[key].dtype == torch.float32 for key in adapters)
    assert len(adapters) == 2 * 2 * (6 if name == "t5" else 2)  # A and B of two matrices per attention
    assert all(kept[key].abs().max() > 0 for key in adapters if ".lora_B." in key)  # initialized to zero


@pytest.mark.parametrize("name", LLMS)
def test_the_weights_of_the_llm_do_not_change(parts, tuned, name):
    before = load_language_model(getattr(parts, name)).state_dict()
    after = blip2.load(tuned / name, device="cpu").model.language.state_dict()
    own = {key.replace(".base_layer", ""): tensor for key, tensor in after.items() if ".lora_" not in key}
    assert own.keys() == before.keys()
    assert all(torch.equal(own[key], before[key]) for key in before)


@pytest.mark.parametrize("name", LLMS)
def test_a_loaded_run_computes_with_its_adapters(parts, tuned, name):
    """Each matrix W becomes W + alpha / r * B A."""
    found = blip2.load(tuned / name, device="cpu").model.language
    plain = load_language_model(getattr(parts, name))
    kept = load_file(checkpoint.latest_checkpoint(tuned / name) / "model.safetensors")
    with torch.no_grad():
        for key in [key for key in kept if ".lora_A." in key]:
            added = 4 / 2 * kept[key.replace("lora_A", "lora_B")] @ kept[key]
            plain.get_parameter(key.removeprefix("language.").split(".lora_")[0] + ".weight").add_(added)
    visual = torch.randn(2, 3, 32)
    ids, mask = torch.randint(0, 250, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    logits = [llm.lm_head(llm.hidden_states(visual, ids, mask, ids)[0]) for llm in (found, plain)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    without = load_language_model(getattr(parts, name))
    assert (without.lm_head(without.hidden_states(visual, ids, mask, ids)[0]) - logits[0]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("name", LLMS)
def test_converting_to_transformers_merges(parts, tuned, tmp_path, monkeypatch, name):
    monkeypatch.setattr("blip2.convert.load_submodule", None)  # the LLM is not loaded a second time
    convert(tuned / name, tmp_path / "converted", "transformers")
    found = blip2.load(tuned / name, device="cpu")
    merged = blip2.load(tmp_path / "converted", device="cpu")
    assert merged.config.language.lora is None
    assert not any(".lora_" in key or ".base_layer." in key for key in merged.model.state_dict())
    visual = torch.randn(2, 3, 32)
    ids, mask = torch.randint(0, 250, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    logits = [
        each.lm_head(each.hidden_states(visual, ids, mask, ids)[0])[..., :257]
        for each in (found.model.language, merged.model.language)
    ]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    image = min(Path(parts.images).parent.glob("*.png"))
    decoding = blip2.Decoding(num_beams=1, max_new_tokens=6)
    assert merged.generate([image], ["a"], decoding) == found.generate([image], ["a"], decoding)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_gpt2_merges_transposed_weights():
    """The layers of GPT-2 are no linear layers: their matrices are transposed."""
    network = randomize(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=16)))
    llm = LanguageModel(copy.deepcopy(network))
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["c_proj"])  # one of the two is square
    add_adapters(llm, config)
    randomize(llm, 1)
    plain = {key: tensor for key, tensor in llm.network.state_dict().items() if ".lora_" in key}
    base = {key.replace(".base_layer", ""): t for key, t in llm.network.state_dict().items() if ".lora_" not in key}
    network.load_state_dict(base)
    merged = merge_adapters(network, config, plain)
    assert set(merged) == {f"transformer.h.0.{part}.c_proj.weight" for part in ("attn", "mlp")}
    again = GPT2LMHeadModel(network.config).eval()
    again.load_state_dict(base | merged)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(again(ids).logits, llm.network(ids).logits, atol=1e-5, rtol=1e-5)
    again.load_state_dict(base)
    assert (again(ids).logits - llm.network(ids).logits).abs().max() > 1e-2


def test_adapters_of_another_config_are_not_merged(parts):
    llm = load_language_model(parts.llama)
    add_adapters(llm, LoraConfig(target_modules=["q_proj"]))
    adapters = {key: tensor for key, tensor in llm.network.state_dict().items() if ".lora_" in key}
    with pytest.raises(InputError, match=r"the adapters do not fit the LLM, a LlamaForCausalLM \(.*v_proj"):
        merge_adapters(load_language_model(parts.llama).network, LoraConfig(), adapters)


def test_captioning(parts, tuned):
    image = min(Path(parts.images).parent.glob("*.png"))
    assert isinstance(blip2.load(tuned / "llama", device="cpu").caption(image)[0], str)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_new_adapters_change_nothing_and_the_llm_stays_in_eval(parts, name):
    visual = torch.randn(2, 3, 32)
    ids, mask = torch.randint(0, 250, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    llm = load_language_model(getattr(parts, name), torch.bfloat16)
    before = llm.hidden_states(visual, ids, mask, ids)[0]
    add_adapters(llm, LoraConfig(lora_dropout=0.5))
    torch.testing.assert_close(llm.hidden_states(visual, ids, mask, ids)[0], before, atol=0, rtol=0)
    torch.nn.Sequential(llm).train()
    assert llm.is_frozen and not any(module.training for module in llm.modules())
    for key, parameter in llm.named_parameters():
        parameter.requires_grad_(".lora_" in key)
        assert parameter.dtype == (torch.float32 if ".lora_" in key else torch.bfloat16)
    llm.train()
    trains = {key for key, module in llm.named_modules() if module.training and not list(module.children())}
    assert trains and all(".lora_" in key for key in trains)
    assert any(isinstance(llm.get_submodule(key), torch.nn.Dropout) for key in trains)


@pytest.mark.parametrize(("name", "dtype"), [("llama", None), ("t5", "bf16")])
def test_a_resumed_run_equals_an_uninterrupted_one(parts, tmp_path, name, dtype):
    recipe = tune(parts, tmp_path / "run", name, dtype=dtype, training={"max_steps": 4, "save_steps": 2})
    train(recipe)
    copy = cut_short(tmp_path / "run", 2)
    train(replace(recipe, output=str(copy)), resume=True)
    assert_same_run(tmp_path / "run", copy)


@pytest.mark.parametrize(("name", "adapts"), [("llama", True), ("t5", True), ("llama", False)])
def test_gradient_checkpointing_changes_nothing(parts, tmp_path, name, adapts):
    """With adapters and their dropout, and in an LLM whose own weights train."""
    for checkpointing in (False, True):
        training = {"max_steps": 2, "save_steps": 2, "gradient_checkpointing": checkpointing}
        recipe = tune(parts, tmp_path / str(checkpointing), name, training=training)
        if not adapts:
            optimizer = replace(recipe.optimizer, learning_rate={"vision.*": "frozen", "*": 1e-3})
            recipe = replace(recipe, language=replace(recipe.language, lora=None), optimizer=optimizer)
        train(recipe)
    assert_same_run(tmp_path / "False", tmp_path / "True")
    kept = load_file(checkpoint.latest_checkpoint(tmp_path / "True") / "model.safetensors")
    adapters = [key for key in kept if key.startswith("language.") and ".lora_" in key]
    assert bool(adapters) is adapts and any(key.startswith("language.") for key in kept)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        (
            {"language.*": "frozen", "*": 1e-3},
            r"language has adapters, but optimizer\.learning_rate freezes the adapters",
        ),
        (
            {"language.*": 1e-4, "*": 1e-3},
            r"also trains language\.network\..*, which is not an adapter: begin",
        ),
    ],
)
def test_rates_that_do_not_fit_adapters(parts, tmp_path, rates, message):
    with pytest.raises(InputError, match=message):
        train(tune(parts, tmp_path / "run", rates={"vision.*": "frozen", **rates}))


def test_target_modules_that_do_not_exist(parts):
    llm = load_language_model(parts.llama)
    with pytest.raises(InputError, match=r"no adapters fit the LLM, a LlamaForCausalLM .*: set language\.lora"):
        add_adapters(llm, LoraConfig(target_modules=["query"]))


def test_target_modules(parts):
    llm = load_language_model(parts.llama)
    add_adapters(llm, LoraConfig(target_modules=["gate_proj"]))
    assert {key.split(".")[-4] for key, _ in llm.named_parameters() if ".lora_" in key} == {"gate_proj"}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_output_matrix_has_no_adapter(parts):
    """Merging would also change the input embeddings."""
    add_adapters(load_language_model(parts.llama), LoraConfig(target_modules=["lm_head"]))  # not tied
    with pytest.raises(InputError, match=r"target_modules matches lm_head, whose weight is also .*embed_tokens"):
        add_adapters(load_language_model(parts.opt), LoraConfig(target_modules=["lm_head", "q_proj"]))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT uses a name that transformers will remove
def test_adapters_beside_an_llm(parts, tmp_path):
    """transformers would load the model that the adapters name, and not the weights beside them."""
    network = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(parts.llama), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    shutil.copytree(parts.llama, tmp_path / "llm")
    network.save_pretrained(tmp_path / "llm")
    with pytest.raises(InputError, match=r"has an adapter_config\.json, with which .*: merge the adapters"):
        load_language_model(str(tmp_path / "llm"))


def test_without_peft(parts, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"language\.lora needs PEFT: pip install 'blip2\[lora\]'"):
        add_adapters(load_language_model(parts.llama), LoraConfig())


def test_adapters_are_never_lost(parts, tuned, tmp_path):
    """A run without adapters cannot start from one with them, and a checkpoint without them cannot be loaded."""
    plain = parts.recipe(tmp_path / "plain", stage="generation", language={"name": parts.llama})
    with pytest.raises(
        InputError,
        match=r"contains the weight language\..*lora_.*, which the model does not have: copy the section language",
    ):
        train(replace(plain, start_from=str(tuned / "llama")))
    train(plain)
    path = checkpoint.latest_checkpoint(tmp_path / "plain") / "model.yaml"
    text = path.read_text()
    assert "  lora: null" in text
    path.write_text(text.replace("  lora: null", "  lora: {r: 2}"))
    with pytest.raises(InputError, match=r"does not fit the model config \(missing: language\..*lora_"):
        blip2.load(tmp_path / "plain", device="cpu")


def test_a_run_starts_from_one_without_adapters_or_with_the_same(parts, runs, tuned, tmp_path, capsys):
    train(replace(tune(parts, tmp_path / "new"), start_from=str(runs["llama"])))
    assert "new weights, which no checkpoint contains: language" in capsys.readouterr().err
    train(replace(tune(parts, tmp_path / "same"), start_from=str(tuned / "llama")))
    assert "new:" not in capsys.readouterr().err


def test_converted_to_its_own_format_it_is_the_same(tuned, tmp_path):
    convert(tuned / "llama", tmp_path / "copy", "blip2")
    one, other = (blip2.load(path, device="cpu").model.state_dict() for path in (tuned / "llama", tmp_path / "copy"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one if ".pooler." not in key)  # which is in no file


@pytest.mark.parametrize(("key", "value"), [("r", 0), ("lora_alpha", -1), ("lora_dropout", 1.5)])
def test_ranges(parts, tmp_path, key, value):
    recipe = tune(parts, tmp_path)
    with pytest.raises(InputError, match=f"^language.lora.{key} is {value}, expected"):
        replace(recipe, language=LanguageConfig("opt", lora=replace(LoraConfig(), **{key: value})))
