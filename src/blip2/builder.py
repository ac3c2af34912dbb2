"""Build models from configs: load the pretrained parts by name, check that they fit each other, initialize the rest."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import dispatch_model
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from blip2.backbones.features import FeatureFormat
from blip2.backbones.language import LanguageModel, load_language_model
from blip2.backbones.lora import add_adapters, add_qformer_adapters
from blip2.backbones.pretrained import check_finite
from blip2.backbones.vision import ImageEncoder, Preprocessing
from blip2.backbones.vision_loaders import load_image_encoder, wrap_module
from blip2.config import (
    FEATURES,
    IMAGE_TOKEN,
    MODULE,
    LanguageConfig,
    ModelConfig,
    ObjectivesConfig,
    Precision,
    QFormerConfig,
    Recipe,
    VisionConfig,
)
from blip2.data.assets import resolve
from blip2.data.benchmarks import SOURCE_PATTERN as BENCHMARK
from blip2.data.collate import CausalLMCollator, Collator, PrefixLMCollator, Stage1Collator, check_prompt
from blip2.data.shards import is_url
from blip2.errors import InputError
from blip2.interop.checkpoint import Checkpoint, load_tokenizer
from blip2.interop.detect import open_foreign
from blip2.io import expand_home
from blip2.model.bert_init import check_compatible, initialize_from_bert
from blip2.model.generation import GenerationModel
from blip2.model.image_memory import encodes_positions
from blip2.model.representation import RepresentationModel

log = logging.getLogger("blip2")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DECODER_START_TOKEN = "[DEC]"


@dataclass(frozen=True)
class Built:
    """A model with its tokenizers."""

    model: RepresentationModel | GenerationModel
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer of the captions: that of the Q-Former in stage 1, that of the LLM in stage 2."""
    eos_token_id: int | None = None
    """Stage 2: id of the token that ends each text of the LLM. None in stage 1."""
    question_tokenizer: PreTrainedTokenizerBase | None = None
    """Stage 2: tokenizer of the Q-Former. None if the Q-Former reads no questions, and in stage 1."""

    @property
    def qformer_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer of the Q-Former's text; None if the Q-Former reads no text."""
        return self.tokenizer if isinstance(self.model, RepresentationModel) else self.question_tokenizer


def choose_device(requested: str | None) -> torch.device:
    """Return the device on which to run.

    Args:
        requested: ``cpu``, ``cuda``, ``cuda:1`` or ``mps``. None: the first of cuda, mps and cpu that is available.

    Raises:
        InputError: the requested device is not available.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if requested is None:
        requested = next(name for name in ("cuda", "mps", "cpu") if available[name])
    kind = requested.split(":")[0]
    if kind not in available:
        raise InputError(f"there is no device {requested!r}: choose cpu, cuda or mps")
    if not available[kind]:
        raise InputError(
            f"device {requested!r} was requested, but PyTorch {torch.__version__} finds no such device: use cpu"
        )
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise InputError(
            f"there is no device {requested!r}: choose cpu, cuda or mps, or a GPU by its number, such as cuda:1"
        ) from error
    if kind == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {requested!r} was requested, but the number of GPUs is {torch.cuda.device_count()} and the first"
            " is cuda:0: choose a lower number"
        )
    return device


def choose_dtype(requested: Precision | str | None, device: torch.device) -> torch.dtype:
    """Return the requested dtype. None: bfloat16 on CUDA devices, float32 on all others.

    Raises:
        InputError: `requested` is not the name of a dtype.
    """
    if requested is not None and requested not in DTYPES:
        raise InputError(f"dtype is {str(requested)!r}, expected one of {', '.join(DTYPES)}: use one of them")
    return DTYPES[requested or ("bf16" if device.type == "cuda" else "fp32")]


Config = TypeVar("Config", ModelConfig, Recipe)


def with_absolute_paths(config: Config) -> Config:
    """Return a model's config, or a recipe, whose paths do not depend on the working directory.

    Outputs become absolute paths. A name of a model or of data becomes an absolute path if a file or folder has this
    name. Hub names, names with ``package:`` and URLs are not changed.
    """
    qformer, language = config.qformer, config.language
    config = replace(
        config,
        vision=_absolute_model(config.vision),
        qformer=replace(qformer, bert=_absolute_or_none(qformer.bert), tokenizer=_absolute_or_none(qformer.tokenizer)),
        language=None if language is None else _absolute_model(language),
    )
    if isinstance(config, ModelConfig):
        return config
    data, evaluation, starts = config.data, config.evaluation, config.start_from
    sources = data.train
    sources = _absolute(sources) if isinstance(sources, str) else {_absolute(key): n for key, n in sources.items()}
    features = None if data.features is None else str(expand_home(data.features).absolute())
    return replace(
        config,
        output=str(expand_home(config.output).absolute()),
        data=replace(data, train=sources, validation=_absolute_or_none(data.validation), features=features),
        evaluation=None if evaluation is None else replace(evaluation, data=_absolute(evaluation.data)),
        start_from=[_absolute(each) for each in starts] if isinstance(starts, list) else _absolute_or_none(starts),
    )


Part = TypeVar("Part", VisionConfig, LanguageConfig)


def _absolute_model(part: Part) -> Part:
    if isinstance(part, VisionConfig) and part.name in (FEATURES, MODULE):
        return part
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
    # os.path accepts names that are not paths, or are too long.
    path = os.path.expanduser(name)  # noqa: PTH111
    plain = re.split(r"[*?\[{]", path)[0]  # the part before the first wildcard
    folder = os.path.dirname(plain) or "."  # noqa: PTH120
    exists = os.path.exists(path) or (plain != path and os.path.isdir(folder))  # noqa: PTH110, PTH112
    return str(Path(path).absolute()) if exists else name


def build(
    config: ModelConfig,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
    weights_device: torch.device | None = None,
    objectives: ObjectivesConfig | None = None,
    from_bert: bool = True,
    encoder: nn.Module | None = None,
    load_kwargs: Mapping[str, Any] | None = None,
) -> Built:
    """Build a model: load the pretrained parts and initialize the rest.

    The image encoder and the LLM have the dtypes that the config sets; all other weights are in float32.

    Args:
        config: the config of the model.
        device: device on which the model will run; it determines each dtype that the config does not set.
        checkpoint: checkpoint whose trained weights the caller will load afterwards. The tokenizer and frozen parts
            that it contains are used, and BERT is not loaded.
        weights_device: device to which the model is moved. None: `device`.
        objectives: weights of the losses in training. None: the defaults.
        from_bert: whether ``qformer.bert`` initializes the Q-Former if there is no checkpoint.
        encoder: the module for ``vision.name`` module or features (:func:`build_image_encoder`).
        load_kwargs: further arguments of ``from_pretrained`` for the LLM. If there is a ``device_map``, the LLM is not
            moved to `weights_device`. A ``quantization_config`` is used for the image encoder too.

    Returns:
        The model and its tokenizers.

    Raises:
        InputError: a part cannot be loaded, or the parts do not fit each other.
    """
    weights_device, objectives = weights_device or device, objectives or ObjectivesConfig()
    load_kwargs = load_kwargs or {}
    quantization = {key: value for key, value in load_kwargs.items() if key == "quantization_config"}
    vision_kwargs = {**quantization, "device_map": {"": device}} if quantization else None
    dtype = choose_dtype(config.vision.dtype, device)
    vision = build_image_encoder(config.vision, dtype, checkpoint, encoder, vision_kwargs)
    if quantization and all(parameter.is_floating_point() for parameter in vision.parameters()):
        log.warning("the image encoder %s is not a model of transformers and is not quantized", config.vision.name)
    if load_kwargs:  # before the LLM, which gets what is left of the memory
        vision = vision.to(weights_device)
    bert = config.qformer.bert if from_bert and checkpoint is None else None
    if config.language is None:
        if bert is not None:
            check_compatible(resolve(bert), config.qformer)
        tokenizer = load_text_tokenizer(config.qformer, checkpoint)
        model = RepresentationModel(vision, config.qformer, objectives)
        if bert is not None:
            initialize_from_bert(resolve(bert), model.qformer, model.language_head)
        if config.qformer.lora is not None:
            add_qformer_adapters(model.qformer, config.qformer.lora)
        return Built(_to_device(model, config, weights_device), tokenizer)
    dtype = choose_dtype(config.language.dtype, device)
    language = build_language_model(config.language, dtype, checkpoint, device, load_kwargs)
    embeddings = language.network.get_input_embeddings().weight  # whose size determines that of a new projection
    check_finite("of the token embeddings", embeddings, config.language.name)
    if config.language.lora is not None:
        add_adapters(language, config.language.lora)
    tokenizer = load_language_tokenizer(config.language)
    if config.language.bos_token is not None and language.is_encoder_decoder:
        raise InputError(
            f"language.bos_token is {config.language.bos_token!r}, but {config.language.name!r} is an encoder-decoder,"
            " whose texts begin with no such token: leave out language.bos_token"
        )
    question_tokenizer = (
        load_text_tokenizer(config.qformer, checkpoint) if config.qformer.use_qformer_text_input else None
    )
    model = GenerationModel(vision, config.qformer, language, objectives)
    if bert is not None:
        initialize_from_bert(resolve(bert), model.qformer)
        model.initialize_projection()
    if config.qformer.lora is not None:
        add_qformer_adapters(model.qformer, config.qformer.lora)
    eos_token_id = find_eos_token_id(tokenizer, config.language.stop_string, config.language.name)
    model = _to_device(model, config, weights_device)
    model.language.check()
    return Built(model, tokenizer, eos_token_id, question_tokenizer)


Model = TypeVar("Model", RepresentationModel, GenerationModel)


def _to_device(model: Model, config: ModelConfig, device: torch.device) -> Model:
    """Move a model to a device, unless its LLM has devices of its own, and check that the weights are finite there."""
    if isinstance(model, GenerationModel) and hasattr(model.language.network, "_hf_hook"):
        for part in (model.vision, model.image_norm, model.qformer, model.projection):
            part.to(device)
    else:
        model = model.to(device)
    sources = {"vision": config.vision.name, "language": config.language.name if config.language else ""}
    for name, parameter in model.named_parameters():
        check_finite(name, parameter, sources.get(name.split(".")[0]) or config.qformer.bert or "")
    return model


def build_image_encoder(
    config: VisionConfig,
    dtype: torch.dtype,
    opened: Checkpoint | None = None,
    encoder: nn.Module | None = None,
    load_kwargs: Mapping[str, Any] | None = None,
) -> ImageEncoder:
    """Load an image encoder from its own files or from a BLIP-2 checkpoint that contains it, or wrap a module.

    Args:
        config: section ``vision`` of the model's config.
        dtype: data type of the weights.
        opened: a checkpoint that is already open. If it contains an image encoder, that one is returned.
        encoder: a module that maps pixels [B, 3, H, W] (``vision.name`` module) or arrays [B, P, E] (features) to
            features. It keeps its data type unless ``config.dtype`` is set. None with ``vision.name`` features: the
            arrays themselves are the features.
        load_kwargs: further arguments of ``from_pretrained``, which apply to image encoders of transformers only.

    Raises:
        InputError: the image encoder cannot be loaded, or `config` or `encoder` does not fit it.
    """
    if encoder is not None and config.dtype is not None:
        encoder = encoder.to(dtype)
    if config.name == FEATURES:
        assert config.hidden_size is not None and config.max_tokens is not None
        form = FeatureFormat(config.hidden_size, config.max_tokens)
        return wrap_module(nn.Identity() if encoder is None else encoder, form)
    if config.name == MODULE and encoder is None:
        raise InputError(
            f"vision.name is {MODULE}, but no module was given: pass it in Python, as blip2.train(recipe, encoder=...)"
            " or blip2.load(path, encoder=...)"
        )
    if config.name != MODULE and encoder is not None:
        raise InputError(
            f"encoder is given, but vision.name is {config.name!r}, which names another image encoder: set vision.name"
            f" to {MODULE} or {FEATURES}, or leave out encoder"
        )
    if encoder is not None:
        wrapped = wrap_module(encoder, Preprocessing(config.image_size or 224))
        if config.image_size not in (None, wrapped.preprocessing.image_size):
            raise InputError(
                f"vision.image_size is {config.image_size}, but encoder is an ImageEncoder for images of"
                f" {wrapped.preprocessing.image_size} pixels per side: leave out vision.image_size"
            )
        return _with_position_encoding(wrapped, config)
    container = opened if opened is not None and opened.has_vision else open_foreign(config.name)
    if container is None:
        if config.num_attention_heads is not None:
            raise InputError(
                f"vision.num_attention_heads is {config.num_attention_heads}, but the files of {config.name!r}"
                " determine the number of heads: leave out vision.num_attention_heads"
            )
        trusts = config.trust_remote_code is not None  # ModelConfig accepts only the name
        name = resolve(config.name)
        loaded = load_image_encoder(name, config.layer, config.image_size, dtype, trusts, load_kwargs)
    elif container.has_vision:
        loaded = container.with_num_attention_heads(config.num_attention_heads).load_image_encoder(
            config.layer, config.image_size, dtype, load_kwargs
        )
    else:
        raise InputError(
            f"{config.name!r} ({container.description}) contains no image encoder: set vision.name to an image encoder,"
            " or to a checkpoint that contains one"
        )
    return _with_position_encoding(loaded, config)


def _with_position_encoding(encoder: ImageEncoder, config: VisionConfig) -> ImageEncoder:
    encoding = config.position_encoding
    encoder.position_encoding = ("none" if encodes_positions(encoder) else "sine2d") if encoding == "auto" else encoding
    return encoder


def build_language_model(
    config: LanguageConfig,
    dtype: torch.dtype,
    opened: Checkpoint | None = None,
    device: torch.device | None = None,
    load_kwargs: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """Load an LLM from its own files or from a BLIP-2 checkpoint that contains it.

    Args:
        config: section ``language`` of the model's config.
        dtype: data type of the weights; of a quantized LLM, data type of the computation.
        opened: a checkpoint that is already open. If it contains an LLM, that one is returned.
        device: device on which a quantized LLM is loaded. None: the CPU.
        load_kwargs: further arguments of ``from_pretrained``. ``device_map`` and ``quantization_config`` take
            precedence over `device` and `config`.

    Raises:
        InputError: the LLM cannot be loaded, `config` does not fit it, or bitsandbytes is needed and is not installed.
    """
    load_kwargs, is_placed = dict(load_kwargs or {}), "device_map" in (load_kwargs or {})
    if config.quantization is not None:
        check_bitsandbytes(f"language.quantization {config.quantization}")
        bits = {"load_in_4bit": True} if config.quantization == "4bit" else {"load_in_8bit": True}
        default = BitsAndBytesConfig(**bits, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        load_kwargs.setdefault("quantization_config", default)
    if "quantization_config" in load_kwargs:
        load_kwargs.setdefault("device_map", {"": device or torch.device("cpu")})
    language = _load_language_model(config, dtype, opened, load_kwargs)
    network = language.network
    # An LLM on one device has no hooks yet that move its inputs there.
    if is_placed and not hasattr(network, "_hf_hook"):
        if len({parameter.device for parameter in network.parameters()}) > 1:
            raise InputError(
                f"{config.name!r} is an LLM within a larger model, which cannot be spread over devices: leave out"
                " device_map, or give one device"
            )
        skip_keys = network._skip_keys_device_placement
        dispatch_model(network, {"": network.device}, skip_keys=skip_keys, force_hooks=True)
    return language


def check_bitsandbytes(what: str) -> None:
    """Raise InputError if bitsandbytes, which `what` needs, is not installed."""
    if find_spec("bitsandbytes") is None:
        raise InputError(f"{what} needs bitsandbytes: pip install 'blip2[quantization]', or leave it out")


def _load_language_model(
    config: LanguageConfig, dtype: torch.dtype, opened: Checkpoint | None, load_kwargs: Mapping[str, Any]
) -> LanguageModel:
    container = opened if opened is not None and opened.has_language else open_foreign(config.name)
    if container is None:
        trusts = config.trust_remote_code is not None
        return load_language_model(resolve(config.name), dtype, config.activation, load_kwargs, trusts)
    if not container.has_language:
        raise InputError(
            f"{config.name!r} ({container.description}) contains no LLM: set language.name to an LLM, or to a"
            " checkpoint that contains one"
        )
    return container.load_language_model(dtype, config.activation, load_kwargs)


def load_language_tokenizer(config: LanguageConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of an LLM. It puts ``config.bos_token`` first if that is set.

    Raises:
        InputError: there is no tokenizer, or ``config.bos_token`` is not exactly one of its tokens.
    """
    tokenizer = load_tokenizer(resolve(config.name), config.trust_remote_code is not None)
    token = config.bos_token
    if token is not None:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise InputError(
                f"language.bos_token {token!r} has {len(ids)} tokens in the tokenizer of {config.name!r}, expected"
                " exactly one: choose a text of one token, or leave it out to use the tokenizer's own"
            )
        tokenizer.bos_token = token
        backend: Any = tokenizer.backend_tokenizer
        backend.post_processor = TemplateProcessing(single=[token, "$A"], special_tokens=[(token, ids[0])])
    return tokenizer


def load_text_tokenizer(config: QFormerConfig, checkpoint: Checkpoint | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the Q-Former's text.

    Args:
        config: section ``qformer`` of the model's config.
        checkpoint: if it contains a tokenizer, that one is returned.

    Returns:
        The tokenizer of the checkpoint; otherwise that of ``config.tokenizer`` or, if that is None, of ``config.bert``,
        with [DEC] as an additional last token.

    Raises:
        InputError: there is no tokenizer, or its vocabulary does not fit ``config.vocab_size``.
    """
    if checkpoint is not None and checkpoint.tokenizer is not None:
        return _check_vocabulary(load_tokenizer(checkpoint.tokenizer), config, checkpoint.name)
    name = config.tokenizer or config.bert
    if name is None:
        raise InputError(
            "qformer.tokenizer and qformer.bert are both null, but the Q-Former needs a tokenizer: set one of the two"
        )
    tokenizer = load_tokenizer(resolve(name))
    tokenizer.add_special_tokens({"bos_token": DECODER_START_TOKEN})
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    if len(tokenizer) != config.vocab_size:
        raise InputError(
            f"the tokenizer of {name!r} has {len(tokenizer)} tokens including {DECODER_START_TOKEN}, but"
            f" qformer.vocab_size is {config.vocab_size}: set qformer.vocab_size to {len(tokenizer)}, or"
            " qformer.tokenizer to the tokenizer with which the model was trained"
        )
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: QFormerConfig, name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint if the Q-Former has an embedding for each of its tokens.

    It then truncates texts to the positions of the Q-Former.
    """
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    beyond = [token for token, index in tokenizer.get_vocab().items() if index >= config.vocab_size]
    if set(beyond) - {IMAGE_TOKEN}:  # the pipelines refuse texts that contain the image placeholder
        raise InputError(
            f"the tokenizer of {name!r} has tokens beyond the Q-Former's vocabulary of {config.vocab_size}, such as"
            f" {min(beyond)!r}: copy the tokenizer that belongs to the checkpoint"
        )
    return tokenizer


def find_eos_token_id(tokenizer: PreTrainedTokenizerBase, stop_string: str | None, name: str) -> int:
    """Return the id of the token that ends a text.

    An LLM needs no padding token (padding is masked) and no BOS token (the soft visual prompt comes first), but
    without an end token it would never stop.

    Args:
        tokenizer: tokenizer of the LLM.
        stop_string: text of the token. None: the tokenizer's own end-of-text token.
        name: name of the LLM, for error messages.

    Raises:
        InputError: `stop_string` is not exactly one token, or is None and the tokenizer has no end-of-text token.
    """
    if stop_string is not None:
        ids = tokenizer(stop_string, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise InputError(
                f"language.stop_string {stop_string!r} has {len(ids)} tokens in the tokenizer of {name!r}, expected"
                " exactly one: choose a text of one token, or leave it out to use the tokenizer's end-of-text token"
            )
        return ids[0]
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer of {name!r} has no end-of-text token, so texts would never end: set language.stop_string to"
            r' the text that ends a caption, for example "\n"'
        )
    assert isinstance(tokenizer.eos_token_id, int)
    return tokenizer.eos_token_id


def build_collator(config: ModelConfig, built: Built) -> Collator:
    """Make the collator that turns captions into training batches of the model's stage.

    Args:
        config: the config of the model.
        built: the model and its tokenizers.

    Raises:
        InputError: a prompt is too long for the LLM or ends within a token, or the LLM cannot be trained with.
    """
    max_length = config.max_length
    if config.language is None or not isinstance(built.model, GenerationModel):
        max_length = min(max_length, config.qformer.max_position_embeddings)
        return Stage1Collator(built.tokenizer, max_length, config.text_normalization)
    assert built.eos_token_id is not None
    language = built.model.language
    language.check(backward=True)
    kind = PrefixLMCollator if language.is_encoder_decoder else CausalLMCollator
    for prompt in (config.language.prompt, config.language.question_prompt or ""):
        if prompt.strip() and kind is CausalLMCollator:
            check_prompt(built.tokenizer, prompt)
    collator = kind(
        built.tokenizer, max_length, config.language.prompt, built.eos_token_id, built.question_tokenizer,
        config.language.question_prompt, _max_prompt_tokens(config, built.model), config.text_normalization,
        config.qformer.text_input == "prompt",
    )  # fmt: skip
    longest = max(collator.num_prompt_tokens(each) for each in (config.language.prompt, collator.question_prompt or ""))
    if collator.max_prompt_tokens is not None and longest > collator.max_prompt_tokens:
        raise InputError(
            f"the LLM has {language.max_position_embeddings} positions, too few for {built.model.max_visual_tokens}"
            f" queries, a prompt of {longest} tokens and data.max_length {max_length}: make data.max_length or"
            " language.prompt shorter, or set language.name to another LLM"
        )
    return collator


def _max_prompt_tokens(config: ModelConfig, model: GenerationModel) -> int | None:
    """Return the maximum length of a prompt in tokens. None: no limit. Below 0: not even an empty prompt fits."""
    language = model.language
    if language.max_position_embeddings is None:
        return None
    max_length = config.max_length
    if not language.is_encoder_decoder:
        return language.max_position_embeddings - model.max_visual_tokens - max_length
    # The decoder generates the caption; without a prompt, the encoder reads a prefix of the caption.
    max_prompt_tokens = language.max_position_embeddings - model.max_visual_tokens
    if max_length > language.max_position_embeddings or (
        config.language is not None and not config.language.prompt and max_length > max_prompt_tokens
    ):
        return -1
    return max_prompt_tokens
