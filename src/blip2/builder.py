"""From a recipe to a model: the one place that knows names, folders and packages as well as networks."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from blip2.backbones.language import LanguageModel, load_language_model
from blip2.backbones.lora import add_adapters
from blip2.backbones.pretrained import check_finite
from blip2.backbones.vision import ImageEncoder, load_image_encoder
from blip2.config import IMAGE_TOKEN, LanguageConfig, Precision, QFormerConfig, Recipe, VisionConfig
from blip2.data.assets import resolve
from blip2.data.benchmarks import SOURCE as BENCHMARK
from blip2.data.collate import GenerationTexts, PrefixTexts, RepresentationTexts, TextPreparation, check_prompt
from blip2.data.shards import is_url
from blip2.errors import InputError
from blip2.interop.checkpoint import Checkpoint, read_tokenizer
from blip2.interop.detect import open_foreign
from blip2.io import output_path
from blip2.model.bert_init import check_fits, initialize_from_bert
from blip2.model.generation import GenerationModel
from blip2.model.image_memory import tells_positions
from blip2.model.representation import RepresentationModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DECODER_START = "[DEC]"


@dataclass(frozen=True)
class Built:
    """A model with the tokenizer of its text: the Q-Former's in stage 1, the LLM's in stage 2."""

    model: RepresentationModel | GenerationModel
    tokenizer: PreTrainedTokenizerBase
    end: int | None = None
    """Stage 2: id of the token that ends a text."""
    reader: PreTrainedTokenizerBase | None = None
    """Stage 2: tokenizer of a Q-Former that reads questions."""

    @property
    def qformer_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Of the Q-Former's text, if it reads any."""
        return self.tokenizer if isinstance(self.model, RepresentationModel) else self.reader


def choose_device(wanted: str | None) -> torch.device:
    """The device asked for, or the best there is.

    Raises:
        InputError: it is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted is None:
        wanted = next(name for name in ("cuda", "mps", "cpu") if there[name])
    kind = wanted.split(":")[0]
    if kind not in there:
        raise InputError(f"there is no kind of device {wanted!r}: choose cpu, cuda or mps")
    if not there[kind]:
        raise InputError(f"device {wanted!r} was asked for, but PyTorch {torch.__version__} finds none here: use cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise InputError(
            f"there is no device {wanted!r}: choose cpu, cuda or mps, or one of several as cuda:1"
        ) from error
    if kind == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {wanted!r} was asked for, but there are {torch.cuda.device_count()}: the first is cuda:0"
        )
    return device


def choose_dtype(wanted: Precision | None, device: torch.device, trains: bool = False) -> torch.dtype:
    """The dtype asked for; when none was, bfloat16 for what is frozen on a GPU and float32 elsewhere."""
    return DTYPES[wanted or ("bf16" if device.type == "cuda" and not trains else "fp32")]


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """A recipe that means the same from every working directory.

    Names of models and data that are there as files or folders become absolute paths, and so do outputs; names on a
    hub, packages and URLs stay as they are.
    """
    data, language, evaluation, starts = recipe.data, recipe.language, recipe.evaluation, recipe.start_from
    sources = data.train
    sources = _absolute(sources) if isinstance(sources, str) else {_absolute(key): n for key, n in sources.items()}
    features = None if data.features is None else str(output_path(data.features).absolute())
    bert, tokenizer = _absolute_or_none(recipe.qformer.bert), _absolute_or_none(recipe.qformer.tokenizer)
    return replace(
        recipe,
        output=str(output_path(recipe.output).absolute()),
        vision=_absolute_model(recipe.vision),
        data=replace(data, train=sources, validation=_absolute_or_none(data.validation), features=features),
        qformer=replace(recipe.qformer, bert=bert, tokenizer=tokenizer),
        language=None if language is None else _absolute_model(language),
        evaluation=None if evaluation is None else replace(evaluation, data=_absolute(evaluation.data)),
        start_from=[_absolute(each) for each in starts] if isinstance(starts, list) else _absolute_or_none(starts),
    )


Part = TypeVar("Part", VisionConfig, LanguageConfig)


def _absolute_model(part: Part) -> Part:
    name, trusted = _absolute(part.name), _absolute_or_none(part.trust_remote_code)
    return replace(part, name=name, trust_remote_code=trusted)


def _absolute_or_none(name: str | None) -> str | None:
    return None if name is None else _absolute(name)


def _absolute(name: str) -> str:
    if is_url(name):
        return name
    benchmark = BENCHMARK.fullmatch(name)
    if benchmark is not None:
        return f"{benchmark[1]}:{benchmark[2]}:{_absolute(benchmark[3])}"
    # os.path, as a name may be no path at all, or one that is too long
    path = os.path.expanduser(name)  # noqa: PTH111
    plain = re.split(r"[*?\[{]", path)[0]  # of a pattern the folders that it names
    folder = os.path.dirname(plain) or "."  # noqa: PTH120
    there = os.path.exists(path) or (plain != path and os.path.isdir(folder))  # noqa: PTH110, PTH112
    return str(Path(path).absolute()) if there else name


def build(
    recipe: Recipe, device: torch.device, checkpoint: Checkpoint | None = None, place: torch.device | None = None
) -> Built:
    """Load the pretrained parts and make the rest as `recipe` says; what trains is in float32.

    Args:
        device: where it is to run, which decides about dtypes that the recipe leaves open.
        checkpoint: its tokenizer is used and BERT is not read, since all weights will come from there.
        place: where its weights go; None: to `device`.

    Raises:
        InputError: a part cannot be loaded, or the parts do not fit each other.
    """
    place = device if place is None else place
    trains = recipe.optimizer.trains
    vision = read_image_encoder(recipe.vision, choose_dtype(recipe.vision.dtype, device, trains("vision")), checkpoint)
    from_bert = recipe.begins_with_bert and checkpoint is None
    if recipe.language is None:
        if from_bert:
            check_fits(resolve(recipe.qformer.bert or ""), recipe.qformer)
        tokenizer = text_tokenizer(recipe.qformer, checkpoint)
        model = RepresentationModel(vision, recipe.qformer, recipe.objectives)
        if from_bert:
            initialize_from_bert(resolve(recipe.qformer.bert or ""), model.qformer, model.language_head)
        return Built(_placed(model, recipe, place), tokenizer)
    adapts = recipe.language.lora is not None
    dtype = choose_dtype(recipe.language.dtype, device, trains("language") and not adapts)
    language = read_language_model(recipe.language, dtype, checkpoint, device)
    if recipe.language.lora is not None:
        add_adapters(language, recipe.language.lora)
    tokenizer = read_tokenizer(resolve(recipe.language.name), recipe.language.trust_remote_code is not None)
    reader = text_tokenizer(recipe.qformer, checkpoint) if recipe.qformer.use_qformer_text_input else None
    model = GenerationModel(vision, recipe.qformer, language, recipe.objectives)
    if from_bert:
        initialize_from_bert(resolve(recipe.qformer.bert or ""), model.qformer)
        model.initialize_projection()
    end = end_of_text(tokenizer, recipe.language.stop_string, recipe.language.name)
    model = _placed(model, recipe, place)
    model.language.check()
    return Built(model, tokenizer, end, reader)


Model = TypeVar("Model", RepresentationModel, GenerationModel)


def _placed(model: Model, recipe: Recipe, place: torch.device) -> Model:
    """A model whose weights are where they are to go, and were found to be numbers there."""
    model = model.to(place)
    sources = {"vision": recipe.vision.name, "language": recipe.language.name if recipe.language else ""}
    for name, parameter in model.named_parameters():
        check_finite(name, parameter, sources.get(name.split(".")[0]) or recipe.qformer.bert or "")
    return model


def read_image_encoder(config: VisionConfig, dtype: torch.dtype, opened: Checkpoint | None = None) -> ImageEncoder:
    """The image encoder that a recipe names, which may lie within a checkpoint of BLIP-2: `opened`, or another."""
    within = opened if opened is not None and opened.holds_vision else open_foreign(config.name)
    if within is None:
        if config.num_attention_heads is not None:
            raise InputError(
                f"vision.num_attention_heads is {config.num_attention_heads}, which {config.name!r} says itself:"
                " leave it out"
            )
        trusts = config.trust_remote_code is not None  # which is its name then: a recipe sees to that
        encoder = load_image_encoder(resolve(config.name), config.layer, config.image_size, dtype, trusts)
    elif within.holds_vision:
        encoder = within.with_heads(config.num_attention_heads).image_encoder(config.layer, config.image_size, dtype)
    else:
        raise InputError(f"{config.name!r} ({within.about}) holds no image encoder: set vision.name to one that does")
    encoding = config.position_encoding
    encoder.position_encoding = ("none" if tells_positions(encoder) else "sine2d") if encoding == "auto" else encoding
    return encoder


def read_language_model(
    config: LanguageConfig, dtype: torch.dtype, opened: Checkpoint | None = None, device: torch.device | None = None
) -> LanguageModel:
    """The LLM that a recipe names, which may lie within a BLIP-2 of transformers: `opened`, or another.

    Args:
        device: where it is quantized, if it is to be.
    """
    within = opened if opened is not None and opened.holds_language else open_foreign(config.name)
    if within is None:
        trusts = config.trust_remote_code is not None
        return load_language_model(resolve(config.name), dtype, config.activation, config.quantization, device, trusts)
    if not within.holds_language:
        raise InputError(f"{config.name!r} ({within.about}) holds no LLM: set language.name to one that does")
    if config.quantization is not None:
        raise InputError(f"the LLM inside {within.name} cannot be quantized: set language.name to the LLM's own files")
    return within.language_model(dtype, config.activation)


def text_tokenizer(config: QFormerConfig, checkpoint: Checkpoint | None) -> PreTrainedTokenizerBase:
    """BERT's tokenizer with [DEC] as its last token."""
    if checkpoint is not None and checkpoint.tokenizer is not None:
        return _check_vocabulary(read_tokenizer(checkpoint.tokenizer), config, checkpoint.name)
    name = config.tokenizer or config.bert
    if name is None:
        raise InputError("the Q-Former has no text tokenizer: set qformer.tokenizer, or qformer.bert")
    tokenizer = read_tokenizer(resolve(name))
    tokenizer.add_special_tokens({"bos_token": DECODER_START})
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    if len(tokenizer) != config.vocab_size:
        raise InputError(
            f"the tokenizer of {name!r} has {len(tokenizer)} tokens with {DECODER_START}, the recipe's"
            f" qformer.vocab_size is {config.vocab_size}: set qformer.vocab_size to {len(tokenizer)}"
        )
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: QFormerConfig, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, if the Q-Former has an embedding for each of its words."""
    beyond = [token for token, index in tokenizer.get_vocab().items() if index >= config.vocab_size]
    if set(beyond) - {IMAGE_TOKEN}:  # which stands for the picture and is never embedded
        raise InputError(
            f"the tokenizer of {name!r} has tokens beyond the Q-Former's vocabulary of {config.vocab_size}, such as"
            f" {min(beyond)!r}: copy the tokenizer that belongs to the checkpoint"
        )
    return tokenizer


def end_of_text(tokenizer: PreTrainedTokenizerBase, stop: str | None, name: str) -> int:
    """Id of the token that ends a text: of `stop` where it is given, else the tokenizer's own.

    An LLM needs no padding token (padding is masked) and no BOS (the visual prompt comes first), but without an end it
    would never stop.
    """
    if stop is not None:
        ids = tokenizer(stop, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise InputError(f"language.stop_string {stop!r} is {len(ids)} tokens for {name!r}, expected exactly one")
        return ids[0]
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer of {name!r} has no end-of-text token, so texts would never end: set language.stop_string"
            " to the"
            r' text that ends a caption, for example "\n"'
        )
    assert isinstance(tokenizer.eos_token_id, int)
    return tokenizer.eos_token_id


def prepare_texts(recipe: Recipe, built: Built) -> TextPreparation:
    """How captions become what the stage trains on."""
    limit = recipe.data.max_length
    if recipe.language is None or not isinstance(built.model, GenerationModel):
        limit = min(limit, recipe.qformer.max_position_embeddings)
        return RepresentationTexts(built.tokenizer, limit, recipe.data.text_normalization)
    assert built.end is not None
    language = built.model.language
    language.check(trains=True)
    kind = PrefixTexts if language.is_encoder_decoder else GenerationTexts
    for prompt in (recipe.language.prompt, recipe.language.question_prompt or ""):
        if prompt.strip() and kind is GenerationTexts:
            check_prompt(built.tokenizer, prompt)
    texts = kind(
        built.tokenizer, limit, recipe.language.prompt, built.end, built.reader, recipe.language.question_prompt,
        _room(recipe, language), recipe.data.text_normalization,
    )  # fmt: skip
    longest = max(texts.prompt_length(prompt) for prompt in (recipe.language.prompt, texts.question_prompt or ""))
    if texts.room is not None and longest > texts.room:
        raise InputError(
            f"the LLM has {language.positions} positions, which do not hold {recipe.qformer.num_query_tokens}"
            " queries, a prompt"
            f" of {longest} tokens and data.max_length {limit}: make data.max_length or language.prompt shorter, or set"
            " language.name to another"
        )
    return texts


def _room(recipe: Recipe, language: LanguageModel) -> int | None:
    """Tokens that a prompt may have beside queries and caption; None: any number. Below 0 nothing fits at all."""
    if language.positions is None:
        return None
    captions = recipe.data.max_length
    if not language.is_encoder_decoder:
        return language.positions - recipe.qformer.num_query_tokens - captions
    # The decoder writes the caption; without a prompt, the encoder reads the beginning of it.
    room = language.positions - recipe.qformer.num_query_tokens
    if captions > language.positions or (
        recipe.language is not None and not recipe.language.prompt and captions > room
    ):
        return -1
    return room
