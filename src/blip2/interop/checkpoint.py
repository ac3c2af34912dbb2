"""What a checkpoint of another format is, once it is seen as this project's."""

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
from blip2.backbones.pretrained import load_pretrained, read_part, reading
from blip2.backbones.vision import (
    ImageEncoder,
    Layer,
    Preprocessing,
    check_image_size,
    resize_positions,
    wrap_transformers,
)
from blip2.config import Recipe
from blip2.errors import InputError
from blip2.interop.weights import Weights

Format = Literal["blip2", "transformers", "lavis"]
VISION, LANGUAGE = "vision.network.", "language.network."
TEXT = ("qformer.word_embedding", "qformer.position_embedding")
"""Beginnings of the names of weights that stage 2 has only if its Q-Former reads questions, beside the text
feed-forwards."""


STAGE_1_ALONE = ("image_projection", "text_projection", "matching_head", "language_head", "temperature")
"""Beginnings of the names of weights that stage 2 has not."""
STAGE_2_ALONE = ("projection.", LANGUAGE)
"""Beginnings of the names of weights that stage 1 has not."""
QFORMER_TOKENIZER = "qformer_tokenizer"
"""Folder, within one that holds both stages, of the tokenizer of the Q-Former's text."""


def is_text_weight(name: str) -> bool:
    """Whether a weight is of the Q-Former's text transformer alone."""
    return name.startswith(TEXT) or ".text_feed_forward." in name


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any format, under this project's names."""

    name: str
    """Folder, file or hub name."""
    format: Format
    about: str
    """What it was found to be, in a few words."""
    recipe: Recipe
    """The sizes of its parts and the names of its frozen ones; there are no data in it if it is of another format."""
    weights: Weights
    """All that it holds; frozen parts under the names that transformers has for them behind :data:`VISION` and
    :data:`LANGUAGE`."""
    tokenizer: Path | None = None
    """Folder of its tokenizer: of the Q-Former's text in stage 1, of the LLM in stage 2."""
    vision_config: Any = None
    """Of its image encoder, where the weights have one."""
    language_config: Any = None
    """Of its LLM, where the weights have one."""
    preprocessing: Preprocessing | None = None
    """What its image encoder expects of pixels, where the weights have one."""

    @property
    def absent(self) -> tuple[str, ...]:
        """Beginnings of the names of what transformers' stage 1 has no place for, where it is not there: it begins
        anew."""
        return tuple(part for part in ("temperature", "language_head.") if not self.weights.part(part))

    @property
    def holds_vision(self) -> bool:
        return self.vision_config is not None

    @property
    def holds_language(self) -> bool:
        return self.language_config is not None

    @property
    def holds_stage_1(self) -> bool:
        """Whether all is there that :class:`RepresentationModel` has; beside it there may be a stage 2."""
        return "matching_head.weight" in self.weights

    def is_stage_1_alone(self, name: str) -> bool:
        """Whether a weight is of the heads, or of a text transformer that stage 2 has not."""
        return name.startswith(STAGE_1_ALONE) or (
            is_text_weight(name) and not self.recipe.qformer.use_qformer_text_input
        )

    def only_stage(self) -> Weights:
        """The weights that its stage has, frozen parts included, where those of both are there."""
        if self.recipe.stage == "representation":
            return self.weights.without(*STAGE_2_ALONE)
        return self.weights.where(lambda name: not self.is_stage_1_alone(name))

    def trained(self) -> Weights:
        """What its stage trains: all but the frozen parts that :meth:`image_encoder`, :meth:`language_model` read."""
        return self.only_stage().without(*self._frozen)

    def not_frozen(self) -> Weights:
        """What both stages train, as far as it is there: :meth:`trained` of either."""
        return self.weights.without(*self._frozen)

    @property
    def _frozen(self) -> tuple[str, ...]:
        return (VISION,) * self.holds_vision + (LANGUAGE,) * self.holds_language

    def of_stage(self, stage: Literal["representation", "generation"] | None) -> Checkpoint:
        """The same weights seen as those of a stage, where it holds those of both.

        Raises:
            InputError: it does not.
        """
        if stage in (None, self.recipe.stage):
            return self
        if stage == "generation" or not self.holds_stage_1:
            raise InputError(f"{self.name} is of stage {self.recipe.stage} alone: load a model of stage {stage}")
        tokenizer = None if self.tokenizer is None else self.tokenizer / QFORMER_TOKENIZER
        return replace(self, recipe=replace(self.recipe, stage=stage, language=None), tokenizer=tokenizer)

    def with_recipe(self, recipe: Recipe) -> Checkpoint:
        """The same with another recipe; a frozen part that it names elsewhere is no longer this checkpoint's."""
        weights, vision, language = self.weights, self.vision_config, self.language_config
        if self.holds_vision and recipe.vision.name != self.name:
            weights, vision = weights.without(VISION), None
        if self.holds_language and recipe.language is not None and recipe.language.name != self.name:
            weights, language = weights.without(LANGUAGE), None
        return replace(self, recipe=recipe, weights=weights, vision_config=vision, language_config=language)

    def with_heads(self, heads: int | None) -> Checkpoint:
        """The same with the number of heads of its image encoder, which no weight tells.

        Raises:
            InputError: neither its configuration nor `heads` says it, or each says another, or it does not divide the
                width.
        """
        config = copy.deepcopy(self.vision_config)
        if config is None:
            return self
        known, width = config.num_attention_heads or heads, config.hidden_size
        if known is None or width % known:
            raise InputError(
                f"the image encoder of {self.name} is {width} wide and of {known or 'an unknown number of'} heads,"
                " expected a divisor of the width: set vision.num_attention_heads to the number that it was trained"
                " with"
            )
        if heads not in (None, known):
            raise InputError(
                f"vision.num_attention_heads is {heads}, the image encoder of {self.name} has {known}: leave it out"
            )
        config.num_attention_heads = known
        return replace(self, vision_config=config)

    def image_encoder(self, layer: Layer | None, image_size: int | None, dtype: torch.dtype) -> ImageEncoder:
        """Its image encoder, frozen, for images of `image_size` (its own when None)."""
        assert self.vision_config is not None and self.preprocessing is not None
        network = read_part(
            copy.deepcopy(self.vision_config),
            converted(self.weights.stripped(VISION), dtype),
            self.name,
            "image encoder",
            optional="post_layernorm|pooler",
        )
        preprocessing = replace(self.preprocessing, image_size=image_size or self.preprocessing.image_size)
        if layer == "last":
            raise InputError(f"the last layer of the image encoder of {self.name} is gone: leave out vision.layer")
        if not isinstance(self.vision_config, Blip2VisionConfig):
            layer = "last"  # of those that are left
        return wrap_transformers(network, preprocessing, layer)

    def resized(self, image_size: int | None) -> tuple[Any, Weights]:
        """Configuration and weights of its image encoder for images of another size (its own when None)."""
        config, weights = copy.deepcopy(self.vision_config), self.weights.part(VISION)
        if image_size not in (None, config.image_size):
            check_image_size(image_size, config.patch_size)
            place = f"{VISION}embeddings.position_embedding"
            grid = image_size // config.patch_size
            if place in weights:
                weights = weights | {place: resize_positions(weights[place], grid)}
            else:  # CLIP's table is a module, without a dimension for the batch
                table = resize_positions(weights[f"{place}.weight"][None], grid)[0]
                weights = weights | {f"{place}.weight": table}
            config.image_size = image_size
        return config, weights

    def language_model(self, dtype: torch.dtype, activation: str | None = None) -> LanguageModel:
        """Its LLM, frozen."""
        config = copy.deepcopy(self.language_config)
        set_activation(config, activation)
        weights = converted(self.weights.stripped(LANGUAGE), dtype)
        return LanguageModel(read_part(config, weights, self.name, "language model"))


def converted(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in a dtype, each read and converted before the next."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def read_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A fast tokenizer.

    Args:
        trust_remote_code: whether code that lies beside it may run.

    Raises:
        InputError: there is none, it is damaged, it needs code that may not run, or it is a slow one.
    """
    with reading(str(folder), "tokenizer", "tokenizer.json"):
        tokenizer = load_pretrained(AutoTokenizer, folder, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer of {str(folder)!r} has no tokenizer.json: save it as a fast tokenizer first")
    return tokenizer
