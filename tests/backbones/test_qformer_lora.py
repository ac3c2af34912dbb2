import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import blip2
from blip2 import checkpoint
from blip2.backbones.lora import add_qformer_adapters, merged_weights
from blip2.config import LoraConfig, ObjectivesConfig
from blip2.convert import convert
from blip2.errors import InputError
from blip2.model.qformer import QFormer, attention_mask, itc_itg_mask
from blip2.model.representation import RepresentationModel
from blip2.training.trainer import train
from fixtures.runs import assert_same_run, cut_short
from fixtures.tiny import QFORMER, no_encoder, randomize, texts

pytest.importorskip("peft")
LORA = LoraConfig(r=2, lora_alpha=6)
EVERY_LAYER = ["query", "key", "value", "output", "expand", "contract"]
SCALING = 3
RATES = {"qformer.*lora_*": 1e-2, "qformer.*": "frozen", "vision.*": "frozen", "language.*": "frozen", "*": 1e-3}


# -- the model -----------------------------------------------------------------------------------------------------


def pair(**changes):
    """A stage-1 model with nonzero adapters in its Q-Former, and the same model with the adapters merged."""
    adapted = RepresentationModel(no_encoder(5, 24), QFORMER, ObjectivesConfig())
    plain = copy.deepcopy(adapted)
    add_qformer_adapters(adapted.qformer, replace(LORA, **changes))
    randomize(adapted).requires_grad_(True).double()
    state = adapted.state_dict()
    own = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
    plain.double().load_state_dict(own | merged_weights(state, LORA))
    return adapted, plain


def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 5, 24, generator=generator, dtype=torch.float64), *texts(6, 4, 2)


def outputs(model, features, ids, mask):
    """Return a number for each mask of the Q-Former, on which all outputs of queries and text depend."""
    torch.manual_seed(0)  # dropout
    memory = model.qformer.project_image(features, model.image_norm)
    kinds = {}
    for kind in ("unimodal", "causal", "bidirectional"):
        out = model.qformer(memory, ids, attention_mask(kind, 4, mask))
        kinds[kind] = out.queries.sin().sum() + out.text[mask].cos().sum()
    both = model.qformer(memory, ids.repeat(1, 2), itc_itg_mask(4, mask))
    kinds["both"] = both.queries.sin().sum() + both.text.cos().sum()
    return kinds


@pytest.mark.parametrize("targets", [None, ["self_attention.query"], ["contract"], ["expand"], EVERY_LAYER])
@pytest.mark.parametrize("trained_features", [False, True])
def test_no_kernel_bypasses_the_adapters(targets, trained_features):
    """In training and in inference, with frozen features and with an image encoder that trains."""
    adapted, plain = pair(target_modules=targets)
    features, ids, mask = batch()
    features.requires_grad_(trained_features)
    with torch.no_grad():
        torch.testing.assert_close(outputs(adapted, features, ids, mask), outputs(plain, features, ids, mask))
    results = [outputs(model.train(), features, ids, mask) for model in (adapted, plain)]
    torch.testing.assert_close(*results)
    gradients = []
    for each, model in zip(results, (adapted, plain), strict=True):
        features.grad = None
        sum(each.values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        if trained_features:
            gradients[-1]["features"] = features.grad
    found, merged = gradients
    state, checked = adapted.state_dict(), set()
    for name, gradient in merged.items():
        layer = name.removesuffix(".weight")
        a, b = (f"{layer}.lora_{each}.default.weight" for each in "AB")
        if layer != name and a in state:  # W + s B A, so that dB = s dW A' and dA = s B' dW
            torch.testing.assert_close(found[b], SCALING * gradient @ state[a].T)
            torch.testing.assert_close(found[a], SCALING * state[b].T @ gradient)
            checked |= {a, b}
    assert checked and checked == {name for name in found if ".lora_" in name}
    assert trained_features == ("features" in merged) and {"image_norm.weight", "qformer.queries"} <= set(merged)
    for name in ("features", "image_norm.weight", "image_norm.bias", "qformer.queries"):
        if name in merged:
            torch.testing.assert_close(found[name], merged[name])
    without = {name: p for name, p in state.items() if ".lora_" not in name}
    plain.load_state_dict(without)
    with torch.no_grad():
        kinds = outputs(plain, features, ids, mask)
    assert all(abs(kinds[kind] - results[0][kind]) > 1e-2 for kind in kinds)


def test_the_frozen_weights_get_no_gradient_and_the_adapters_the_same():
    adapted, _ = pair(target_modules=EVERY_LAYER, lora_dropout=0.3)
    adapted.train()
    gradients = []
    for freeze, checkpointing in ((False, False), (True, False), (True, True)):
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_(".lora_" in name or not freeze)
        adapted.qformer.gradient_checkpointing = checkpointing
        adapted.zero_grad()
        sum(outputs(adapted, *batch()).values()).backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.grad is not None})
    whole, frozen, lean = gradients
    assert frozen and all(".lora_" in name for name in frozen) and frozen.keys() == lean.keys()
    for name in frozen:
        torch.testing.assert_close(frozen[name], whole[name])
        torch.testing.assert_close(lean[name], frozen[name], rtol=0, atol=0)


def test_new_adapters_change_nothing_and_names_stay():
    plain = randomize(QFormer(QFORMER, 24)).double().eval()
    adapted = copy.deepcopy(plain)
    add_qformer_adapters(adapted, LORA)
    features, ids, mask = batch()
    norm = nn.LayerNorm(24, dtype=torch.float64)
    results = [
        each(each.project_image(features, norm), ids, attention_mask("causal", 4, mask)) for each in (plain, adapted)
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    state = adapted.state_dict()
    assert {name for name in state if ".lora_" not in name} == set(plain.state_dict())
    assert {name.split(".lora_")[0].split(".", 2)[2] for name in state if ".lora_" in name} == {
        f"{attention}.{layer}" for attention in ("self_attention", "cross_attention") for layer in ("query", "value")
    }
    again = copy.deepcopy(adapted)
    again.load_state_dict(randomize(adapted).state_dict())
    assert all(torch.equal(*each) for each in zip(again.parameters(), adapted.parameters(), strict=True))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj"], r"no adapters fit the Q-Former .*: set qformer\.lora\.target_modules to suffixes"),
        (["query", "word_embedding"], r"matches word_embedding, a Embedding, but only linear layers"),
    ],
)
def test_target_modules_that_do_not_fit(targets, message):
    with pytest.raises(InputError, match=message):
        add_qformer_adapters(QFormer(QFORMER, 24), LoraConfig(target_modules=targets))


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"qformer\.lora needs PEFT: pip install 'blip2\[lora\]'"):
        add_qformer_adapters(QFormer(QFORMER, 24), LoraConfig())


# -- runs ----------------------------------------------------------------------------------------------------------


def tune(parts, run, stage="representation", rates=RATES, lora=LORA, **changes):
    language = {"language": {"name": parts.llama}} if stage == "generation" else {}
    optimizer = {"learning_rate": rates, "warmup_steps": 0}
    return parts.recipe(run, stage=stage, qformer={"lora": lora}, optimizer=optimizer, **language, **changes)


def weights(run):
    return load_file(checkpoint.latest_checkpoint(run) / "model.safetensors")


@pytest.fixture(scope="module")
def tuned(parts, runs, tmp_path_factory):
    """Runs with adapters of both stages, which start from runs without."""
    root = tmp_path_factory.mktemp("qformer-lora")
    for stage, start in (("representation", "stage1"), ("generation", "llama")):
        train(replace(tune(parts, root / stage, stage), start_from=str(runs[start])))
    return root


@pytest.mark.parametrize(("stage", "start"), [("representation", "stage1"), ("generation", "llama")])
def test_adapters_train_and_the_weights_of_the_qformer_do_not(runs, tuned, stage, start):
    before, after = weights(runs[start]), weights(tuned / stage)
    adapters = {name for name in after if ".lora_" in name}
    assert set(after) - adapters == set(before) and len(adapters) == 2 * 2 * 3  # A, B; query, value; 2 self, 1 cross
    assert all(after[name].abs().max() > 0 for name in adapters)  # B is initialized to zero
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith("qformer.") for name in changed)


@pytest.mark.parametrize("stage", ["representation", "generation"])
def test_a_loaded_run_computes_with_its_adapters_as_merged(parts, tuned, stage):
    found = blip2.load(tuned / stage, device="cpu")
    merged = blip2.load(tuned / stage, device="cpu", overrides={"qformer.lora": None})
    assert any(".lora_" in name for name, _ in found.model.named_parameters())
    assert not any(".lora_" in name or ".base_layer." in name for name, _ in merged.model.named_parameters())
    image = min(Path(parts.images).parent.glob("*.png"))
    assert found.caption(image) == merged.caption(image)
    results = [each.query_outputs(image) for each in (found, merged)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", ["representation", "generation"])
def test_a_resumed_run_equals_an_uninterrupted_one(parts, tmp_path, stage):
    lora = replace(LORA, lora_dropout=0.2)
    recipe = tune(parts, tmp_path / "run", stage, lora=lora, training={"gradient_checkpointing": True})
    train(recipe)
    copied = cut_short(tmp_path / "run", 2)
    train(replace(recipe, output=str(copied)), resume=True)
    assert_same_run(tmp_path / "run", copied)
    with pytest.raises(InputError, match=r"^qformer\.lora is None, but .* was trained with \{'r': 2,"):
        train(replace(recipe, output=str(copied), qformer=replace(recipe.qformer, lora=None)), resume=True)


def test_stage_2_starts_from_a_stage_1_with_adapters(parts, tuned, tmp_path, capsys):
    """It goes on with the same adapters, and merges other ones."""
    start = tuned / "representation"
    none = {"vision.*": "frozen", "language.*": "frozen", "*": 0.0}
    still = {"qformer.*lora_*": 0.0, "qformer.*": "frozen", **none}
    old = weights(start)
    merged = old | merged_weights(old, LORA)
    for name, lora, rates in (("same", LORA, still), ("none", None, none), ("other", replace(LORA, r=1), still)):
        train(replace(tune(parts, tmp_path / name, "generation", rates, lora), start_from=str(start)))
        said = " ".join(capsys.readouterr().err.split())
        assert ("are merged into its weights" in said) is (name != "same")
        new = {key: tensor for key, tensor in weights(tmp_path / name).items() if key.startswith("qformer.")}
        expected = old if name == "same" else merged
        assert all(torch.equal(new[key], expected[key]) for key in new if name == "same" or ".lora_" not in key)
        added = [tensor for key, tensor in new.items() if ".lora_B." in key]
        assert bool(added) is (name != "none") and (name != "other" or not any(b.any() for b in added))


@pytest.mark.parametrize("stage", ["representation", "generation"])
def test_converting_to_transformers_merges(tuned, tmp_path, stage):
    convert(tuned / stage, tmp_path / "model", "transformers")
    back = checkpoint.open_checkpoint(str(tmp_path / "model"))
    old = weights(tuned / stage)
    merged = merged_weights(old, LORA)
    assert merged and all(torch.equal(back.weights[name], tensor) for name, tensor in merged.items())
    assert not any(".lora_" in name for name in back.weights)


def test_converting_to_its_own_format_keeps_or_merges_them(tuned, tmp_path):
    run = tuned / "representation"
    convert(run, tmp_path / "kept", "blip2")
    convert(run, tmp_path / "merged", "blip2", {"qformer.lora": None})
    old, kept, merged = weights(run), *(load_file(tmp_path / n / "model.safetensors") for n in ("kept", "merged"))
    assert kept.keys() == old.keys() and all(torch.equal(kept[name], old[name]) for name in old)
    assert merged.keys() == {name for name in old if ".lora_" not in name}
    assert all(torch.equal(merged[name], tensor) for name, tensor in merged_weights(old, LORA).items())
    assert blip2.load(tmp_path / "merged", device="cpu").config.qformer.lora is None


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"qformer.*": "frozen", "*": 1e-3}, "qformer has adapters, but optimizer.learning_rate freezes the adapters"),
        ({"*": 1e-3}, r"also trains qformer\..*base_layer.*, which is not an adapter: begin .*\"qformer\.\*lora_\*\""),
    ],
)
def test_rates_that_do_not_fit_adapters(parts, tmp_path, rates, message):
    with pytest.raises(InputError, match=message):
        train(tune(parts, tmp_path / "run", rates={"vision.*": "frozen", **rates}))


def test_queries_may_train_beside_adapters(parts, tmp_path):
    rates = {"qformer.queries": 1e-3, **RATES}
    train(tune(parts, tmp_path / "run", rates=rates, training={"max_steps": 1, "save_steps": 1}))
    assert any(".lora_B." in name for name in weights(tmp_path / "run"))
