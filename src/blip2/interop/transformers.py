"""Checkpoints in transformers' layout: ``Blip2ForConditionalGeneration`` and ``Blip2ForImageTextRetrieval``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2Processor,
    Blip2QFormerConfig,
    BlipImageProcessorPil,
    GenerationConfig,
    ImageProcessingMixin,
    PreTrainedTokenizerBase,
)

from blip2.backbones.language import activation_of
from blip2.backbones.pretrained import reading
from blip2.backbones.vision import read_preprocessing
from blip2.config import (
    IMAGE_TOKEN,
    DataConfig,
    LanguageConfig,
    QFormerConfig,
    Recipe,
    TextNormalization,
    VisionConfig,
)
from blip2.errors import InputError
from blip2.interop.checkpoint import Checkpoint, read_tokenizer
from blip2.interop.key_map import Table, block_names
from blip2.interop.weights import Weights, open_folder, understood
from blip2.io import read_json as read_plain
from blip2.io import write_json

RETRIEVAL, GENERATION = "Blip2ForImageTextRetrieval", "Blip2ForConditionalGeneration"
NORMALIZATION = "text_normalization"
"""Key of config.json, which transformers passes over, for a ``data.text_normalization`` other than
:data:`PUBLISHED`."""
PUBLISHED: TextNormalization = "lavis"
"""What the published checkpoints were trained with."""
NAMES: Table = (
    ("query_tokens", "qformer.num_query_tokens"),
    ("vision_model.post_layernorm", "image_norm"),
    ("vision_model.{...}", "vision.network.{...}"),
    ("embeddings.word_embeddings", "qformer.word_embedding"),
    ("embeddings.position_embeddings", "qformer.position_embedding"),
    ("qformer.layernorm", "qformer.embedding_norm"),
    *block_names("qformer.encoder.layer.{}", attention="attention"),
    ("vision_projection", "image_projection"),
    ("text_projection", "text_projection"),
    ("itm_head", "matching_head"),
    ("language_projection", "projection"),
    ("language_model.{...}", "language.network.{...}"),
    # What the layout has no place for goes under LAVIS's names, which transformers passes over.
    ("temp", "temperature"),
    ("cls.predictions.transform.dense", "language_head.transform"),
    ("cls.predictions.transform.LayerNorm", "language_head.norm"),
    ("cls.predictions.bias", "language_head.bias"),
)


def read(name: str, folder: Path) -> Checkpoint:
    """A folder in transformers' layout.

    Args:
        name: what it is called: the folder, or the hub name that it was fetched from.

    Raises:
        InputError: it is of another model, its files are damaged, or they do not fit each other.
    """
    with understood(name):
        return _read(name, folder, read_json(folder / "config.json"))


def _read(name: str, folder: Path, settings: dict[str, Any]) -> Checkpoint:
    kind = settings.get("model_type")
    if kind != "blip-2":
        raise InputError(f"{name} is a model of type {kind}, expected blip-2: name a BLIP-2 checkpoint")
    for part, expected in (("vision_config", "blip_2_vision_model"), ("qformer_config", "blip_2_qformer")):
        found = (settings.get(part) or {}).get("model_type", expected)
        if found != expected:
            raise InputError(
                f"{name}: its {part} is of type {found}, which transformers would take for a {expected} in silence: no"
                " checkpoint of this layout can have it"
            )
    with reading(name, "configuration"):
        config: Any = Blip2Config.from_dict(settings)
    weights = open_folder(folder).renamed(NAMES, name)
    generates = GENERATION in (settings.get("architectures") or []) or (
        RETRIEVAL not in (settings.get("architectures") or []) and "projection.weight" in weights
    )
    tokenizer = read_tokenizer(folder)
    check_conventions(name, folder, config, tokenizer, generates)
    recipe = _recipe(name, config, weights, tokenizer, generates)
    vision = config.vision_config
    _set_size(name, vision, weights)
    llm = config.text_config.model_type
    about = (
        f"transformers' {GENERATION if generates else RETRIEVAL}: a ViT of {vision.num_hidden_layers} layers for"
        f" {vision.image_size} pixels, {config.num_query_tokens} queries"
        + (f", an LLM of type {llm}" if generates else "")
    )
    return Checkpoint(
        name=name,
        format="transformers",
        about=about,
        recipe=recipe,
        weights=weights,
        tokenizer=folder,
        vision_config=vision,
        language_config=config.text_config if "projection.weight" in weights else None,
        preprocessing=read_preprocessing(str(folder), vision, None),
    )


def _recipe(name: str, config: Any, weights: Weights, tokenizer: PreTrainedTokenizerBase, generates: bool) -> Recipe:
    theirs = config.qformer_config
    if theirs.hidden_act != "gelu":
        raise InputError(f"{name}: its Q-Former has the activation {theirs.hidden_act}, expected gelu")
    positions = weights.get("qformer.position_embedding.weight")
    shapes = {
        "num_query_tokens": (config.num_query_tokens, weights["qformer.num_query_tokens"].shape[1]),
        "qformer_config.hidden_size": (theirs.hidden_size, weights["qformer.num_query_tokens"].shape[2]),
    }
    for key, (said, found) in shapes.items():
        if said != found:
            raise InputError(
                f"{name}: its config.json says {key} {said}, its weights have {found}: correct the one that is wrong"
            )
    try:
        qformer = QFormerConfig(
            bert=None,
            tokenizer=None,
            hidden_size=theirs.hidden_size,
            num_hidden_layers=theirs.num_hidden_layers,
            num_attention_heads=theirs.num_attention_heads,
            intermediate_size=theirs.intermediate_size,
            num_query_tokens=config.num_query_tokens,
            cross_attention_frequency=theirs.cross_attention_frequency,
            image_text_hidden_size=config.image_text_hidden_size,
            vocab_size=theirs.vocab_size,
            max_position_embeddings=theirs.max_position_embeddings if positions is None else len(positions),
            dropout=theirs.hidden_dropout_prob,
            layer_norm_eps=theirs.layer_norm_eps,
            image_norm_eps=config.vision_config.layer_norm_eps,
        )
        language = None
        if generates:
            prompt, stop = _prompt(config.text_config, tokenizer), _stop(name, config.text_config, tokenizer)
            # Kept, for the LLM's own files may say another: those of FlanT5 have gelu_new, LAVIS trained with gelu.
            language = LanguageConfig(
                name=name, prompt=prompt, stop_string=stop, activation=activation_of(config.text_config)
            )
        return Recipe(
            stage="generation" if generates else "representation",
            output="",
            vision=VisionConfig(name=name, position_encoding="none"),
            data=DataConfig(train="", text_normalization=_normalization(name, config)),
            qformer=qformer,
            language=language,
        )
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _normalization(name: str, config: Any) -> TextNormalization:
    """What was done to texts in training: LAVIS's way, unless :func:`write_settings` has said otherwise."""
    found: Any = getattr(config, NORMALIZATION, PUBLISHED)
    if found not in get_args(TextNormalization):
        raise InputError(
            f"{name}: its config.json says {NORMALIZATION} {found!r}, expected one of"
            f" {', '.join(get_args(TextNormalization))}: correct it, or leave it out"
        )
    return found


def _prompt(text_config: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """What transformers puts behind the picture when there is no text: a BOS, though the tokenizer may put none."""
    start = getattr(text_config, "bos_token_id", None)
    if text_config.is_encoder_decoder or start is None or tokenizer("")["input_ids"]:
        return ""
    text = str(tokenizer.decode([start]))
    return text if tokenizer(text)["input_ids"] == [start] else ""


def _stop(name: str, text_config: Any, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text whose token ends a text, where that is not the tokenizer's own end: a newline for the paper's OPT."""
    ends = getattr(text_config, "eos_token_id", None)
    ends = list(ends) if isinstance(ends, list | tuple) else [ends]
    end: Any = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    if end in (None, tokenizer.eos_token_id):
        return None
    stop = str(tokenizer.decode([end]))
    if tokenizer(stop, add_special_tokens=False)["input_ids"] != [end]:
        raise InputError(f"{name}: its texts end with token {end}, {stop!r}, which its tokenizer does not make: correct"
                         " text_config.eos_token_id")  # fmt: skip
    return stop


def _set_size(name: str, vision: Any, weights: Weights) -> None:
    """The image size that the position embeddings are for, whatever the configuration says."""
    key = "vision.network.embeddings.position_embedding"
    if key not in weights:
        raise InputError(f"{name} has no image encoder ({key} is missing): download its weights again")
    grid = round((weights[key].shape[1] - 1) ** 0.5)
    vision.image_size = grid * vision.patch_size


def check_conventions(
    name: str, folder: Path, config: Any, tokenizer: PreTrainedTokenizerBase, generates: bool
) -> None:
    """What transformers passes over in silence: placeholders that are not as many as queries, or are other tokens."""
    settings = read_json(folder / "processor_config.json") if (folder / "processor_config.json").is_file() else {}
    queries = settings.get("num_query_tokens")
    if queries not in (None, config.num_query_tokens):
        raise InputError(
            f"{name}: its processor puts {queries} {IMAGE_TOKEN} tokens before a text, but it has"
            f" {config.num_query_tokens} queries: set num_query_tokens to {config.num_query_tokens} in"
            " processor_config.json"
        )
    with reading(name, "image processor", "processor_config.json"):
        try:
            images, _ = ImageProcessingMixin.get_image_processor_dict(str(folder))
        except OSError:  # there is none: CLIP's conventions hold
            images = {}
    for key, expected in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("resample", 3)):
        if images.get(key, expected) != expected:
            raise InputError(
                f"{name}: its image processor has {key} {images[key]}, BLIP-2's {expected}: images would be prepared in"
                " another way than those that it was trained on"
            )
    index = config.image_token_index
    if not generates or index is None:
        return
    found = tokenizer.get_vocab().get(IMAGE_TOKEN)
    if found is None:
        raise InputError(
            f"{name}: its tokenizer has no {IMAGE_TOKEN}, which its config.json says is token {index}: copy the"
            " tokenizer that belongs to it"
        )
    if found != index:
        raise InputError(
            f"{name}: {IMAGE_TOKEN} is token {found} of its tokenizer, its config.json says {index}: set"
            f" image_token_index to {found}"
        )


def read_json(path: Path) -> dict[str, Any]:
    found = read_plain(path)
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no object: copy or download it again")
    return found


def write_settings(folder: Path, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> Blip2Config:
    """Processor, tokenizer and generation settings of a checkpoint that holds its frozen parts.

    Returns:
        Its configuration.
    """
    recipe, vision, llm = checkpoint.recipe, checkpoint.vision_config, checkpoint.language_config
    preprocessing = checkpoint.preprocessing
    assert preprocessing is not None
    size = {"height": preprocessing.image_size, "width": preprocessing.image_size}
    images = BlipImageProcessorPil(size=size, image_mean=list(preprocessing.mean), image_std=list(preprocessing.std))
    processor = Blip2Processor(images, tokenizer, num_query_tokens=recipe.qformer.num_query_tokens)  # adds <image>
    processor.save_pretrained(folder)
    # Some versions of transformers look for the one file, some for the other; none for a class made for PIL alone.
    settings = read_json(folder / "processor_config.json")
    settings["image_processor"]["image_processor_type"] = "BlipImageProcessor"
    write_json(folder / "processor_config.json", settings)
    write_json(
        folder / "preprocessor_config.json", {**settings["image_processor"], "processor_class": "Blip2Processor"}
    )
    qformer = Blip2QFormerConfig(
        vocab_size=recipe.qformer.vocab_size,
        hidden_size=recipe.qformer.hidden_size,
        num_hidden_layers=recipe.qformer.num_hidden_layers,
        num_attention_heads=recipe.qformer.num_attention_heads,
        intermediate_size=recipe.qformer.intermediate_size,
        hidden_dropout_prob=recipe.qformer.dropout,
        attention_probs_dropout_prob=recipe.qformer.dropout,
        max_position_embeddings=recipe.qformer.max_position_embeddings,
        layer_norm_eps=recipe.qformer.layer_norm_eps,
        cross_attention_frequency=recipe.qformer.cross_attention_frequency,
        encoder_hidden_size=vision.hidden_size,
        use_qformer_text_input=any(".text_feed_forward." in name for name in checkpoint.weights),
    )
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=llm,
        num_query_tokens=recipe.qformer.num_query_tokens,
        image_text_hidden_size=recipe.qformer.image_text_hidden_size,
        image_token_index=tokenizer.get_vocab()[IMAGE_TOKEN],
    )
    if recipe.data.text_normalization != PUBLISHED:
        setattr(config, NORMALIZATION, recipe.data.text_normalization)
    if llm is not None:
        start = getattr(llm, "decoder_start_token_id", None)
        GenerationConfig(
            num_beams=5, max_new_tokens=30, eos_token_id=llm.eos_token_id, decoder_start_token_id=start,
            bos_token_id=getattr(llm, "bos_token_id", None), pad_token_id=getattr(llm, "pad_token_id", None),
        ).save_pretrained(folder)  # fmt: skip
    return config


def write_config(folder: Path, config: Any, weights: Mapping[str, Tensor]) -> None:
    """config.json, with the class and the dtype that the weights are of: float32 where they are of several."""
    config.architectures = [GENERATION if "language_projection.weight" in weights else RETRIEVAL]
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    config.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    config.save_pretrained(folder)
