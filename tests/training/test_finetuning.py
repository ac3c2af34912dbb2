"""Runs that train the image encoder (§4.2-4.4)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import blip2
from blip2 import checkpoint
from blip2.backbones.language import LanguageModel
from blip2.backbones.vision_loaders import load_image_encoder
from blip2.builder import build, build_collator, choose_dtype
from blip2.config import ObjectivesConfig
from blip2.data.dataset import BatchDataset
from blip2.data.images import read_image
from blip2.data.sampler import sequential_batches
from blip2.data.sources import open_records
from blip2.errors import InputError
from blip2.model.generation import GenerationBatch, GenerationModel
from blip2.training.features import make_features
from blip2.training.optimizer import configure_trainable
from blip2.training.trainer import train
from fixtures.runs import assert_same_run, cut_short, lines
from fixtures.tiny import QFORMER, randomize

CPU = torch.device("cpu")
RATES = {"vision.*": 1e-3, "*": 1e-3}
FROZEN = {"vision.*": "frozen", "*": 1e-3}
STAGES = ("representation", "llama", "t5")


def tune(parts, run, stage="representation", **changes):
    """A recipe that trains the image encoder too."""
    if stage != "representation":
        changes |= {"stage": "generation", "language": {"name": getattr(parts, stage)}}
        changes["optimizer"] = {"learning_rate": {"language.*": "frozen", **RATES}, **changes.get("optimizer", {})}
    changes["optimizer"] = {
        "learning_rate": RATES,
        "warmup_steps": 0,
        "min_lr_rate": 1.0,
        **changes.get("optimizer", {}),
    }
    return parts.recipe(run, **changes)


def weights(run: Path):
    return load_file(checkpoint.latest_checkpoint(run) / "model.safetensors")


def is_behind(name):
    """What comes after the last block that is used, and gets no gradient."""
    return ".layernorm." in name or ".pooler." in name


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_the_image_encoder_are_the_slope_of_the_loss(parts, tmp_path, stage):
    """Through the cross-attention, the norm of the features and, in stage 2, the frozen LLM."""
    torch.manual_seed(0)  # the same weights whatever test ran before
    objectives = ObjectivesConfig(itm=0.0)  # its negatives are drawn, so that it has no slope
    recipe = tune(parts, tmp_path, stage, qformer={"dropout": 0.0}, objectives=objectives)
    built = build(recipe.model, CPU, objectives=recipe.objectives)
    model = built.model
    configure_trainable(model, recipe.optimizer)
    for part in (model.vision, model.image_norm, model.qformer):
        randomize(part)
    records = open_records(parts.images, recipe.data)
    (plan, *_) = sequential_batches(records, 4)
    preparation = BatchDataset(
        records, build_collator(recipe.model, built), model.vision.preprocessing, False, 1.0, False
    )
    batch = preparation[plan].batch
    loss = sum(model(batch).losses.values())
    loss.backward()
    own = {name: p for name, p in model.vision.named_parameters() if not is_behind(name)}
    assert {name for name, p in own.items() if p.grad is None or not p.grad.any()} == set()

    slope = sum(float(p.grad.square().sum()) for p in own.values())
    assert slope > 0
    start = {p: p.detach().clone() for p in own.values()}

    @torch.no_grad()
    def measured(step: float) -> float:
        around = []
        for sign in (1, -1):
            for p, value in start.items():
                p.copy_(value + sign * step * p.grad)
            around.append(float(sum(model(batch).losses.values())))
        return (around[0] - around[1]) / (2 * step)

    step = 3e-4 / slope  # the loss changes by so much, which float32 tells, whether it is steep or flat
    straight = (4 * measured(step / 2) - measured(step)) / 3  # without the bend of the loss, which goes with step ** 2
    assert straight == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("stage", STAGES)
def test_only_what_has_a_rate_changes(parts, tmp_path, stage):
    rates = {"vision.network.layers.1.*": 1e-3, "vision.*": "frozen", "language.*": "frozen", "*": 1e-3}
    recipe = tune(parts, tmp_path / "run", stage, training={"max_steps": 1, "save_steps": 1})
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, learning_rate=rates))
    train(recipe)
    pretrained = load_image_encoder(parts.vision).state_dict()
    trained = {k.removeprefix("vision."): v for k, v in weights(tmp_path / "run").items() if k.startswith("vision.")}
    assert set(trained) == set(pretrained)
    changed = {name for name in trained if not torch.equal(trained[name], pretrained[name])}
    # The gradient of the former is nothing but rounding; the latter is drawn, for the files do not have it.
    rounding = {"network.layers.1.attention.k_proj.bias", "network.pooler.dense.weight"}
    assert changed - rounding == {name for name in pretrained if ".layers.1." in name} - rounding
    assert not any(name.startswith("language.") for name in weights(tmp_path / "run"))


@pytest.mark.parametrize("stage", ["representation", "t5"])
def test_activation_checkpointing_changes_nothing(parts, tmp_path, stage):
    """Of the Q-Former with its dropout, of the image encoder with its drop path, and of the frozen LLM."""
    for name, checkpointing in (("plain", False), ("lean", True)):
        training = {"max_steps": 2, "save_steps": 2, "gradient_checkpointing": checkpointing}
        train(tune(parts, tmp_path / name, stage, training=training, vision={"drop_path_rate": 0.3}))
    assert_same_run(tmp_path / "plain", tmp_path / "lean")
    plain, lean = (
        torch.load(checkpoint.latest_checkpoint(tmp_path / name) / "optimizer.pt") for name in ("plain", "lean")
    )
    moments = [each["optimizer"] for each in (plain, lean)]
    assert moments[0].keys() == moments[1].keys()
    learned = [(moments[0][key]["exp_avg"], state["exp_avg"]) for key, state in moments[1].items() if state]
    assert learned and all(torch.equal(*each) for each in learned)


LARGE = {
    "vit": hf.ViTConfig(
        hidden_size=24, num_hidden_layers=7, num_attention_heads=2, intermediate_size=96, image_size=32, patch_size=4
    ),
    "opt": hf.OPTConfig(
        vocab_size=259, hidden_size=32, ffn_dim=128, num_hidden_layers=6, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=96,
    ),
    "t5": hf.T5Config(
        vocab_size=259, d_model=32, d_kv=8, d_ff=128, num_layers=6, num_heads=4, decoder_start_token_id=257,
        feed_forward_proj="gated-gelu",
    ),
}  # fmt: skip


def kept(model, batch):
    """Bytes that autograd keeps of each part for the backward pass, but for weights, and the gradients."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = sum(model(batch).losses.values())
    size = sum(storage.nbytes() for storage in storages.values())
    loss.backward()
    return size, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_activation_checkpointing_keeps_a_block_s_inputs_alone(parts, tmp_path, language):
    """An image encoder that trains and a frozen LLM, each deep enough to see it: the case of VQA's fine-tuning."""
    vision = load_image_encoder(str(save(hf.ViTModel(LARGE["vit"], add_pooling_layer=False), tmp_path / "vit")))
    llm = hf.OPTForCausalLM if language == "opt" else hf.T5ForConditionalGeneration
    model = GenerationModel(vision, QFORMER, LanguageModel(randomize(llm(LARGE[language]))))
    vision.requires_grad_(True)
    model.train()
    ids = torch.randint(5, 250, (2, 12), generator=torch.Generator().manual_seed(1))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    batch = GenerationBatch(pixels, ids, torch.ones_like(ids).bool(), ids)
    whole, gradients = kept(model, batch)
    sizes = []
    for part in (model.vision, model.language):
        assert part.gradient_checkpointing_enable()
        size, same = kept(model, batch)
        sizes.append(size)
        assert all(torch.equal(gradients[name], gradient) for name, gradient in same.items()), len(gradients)
        assert set(same) == set(gradients)
    assert not model.language.training and model.language.is_frozen
    # Each of the two keeps less than a third of what it kept, the Q-Former all of it.
    assert sizes[0] < 0.75 * whole and sizes[1] < 0.35 * whole, (whole, sizes)
    with torch.no_grad():  # nothing is kept, and nothing computed twice
        calls = []
        hook = model.language.blocks[0].register_forward_hook(lambda *_: calls.append(1))
        model(batch)
        hook.remove()
    assert calls == [1]


def test_a_cnn_that_keeps_all_is_named(parts, tmp_path, cnn, capsys):
    recipe = tune(parts, tmp_path / "run", training={"max_steps": 1, "gradient_checkpointing": True})
    train(replace(recipe, vision=replace(recipe.vision, name=cnn, image_size=32)))
    said = " ".join(capsys.readouterr().err.split())
    assert "has no effect on the image encoder, which is not a stack of equal blocks" in said
    assert "training.gradient_checkpointing has no effect" in said


def save(network, folder):
    network.save_pretrained(folder)
    return folder


# -- what is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_trained_encoder_is_kept_and_loaded(parts, tmp_path, precision):
    """In float32, though it computes in half precision; what cannot be seen in bfloat16 is learned all the same."""
    recipe = tune(parts, tmp_path / "run", optimizer={"learning_rate": {"*": 1e-5}}, training={"precision": precision})
    train(recipe)
    kept = {name: t for name, t in weights(tmp_path / "run").items() if name.startswith("vision.")}
    pretrained = load_image_encoder(parts.vision)
    assert {t.dtype for t in kept.values()} == {torch.float32}
    moved = [name for name, t in kept.items() if not torch.equal(t, pretrained.state_dict()[name[len("vision.") :]])]
    assert {name for name in kept if not is_behind(name)} - set(moved) == set()

    found = blip2.load(tmp_path / "run", device="cpu")
    trained = load_image_encoder(parts.vision)
    trained.load_state_dict({name.removeprefix("vision."): t for name, t in kept.items()})
    image = open_records(parts.images, recipe.data)[0].image
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(found.model.vision.encode(pixels), trained.encode(pixels), atol=0, rtol=0)
    assert not torch.equal(found.encode_images(read_image(image)), pretrained.encode(pixels[:1]))
    assert (trained.encode(pixels) - pretrained.encode(pixels)).abs().max() > 0
    assert found.model.vision.is_frozen


CHANGES = {
    "fp32": {"optimizer": {"layer_decay": 0.7}, "vision": {"drop_path_rate": 0.4}},
    "bf16": {"optimizer": {"layer_decay": 0.7}, "vision": {"drop_path_rate": 0.4}, "training": {"precision": "bf16"}},
}


@pytest.mark.parametrize(("variant", "stage"), [("fp32", "representation"), ("bf16", "representation"), ("fp32", "t5")])
def test_going_on_equals_never_stopping(parts, tmp_path, variant, stage):
    changes = {key: dict(value) for key, value in CHANGES[variant].items()}
    changes["training"] = {"max_steps": 6, "save_steps": 2, "save_total_limit": 3, **changes.get("training", {})}
    recipe = tune(parts, tmp_path / "run", stage, **changes)
    train(recipe)
    copy = cut_short(tmp_path / "run", 2)
    train(replace(recipe, output=str(copy)), resume=True)
    assert_same_run(tmp_path / "run", copy)


def test_half_precision_has_full_weights(parts, tmp_path):
    """bf16 has no number between 1 and 1.0078, and a step of 1e-5 would be lost in it."""
    recipe = tune(parts, tmp_path / "run", vision={"dtype": "bf16"})
    with pytest.raises(InputError, match=r"vision\..* trains at 0.001 but is in bfloat16: set vision\.dtype to fp32"):
        train(recipe)
    gpu = torch.device("cuda")
    assert choose_dtype(None, gpu) == torch.bfloat16
    assert choose_dtype(tune(parts, tmp_path).model.vision.dtype, gpu) == torch.float32
    assert choose_dtype(tune(parts, tmp_path, vision={"dtype": "fp16"}).model.vision.dtype, gpu) == torch.float16
    assert parts.recipe(tmp_path).model.vision.dtype is None  # frozen


# -- layer-wise decay and drop path --------------------------------------------------------------------------------


def test_a_run_moves_layers_as_layer_decay_says(parts, tmp_path):
    """The first step of AdamW, from the same gradients."""
    one = {"max_steps": 1, "save_steps": 1}
    start = {f"vision.{name}": t for name, t in load_image_encoder(parts.vision).state_dict().items()}
    moved = []
    for decay in (1.0, 0.5):
        recipe = tune(parts, tmp_path / str(decay), optimizer={"layer_decay": decay}, training=one)
        train(recipe)
        after = weights(tmp_path / str(decay))
        moved.append({name: float((after[name] - t).norm()) for name, t in start.items() if not is_behind(name)})
    for name, plain in moved[0].items():
        power = 3 if "embeddings" in name else 2 if ".layers.0." in name else 1
        assert plain > 0
        assert moved[1][name] / plain == pytest.approx(0.5**power, rel=2e-3), name


def test_drop_path_is_applied_in_a_run(parts, tmp_path):
    """To training and not to validation."""
    vit = randomize(hf.AutoModel.from_pretrained(parts.vision))
    vit.save_pretrained(tmp_path / "vit")
    for name, rate in (("without", 0.0), ("with", 0.9)):
        train(
            tune(
                parts,
                tmp_path / name,
                vision={"name": str(tmp_path / "vit"), "drop_path_rate": rate},
                data={"validation": parts.images},
                qformer={"dropout": 0.0},
                optimizer={"learning_rate": {"*": 1e-12}, "weight_decay": 0.0},
                training={"max_steps": 2, "save_steps": 2, "eval_steps": 2},
            )
        )
    without, dropped = lines(tmp_path / "without"), lines(tmp_path / "with")
    for one, other in zip(without, dropped, strict=True):
        assert other["itc"] != one["itc"]  # in which nothing else is drawn
    assert dropped[-1]["validation_itg"] == pytest.approx(without[-1]["validation_itg"], rel=1e-6)


@pytest.fixture
def cnn(tmp_path):
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], num_stages=2)
    randomize(hf.ResNetModel(config)).save_pretrained(tmp_path / "cnn")
    return str(tmp_path / "cnn")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vision": {"drop_path_rate": 0.1}, "optimizer": {"learning_rate": FROZEN}},
            "vision.drop_path_rate is 0.1, but optimizer",
        ),
        (
            {"optimizer": {"learning_rate": FROZEN, "layer_decay": 0.9}},
            "optimizer.layer_decay is 0.9, but optimizer.learning_rate fre",
        ),
        (
            {"data": {"cached_views": 2}},
            "data.cached_views needs a frozen image encoder, but optimizer.learning_rate trains",
        ),
    ],
)
def test_what_needs_an_encoder_that_trains_or_is_frozen(parts, tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as raised:
        train(tune(parts, tmp_path / "run", **changes))
    assert "\n" not in str(raised.value)


def test_features_of_an_encoder_that_trains_are_not_made(parts, tmp_path):
    with pytest.raises(InputError, match="needs a frozen image encoder"):
        make_features(tune(parts, tmp_path / "run", data={"cached_views": 2}))


@pytest.mark.parametrize("changes", [{"vision": {"drop_path_rate": 0.1}}, {"optimizer": {"layer_decay": 0.9}}])
def test_a_cnn_trains_at_one_rate(parts, tmp_path, cnn, changes):
    recipe = tune(parts, tmp_path / "run", **changes)
    recipe = replace(recipe, vision=replace(recipe.vision, name=cnn, image_size=32))
    with pytest.raises(InputError, match="a ResNetModel, is not a stack of equal blocks"):
        train(recipe)


def test_a_cnn_keeps_the_statistics_that_it_learned(parts, tmp_path, cnn):
    recipe = tune(parts, tmp_path / "run", vision={"name": cnn, "image_size": 32})
    train(recipe)
    kept = weights(tmp_path / "run")
    (first, *_) = (name for name in kept if name.endswith("running_mean"))
    assert not torch.equal(kept[first], load_image_encoder(cnn).state_dict()[first.removeprefix("vision.")])
    found = blip2.load(tmp_path / "run", device="cpu").model
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in kept.items())
