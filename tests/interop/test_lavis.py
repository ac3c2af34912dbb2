"""LAVIS's files: the same numbers there and back, and the image encoders that it loads."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, T5ForConditionalGeneration

import blip2
from blip2.backbones.vision_loaders import load_image_encoder
from blip2.builder import build
from blip2.cli import split_overrides
from blip2.config import ObjectivesConfig, QFormerConfig
from blip2.convert import convert
from blip2.errors import InputError
from blip2.interop import lavis
from blip2.interop.checkpoint import Checkpoint
from blip2.interop.weights import Weights
from blip2.model.generation import GenerationBatch
from blip2.model.representation import Negatives, RepresentationBatch, RepresentationModel
from conftest import draw
from fixtures.checkpoints import lavis_state, save_transformers
from fixtures.tiny import no_encoder, randomize

FIXTURES = Path(__file__).parents[1] / "fixtures"
IMAGES = [draw("disc", "red", 0), draw("square", "blue", 7), draw("stripe", "green", 3)]
TEXTS = ["a red disc", "the square is blue here and there"]


@pytest.fixture
def save(tmp_path):
    def make(state, name="blip2.pth", **more):
        torch.save({"model": state, **more} if more or name != "bare.pth" else state, tmp_path / name)
        return tmp_path / name

    return make


def same(first, second):
    here, there = (torch.load(path, weights_only=True)["model"] for path in (first, second))
    assert set(here) == set(there)
    return all(here[n].dtype == there[n].dtype and torch.equal(here[n], there[n]) for n in here)


def refuses(path, match, **changes):
    with pytest.raises(InputError, match=match) as error:
        blip2.load(path, device="cpu", overrides={key.replace("__", "."): value for key, value in changes.items()})
    assert "\n" not in str(error.value)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_the_fixture_of_stage_1_gives_its_losses(parts, save, tmp_path):
    """A .pth made of what LAVIS saved; the images of the fixture are features."""
    arrays = np.load(FIXTURES / "stage1.npz")
    state = {k.removeprefix("param/"): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith("param/")}
    clip = CLIPVisionConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=14, patch_size=2)
    CLIPVisionModel(clip).save_pretrained(tmp_path / "clip")
    changes = {"vision.name": str(tmp_path / "clip"), "qformer.num_attention_heads": 4, "qformer.tokenizer": parts.bert}
    with pytest.raises(InputError, match=r"has 58 tokens including \[DEC\], but qformer.vocab_size is 201"):
        blip2.load(save(state), device="cpu", overrides=changes)
    # The fixture's vocabulary has no words, only 201 ids.
    tokenizer = _tokenizer_of(201, tmp_path / "words")
    model = blip2.load(save(state), device="cpu", overrides={**changes, "qformer.tokenizer": tokenizer}).model
    image, ids, mask = (torch.from_numpy(arrays[f"input/{k}"]) for k in ("image", "input_ids", "attention_mask"))
    drawn = Negatives(*(torch.from_numpy(arrays[k]) for k in ("neg_image_for_text", "neg_text_for_image")))
    losses = model(RepresentationBatch(image, ids, mask.bool(), torch.arange(4)), negatives=drawn).losses
    for here, there in (("itc", "loss_itc"), ("itm", "loss_itm"), ("itg", "loss_lm")):
        assert losses[here].item() == pytest.approx(arrays[f"loss/{there}"].item(), abs=1e-5)


def _tokenizer_of(size, folder):
    from transformers import BertTokenizerFast

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(size - 6))]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def test_the_fixture_of_stage_2_gives_its_loss(parts, save, tmp_path):
    arrays = np.load(FIXTURES / "stage2_opt.npz")
    state = {k.removeprefix("param/"): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith("param/")}
    assert any(name.startswith("opt_model.") for name in state)
    assert any(name.startswith("visual_encoder.") for name in state)  # no real one: the one named takes its place
    _opt_of(260, tmp_path / "opt")
    clip = CLIPVisionConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=14, patch_size=2)
    CLIPVisionModel(clip).save_pretrained(tmp_path / "clip")
    changes = {
        "vision.name": str(tmp_path / "clip"),
        "language.name": str(tmp_path / "opt"),
        "qformer.num_attention_heads": 4,
    }
    model = blip2.load(save(state), device="cpu", overrides=changes).model
    image, ids, mask = (torch.from_numpy(arrays[f"input/{k}"]) for k in ("image", "ids", "mask"))
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : int(arrays["prompt_length"][0])] = -100
    loss = model(GenerationBatch(image, ids, mask.bool(), labels)).losses["lm"]
    assert loss.item() == pytest.approx(arrays["loss"].item(), abs=1e-5)


def _opt_of(size, folder):
    """An OPT of the fixture's sizes and other weights: the right ones are in the .pth."""
    from transformers import OPTConfig, OPTForCausalLM

    from conftest import byte_tokenizer

    sizes = {"vocab_size": size, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=4, max_position_embeddings=128)).save_pretrained(folder)
    byte_tokenizer(True).save_pretrained(folder)


def test_names_and_shapes_of_the_real_checkpoint():
    """Of stage 1, as LAVIS saves it, without its image encoder."""
    rows = [line.split("\t") for line in (FIXTURES / "lavis_keys_stage1.txt").read_text().splitlines()]
    expected = {name: tuple(int(n) for n in shape.strip("()").split(",") if n.strip()) for name, shape, _ in rows}
    encoder = no_encoder(4, 1408)
    with torch.device("meta"):
        model = RepresentationModel(encoder, QFormerConfig(), ObjectivesConfig())
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("vision.")}
    config = lavis.ModelConfig("representation", lavis.VisionConfig(""))
    checkpoint = Checkpoint("ours", "blip2", "", config, Weights(weights))
    state = lavis.to_state_dict(checkpoint, "opt")
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    with torch.device("meta"):
        theirs = {name: torch.empty(shape) for name, shape in expected.items()}
    lavis.drop_tied(
        {k: torch.zeros(1) if "predictions" in k or "word" in k else t for k, t in theirs.items()}, Path("x")
    )
    kept = Weights({k: t for k, t in theirs.items() if "predictions.decoder" not in k and "position_ids" not in k})
    back = kept.rename_keys(lavis.QFORMER_KEYS, "theirs")
    assert {k: t.shape for k, t in back.items()} == {k: t.shape for k, t in weights.items()}


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["1", "opt", "t5"])
def test_through_transformers_and_back(parts, save, tmp_path, stage):
    """LAVIS to this project to transformers to this project to LAVIS, bit for bit."""
    there = save(lavis_state(stage))
    changes = {"qformer.tokenizer": parts.bert} if stage == "1" else {"language.name": getattr(parts, stage)}
    convert(there, tmp_path / "ours", "blip2", changes)
    convert(tmp_path / "ours", tmp_path / "theirs", "transformers")
    convert(tmp_path / "theirs", tmp_path / "ours-again", "blip2")
    convert(tmp_path / "ours-again", tmp_path / "back.pth", "lavis")
    assert same(there, tmp_path / "back.pth")


def test_mixed_dtypes_stay(parts, save, tmp_path):
    """LAVIS halves the matrices of its image encoder and nothing else."""
    state = lavis_state("1")
    for name in state:
        if name.startswith("visual_encoder.") and name.endswith(("proj.weight", "fc1.weight", "fc2.weight")):
            state[name] = state[name].half()
    there = save(state)
    convert(there, tmp_path / "theirs", "transformers", {"qformer.tokenizer": parts.bert})
    convert(tmp_path / "theirs", tmp_path / "back.pth", "lavis")
    assert same(there, tmp_path / "back.pth")


def test_with_the_llm_inside(parts, save, tmp_path):
    changes = {"language.name": parts.opt}
    convert(save(lavis_state("opt")), tmp_path / "full.pth", "lavis", changes, with_language=True)
    state = torch.load(tmp_path / "full.pth", weights_only=True)["model"]
    assert "opt_model.model.decoder.embed_tokens.weight" in state and "opt_model.lm_head.weight" not in state
    loaded = blip2.load(tmp_path / "full.pth", device="cpu", overrides=changes)
    expected = blip2.load(save(lavis_state("opt")), device="cpu", overrides=changes)
    assert loaded.caption(IMAGES) == expected.caption(IMAGES)


def test_settings_for_which_its_files_have_no_place(parts, save, tmp_path, caplog):
    for number, (stage, key, value, note) in enumerate((
        ("t5", "language.prompt", "a photo of", "to 'a photo of', with which this model was trained"),
        ("1", "max_length", 8, "trained on texts of up to 8 tokens: set max_txt_len"),
    )):  # fmt: skip
        there = save(lavis_state(stage))
        changes = {"qformer.tokenizer": parts.bert} if stage == "1" else {"language.name": parts.t5}
        convert(there, tmp_path / f"same-{number}.pth", "lavis", changes)
        assert note not in caplog.text
        convert(there, tmp_path / f"other-{number}.pth", "lavis", {**changes, key: value})
        assert note in caplog.text


def test_what_else_lies_in_the_file_is_no_matter(parts, save):
    """Optimizer and settings of a training run of LAVIS; a state dict by itself."""
    state = lavis_state("1")
    changes = {"qformer.tokenizer": parts.bert}
    full = blip2.load(
        save(state, optimizer={"state": {}}, config={"run": {"lr": 1e-4}}, epoch=3), "cpu", overrides=changes
    )
    bare = blip2.load(save(state, "bare.pth"), "cpu", overrides=changes)
    assert torch.equal(full.match(IMAGES, TEXTS), bare.match(IMAGES, TEXTS))
    assert full.match(IMAGES, TEXTS).std() > 0


def test_texts_are_normalized_as_lavis_normalizes_them(parts, save):
    changes = {"qformer.tokenizer": parts.bert}
    ours = blip2.load(save(lavis_state("1")), device="cpu", overrides=changes)
    assert ours.config.text_normalization == "lavis"
    signs = ["A Red (disc).", "The square: is *blue*; here!"]
    bare = ["a red disc", "the square is blue here"]
    assert torch.equal(ours.similarity(IMAGES, signs), ours.similarity(IMAGES, bare))
    assert torch.equal(ours.match(IMAGES, signs), ours.match(IMAGES, bare))
    _, given = split_overrides(["match", "blip2.pth", "--text_normalization", "none"])
    plain = blip2.load(save(lavis_state("1")), "cpu", overrides=changes | given)
    assert not torch.allclose(plain.similarity(IMAGES, signs), plain.similarity(IMAGES, bare), atol=1e-3)
    assert torch.equal(plain.similarity(IMAGES, bare), ours.similarity(IMAGES, bare))


def test_questions_are_normalized_as_lavis_normalizes_them(parts, save, monkeypatch):
    ours = blip2.load(save(lavis_state("opt")), device="cpu", overrides={"language.name": parts.opt})
    seen = []
    tokenize = ours._tokenize_prompts
    monkeypatch.setattr(
        ours, "_tokenize_prompts", lambda prompts, *rest: seen.append(list(prompts)) or tokenize(prompts, *rest)
    )
    ours.answer(IMAGES[0], ["What (Color) is it?", "A Disc."])
    assert seen and all(
        prompts == ["Question: what color is it? Answer:", "Question: a disc Answer:"] for prompts in seen
    )
    seen.clear()
    ours.caption(IMAGES[0], "A Photo. Of")
    assert seen and all(prompts == ["A Photo. Of"] for prompts in seen)


def test_captions_stop_where_lavis_stops(parts, save):
    ours = blip2.load(save(lavis_state("opt")), device="cpu", overrides={"language.name": parts.opt})
    assert ours.config.language.stop_string == "\n" and ours.tokenizer.decode([ours.eos_token_id]) == "\n"
    ours = blip2.load(save(lavis_state("t5")), device="cpu", overrides={"language.name": parts.t5})
    assert ours.eos_token_id == ours.tokenizer.eos_token_id
    assert ours.model.language.network.config.dense_act_fn == "gelu"


def test_train_on_from_it(parts, save, tmp_path):
    """Stage 2 begins with LAVIS's stage 1."""
    from blip2.training.trainer import train

    path = str(save(lavis_state("1")))
    sizes = {"num_hidden_layers": 3, "bert": None, "hidden_size": 64, "num_attention_heads": 1}
    recipe = parts.recipe(
        tmp_path / "run", stage="generation", vision={"name": path}, qformer=sizes, language={"name": parts.opt},
        start_from=path, training={"max_steps": 1, "device": "cpu"},
    )  # fmt: skip
    after = blip2.load(train(recipe), device="cpu").model.state_dict()
    before = lavis_state("1")
    torch.testing.assert_close(after["qformer.queries"], before["query_tokens"], atol=0.01, rtol=0)
    torch.testing.assert_close(after["image_norm.weight"], before["ln_vision.weight"], atol=0.01, rtol=0)


# -- image encoders ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_eva_is_computed_as_lavis_does(parts, save):
    """Its blocks written out: no bias of keys, queries scaled, pre-norm, no norm at the end."""
    state = lavis_state("1")
    encoder = blip2.load(save(state), device="cpu", overrides={"qformer.tokenizer": parts.bert}).model.vision
    image = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    w = {k.removeprefix("visual_encoder."): t for k, t in state.items() if k.startswith("visual_encoder.")}
    f = torch.nn.functional
    patches = f.conv2d(image, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=7).flatten(2).mT
    x = torch.cat([w["cls_token"].expand(2, -1, -1), patches], 1) + w["pos_embed"]
    for i in range(2):
        b = {k.removeprefix(f"blocks.{i}."): t for k, t in w.items() if k.startswith(f"blocks.{i}.")}
        y = f.layer_norm(x, [176], b["norm1.weight"], b["norm1.bias"], 1e-6)
        bias = torch.cat([b["attn.q_bias"], torch.zeros(176), b["attn.v_bias"]])
        q, k, v = f.linear(y, b["attn.qkv.weight"], bias).unflatten(2, (3, 2, 88)).permute(2, 0, 3, 1, 4)
        seen = ((q * 88**-0.5) @ k.mT).softmax(-1) @ v
        x = x + f.linear(seen.transpose(1, 2).flatten(2), b["attn.proj.weight"], b["attn.proj.bias"])
        y = f.layer_norm(x, [176], b["norm2.weight"], b["norm2.bias"], 1e-6)
        y = f.gelu(f.linear(y, b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
        x = x + f.linear(y, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
    torch.testing.assert_close(encoder.encode(image), x, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("file", [21, 28, 42])
@pytest.mark.parametrize("size", [21, 28, 42])
def test_any_size_from_a_file_of_any(parts, save, file, size):
    state = lavis_state("1")
    state["visual_encoder.pos_embed"] = torch.randn(1, (file // 7) ** 2 + 1, 176)
    changes = {"qformer.tokenizer": parts.bert, "vision.image_size": size}
    vision = blip2.load(save(state), device="cpu", overrides=changes).model.vision
    table = vision.network.embeddings.position_embedding
    assert table.shape[1] == vision.num_tokens == (size // 7) ** 2 + 1
    assert torch.equal(table[:, 0], state["visual_encoder.pos_embed"][:, 0])
    if file == size:
        assert torch.equal(table, state["visual_encoder.pos_embed"])
    assert vision.encode(torch.randn(1, 3, size, size)).isfinite().all()


@torch.no_grad()
def test_the_file_of_the_encoder_alone(parts, save, tmp_path):
    """As eva_vit_g.pth is: with the block that BLIP-2 removes, and a head that it has no use for."""
    state = {k.removeprefix("visual_encoder."): t for k, t in lavis_state("1").items() if "visual_encoder" in k}
    last = {k.replace("blocks.1", "blocks.2"): torch.randn_like(t) for k, t in state.items() if "blocks.1" in k}
    whole = {
        **state,
        **last,
        "norm.weight": torch.ones(176),
        "norm.bias": torch.ones(176),
        "head.weight": torch.ones(2, 176),
    }
    torch.save(whole, tmp_path / "eva.pth")
    without = save({k: t for k, t in lavis_state("1").items() if "visual_encoder" not in k})
    changes = {"qformer.tokenizer": parts.bert}
    refuses(without, "contains no image encoder: set vision.name to the image encoder that it was trained with, for")
    named = blip2.load(without, device="cpu", overrides={**changes, "vision.name": str(tmp_path / "eva.pth")})
    inside = blip2.load(save(lavis_state("1"), "whole.pth"), device="cpu", overrides=changes)
    assert torch.equal(named.encode_images(IMAGES), inside.encode_images(IMAGES))
    recipe = parts.recipe(tmp_path / "run", vision={"name": str(tmp_path / "eva.pth")})
    assert build(recipe.model, torch.device("cpu")).model.vision.hidden_size == 176
    refuses(tmp_path / "eva.pth", "contains an image encoder, expected a BLIP-2")


@torch.no_grad()
def test_the_heads_of_an_eva_of_another_width_are_asked_for(parts, save, tmp_path):
    def narrower(tensor):  # 96 in place of 176, which heads of 88 do not divide
        for dim, size in enumerate(tensor.shape):
            if size % 176 == 0:
                tensor = tensor.narrow(dim, 0, size * 96 // 176)
        return tensor.clone()

    state = {k.removeprefix("visual_encoder."): t for k, t in lavis_state("1").items() if "visual_encoder" in k}
    last = {k.replace("blocks.1", "blocks.2"): t for k, t in state.items() if "blocks.1" in k}
    torch.save({name: narrower(tensor) for name, tensor in {**state, **last}.items()}, tmp_path / "eva.pth")
    named = {"name": str(tmp_path / "eva.pth")}
    features = []
    for heads in (None, 4, 6, 7):
        recipe = parts.recipe(tmp_path / "run", vision={**named, "num_attention_heads": heads})
        if heads in (None, 7):
            with pytest.raises(
                InputError, match=r"has width 96 and .* heads, .*: set vision.num_attention_heads to the number"
            ):
                build(recipe.model, torch.device("cpu"))
            continue
        vision = build(recipe.model, torch.device("cpu")).model.vision
        assert vision.network.config.num_attention_heads == heads
        features.append(vision.encode(torch.ones(1, 3, 28, 28)))
    assert not torch.allclose(*features)  # so that a guess would be wrong in silence
    with pytest.raises(InputError, match=r"vision.num_attention_heads is 3, but the files of .* determine"):
        build(parts.recipe(tmp_path / "run", vision={"num_attention_heads": 3}).model, torch.device("cpu"))


def test_two_names_of_one_matrix_with_other_values_are_refused(parts, save):
    """As in LAVIS's FlanT5, whose output matrix is not its embedding, with a configuration that ties them."""
    there = T5ForConditionalGeneration.from_pretrained(parts.t5).state_dict()
    whole = {**lavis_state("t5"), **{f"t5_model.{name}": tensor.clone() for name, tensor in there.items()}}
    changes = {"language.name": parts.t5, "qformer.tokenizer": parts.bert}
    blip2.load(save(whole), device="cpu", overrides=changes)
    whole["t5_model.lm_head.weight"] += 1
    refuses(
        save(whole), "has different values for language.network.* and .*, which are one matrix",
        **{key.replace(".", "__"): value for key, value in changes.items()},
    )  # fmt: skip


@torch.no_grad()
def test_clip_inside(parts, save, tmp_path):
    """LAVIS's ViT-L: CLIP's, without its last block."""
    config = CLIPVisionConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=1, intermediate_size=40, image_size=28, patch_size=7
    )
    clip = randomize(CLIPVisionModel(config)).eval()
    clip.save_pretrained(tmp_path / "clip")
    there = {k: t for k, t in lavis_state("1").items() if "visual_encoder" not in k}
    for name in [name for name in there if "crossattention.self.key" in name or "crossattention.self.value" in name]:
        if name.endswith("weight"):
            there[name] = there[name][:, :64]
    there["ln_vision.weight"], there["ln_vision.bias"] = there["ln_vision.weight"][:64], there["ln_vision.bias"][:64]
    there = {k: t.clone() for k, t in there.items()}
    changes = {"qformer.tokenizer": parts.bert, "vision.name": str(tmp_path / "clip")}
    convert(save(there), tmp_path / "with.pth", "lavis", changes)
    state = torch.load(tmp_path / "with.pth", weights_only=True)["model"]
    block = "visual_encoder.transformer.resblocks"
    own = clip.state_dict()
    joint = torch.cat([own[f"encoder.layers.1.self_attn.{p}_proj.weight"] for p in "qkv"])
    assert torch.equal(state[f"{block}.1.attn.in_proj_weight"], joint)
    assert not any(name.startswith((f"{block}.2.", "visual_encoder.ln_post")) for name in state)
    again = blip2.load(tmp_path / "with.pth", device="cpu", overrides={"qformer.tokenizer": parts.bert})
    expected = load_image_encoder(str(tmp_path / "clip"), image_size=28)
    images = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(again.model.vision.encode(images), expected.encode(images))
    for name in [name for name in state if name.startswith("visual_encoder.") and "ln" not in name]:
        state[name] = state[name].half()
    torch.save({"model": state}, tmp_path / "half.pth")
    convert(tmp_path / "half.pth", tmp_path / "again.pth", "lavis", {"qformer.tokenizer": parts.bert})
    assert same(tmp_path / "half.pth", tmp_path / "again.pth")
    larger = {"qformer.tokenizer": parts.bert, "vision.image_size": 42}
    convert(tmp_path / "with.pth", tmp_path / "larger.pth", "lavis", larger)
    resized = blip2.load(tmp_path / "larger.pth", device="cpu", overrides={"qformer.tokenizer": parts.bert})
    expected = load_image_encoder(str(tmp_path / "clip"), image_size=42)
    images = torch.randn(2, 3, 42, 42)
    torch.testing.assert_close(resized.model.vision.encode(images), expected.encode(images))


# -- what can be wrong -------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


def test_a_file_that_carries_code(save, tmp_path):
    path = save({"query_tokens": Evil()})
    refuses(path, r"blip2.pth is not loaded, because loading it would run (posix|nt|os).system: save")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil()))
    refuses(tmp_path / "plain.pth", "plain.pth (is not loaded|cannot be read)")


def test_a_truncated_file(save):
    path = save(lavis_state("1"))
    path.write_bytes(path.read_bytes()[:1000])
    refuses(path, r"blip2.pth cannot be read \(.*\): check its permissions, or copy or download it again")


@pytest.mark.parametrize(
    ("stage", "left_out"),
    [
        ("1", "attn.v_bias"), ("1", "patch_embed"), ("1", "intermediate_query"), ("1", "Qformer.bert.encoder"),
        ("opt", "visual_encoder.blocks"), ("1", "Qformer.bert.embeddings.word"), ("1", "text_proj"),
    ],
)  # fmt: skip
def test_parts_that_are_not_there(parts, save, stage, left_out):
    state = {name: tensor for name, tensor in lavis_state(stage).items() if left_out not in name}
    named = {"language__name": parts.opt} if stage == "opt" else {"qformer__tokenizer": parts.bert}
    refuses(save(state), r"has no |is not a complete BLIP-2|does not fit|missing|correct", **named)


def test_odd_shapes_and_names(parts, save):
    refuses(save({**lavis_state("1"), "query_tokens": torch.zeros(4, 64)}), "is not a complete BLIP-2")
    refuses(save({1: torch.zeros(2)}), "contains no state dict")
    refuses(
        save(lavis_state("1")),
        "qformer.num_attention_heads 'abc'",
        qformer__num_attention_heads="abc",
        qformer__tokenizer=parts.bert,
    )


def test_another_encoder_is_not_taken_for_eva(parts, tmp_path):
    """As timm has a plain ViT: the same names, but one bias of query, key and value."""
    state = {"cls_token": torch.zeros(1, 1, 64), "blocks.0.attn.qkv.bias": torch.zeros(192)}
    torch.save(state, tmp_path / "vit.pth")
    recipe = parts.recipe(tmp_path / "run", vision={"name": str(tmp_path / "vit.pth")})
    with pytest.raises(InputError, match="contains an image encoder that is neither EVA-CLIP nor CLIP: give timm"):
        build(recipe.model, torch.device("cpu"))


def test_no_file(tmp_path):
    refuses(tmp_path / "none.pth", r"there is no file .*none.pth: check its path")


def test_files_of_other_models(save):
    refuses(save({"linear.weight": torch.zeros(2)}), r"\(it has no query_tokens, but linear.weight\)")
    refuses(save({"a": 1}), "contains no state dict")
    refuses(save(lavis_state("instruct-llama")), "does not name its LLM: set language.name, for example to lmsys/vic")
    refuses(
        save({**lavis_state("1"), "extra.weight": torch.zeros(2)}),
        "has 1 weight unknown in BLIP-2: ext",
    )


def test_what_has_to_be_named(parts, save):
    refuses(save(lavis_state("opt")), "does not name its LLM: set language.name, for example to facebook")
    refuses(save(lavis_state("t5")), "set language.name, for example to google/flan-t5-xl")
    state = lavis_state("1")
    state["query_tokens"] = torch.zeros(1, 4, 48)
    refuses(
        save(state),
        "the width of its Q-Former is 48, not a multiple of 64, the width of a head in BERT: set"
        " qformer.num_attention_heads",
    )


def test_an_output_matrix_that_is_not_tied(save):
    state = lavis_state("1")
    state["Qformer.cls.predictions.decoder.weight"] = torch.zeros(58, 64)
    refuses(
        save(state),
        "word_embeddings.weight is missing or differs from Qformer.cls.predictions.decoder.weight, but",
    )


# -- what LAVIS cannot hold --------------------------------------------------------------------------------------------


def test_other_parts_are_refused_before_anything_is_written(runs, tmp_path, parts):
    for source, match in (
        (
            runs["stage1"],
            "the image encoder of .* has num_attention_heads 2, but LAVIS, .*, would use another value: conv",
        ),
        (runs["llama"], "has an LLM of type llama; LAVIS's BLIP-2 supports OPT and T5: convert it to transformers"),
    ):
        with pytest.raises(InputError, match=match):
            convert(source, tmp_path / "out.pth", "lavis")
    assert not list(tmp_path.iterdir())


def test_a_bias_of_keys_is_refused(parts, tmp_path):
    """In EVA's layout there is no place for it."""
    model = save_transformers(tmp_path / "there", None, parts.bert, width=64, heads=1, vision=176)
    convert(tmp_path / "there", tmp_path / "out.pth", "lavis")
    model.vision_model.encoder.layers[1].self_attn.qkv.bias.data[200] = 1
    model.save_pretrained(tmp_path / "there")
    with pytest.raises(InputError, match=r"a nonzero key bias \(visual_encoder.blocks.1.attn.qkv.bias in"):
        convert(tmp_path / "there", tmp_path / "other.pth", "lavis")
    assert not (tmp_path / "other.pth").exists()
