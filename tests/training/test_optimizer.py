import math
import re
from dataclasses import replace

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, ResNetConfig, ResNetModel

from blip2.backbones.vision import Preprocessing
from blip2.backbones.vision_loaders import wrap_transformers
from blip2.builder import build
from blip2.config import OptimizerConfig
from blip2.errors import InputError
from blip2.training.optimizer import (
    build_optimizer,
    configure_trainable,
    optimizer_state_by_name,
    restore_optimizer,
    summarize_parts,
    update_learning_rate,
)  # fmt: skip

FROZEN = {"vision.*": "frozen", "language.*": "frozen"}


@pytest.fixture
def model(parts, tmp_path):
    return build(parts.recipe(tmp_path).model, torch.device("cpu")).model


@pytest.fixture
def generator(parts, tmp_path):
    recipe = parts.recipe(tmp_path, stage="generation", language={"name": parts.llama})
    return build(recipe.model, torch.device("cpu")).model


def test_first_matching_pattern_wins(model):
    rates = configure_trainable(
        model,
        OptimizerConfig(learning_rate={"qformer.queries": 3e-3, "qformer.*": 2e-3, "vision.*": "frozen", "*": 1e-3}),
    )
    assert rates["qformer.queries"] == 3e-3
    assert rates["qformer.blocks.0.self_attention.query.weight"] == 2e-3
    assert rates["temperature"] == rates["image_norm.weight"] == 1e-3


def test_exactly_what_has_a_rate_trains(model):
    rates = configure_trainable(
        model, OptimizerConfig(learning_rate={**FROZEN, "qformer.embedding_norm.*": "frozen", "*": 1e-3})
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    every = {name for name, _ in model.named_parameters()}
    frozen = {name for name in every if name.startswith(("vision.", "qformer.embedding_norm."))}
    assert trained == set(rates) == every - frozen
    assert frozen


def test_an_unfrozen_part_leaves_eval_and_a_frozen_one_stays(model):
    configure_trainable(model, OptimizerConfig(learning_rate={**FROZEN, "*": 1e-3}))
    assert not model.vision.training
    assert model.qformer.training
    configure_trainable(model, OptimizerConfig(learning_rate={"*": 1e-3}))
    assert model.vision.training


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"qformer.*": 1e-3}, 'no pattern of optimizer.learning_rate matches temperature: add "*" as the last pattern'),
        (
            {"qformers.*": 1e-3, "*": 1e-3},
            "patterns of optimizer.learning_rate match no parameter (qformers.*): correct",
        ),
        ({"*": "frozen"}, "optimizer.learning_rate freezes every parameter: give at least one pattern a rate"),
    ],
)
def test_rates_that_cannot_be_meant(model, rates, message):
    with pytest.raises(InputError) as raised:
        configure_trainable(model, OptimizerConfig(learning_rate=rates))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_half_precision_cannot_train(model):
    model.vision.bfloat16()
    configure_trainable(model, OptimizerConfig(learning_rate={**FROZEN, "*": 1e-3}))
    with pytest.raises(InputError, match=r"vision\..* trains at 0.001 but is in bfloat16: set vision\.dtype to fp32"):
        configure_trainable(model, OptimizerConfig(learning_rate={"*": 1e-3}))


@pytest.mark.parametrize("stage", ["model", "generator"])
def test_no_decay_on_biases_norms_temperature_and_queries(stage, request):
    model = request.getfixturevalue(stage)
    config = OptimizerConfig(learning_rate={**FROZEN, "*": 1e-3}, weight_decay=0.05)
    rates = configure_trainable(model, config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, rates, config).param_groups
    decayed = {names[p] for group in groups if group["weight_decay"] == 0.05 for p in group["params"]}
    spared = {names[p] for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
    expected = {name for name in rates if name.endswith((".bias", "norm.weight"))}
    expected |= {"qformer.queries", "temperature"} & set(rates)
    assert spared == expected
    assert decayed == set(rates) - expected
    assert sum(len(group["params"]) for group in groups) == len(rates)
    assert {name for name in rates if model.get_parameter(name).ndim == 1} <= spared


def test_groups_keep_their_own_peak(model):
    config = OptimizerConfig(learning_rate={"qformer.*": 2e-3, **FROZEN, "*": 1e-3}, betas=(0.8, 0.9))
    optimizer = build_optimizer(model, configure_trainable(model, config), config)
    assert {(group["peak"], group["weight_decay"]) for group in optimizer.param_groups} == {
        (2e-3, 0.05),
        (2e-3, 0.0),
        (1e-3, 0.05),
        (1e-3, 0.0),
    }
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
    assert update_learning_rate(optimizer, 0, 10, replace(config, warmup_steps=4)) == 0.25
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4, 2.5e-4}


# -- layer-wise decay ----------------------------------------------------------------------------------------------

DECAYED = OptimizerConfig(
    learning_rate={"vision.*": 1e-3, "*": 2e-3}, layer_decay=0.5, weight_decay=0.0, warmup_steps=4
)


def share_of(name):
    """What a parameter's rate is of its pattern's: the tiny encoder has two blocks behind its embeddings."""
    if not name.startswith("vision."):
        return 1.0
    if name.startswith("vision.network.embeddings."):
        return 0.125
    return 0.25 if ".layers.0." in name else 0.5


def test_rates_decay_by_layer(model):
    rates = configure_trainable(model, DECAYED)
    expected = {name: share_of(name) * (1e-3 if name.startswith("vision.") else 2e-3) for name in rates}
    assert rates == pytest.approx(expected)
    assert set(expected.values()) == {2e-3, 0.5e-3, 0.25e-3, 0.125e-3}
    optimizer = build_optimizer(model, rates, DECAYED)
    assert update_learning_rate(optimizer, 0, 10, DECAYED) == 0.25  # warm-up is everybody's
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert found == pytest.approx({name: rate / 4 for name, rate in expected.items()})


def test_parameters_move_as_their_layer_says(model):
    """AdamW's first step moves a parameter by its rate, whatever its gradient."""
    rates = configure_trainable(model, DECAYED)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, rates, DECAYED)
    update_learning_rate(optimizer, 3, 10, DECAYED)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.3)
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = (before[name] - parameter.detach()).mean().item()
        peak = 1e-3 if name.startswith("vision.") else 2e-3
        assert moved == pytest.approx(peak * share_of(name), rel=1e-3), name


def test_decay_needs_layers_that_train(model, tmp_path):
    with pytest.raises(InputError, match=r"layer_decay is 0.5, but optimizer\.learning_rate freezes the image encoder"):
        configure_trainable(model, replace(DECAYED, learning_rate={**FROZEN, "*": 1e-3}))
    rates = configure_trainable(
        model, replace(DECAYED, learning_rate={"vision.network.layers.0.*": 1e-3, **FROZEN, "*": 1e-3})
    )
    assert {rate for name, rate in rates.items() if name.startswith("vision.")} == {0.25e-3}


def test_a_whole_range_of_rates_is_described_by_its_ends(model):
    rows = {
        row[0]: row[2] for row in summarize_parts(model, configure_trainable(model, replace(DECAYED, layer_decay=0.5)))
    }
    assert rows["vision"] == "trains at 0.000125, 0.00025, 0.0005"
    rates = configure_trainable(
        model, replace(DECAYED, learning_rate={"vision.network.layernorm.*": 3e-3, **DECAYED.learning_rate})
    )
    assert {row[0]: row[2] for row in summarize_parts(model, rates)}["vision"] == "trains at 0.000125 to 0.0015"


@pytest.mark.parametrize("kind", ["ResNet", "CLIP"])
def test_no_decay_on_norms_and_biases_of_encoders(model, kind):
    """Nor on a CNN's batch norms, nor on CLIP's class token, which is a vector."""
    if kind == "CLIP":
        sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
        network = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8))
    else:
        network = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], num_stages=2))
    model.vision = wrap_transformers(getattr(network, "vision_model", network), Preprocessing(32))
    rates = configure_trainable(model, OptimizerConfig(learning_rate={"*": 1e-3}))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, rates, OptimizerConfig()).param_groups
    spared = {names[p] for group in groups if not group["weight_decay"] for p in group["params"]}
    spared = {name.removeprefix("vision.network.") for name in spared if name.startswith("vision.")}
    every = {name for name, _ in model.vision.network.named_parameters()}
    norms = {name for name in every if re.search(r"norm|layrnorm", name)}
    assert norms and spared == norms | {n for n in every if n.endswith((".bias", "class_embedding"))}


# -- schedule ------------------------------------------------------------------------------------------------------


def schedule(steps, warmup, final):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [parameter], "peak": 1.0}])
    config = OptimizerConfig(warmup_steps=warmup, min_lr_rate=final)
    return [update_learning_rate(optimizer, step, steps, config) for step in range(steps)]


def test_schedule_by_hand():
    # Steps 0 to 3 warm up, step 4 is the top of a cosine that reaches a tenth at step 8.
    middle = [0.1 + 0.45 * (1 + math.cos(math.pi * share)) for share in (0.25, 0.5, 0.75)]
    assert schedule(9, 4, 0.1) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, *middle, 0.1])
    assert middle[1] == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("steps", "warmup", "expected"),
    [
        (1, 0, [1.0]),
        (1, 2000, [1.0]),
        (3, 0, [1.0, 0.75, 0.5]),
        (3, 2000, [0.5, 1.0, 1.0]),  # warm-up is never longer than the run
    ],
)
def test_schedule_of_short_runs(steps, warmup, expected):
    assert schedule(steps, warmup, 0.5) == pytest.approx(expected)


def test_describe_counts_everything(model):
    config = OptimizerConfig(learning_rate={**FROZEN, "image_norm.*": "frozen", "qformer.queries": 2e-3, "*": 1e-3})
    model.vision.bfloat16()
    rows = {row[0]: row[1:] for row in summarize_parts(model, configure_trainable(model, config))}

    def count(part):
        return sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] == part)

    assert rows["vision"] == (f"{count('vision'):,}", "frozen", "bfloat16")
    assert rows["image_norm"] == ("48", "frozen", "float32")
    assert rows["qformer"] == (f"{count('qformer'):,}", "trains at 0.001, 0.002", "float32")
    assert rows["temperature"] == ("1", "trains at 0.001", "float32")
    total = sum(int(row[0].replace(",", "")) for row in rows.values())
    assert total == sum(p.numel() for p in model.parameters())


def test_describe_says_how_much_of_a_part_trains(model):
    rates = configure_trainable(model, OptimizerConfig(learning_rate={"qformer.queries": 2e-3, "*": "frozen"}))
    rows = {row[0]: row[2] for row in summarize_parts(model, rates)}
    assert rows["qformer"] == "128 trains at 0.002"
    assert rows["temperature"] == "frozen"


# -- going on ------------------------------------------------------------------------------------------------------


def stepped(model, config):
    """An optimizer after a step in which the gradient of each parameter is its number, and its state by names."""
    optimizer = build_optimizer(model, configure_trainable(model, config), config)
    for number, parameter in enumerate(model.parameters(), 1):
        parameter.grad = torch.full_like(parameter, float(number)) if parameter.requires_grad else None
    optimizer.step()
    return optimizer, optimizer_state_by_name(optimizer, model)


def moments(model, optimizer):
    """The first moment of each parameter that has one, which the step of :func:`stepped` made equal throughout."""
    found = {name: optimizer.state.get(parameter, {}).get("exp_avg") for name, parameter in model.named_parameters()}
    return {name: float(moment.mean()) for name, moment in found.items() if moment is not None}


@pytest.mark.parametrize(
    "rates",
    [
        {**FROZEN, "*": 1e-4},
        {**FROZEN, "qformer.*": 1e-4, "*": 1e-3},
        {"temperature": 1e-5, "qformer.blocks.1.*": 2e-3, **FROZEN, "qformer.queries": 3e-3, "*": 1e-3},
    ],
)
def test_moments_go_to_the_parameter_of_their_name(model, rates):
    """However the rates divide the parameters into groups; rates and decay are those of the recipe."""
    optimizer, saved = stepped(model, OptimizerConfig(learning_rate={**FROZEN, "*": 1e-3}))
    before = moments(model, optimizer)
    config = OptimizerConfig(learning_rate=rates, weight_decay=0.01, betas=(0.5, 0.6))
    new = build_optimizer(model, configure_trainable(model, config), config)
    assert restore_optimizer(new, model, saved) == []
    assert moments(model, new) == before
    assert len(set(before.values())) == len(before) > 40
    assert {group["peak"] for group in new.param_groups} == {rate for rate in rates.values() if rate != "frozen"}
    assert {group["weight_decay"] for group in new.param_groups} == {0.01, 0.0}
    assert {group["betas"] for group in new.param_groups} == {(0.5, 0.6)}


def test_what_no_longer_trains_and_what_trains_anew_is_said(model):
    before = moments(model, stepped(model, OptimizerConfig(learning_rate={**FROZEN, "*": 1e-3}))[0])
    _, saved = stepped(model, OptimizerConfig(learning_rate={**FROZEN, "image_norm.*": "frozen", "*": 1e-3}))
    config = OptimizerConfig(learning_rate={**FROZEN, "qformer.queries": "frozen", "*": 1e-3})
    optimizer = build_optimizer(model, configure_trainable(model, config), config)
    fresh, dropped = restore_optimizer(optimizer, model, saved)
    assert "starts without a state for 2 parameters (image_norm.weight, image_norm.bias)" in fresh
    assert "1 parameter (qformer.queries) is dropped" in dropped
    expected = set(before) - {"qformer.queries", "image_norm.weight", "image_norm.bias"}
    assert {name: moment for name, moment in before.items() if name in expected} == moments(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()  # what begins anew has a state after it
    assert set(moments(model, optimizer)) == expected | {"image_norm.weight", "image_norm.bias"}


def test_moments_of_another_shape_begin_anew(model):
    config = OptimizerConfig(learning_rate={**FROZEN, "*": 1e-3})
    optimizer, saved = stepped(model, config)
    whole = saved["temperature"]
    without = [{name: value for name, value in whole.items() if name != key} for key in ("exp_avg", "step")]
    for state in ({**whole, "exp_avg": torch.zeros(3)}, {**whole, "exp_avg": "x"}, *without):
        fresh, dropped = restore_optimizer(optimizer, model, {**saved, "temperature": state})
        assert "(temperature)" in fresh and "(temperature)" in dropped


def test_a_parameter_without_a_gradient_is_nothing_to_speak_of(model):
    """A head whose objective is switched off has no state, and none after the run goes on."""
    config = OptimizerConfig(learning_rate={**FROZEN, "*": 1e-3})
    optimizer = build_optimizer(model, configure_trainable(model, config), config)
    for parameter in (p for name, p in model.named_parameters() if p.requires_grad and "head" not in name):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    new = build_optimizer(model, configure_trainable(model, config), config)
    assert restore_optimizer(new, model, optimizer_state_by_name(optimizer, model)) == []
    assert moments(model, new) == moments(model, optimizer)
