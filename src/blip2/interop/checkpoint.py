"""A checkpoint of any format, whose weights have this project's names."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, Blip2VisionConfig, PreTrainedTokenizerBase

from blip2.backbones.language import LanguageModel, set_activation
from blip2.backbones.lora import ADAPTER_KEY, merged_weights
from blip2.backbones.pretrained import load_pretrained, load_submodule, wrap_load_errors
from blip2.backbones.vision import ImageEncoder, Preprocessing
from blip2.backbones.vision_loaders import Layer, check_image_size, interpolate_pos_embed, wrap_transformers
from blip2.config import ModelConfig
from blip2.errors import InputError
from blip2.interop.weights import Weights

Format = Literal["blip2", "transformers", "lavis"]
VISION_PREFIX, LANGUAGE_PREFIX = "vision.network.", "language.network."
TEXT_PREFIXES = ("qformer.word_embedding", "qformer.position_embedding")
"""Name prefixes of the weights, besides the text feed-forwards, that stage 2 has only if its Q-Former reads text."""

STAGE1_ONLY = ("image_projection", "text_projection", "matching_head", "language_head", "temperature")
"""Name prefixes of the weights that only stage 1 has."""
STAGE2_ONLY = ("projection.", LANGUAGE_PREFIX)
"""Name prefixes of the weights that only stage 2 has."""
QFORMER_TOKENIZER = "qformer_tokenizer"
"""Subfolder of the Q-Former's tokenizer in a folder that also contains the LLM's."""


def is_text_weight(name: str) -> bool:
    """Return whether a weight belongs only to the text transformer of the Q-Former."""
    return name.startswith(TEXT_PREFIXES) or ".text_feed_forward." in name


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any format, whose weights have this project's names."""

    name: str
    """Folder, file or hub name."""
    format: Format
    description: str
    """A short description of the contents, for the log."""
    config: ModelConfig
    weights: Weights
    """All weights. The names of weights of frozen parts are :data:`VISION_PREFIX` or :data:`LANGUAGE_PREFIX`, followed
    by transformers' name."""
    tokenizer: Path | None = None
    """Folder of the tokenizer: the Q-Former's in stage 1, and in stage 2 if the Q-Former reads text; else the LLM's.
    None: the checkpoint has none."""
    vision_config: Any = None
    """Configuration of the image encoder. None: the weights contain no image encoder."""
    language_config: Any = None
    """Configuration of the LLM. None: the weights contain no LLM."""
    preprocessing: Preprocessing | None = None
    """Preprocessing for the image encoder. None: the weights contain no image encoder."""

    @property
    def missing_prefixes(self) -> tuple[str, ...]:
        """Name prefixes of missing stage-1 weights for which transformers' format has no place.

        A model that loads the checkpoint keeps its initial values of these weights.
        """
        return tuple(part for part in ("temperature", "language_head.") if not self.weights.select(part))

    @property
    def has_vision(self) -> bool:
        return self.vision_config is not None

    @property
    def has_language(self) -> bool:
        return self.language_config is not None

    @property
    def has_stage1(self) -> bool:
        """Whether all weights of stage 1 are present, possibly together with those of stage 2."""
        return "matching_head.weight" in self.weights

    def is_stage1_only(self, name: str) -> bool:
        """Return whether a weight belongs to a head or to a text transformer that the stage-2 model does not have."""
        return name.startswith(STAGE1_ONLY) or (is_text_weight(name) and not self.config.qformer.use_qformer_text_input)

    def stage_weights(self) -> Weights:
        """Return the weights of the checkpoint's own stage, including frozen parts."""
        if self.config.stage == "representation":
            return self.weights.drop(*STAGE2_ONLY)
        return self.weights.filter(lambda name: not self.is_stage1_only(name))

    def trained_weights(self) -> Weights:
        """Return the weights of the checkpoint's own stage, without frozen parts."""
        return self.stage_weights().drop(*self._frozen)

    def all_trained_weights(self) -> Weights:
        """Return all weights of the checkpoint, of both stages if it contains both, without frozen parts."""
        return self.weights.drop(*self._frozen)

    @property
    def _frozen(self) -> tuple[str, ...]:
        return (VISION_PREFIX,) * self.has_vision + (LANGUAGE_PREFIX,) * self.has_language

    def as_stage(self, stage: Literal["representation", "generation"] | None) -> Checkpoint:
        """Return this checkpoint as a checkpoint of a given stage.

        Args:
            stage: the stage. None: the checkpoint's own stage.

        Raises:
            InputError: the checkpoint does not contain the stage.
        """
        if stage in (None, self.config.stage):
            return self
        if stage == "generation" or not self.has_stage1:
            raise InputError(f"{self.name} contains only stage {self.config.stage}: load a model of stage {stage}")
        tokenizer = None if self.tokenizer is None else self.tokenizer / QFORMER_TOKENIZER
        return replace(self, config=replace(self.config, stage=stage, language=None), tokenizer=tokenizer)

    def merge_adapters(self) -> Checkpoint:
        """Return this checkpoint with the Q-Former's adapters (``qformer.lora``) merged into the weights they adapt."""
        qformer = self.config.qformer
        if qformer.lora is None:
            return self
        merged = merged_weights(self.weights.select("qformer."), qformer.lora)
        weights = self.weights.filter(lambda name: not (name.startswith("qformer.") and ADAPTER_KEY in name))
        config = replace(self.config, qformer=replace(qformer, lora=None))
        return replace(self, config=config, weights=weights | merged)

    def with_config(self, config: ModelConfig) -> Checkpoint:
        """Return this checkpoint with another config.

        The weights of an embedded image encoder or LLM are dropped if `config` loads that part from somewhere else: if
        the ``name`` of the part in `config` is not the name of this checkpoint.
        """
        weights, vision, language = self.weights, self.vision_config, self.language_config
        if self.has_vision and config.vision.name != self.name:
            weights, vision = weights.drop(VISION_PREFIX), None
        if self.has_language and config.language is not None and config.language.name != self.name:
            weights, language = weights.drop(LANGUAGE_PREFIX), None
        return replace(self, config=config, weights=weights, vision_config=vision, language_config=language)

    def with_num_attention_heads(self, num_attention_heads: int | None) -> Checkpoint:
        """Return this checkpoint with the number of heads of its image encoder, which the weights do not determine.

        Args:
            num_attention_heads: the number that the user has set. None: the number in the configuration of the image
                encoder.

        Raises:
            InputError: the number is unknown, contradicts the configuration or does not divide the width.
        """
        config = copy.deepcopy(self.vision_config)
        if config is None:
            return self
        known, width = config.num_attention_heads or num_attention_heads, config.hidden_size
        if known is None or width % known:
            raise InputError(
                f"the image encoder of {self.name} has width {width} and {known or 'an unknown number of'} heads,"
                " expected a divisor of the width: set vision.num_attention_heads to the number of heads that it was"
                " trained with"
            )
        if num_attention_heads not in (None, known):
            raise InputError(
                f"vision.num_attention_heads is {num_attention_heads}, but the image encoder of {self.name} has"
                f" {known} heads: leave out vision.num_attention_heads"
            )
        config.num_attention_heads = known
        return replace(self, vision_config=config)

    def load_image_encoder(
        self,
        layer: Layer | None,
        image_size: int | None,
        dtype: torch.dtype,
        load_kwargs: Mapping[str, Any] | None = None,
    ) -> ImageEncoder:
        """Create the image encoder of this checkpoint, frozen.

        Args:
            layer: the layer whose output is used; see :func:`load_image_encoder`.
            image_size: height and width of the images in pixels. None: the encoder's own size.
            dtype: data type of the weights and of the computation.
            load_kwargs: further arguments of ``from_pretrained``.

        Raises:
            InputError: the weights are incomplete, or the encoder has no such layer or cannot encode images of this
                size.
        """
        assert self.vision_config is not None and self.preprocessing is not None
        network = load_submodule(
            copy.deepcopy(self.vision_config),
            to_dtype(self.weights.strip_prefix(VISION_PREFIX), dtype),
            self.name,
            "image encoder",
            optional="post_layernorm|pooler",
            load_kwargs=load_kwargs,
        )
        preprocessing = replace(self.preprocessing, image_size=image_size or self.preprocessing.image_size)
        if layer == "last":
            raise InputError(
                f"vision.layer is last, but the last layer of the image encoder is not stored in {self.name}: leave out"
                " vision.layer"
            )
        if not isinstance(self.vision_config, Blip2VisionConfig):
            layer = "last"  # the last of the remaining layers
        return wrap_transformers(network, preprocessing, layer)

    def resize_vision(self, image_size: int | None) -> tuple[Any, Weights]:
        """Return the configuration and the weights of the image encoder, with resized position embeddings.

        Args:
            image_size: height and width of the images in pixels. None: the encoder's own size.
        """
        config, weights = copy.deepcopy(self.vision_config), self.weights.select(VISION_PREFIX)
        if image_size not in (None, config.image_size):
            check_image_size(image_size, config.patch_size)
            name = f"{VISION_PREFIX}embeddings.position_embedding"
            grid = image_size // config.patch_size
            if name in weights:
                weights = weights | {name: interpolate_pos_embed(weights[name], grid)}
            else:  # CLIP's table is a module and has no batch dimension
                table = interpolate_pos_embed(weights[f"{name}.weight"][None], grid)[0]
                weights = weights | {f"{name}.weight": table}
            config.image_size = image_size
        return config, weights

    def load_language_model(
        self, dtype: torch.dtype, activation: str | None = None, load_kwargs: Mapping[str, Any] | None = None
    ) -> LanguageModel:
        """Create the LLM of this checkpoint, frozen; see :func:`blip2.backbones.language.load_language_model`."""
        config = copy.deepcopy(self.language_config)
        set_activation(config, activation)
        weights = to_dtype(self.weights.strip_prefix(LANGUAGE_PREFIX), dtype)
        return LanguageModel(load_submodule(config, weights, self.name, "language model", load_kwargs=load_kwargs))


def to_dtype(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert the floating-point weights to a data type, one weight at a time to save memory."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer.

    Args:
        folder: folder of the tokenizer.
        trust_remote_code: whether to run Python code in the folder.

    Raises:
        InputError: the tokenizer is missing, damaged or not a fast one, or needs code that is not trusted.
    """
    with wrap_load_errors(str(folder), "tokenizer", "tokenizer.json"):
        tokenizer = load_pretrained(AutoTokenizer, folder, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer of {str(folder)!r} is slow (it has no tokenizer.json), expected a fast one: save it as a"
            " fast tokenizer of transformers first"
        )
    return tokenizer
