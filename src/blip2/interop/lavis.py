"""Read and write LAVIS's ``.pth`` files: stage 1, stage 2 with OPT or FlanT5, InstructBLIP with Vicuna or FlanT5, and
image encoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Blip2VisionConfig, CLIPVisionConfig

from blip2.backbones.vision import CLIP_MEAN, CLIP_STD, Preprocessing
from blip2.config import QUESTION_PLACEHOLDER, LanguageConfig, ModelConfig, QFormerConfig, VisionConfig
from blip2.errors import InputError
from blip2.interop.checkpoint import LANGUAGE_PREFIX, VISION_PREFIX, Checkpoint
from blip2.interop.key_map import KeyMap, format_names, qformer_block_keys
from blip2.interop.weights import Weights, open_file, wrap_parse_errors
from blip2.recipe import override

LAYER = f"{VISION_PREFIX}encoder.layers.{{}}"
QFORMER_KEYS: KeyMap = (
    ("query_tokens", "qformer.queries"),
    ("temp", "temperature"),
    ("ln_vision", "image_norm"),
    ("Qformer.bert.embeddings.word_embeddings", "qformer.word_embedding"),
    ("Qformer.bert.embeddings.position_embeddings", "qformer.position_embedding"),
    ("Qformer.bert.embeddings.LayerNorm", "qformer.embedding_norm"),
    *qformer_block_keys("Qformer.bert.encoder.layer.{}", attention="self"),
    ("Qformer.cls.predictions.transform.dense", "language_head.transform"),
    ("Qformer.cls.predictions.transform.LayerNorm", "language_head.norm"),
    ("Qformer.cls.predictions.bias", "language_head.bias"),
    ("vision_proj", "image_projection"),
    ("text_proj", "text_projection"),
    ("itm_head", "matching_head"),
)
OPT_KEYS: KeyMap = (("opt_proj", "projection"), ("opt_model.{...}", f"{LANGUAGE_PREFIX}{{...}}"))
T5_KEYS: KeyMap = (("t5_proj", "projection"), ("t5_model.{...}", f"{LANGUAGE_PREFIX}{{...}}"))
VICUNA_KEYS: KeyMap = (("llm_proj", "projection"), ("llm_model.{...}", f"{LANGUAGE_PREFIX}{{...}}"))
LANGUAGE_KEYS = {"opt": OPT_KEYS, "t5": T5_KEYS, "llama": VICUNA_KEYS}
"""The names of projection and LLM by the type of the LLM in transformers."""
LLM_NAMES = {"opt": "OPT", "t5": "T5", "llama": "Vicuna"}
LLM_EXAMPLES = {"opt": "facebook/opt-2.7b", "t5": "google/flan-t5-xl", "llama": "lmsys/vicuna-7b-v1.1"}
VICUNA_BOS_TOKEN = "</s>"
"""The token with which LAVIS's InstructBLIP begins each text of Vicuna."""
EVA_KEYS: KeyMap = (
    ("visual_encoder.cls_token", f"{VISION_PREFIX}embeddings.class_embedding"),
    ("visual_encoder.pos_embed", f"{VISION_PREFIX}embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj", f"{VISION_PREFIX}embeddings.patch_embedding"),
    ("visual_encoder.blocks.{}.norm1", f"{LAYER}.layer_norm1"),
    ("visual_encoder.blocks.{}.attn.qkv", f"{LAYER}.self_attn.qkv"),
    ("visual_encoder.blocks.{}.attn.proj", f"{LAYER}.self_attn.projection"),
    ("visual_encoder.blocks.{}.norm2", f"{LAYER}.layer_norm2"),
    ("visual_encoder.blocks.{}.mlp.fc1", f"{LAYER}.mlp.fc1"),
    ("visual_encoder.blocks.{}.mlp.fc2", f"{LAYER}.mlp.fc2"),
)
CLIP_KEYS: KeyMap = (
    ("visual_encoder.class_embedding", f"{VISION_PREFIX}embeddings.class_embedding"),
    ("visual_encoder.positional_embedding", f"{VISION_PREFIX}embeddings.position_embedding.weight"),
    ("visual_encoder.conv1", f"{VISION_PREFIX}embeddings.patch_embedding"),
    ("visual_encoder.ln_pre", f"{VISION_PREFIX}pre_layrnorm"),
    ("visual_encoder.transformer.resblocks.{}.ln_1", f"{LAYER}.layer_norm1"),
    ("visual_encoder.transformer.resblocks.{}.attn.q_proj", f"{LAYER}.self_attn.q_proj"),
    ("visual_encoder.transformer.resblocks.{}.attn.k_proj", f"{LAYER}.self_attn.k_proj"),
    ("visual_encoder.transformer.resblocks.{}.attn.v_proj", f"{LAYER}.self_attn.v_proj"),
    ("visual_encoder.transformer.resblocks.{}.attn.out_proj", f"{LAYER}.self_attn.out_proj"),
    ("visual_encoder.transformer.resblocks.{}.ln_2", f"{LAYER}.layer_norm2"),
    ("visual_encoder.transformer.resblocks.{}.mlp.c_fc", f"{LAYER}.mlp.fc1"),
    ("visual_encoder.transformer.resblocks.{}.mlp.c_proj", f"{LAYER}.mlp.fc2"),
)
UNUSED_ENCODER_PREFIXES = ("norm.", "fc_norm.", "head.", "mask_token", "ln_post.", "proj")
"""Name prefixes of the weights of EVA-CLIP and CLIP that BLIP-2 does not use."""
IMAGE_NORM_EPS = 1e-5
"""Epsilon of ``ln_vision``, LAVIS's LayerNorm of the image features."""
BERT_TOKENIZER = "google-bert/bert-base-uncased"
"""Hub name of the tokenizer of LAVIS's Q-Former."""
EVA_HEAD_DIM, CLIP_HEAD_DIM = 88, 64
"""Width of an attention head of EVA-CLIP and CLIP."""
TRUNCATED_VITS = ((1408, 39), (1024, 23))
"""Width and number of blocks of EVA-CLIP ViT-g/14 and CLIP ViT-L/14 without their last block."""


def read(path: Path, overrides: Mapping[str, object] | None) -> Checkpoint:
    """Read a ``.pth`` file of LAVIS.

    Args:
        path: the file.
        overrides: values for config keys that the file does not contain, by key: ``vision.name`` and, for stage 2,
            ``language.name`` if these frozen parts are not in the file, and ``qformer.num_attention_heads`` if a head
            is not 64 wide. If ``vision.name`` is given, the image encoder in the file is not used. None: only the
            frozen parts in the file are needed, so no value is required.

    Raises:
        InputError: the file is damaged, contains code or another model, or a required value is missing.
    """
    with wrap_parse_errors(str(path)):
        return _read(path, dict(open_file(path)), overrides)


def _read(path: Path, state: dict[str, Tensor], overrides: Mapping[str, object] | None) -> Checkpoint:
    has_prefix = any(name.startswith(("visual_encoder.", "Qformer.")) for name in state)
    if not has_prefix and ("cls_token" in state or "class_embedding" in state):
        return _read_encoder(path, state)
    if "query_tokens" not in state:
        raise InputError(
            f"{path} is not a BLIP-2 checkpoint (it has no query_tokens, but {format_names(state, 3)}): give a BLIP-2"
            " checkpoint"
        )
    replaced = False
    if overrides and overrides.get("vision.name", str(path)) != str(path):
        num_weights = len(state)
        state = {name: tensor for name, tensor in state.items() if not name.startswith("visual_encoder.")}
        replaced = len(state) < num_weights
    drop_tied(state, path)
    is_clip = "visual_encoder.conv1.weight" in state
    split_in_proj(state) if is_clip else merge_qkv_bias(state)
    kind = next(
        (each for each, prefix in (("t5", "t5_proj."), ("llama", "llm_proj.")) if f"{prefix}weight" in state), "opt"
    )
    weights = Weights(state).rename_keys(_key_map(kind, is_clip), str(path))
    stage = "generation" if "projection.weight" in weights else "representation"
    vision = _vision_config(path, weights) if weights.select(VISION_PREFIX) else None
    config = _config(path, weights, stage, kind, vision is not None, overrides)
    frozen = {"image encoder": VISION_PREFIX, "LLM": LANGUAGE_PREFIX}
    included = " and ".join(part for part, prefix in frozen.items() if weights.select(prefix)) or "no frozen parts"
    trained = "InstructBLIP" if config.qformer.use_qformer_text_input else "stage 2"
    description = f"LAVIS's {'stage 1' if stage == 'representation' else f'{trained} with {LLM_NAMES[kind]}'}"
    description += f", {config.qformer.num_query_tokens} queries, {included} included"
    if replaced:
        description += f"; its image encoder is replaced by {config.vision.name}"
    return Checkpoint(
        name=str(path),
        format="lavis",
        description=description,
        config=config,
        weights=weights,
        vision_config=vision,
        preprocessing=None if vision is None else Preprocessing(vision.image_size, CLIP_MEAN, CLIP_STD),
    )


def _key_map(kind: str, is_clip: bool) -> KeyMap:
    return QFORMER_KEYS + LANGUAGE_KEYS[kind] + (CLIP_KEYS if is_clip else EVA_KEYS)


def _config(
    path: Path,
    weights: Weights,
    stage: Any,
    kind: str,
    has_vision: bool,
    overrides: Mapping[str, object] | None,
) -> ModelConfig:
    values = {"qformer.num_attention_heads": 1} if overrides is None else overrides
    if stage == "representation":
        values = {key: value for key, value in values.items() if key != "language.name"}
    queries = weights["qformer.queries"].shape
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("qformer.blocks."))
    cross_attention_layers = [i for i in range(layers) if f"qformer.blocks.{i}.cross_attention.key.weight" in weights]
    word_embedding = weights.get("qformer.word_embedding.weight")
    positions = weights.get("qformer.position_embedding.weight")
    width = queries[2]
    if width % 64 and "qformer.num_attention_heads" not in values:
        raise InputError(
            f"{path}: the width of its Q-Former is {width}, not a multiple of 64, the width of a head in BERT: set"
            " qformer.num_attention_heads to the number of heads that it was trained with"
        )
    if overrides is not None and not has_vision and "vision.name" not in values:
        raise InputError(
            f"{path} contains no image encoder: set vision.name to the image encoder that it was trained with, for"
            " example to LAVIS's eva_vit_g.pth, or to Salesforce/blip2-itm-vit-g, of which only the image encoder is"
            " loaded"
        )
    if overrides is not None and stage == "generation" and "language.name" not in values:
        raise InputError(f"{path} does not name its LLM: set language.name, for example to"
                         f" {LLM_EXAMPLES[kind]}")  # fmt: skip
    projection = weights.get("image_projection.weight")
    # The heads of stage 1 come with its text transformer; only InstructBLIP has a text transformer without them.
    reads_text = stage == "generation" and word_embedding is not None and "matching_head.weight" not in weights
    config = ModelConfig(
        stage=stage,
        vision=VisionConfig(name=str(path), position_encoding="none"),
        text_normalization="none" if reads_text else "lavis",  # instructions are not normalized
        qformer=QFormerConfig(
            bert=None,
            tokenizer=BERT_TOKENIZER,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=1 if "qformer.num_attention_heads" in values else width // 64,
            intermediate_size=len(weights["qformer.blocks.0.query_feed_forward.expand.weight"]),
            num_query_tokens=queries[1],
            cross_attention_frequency=cross_attention_layers[1] if len(cross_attention_layers) > 1 else layers,
            image_text_hidden_size=256 if projection is None else len(projection),
            vocab_size=30523 if word_embedding is None else len(word_embedding),
            max_position_embeddings=512 if positions is None else len(positions),
            image_norm_eps=IMAGE_NORM_EPS,
            use_qformer_text_input=reads_text,
            text_input="prompt" if reads_text else "question",
        ),
        language=None
        if stage == "representation"
        # LAVIS's OPT stops at a newline. Its T5 uses the exact GELU, unlike FlanT5's own configuration.
        else LanguageConfig(
            name="",
            prompt=QUESTION_PLACEHOLDER if reads_text else "",
            stop_string="\n" if kind == "opt" else None,
            bos_token=VICUNA_BOS_TOKEN if kind == "llama" else None,
            activation="gelu" if kind == "t5" else None,
        ),
    )
    return override(config, values)


def _read_encoder(path: Path, state: dict[str, Tensor]) -> Checkpoint:
    """Read a file of an image encoder, such as LAVIS's ``eva_vit_g.pth``, without the block that BLIP-2 removes."""
    state = {f"visual_encoder.{name}": t for name, t in state.items() if not name.startswith(UNUSED_ENCODER_PREFIXES)}
    is_clip = "visual_encoder.conv1.weight" in state
    if not is_clip and not any(name.endswith(".attn.q_bias") for name in state):
        raise InputError(f"{path} contains an image encoder that is neither EVA-CLIP nor CLIP: give timm's models as"
                         f" timm:NAME@{path.name}")  # fmt: skip
    split_in_proj(state) if is_clip else merge_qkv_bias(state)
    weights = Weights(state).rename_keys(CLIP_KEYS if is_clip else EVA_KEYS, str(path))
    blocks, width = _blocks(weights), weights[f"{VISION_PREFIX}embeddings.class_embedding"].shape[-1]
    if (width, blocks) not in TRUNCATED_VITS:
        weights = weights.drop(f"{VISION_PREFIX}encoder.layers.{blocks - 1}.")
    vision = _vision_config(path, weights)
    return Checkpoint(
        name=str(path),
        format="lavis",
        description="an image encoder",
        config=ModelConfig("representation", VisionConfig(name=str(path), position_encoding="none")),
        weights=weights,
        vision_config=vision,
        preprocessing=Preprocessing(vision.image_size, CLIP_MEAN, CLIP_STD),
    )


def _blocks(weights: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[4] for name in weights if name.startswith(f"{VISION_PREFIX}encoder.layers.")})


def _vision_config(path: Path, weights: Weights) -> Any:
    """Return the configuration of an image encoder, inferred from the weights.

    The weights do not determine the number of heads. It is computed from the width of a head in EVA-CLIP ViT-g or CLIP
    ViT-L, and is 0 if this width does not divide the width of the encoder.
    """
    patches = weights[f"{VISION_PREFIX}embeddings.patch_embedding.weight"]  # [E, 3, p, p]
    is_clip = f"{VISION_PREFIX}pre_layrnorm.weight" in weights
    table = weights[f"{VISION_PREFIX}embeddings.position_embedding{'.weight' if is_clip else ''}"]
    grid = round((table.shape[-2] - 1) ** 0.5)
    width, patch = patches.shape[0], patches.shape[-1]
    head = CLIP_HEAD_DIM if is_clip else EVA_HEAD_DIM
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": _blocks(weights),
        "num_attention_heads": 0 if width % head else width // head,
        "intermediate_size": len(weights[f"{VISION_PREFIX}encoder.layers.0.mlp.fc1.weight"]),
        "image_size": grid * patch,
        "patch_size": patch,
    }
    if is_clip:
        return CLIPVisionConfig(**sizes, hidden_act="quick_gelu")
    return Blip2VisionConfig(**sizes)


# -- what is not a renaming --------------------------------------------------------------------------------------------


def drop_tied(state: dict[str, Tensor], path: Path) -> None:
    """Remove the copies of tied weights (the output layer of ITG) and the buffer of position ids.

    Raises:
        InputError: the copy of a tied weight has other values.
    """
    state.pop("Qformer.bert.embeddings.position_ids", None)
    for tied, first in (
        ("Qformer.cls.predictions.decoder.weight", "Qformer.bert.embeddings.word_embeddings.weight"),
        ("Qformer.cls.predictions.decoder.bias", "Qformer.cls.predictions.bias"),
    ):
        copy = state.pop(tied, None)
        if copy is not None and (first not in state or not torch.equal(copy, state[first])):
            raise InputError(
                f"{path}: {first} is missing or differs from {tied}, but both are the same parameter in LAVIS: save the"
                " checkpoint again with LAVIS"
            )


def add_tied(state: dict[str, Tensor], num_positions: int) -> None:
    """Add the copies of tied weights and the buffer of position ids that LAVIS stores."""
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(num_positions)[None]
    if "Qformer.cls.predictions.bias" in state:
        state["Qformer.cls.predictions.decoder.weight"] = state["Qformer.bert.embeddings.word_embeddings.weight"]
        state["Qformer.cls.predictions.decoder.bias"] = state["Qformer.cls.predictions.bias"]


def merge_qkv_bias(state: dict[str, Tensor]) -> None:
    """Merge EVA's query and value biases into one qkv bias, whose key part is zero."""
    for name in [name for name in state if name.endswith(".attn.q_bias")]:
        query, value = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
        state[name.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])


def split_qkv_bias(state: dict[str, Tensor]) -> None:
    """Split each qkv bias into a query bias and a value bias, the inverse of :func:`merge_qkv_bias`.

    Raises:
        InputError: the key part of a qkv bias is not zero. EVA has no key bias.
    """
    for name in [name for name in state if name.endswith(".attn.qkv.bias")]:
        query, key, value = state.pop(name).chunk(3)
        if key.any():
            raise InputError(f"the image encoder has a nonzero key bias ({name} in LAVIS's names), but LAVIS supports"
                             " no key bias: convert to the format transformers instead")  # fmt: skip
        state[name.replace("qkv.bias", "q_bias")] = query.clone()
        state[name.replace("qkv.bias", "v_bias")] = value.clone()


def split_in_proj(state: dict[str, Tensor]) -> None:
    """Split CLIP's joint input projection into query, key and value projections."""
    for name in [name for name in state if ".attn.in_proj_" in name]:
        start, kind = name.split("in_proj_")
        for part, tensor in zip(("q", "k", "v"), state.pop(name).chunk(3), strict=True):
            state[f"{start}{part}_proj.{kind}"] = tensor


def merge_in_proj(state: dict[str, Tensor]) -> None:
    """Merge query, key and value projections into CLIP's joint input projection."""
    for name in [name for name in state if ".attn.q_proj." in name]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in ("q", "k", "v")]
        state[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)


# -- writing -----------------------------------------------------------------------------------------------------------


def to_state_dict(checkpoint: Checkpoint, kind: str | None) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under LAVIS's names.

    Args:
        checkpoint: the checkpoint.
        kind: type of the LLM, a key of :data:`LANGUAGE_KEYS`. None: there is no LLM.

    Raises:
        InputError: LAVIS does not support the image encoder of the checkpoint.
    """
    is_clip = f"{VISION_PREFIX}pre_layrnorm.weight" in checkpoint.weights
    preprocessing = checkpoint.preprocessing
    if preprocessing is not None and (preprocessing.mean, preprocessing.std) != (CLIP_MEAN, CLIP_STD):
        raise InputError(
            f"the image encoder of {checkpoint.name} expects pixels normalized with mean {preprocessing.mean} and"
            f" standard deviation {preprocessing.std}, but LAVIS always uses CLIP's: convert to the format"
            " transformers instead"
        )
    if checkpoint.vision_config is not None:
        inferred = _vision_config(Path(checkpoint.name), checkpoint.weights)
        for key in ("num_attention_heads", "hidden_act", "layer_norm_eps"):  # not determined by weights
            value, expected = getattr(checkpoint.vision_config, key), getattr(inferred, key)
            if value != expected:
                raise InputError(
                    f"the image encoder of {checkpoint.name} has {key} {value}, but LAVIS, which supports only EVA-CLIP"
                    f" and CLIP ViT-L, would use {expected or 'another value'}: convert to the format transformers"
                    " instead"
                )
    state = dict(checkpoint.weights.rename_keys(_key_map(kind or "opt", is_clip), checkpoint.name, inverse=True))
    merge_in_proj(state) if is_clip else split_qkv_bias(state)
    add_tied(state, checkpoint.config.qformer.max_position_embeddings)
    return state


def compatibility_notes(checkpoint: Checkpoint) -> list[str]:
    """Return a note for each property of a checkpoint that LAVIS's own code or files do not support."""
    qformer, vision, language = checkpoint.config.qformer, checkpoint.vision_config, checkpoint.config.language
    notes = []
    if (qformer.hidden_size, qformer.num_hidden_layers, qformer.num_attention_heads) != (768, 12, 12):
        notes.append("LAVIS builds only Q-Formers with the sizes of BERT-base: this file needs a modified LAVIS")
    if (vision.hidden_size, vision.num_hidden_layers) not in TRUNCATED_VITS:
        notes.append("LAVIS builds only EVA-CLIP ViT-g and CLIP ViT-L: this file needs a modified LAVIS")
    if (qformer.layer_norm_eps, qformer.cross_attention_frequency) != (1e-12, 2):
        notes.append(
            "LAVIS's Q-Former always has norms with epsilon 1e-12 and cross-attention in every second block, unlike"
            " this model: results differ"
        )
    if checkpoint.missing_prefixes and language is None:
        notes.append("the temperature or the language head is missing: LAVIS uses its initial values")
    if language is not None:
        llm = checkpoint.language_config
        if llm is not None and llm.model_type == "t5" and llm.dense_act_fn != "gelu":
            notes.append(f"the T5 of this model has the activation {llm.dense_act_fn}, LAVIS uses gelu: results differ")
        if llm is not None and llm.model_type == "opt" and language.stop_string != "\n":
            notes.append("LAVIS ends a text at a newline, but the texts of this model do not end with a newline")
        default = QUESTION_PLACEHOLDER if qformer.use_qformer_text_input else ""
        prompts = [each for each in (language.prompt, language.question_prompt) if each not in (default, None)]
        if prompts:
            notes.append(
                f"LAVIS's files have no place for prompts: set prompt in LAVIS's config, and language.prompt here, to"
                f" {' or '.join(map(repr, prompts))}, with which this model was trained"
            )
    elif checkpoint.config.max_length != ModelConfig.max_length:
        notes.append(
            f"LAVIS's files do not record that this model was trained on texts of up to {checkpoint.config.max_length}"
            " tokens: set max_txt_len in LAVIS's config, and max_length here"
        )
    if checkpoint.config.text_normalization != "lavis" and not qformer.use_qformer_text_input:
        notes.append(
            "LAVIS lowercases captions and questions and removes punctuation; this model was trained without that"
        )
    if qformer.image_norm_eps != IMAGE_NORM_EPS:
        notes.append(
            f"the norm of the image features has epsilon {qformer.image_norm_eps} in this model and always"
            f" {IMAGE_NORM_EPS} in LAVIS: results differ in the sixth digit"
        )
    return notes
