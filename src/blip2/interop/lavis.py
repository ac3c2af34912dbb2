"""LAVIS's ``.pth`` files: stage 1, stage 2 with OPT and FlanT5, and the image encoders that LAVIS loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Blip2VisionConfig, CLIPVisionConfig

from blip2.backbones.vision import CLIP_MEAN, CLIP_STD, Preprocessing
from blip2.config import DataConfig, LanguageConfig, QFormerConfig, Recipe, VisionConfig
from blip2.errors import InputError
from blip2.interop.checkpoint import LANGUAGE, VISION, Checkpoint
from blip2.interop.key_map import Table, block_names, listing
from blip2.interop.weights import Weights, open_file, understood
from blip2.recipe import override

LAYER = f"{VISION}encoder.layers.{{}}"
QFORMER: Table = (
    ("query_tokens", "qformer.num_query_tokens"),
    ("temp", "temperature"),
    ("ln_vision", "image_norm"),
    ("Qformer.bert.embeddings.word_embeddings", "qformer.word_embedding"),
    ("Qformer.bert.embeddings.position_embeddings", "qformer.position_embedding"),
    ("Qformer.bert.embeddings.LayerNorm", "qformer.embedding_norm"),
    *block_names("Qformer.bert.encoder.layer.{}", attention="self"),
    ("Qformer.cls.predictions.transform.dense", "language_head.transform"),
    ("Qformer.cls.predictions.transform.LayerNorm", "language_head.norm"),
    ("Qformer.cls.predictions.bias", "language_head.bias"),
    ("vision_proj", "image_projection"),
    ("text_proj", "text_projection"),
    ("itm_head", "matching_head"),
)
OPT: Table = (("opt_proj", "projection"), ("opt_model.{...}", f"{LANGUAGE}{{...}}"))
T5: Table = (("t5_proj", "projection"), ("t5_model.{...}", f"{LANGUAGE}{{...}}"))
EVA_NAMES: Table = (
    ("visual_encoder.cls_token", f"{VISION}embeddings.class_embedding"),
    ("visual_encoder.pos_embed", f"{VISION}embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj", f"{VISION}embeddings.patch_embedding"),
    ("visual_encoder.blocks.{}.norm1", f"{LAYER}.layer_norm1"),
    ("visual_encoder.blocks.{}.attn.qkv", f"{LAYER}.self_attn.qkv"),
    ("visual_encoder.blocks.{}.attn.proj", f"{LAYER}.self_attn.projection"),
    ("visual_encoder.blocks.{}.norm2", f"{LAYER}.layer_norm2"),
    ("visual_encoder.blocks.{}.mlp.fc1", f"{LAYER}.mlp.fc1"),
    ("visual_encoder.blocks.{}.mlp.fc2", f"{LAYER}.mlp.fc2"),
)
CLIP_NAMES: Table = (
    ("visual_encoder.class_embedding", f"{VISION}embeddings.class_embedding"),
    ("visual_encoder.positional_embedding", f"{VISION}embeddings.position_embedding.weight"),
    ("visual_encoder.conv1", f"{VISION}embeddings.patch_embedding"),
    ("visual_encoder.ln_pre", f"{VISION}pre_layrnorm"),
    ("visual_encoder.transformer.resblocks.{}.ln_1", f"{LAYER}.layer_norm1"),
    ("visual_encoder.transformer.resblocks.{}.attn.q_proj", f"{LAYER}.self_attn.q_proj"),
    ("visual_encoder.transformer.resblocks.{}.attn.k_proj", f"{LAYER}.self_attn.k_proj"),
    ("visual_encoder.transformer.resblocks.{}.attn.v_proj", f"{LAYER}.self_attn.v_proj"),
    ("visual_encoder.transformer.resblocks.{}.attn.out_proj", f"{LAYER}.self_attn.out_proj"),
    ("visual_encoder.transformer.resblocks.{}.ln_2", f"{LAYER}.layer_norm2"),
    ("visual_encoder.transformer.resblocks.{}.mlp.c_fc", f"{LAYER}.mlp.fc1"),
    ("visual_encoder.transformer.resblocks.{}.mlp.c_proj", f"{LAYER}.mlp.fc2"),
)
ENCODER_ALONE = ("norm.", "fc_norm.", "head.", "mask_token", "ln_post.", "proj")
"""What a file of EVA-CLIP or CLIP alone may hold beside the blocks, of which BLIP-2 uses nothing."""
NORM_EPS = 1e-5
"""Of ``ln_vision``."""
BERT = "google-bert/bert-base-uncased"
"""Whose tokenizer LAVIS's Q-Former has."""
EVA_HEAD, CLIP_HEAD = 88, 64
"""Widths of a head."""
SHORTENED = ((1408, 39), (1024, 23))
"""Width and number of blocks of EVA-CLIP ViT-g/14 and CLIP ViT-L/14 when the last block has been removed already."""


def read(path: Path, changes: Mapping[str, object] | None) -> Checkpoint:
    """A ``.pth`` file of LAVIS.

    Args:
        changes: keys of the recipe that say what the file does not: ``vision.name`` and ``language.name`` (for stage 2)
            of frozen parts that are not in it, ``qformer.num_attention_heads`` where a head is not 64 wide. An image
            encoder inside gives way to one that is named. None: only the parts inside are asked for, and nothing need
            be named.

    Raises:
        InputError: the file is damaged or carries code, holds another model, or something it needs is not named.
    """
    with understood(str(path)):
        return _read(path, dict(open_file(path)), changes)


def _read(path: Path, state: dict[str, Tensor], changes: Mapping[str, object] | None) -> Checkpoint:
    bare = not any(name.startswith(("visual_encoder.", "Qformer.")) for name in state)
    if bare and ("cls_token" in state or "class_embedding" in state):
        return _read_encoder(path, state)
    if "query_tokens" not in state:
        raise InputError(
            f"{path} is no checkpoint of BLIP-2 (it has no query_tokens, but {listing(state, 3)}): name one"
        )
    if any(name.startswith("llm_") for name in state):
        raise InputError(f"{path} is of InstructBLIP (it has llm_proj), whose Q-Former reads the question too: name a"
                         " checkpoint of BLIP-2")  # fmt: skip
    replaced = False
    if changes and changes.get("vision.name", str(path)) != str(path):
        whole = len(state)
        state = {name: tensor for name, tensor in state.items() if not name.startswith("visual_encoder.")}
        replaced = len(state) < whole
    untie(state, path)
    is_clip = "visual_encoder.conv1.weight" in state
    split_attention(state) if is_clip else join_biases(state)
    is_t5 = "t5_proj.weight" in state
    weights = Weights(state).renamed(_table(is_t5, is_clip), str(path))
    stage = "generation" if "projection.weight" in weights else "representation"
    vision = _vision_config(path, weights) if weights.part(VISION) else None
    recipe = _recipe(path, weights, stage, is_t5, vision is not None, changes)
    inside = [what for what, prefix in (("image encoder", VISION), ("LLM", LANGUAGE)) if weights.part(prefix)]
    about = f"LAVIS's stage {'1' if stage == 'representation' else '2 with T5' if is_t5 else '2 with OPT'}"
    about += f", {recipe.qformer.num_query_tokens} queries, {' and '.join(inside) or 'nothing frozen'} inside"
    if replaced:
        about += f"; its own image encoder is left out for {recipe.vision.name}"
    return Checkpoint(
        name=str(path),
        format="lavis",
        about=about,
        recipe=recipe,
        weights=weights,
        vision_config=vision,
        preprocessing=None if vision is None else Preprocessing(vision.image_size, CLIP_MEAN, CLIP_STD),
    )


def _table(is_t5: bool, is_clip: bool) -> Table:
    return QFORMER + (T5 if is_t5 else OPT) + (CLIP_NAMES if is_clip else EVA_NAMES)


def _recipe(
    path: Path,
    weights: Weights,
    stage: Any,
    is_t5: bool,
    has_vision: bool,
    given: Mapping[str, object] | None,
) -> Recipe:
    changes = {"qformer.num_attention_heads": 1} if given is None else given
    if stage == "representation":
        changes = {key: value for key, value in changes.items() if key != "language.name"}
    queries = weights["qformer.num_query_tokens"].shape
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("qformer.blocks."))
    crossed = [i for i in range(layers) if f"qformer.blocks.{i}.cross_attention.key.weight" in weights]
    words = weights.get("qformer.word_embedding.weight")
    positions = weights.get("qformer.position_embedding.weight")
    width = queries[2]
    if width % 64 and "qformer.num_attention_heads" not in changes:
        raise InputError(f"{path}: its Q-Former is {width} wide, no multiple of 64, a head's width in BERT: set"
                         " qformer.num_attention_heads")  # fmt: skip
    if given is not None and not has_vision and "vision.name" not in changes:
        raise InputError(
            f"{path} holds no image encoder, which is frozen: set vision.name to it, for example to LAVIS's"
            " eva_vit_g.pth, or to Salesforce/blip2-itm-vit-g, of which only the image encoder is taken"
        )
    if given is not None and stage == "generation" and "language.name" not in changes:
        raise InputError(f"{path} does not say which LLM it is for: set language.name, for example to"
                         f" {'google/flan-t5-xl' if is_t5 else 'facebook/opt-2.7b'}")  # fmt: skip
    projection = weights.get("image_projection.weight")
    recipe = Recipe(
        stage=stage,
        output="",
        vision=VisionConfig(name=str(path), position_encoding="none"),
        data=DataConfig(train="", text_normalization="lavis"),
        qformer=QFormerConfig(
            bert=None,
            tokenizer=BERT,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=1 if "qformer.num_attention_heads" in changes else width // 64,
            intermediate_size=len(weights["qformer.blocks.0.query_feed_forward.expand.weight"]),
            num_query_tokens=queries[1],
            cross_attention_frequency=crossed[1] if len(crossed) > 1 else layers,
            image_text_hidden_size=256 if projection is None else len(projection),
            vocab_size=30523 if words is None else len(words),
            max_position_embeddings=512 if positions is None else len(positions),
            image_norm_eps=NORM_EPS,
        ),
        language=None
        if stage == "representation"
        # LAVIS's OPT stops at a newline, and its T5 has the exact GELU that FlanT5 was not trained with.
        else LanguageConfig(name="", stop_string=None if is_t5 else "\n", activation="gelu" if is_t5 else None),
    )
    return override(recipe, changes)


def _read_encoder(path: Path, state: dict[str, Tensor]) -> Checkpoint:
    """A file of an image encoder alone, such as LAVIS's ``eva_vit_g.pth``, without the block that BLIP-2 removes."""
    state = {f"visual_encoder.{name}": t for name, t in state.items() if not name.startswith(ENCODER_ALONE)}
    is_clip = "visual_encoder.conv1.weight" in state
    if not is_clip and not any(name.endswith(".attn.q_bias") for name in state):
        raise InputError(f"{path} is of an image encoder that is neither EVA-CLIP nor CLIP: give timm's models as"
                         f" timm:NAME@{path.name}")  # fmt: skip
    split_attention(state) if is_clip else join_biases(state)
    weights = Weights(state).renamed(CLIP_NAMES if is_clip else EVA_NAMES, str(path))
    blocks, width = _blocks(weights), weights[f"{VISION}embeddings.class_embedding"].shape[-1]
    if (width, blocks) not in SHORTENED:
        weights = weights.without(f"{VISION}encoder.layers.{blocks - 1}.")
    vision = _vision_config(path, weights)
    return Checkpoint(
        name=str(path),
        format="lavis",
        about="an image encoder alone",
        recipe=Recipe(
            stage="representation",
            output="",
            vision=VisionConfig(name=str(path), position_encoding="none"),
            data=DataConfig(train=""),
        ),
        weights=weights,
        vision_config=vision,
        preprocessing=Preprocessing(vision.image_size, CLIP_MEAN, CLIP_STD),
    )


def _blocks(weights: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[4] for name in weights if name.startswith(f"{VISION}encoder.layers.")})


def _vision_config(path: Path, weights: Weights) -> Any:
    """The sizes of an image encoder, read off its weights, which do not tell the heads: they are as wide as ViT-g's or
    ViT-L's, or unknown (0). A CLIP has lost its last block already."""
    patches = weights[f"{VISION}embeddings.patch_embedding.weight"]  # [E, 3, p, p]
    is_clip = f"{VISION}pre_layrnorm.weight" in weights
    table = weights[f"{VISION}embeddings.position_embedding{'.weight' if is_clip else ''}"]
    grid = round((table.shape[-2] - 1) ** 0.5)
    width, patch = patches.shape[0], patches.shape[-1]
    head = CLIP_HEAD if is_clip else EVA_HEAD
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": _blocks(weights),
        "num_attention_heads": 0 if width % head else width // head,
        "intermediate_size": len(weights[f"{VISION}encoder.layers.0.mlp.fc1.weight"]),
        "image_size": grid * patch,
        "patch_size": patch,
    }
    if is_clip:
        return CLIPVisionConfig(**sizes, hidden_act="quick_gelu")
    return Blip2VisionConfig(**sizes)


# -- what is not a renaming --------------------------------------------------------------------------------------------


def untie(state: dict[str, Tensor], path: Path) -> None:
    """Drop what is there twice (the output matrix of ITG) and what is counted, not learned (positions)."""
    state.pop("Qformer.bert.embeddings.position_ids", None)
    for tied, first in (
        ("Qformer.cls.predictions.decoder.weight", "Qformer.bert.embeddings.word_embeddings.weight"),
        ("Qformer.cls.predictions.decoder.bias", "Qformer.cls.predictions.bias"),
    ):
        there = state.pop(tied, None)
        if there is not None and (first not in state or not torch.equal(there, state[first])):
            raise InputError(f"{path}: {tied} is not {first}, to which LAVIS ties it: save the checkpoint again")


def tie(state: dict[str, Tensor], positions: int) -> None:
    """Add what LAVIS keeps twice, and its buffer of positions."""
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(positions)[None]
    if "Qformer.cls.predictions.bias" in state:
        state["Qformer.cls.predictions.decoder.weight"] = state["Qformer.bert.embeddings.word_embeddings.weight"]
        state["Qformer.cls.predictions.decoder.bias"] = state["Qformer.cls.predictions.bias"]


def join_biases(state: dict[str, Tensor]) -> None:
    """EVA's biases of query and value to one of qkv, whose key part is zero."""
    for name in [name for name in state if name.endswith(".attn.q_bias")]:
        query, value = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
        state[name.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])


def split_biases(state: dict[str, Tensor]) -> None:
    """The inverse of :func:`join_biases`.

    Raises:
        InputError: a key has a bias, which EVA's keys have not.
    """
    for name in [name for name in state if name.endswith(".attn.qkv.bias")]:
        query, key, value = state.pop(name).chunk(3)
        if key.any():
            raise InputError(f"LAVIS's image encoder has no bias of keys, and {name} has one that is not zero: a"
                             " checkpoint for LAVIS needs EVA-CLIP, or CLIP ViT-L")  # fmt: skip
        state[name.replace("qkv.bias", "q_bias")] = query.clone()
        state[name.replace("qkv.bias", "v_bias")] = value.clone()


def split_attention(state: dict[str, Tensor]) -> None:
    """CLIP's joint projection to query, key and value."""
    for name in [name for name in state if ".attn.in_proj_" in name]:
        start, kind = name.split("in_proj_")
        for part, tensor in zip(("q", "k", "v"), state.pop(name).chunk(3), strict=True):
            state[f"{start}{part}_proj.{kind}"] = tensor


def join_attention(state: dict[str, Tensor]) -> None:
    """The inverse of :func:`split_attention`."""
    for name in [name for name in state if ".attn.q_proj." in name]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in ("q", "k", "v")]
        state[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)


# -- writing -----------------------------------------------------------------------------------------------------------


def state_of(checkpoint: Checkpoint, is_t5: bool) -> dict[str, Tensor]:
    """The checkpoint under LAVIS's names.

    Raises:
        InputError: its image encoder is none that LAVIS has.
    """
    is_clip = f"{VISION}pre_layrnorm.weight" in checkpoint.weights
    found = checkpoint.preprocessing
    if found is not None and (found.mean, found.std) != (CLIP_MEAN, CLIP_STD):
        raise InputError(
            f"the image encoder of {checkpoint.name} expects pixels of mean {found.mean} and deviation {found.std};"
            " LAVIS's have CLIP's, and its files cannot say otherwise: convert it to transformers"
        )
    if checkpoint.vision_config is not None:
        understood = _vision_config(Path(checkpoint.name), checkpoint.weights)
        for key in ("num_attention_heads", "hidden_act", "layer_norm_eps"):  # which no weight tells
            here, there = getattr(checkpoint.vision_config, key), getattr(understood, key)
            if here != there:
                raise InputError(
                    f"the image encoder of {checkpoint.name} has {key} {here}, where LAVIS, which knows EVA-CLIP and"
                    f" CLIP ViT-L alone, would take {there or 'none that is known'}: convert it to transformers"
                )
    state = dict(checkpoint.weights.renamed(_table(is_t5, is_clip), checkpoint.name, back=True))
    join_attention(state) if is_clip else split_biases(state)
    tie(state, checkpoint.recipe.qformer.max_position_embeddings)
    return state


def differences(checkpoint: Checkpoint) -> list[str]:
    """Sizes of a checkpoint that LAVIS itself does not build, and what its file does not say."""
    qformer, vision, language = checkpoint.recipe.qformer, checkpoint.vision_config, checkpoint.recipe.language
    notes = []
    if (qformer.hidden_size, qformer.num_hidden_layers, qformer.num_attention_heads) != (768, 12, 12):
        notes.append("LAVIS builds a Q-Former of BERT-base's sizes alone: this file is for a changed LAVIS")
    if (vision.hidden_size, vision.num_hidden_layers) not in SHORTENED:
        notes.append("LAVIS builds EVA-CLIP ViT-g and CLIP ViT-L alone: this file is for a changed LAVIS")
    if (qformer.layer_norm_eps, qformer.cross_attention_frequency) != (1e-12, 2):
        notes.append("LAVIS's Q-Former has norms of epsilon 1e-12 and looks at the image in every second block")
    if checkpoint.absent and language is None:
        notes.append("it has no temperature or no head that writes text, which LAVIS will draw anew")
    if language is not None:
        llm = checkpoint.language_config
        if llm is not None and llm.model_type == "t5" and llm.dense_act_fn != "gelu":
            notes.append(f"its T5 has the activation {llm.dense_act_fn}; LAVIS's has gelu: results differ")
        if llm is not None and llm.model_type == "opt" and language.stop_string != "\n":
            notes.append("its texts end with the LLM's own token; LAVIS's end with a newline")
    if checkpoint.recipe.data.text_normalization != "lavis":
        notes.append("LAVIS puts captions and questions in lower case and takes signs out; this was not trained so")
    if qformer.image_norm_eps != NORM_EPS:
        notes.append(
            f"the norm of its image features has an epsilon of {qformer.image_norm_eps}, LAVIS's is {NORM_EPS}, which"
            " no file says: results differ in the sixth digit"
        )
    return notes
