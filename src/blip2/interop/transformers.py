"""Read and write models of transformers: ``Blip2ForConditionalGeneration``, ``Blip2ForImageTextRetrieval``
(:data:`BLIP2`) and ``InstructBlipForConditionalGeneration`` (:data:`INSTRUCTBLIP`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    GenerationConfig,
    ImageProcessingMixin,
    InstructBlipConfig,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    PreTrainedTokenizerBase,
)

from blip2.backbones.language import activation_name
from blip2.backbones.pretrained import wrap_load_errors
from blip2.backbones.vision_loaders import load_preprocessing
from blip2.config import (
    IMAGE_TOKEN,
    QUESTION_PLACEHOLDER,
    LanguageConfig,
    ModelConfig,
    QFormerConfig,
    TextNormalization,
    VisionConfig,
)
from blip2.errors import InputError
from blip2.interop.checkpoint import QFORMER_TOKENIZER, Checkpoint, load_tokenizer
from blip2.interop.key_map import KeyMap, qformer_block_keys
from blip2.interop.weights import Weights, open_folder, wrap_parse_errors
from blip2.io import read_json, write_json

RETRIEVAL_CLASS, GENERATION_CLASS = "Blip2ForImageTextRetrieval", "Blip2ForConditionalGeneration"
INSTRUCT_CLASS = "InstructBlipForConditionalGeneration"
NORMALIZATION_KEY, TEXT_INPUT_KEY = "text_normalization", "text_input"
PROMPT_KEY, QUESTION_PROMPT_KEY = "prompt", "question_prompt"
MAX_LENGTH_KEY = "max_caption_length"  # "max_length" is an option of transformers' generate
"""Keys of config.json for settings of :class:`~blip2.config.ModelConfig` that transformers has no place for. They are
there if a setting is not that of the published checkpoints; the transformers library ignores them."""
SHARED_KEYS: KeyMap = (
    ("query_tokens", "qformer.queries"),
    ("vision_model.post_layernorm", "image_norm"),
    ("vision_model.{...}", "vision.network.{...}"),
    *qformer_block_keys("qformer.encoder.layer.{}", attention="attention"),
    ("language_projection", "projection"),
    ("language_model.{...}", "language.network.{...}"),
)
KEY_MAP: KeyMap = (
    *SHARED_KEYS,
    ("embeddings.word_embeddings", "qformer.word_embedding"),
    ("embeddings.position_embeddings", "qformer.position_embedding"),
    ("qformer.layernorm", "qformer.embedding_norm"),
    ("vision_projection", "image_projection"),
    ("text_projection", "text_projection"),
    ("itm_head", "matching_head"),
    # Weights that this layout does not define have LAVIS's names, which transformers ignores.
    ("temp", "temperature"),
    ("cls.predictions.transform.dense", "language_head.transform"),
    ("cls.predictions.transform.LayerNorm", "language_head.norm"),
    ("cls.predictions.bias", "language_head.bias"),
)
INSTRUCT_KEY_MAP: KeyMap = (
    *SHARED_KEYS,
    ("qformer.embeddings.word_embeddings", "qformer.word_embedding"),
    ("qformer.embeddings.position_embeddings", "qformer.position_embedding"),
    ("qformer.embeddings.layernorm", "qformer.embedding_norm"),
)
BUFFERS = (".position_ids", ".rotary_emb.inv_freq")
"""Suffixes of the names of buffers that older versions of transformers stored with the weights."""
INCONSISTENT_LLM = "LLaMAForCausalLM"
"""Class of the LLM in the published InstructBLIP with Vicuna. The token ids in the LLM's configuration are wrong (1 for
the end of a text). In training, texts began with the tokenizer's BOS, </s>, and ended with its EOS, also </s>; some
versions of transformers begin a text with another token."""


class Layout(NamedTuple):
    """One of the two layouts of transformers: the classes of its parts, and the names of its weights."""

    model_type: str
    name: str
    config: Any
    vision: Any
    """Class of the configuration of the image encoder; both layouts have the fields of Blip2VisionConfig."""
    qformer: Any
    key_map: KeyMap
    text_normalization: TextNormalization
    """Text normalization of the published checkpoints."""


BLIP2 = Layout("blip-2", "BLIP-2", Blip2Config, Blip2VisionConfig, Blip2QFormerConfig, KEY_MAP, "lavis")
INSTRUCTBLIP = Layout(
    "instructblip",
    "InstructBLIP",
    InstructBlipConfig,
    InstructBlipVisionConfig,
    InstructBlipQFormerConfig,
    INSTRUCT_KEY_MAP,
    "none",
)
LAYOUTS = {layout.model_type: layout for layout in (BLIP2, INSTRUCTBLIP)}
"""The layouts by the ``model_type`` in config.json."""


def layout_of(config: ModelConfig) -> Layout:
    """Return the layout for a model: InstructBLIP's if the Q-Former reads text in stage 2, else BLIP-2's."""
    return INSTRUCTBLIP if config.qformer.use_qformer_text_input else BLIP2


def read(name: str, folder: Path) -> Checkpoint:
    """Read a folder in transformers' layout.

    Args:
        name: the folder, or the hub name from which it was downloaded, for messages.
        folder: the folder.

    Raises:
        InputError: the folder contains another model, or its files are damaged or contradict each other.
    """
    with wrap_parse_errors(name):
        return _read(name, folder, _read_object(folder / "config.json"))


def _read(name: str, folder: Path, settings: dict[str, Any]) -> Checkpoint:
    kind = settings.get("model_type")
    layout = LAYOUTS.get(str(kind))
    if layout is None:
        raise InputError(
            f"{name} is a model of type {kind}, expected {' or '.join(LAYOUTS)}: give a BLIP-2 or InstructBLIP"
            " checkpoint"
        )
    reads_text = layout is INSTRUCTBLIP
    for part, part_config in (("vision_config", layout.vision), ("qformer_config", layout.qformer)):
        expected = part_config.model_type
        found = (settings.get(part) or {}).get("model_type", expected)
        if found != expected:
            raise InputError(
                f"{name}: the {part} in its config.json is of type {found}, expected {expected}. transformers would"
                f" ignore the type and load it as {expected}: give a checkpoint with a {part} of type {expected}"
            )
    with wrap_load_errors(name, "configuration"):
        config: Any = layout.config.from_dict(settings)
    weights = open_folder(folder).filter(lambda key: not key.endswith(BUFFERS)).rename_keys(layout.key_map, name)
    generates = (
        reads_text
        or GENERATION_CLASS in (settings.get("architectures") or [])
        or (RETRIEVAL_CLASS not in (settings.get("architectures") or []) and "projection.weight" in weights)
    )
    tokenizer = load_tokenizer(folder)
    check_processor(name, folder, config, tokenizer, generates)
    model_config = _config(name, config, weights, tokenizer, generates)
    vision = _with_class(config.vision_config, Blip2VisionConfig)
    _set_size(name, vision, weights)
    llm = config.text_config.model_type
    kind = INSTRUCT_CLASS if reads_text else GENERATION_CLASS if generates else RETRIEVAL_CLASS
    description = (
        f"transformers' {kind}: a ViT with {vision.num_hidden_layers}"
        f" layers for {vision.image_size} pixels, {config.num_query_tokens} queries"
        + (f", an LLM of type {llm}" if generates else "")
    )
    return Checkpoint(
        name=name,
        format="transformers",
        description=description,
        config=model_config,
        weights=weights,
        tokenizer=folder / QFORMER_TOKENIZER if reads_text else folder,
        vision_config=vision,
        language_config=config.text_config if "projection.weight" in weights else None,
        preprocessing=load_preprocessing(str(folder), vision, None),
    )


def _config(
    name: str, config: Any, weights: Weights, tokenizer: PreTrainedTokenizerBase, generates: bool
) -> ModelConfig:
    reads_text, qformer_config = isinstance(config, InstructBlipConfig), config.qformer_config
    if qformer_config.hidden_act != "gelu":
        raise InputError(
            f"{name}: its Q-Former has the activation {qformer_config.hidden_act}, expected gelu: give a checkpoint"
            " whose Q-Former has gelu"
        )
    positions = weights.get("qformer.position_embedding.weight")
    shapes = {
        "num_query_tokens": (config.num_query_tokens, weights["qformer.queries"].shape[1]),
        "qformer_config.hidden_size": (qformer_config.hidden_size, weights["qformer.queries"].shape[2]),
    }
    for key, (configured, found) in shapes.items():
        if configured != found:
            raise InputError(
                f"{name}: its config.json has {key} {configured}, but its weights have {found}: correct config.json, or"
                " copy or download the weights that belong to it"
            )
    try:
        qformer = QFormerConfig(
            bert=None,
            tokenizer=None,
            hidden_size=qformer_config.hidden_size,
            num_hidden_layers=qformer_config.num_hidden_layers,
            num_attention_heads=qformer_config.num_attention_heads,
            intermediate_size=qformer_config.intermediate_size,
            num_query_tokens=config.num_query_tokens,
            cross_attention_frequency=qformer_config.cross_attention_frequency,
            **({} if reads_text else {"image_text_hidden_size": config.image_text_hidden_size}),
            vocab_size=qformer_config.vocab_size,
            max_position_embeddings=qformer_config.max_position_embeddings if positions is None else len(positions),
            dropout=qformer_config.hidden_dropout_prob,
            layer_norm_eps=qformer_config.layer_norm_eps,
            image_norm_eps=config.vision_config.layer_norm_eps,
            use_qformer_text_input=reads_text,
            text_input=_setting(
                name, config, TEXT_INPUT_KEY, "prompt" if reads_text else "question", ("question", "prompt")
            ),
        )
        language = None
        if generates:
            stop = _stop(name, config.text_config, tokenizer)
            default_prompt = _default_prompt(reads_text, config.text_config, tokenizer)
            # Recorded because the LLM's own files may differ: those of FlanT5 have gelu_new, but LAVIS used gelu.
            bos: Any = tokenizer.bos_token if _is_inconsistent(config.text_config) else None
            activation = activation_name(config.text_config)
            language = LanguageConfig(
                name=name,
                prompt=_setting(name, config, PROMPT_KEY, default_prompt),
                question_prompt=_setting(name, config, QUESTION_PROMPT_KEY, None),
                stop_string=stop,
                bos_token=bos,
                activation=activation,
            )
        return ModelConfig(
            stage="generation" if generates else "representation",
            vision=VisionConfig(name=name, position_encoding="none"),
            qformer=qformer,
            language=language,
            text_normalization=_setting(
                name, config, NORMALIZATION_KEY, LAYOUTS[config.model_type].text_normalization,
                get_args(TextNormalization),
            ),
            max_length=_setting(name, config, MAX_LENGTH_KEY, ModelConfig.max_length),
        )  # fmt: skip
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _setting(name: str, config: Any, key: str, default: Any, values: Sequence[str] | None = None) -> Any:
    """Return a setting that :func:`save_processor` recorded in config.json; `default` if it recorded none.

    Args:
        name: name of the checkpoint, for messages.
        config: configuration of the model.
        key: key of the setting.
        default: the value that is not recorded.
        values: all values that the setting can have. None: any value of the type of `default`, or any text if that is
            None.
    """
    found: Any = getattr(config, key, default)
    kind = str if default is None else type(default)
    if found == default or (type(found) is kind if values is None else found in values):
        return found
    expected = f"a value of type {kind.__name__}" if values is None else f"one of {', '.join(values)}"
    raise InputError(f"{name}: its config.json has {key} {found!r}, expected {expected}: correct or remove {key}")


def _with_class(config: Any, config_class: Any) -> Any:
    """Return the configuration of an image encoder as the class of a layout, with the same values."""
    if type(config) is config_class:
        return config
    return config_class(**{key: value for key, value in config.to_dict().items() if key != "model_type"})


def _default_prompt(reads_text: bool, text_config: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prompt that transformers uses if the user gives none: a BOS token, even if the tokenizer adds none.

    InstructBLIP always gets a text, the question itself.
    """
    if reads_text:
        return QUESTION_PLACEHOLDER
    start = getattr(text_config, "bos_token_id", None)
    if text_config.is_encoder_decoder or start is None or tokenizer("")["input_ids"]:
        return ""
    text = str(tokenizer.decode([start]))
    return text if tokenizer(text)["input_ids"] == [start] else ""


def _is_inconsistent(text_config: Any) -> bool:
    """Return whether the token ids in the configuration of an LLM are wrong; see :data:`INCONSISTENT_LLM`."""
    return INCONSISTENT_LLM in (getattr(text_config, "architectures", None) or ())


def _stop(name: str, text_config: Any, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the text of the end token, such as the newline of the paper's OPT; None if it is the tokenizer's EOS."""
    ends = getattr(text_config, "eos_token_id", None)
    ends = list(ends) if isinstance(ends, list | tuple) else [ends]
    if _is_inconsistent(text_config):
        ends = [tokenizer.eos_token_id]
    end: Any = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    if end in (None, tokenizer.eos_token_id):
        return None
    stop = str(tokenizer.decode([end]))
    if tokenizer(stop, add_special_tokens=False)["input_ids"] != [end]:
        raise InputError(f"{name}: its texts end with token {end}, {stop!r}, which its tokenizer never produces:"
                         " correct text_config.eos_token_id in its config.json")  # fmt: skip
    return stop


def _set_size(name: str, vision: Any, weights: Weights) -> None:
    """Set the image size in a configuration to the size for which the weights have position embeddings."""
    key = "vision.network.embeddings.position_embedding"
    if key not in weights:
        raise InputError(
            f"{name} has no image encoder (vision_model.embeddings.position_embedding is missing): copy or download its"
            " weights again"
        )
    grid = round((weights[key].shape[1] - 1) ** 0.5)
    vision.image_size = grid * vision.patch_size


def check_processor(name: str, folder: Path, config: Any, tokenizer: PreTrainedTokenizerBase, generates: bool) -> None:
    """Check settings of the processor that transformers does not check, such as the number of image placeholders.

    Args:
        name: name of the checkpoint, for messages.
        folder: folder with the files of the processor.
        config: configuration of the model.
        tokenizer: tokenizer of the checkpoint.
        generates: whether the checkpoint generates text (stage 2), so that prompts contain image placeholders.

    Raises:
        InputError: the processor contradicts the configuration or BLIP-2's preprocessing.
    """
    settings = _read_object(folder / "processor_config.json") if (folder / "processor_config.json").is_file() else {}
    queries = settings.get("num_query_tokens")
    if queries not in (None, config.num_query_tokens):
        raise InputError(
            f"{name}: its processor inserts {queries} {IMAGE_TOKEN} tokens before a text, but the model has"
            f" {config.num_query_tokens} queries: set num_query_tokens to {config.num_query_tokens} in"
            " processor_config.json"
        )
    with wrap_load_errors(name, "image processor", "processor_config.json"):
        try:
            images, _ = ImageProcessingMixin.get_image_processor_dict(str(folder))
        except OSError:  # without an image processor, CLIP's defaults apply
            images = {}
    for key, expected in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("resample", 3)):
        if images.get(key, expected) != expected:
            raise InputError(
                f"{name}: its image processor has {key} {images[key]}, expected {expected}, as in BLIP-2's training:"
                f" correct {key} in processor_config.json or preprocessor_config.json"
            )
    index = config.image_token_index
    if not generates or index is None:
        return
    found = tokenizer.get_vocab().get(IMAGE_TOKEN)
    if found is None:
        raise InputError(
            f"{name}: its tokenizer has no {IMAGE_TOKEN}, which is token {index} in its config.json: copy the"
            " tokenizer that belongs to the model"
        )
    if found != index:
        raise InputError(
            f"{name}: {IMAGE_TOKEN} is token {found} of its tokenizer, but {index} in its config.json: set"
            f" image_token_index to {found} in config.json"
        )


def _read_object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path} contains a {type(found).__name__}, expected a JSON object: copy or download it again")
    return found


def save_processor(
    folder: Path,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    qformer_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Any:
    """Save the processor, the tokenizers and the generation configuration of a checkpoint.

    Args:
        folder: the folder to write into.
        checkpoint: a checkpoint that contains its frozen parts.
        tokenizer: the tokenizer of the checkpoint. The image placeholder is added to it.
        qformer_tokenizer: the tokenizer of a Q-Former that reads text in stage 2.

    Returns:
        The configuration of the model, for :func:`save_config`.
    """
    layout, sizes = layout_of(checkpoint.config), checkpoint.config.qformer
    vision, llm = _with_class(checkpoint.vision_config, layout.vision), checkpoint.language_config
    reads_text = layout is INSTRUCTBLIP
    preprocessing = checkpoint.preprocessing
    assert preprocessing is not None
    size = {"height": preprocessing.image_size, "width": preprocessing.image_size}
    images = BlipImageProcessorPil(size=size, image_mean=list(preprocessing.mean), image_std=list(preprocessing.std))
    processor: Any  # which adds <image>
    if reads_text:
        processor = InstructBlipProcessor(images, tokenizer, qformer_tokenizer, num_query_tokens=sizes.num_query_tokens)
    else:
        processor = Blip2Processor(images, tokenizer, num_query_tokens=sizes.num_query_tokens)
    processor.save_pretrained(folder)
    # Versions of transformers differ in which of the two files they read; none accepts the PIL-only class name.
    settings = _read_object(folder / "processor_config.json")
    settings["image_processor"]["image_processor_type"] = "BlipImageProcessor"
    write_json(folder / "processor_config.json", settings)
    write_json(
        folder / "preprocessor_config.json",
        {**settings["image_processor"], "processor_class": type(processor).__name__},
    )
    qformer = layout.qformer(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        intermediate_size=sizes.intermediate_size,
        hidden_dropout_prob=sizes.dropout,
        attention_probs_dropout_prob=sizes.dropout,
        max_position_embeddings=sizes.max_position_embeddings,
        layer_norm_eps=sizes.layer_norm_eps,
        cross_attention_frequency=sizes.cross_attention_frequency,
        encoder_hidden_size=vision.hidden_size,
        **(
            {}
            if reads_text
            else {"use_qformer_text_input": any(".text_feed_forward." in n for n in checkpoint.weights)}
        ),
    )
    config = layout.config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=llm,
        num_query_tokens=sizes.num_query_tokens,
        image_token_index=tokenizer.get_vocab()[IMAGE_TOKEN],
        **({} if reads_text else {"image_text_hidden_size": sizes.image_text_hidden_size}),
    )
    language = checkpoint.config.language
    own: dict[str, tuple[object, object]] = {  # with the value that is read if there is none
        NORMALIZATION_KEY: (checkpoint.config.text_normalization, layout.text_normalization),
        MAX_LENGTH_KEY: (checkpoint.config.max_length, ModelConfig.max_length),
    }
    if language is not None:
        own[PROMPT_KEY] = (language.prompt, _default_prompt(reads_text, llm, tokenizer))
        own[QUESTION_PROMPT_KEY] = (language.question_prompt, None)
    if reads_text:
        own[TEXT_INPUT_KEY] = (sizes.text_input, "prompt")
    for key, (value, default) in own.items():
        if value != default:
            setattr(config, key, value)
    if llm is not None:
        start = getattr(llm, "decoder_start_token_id", None)
        GenerationConfig(
            num_beams=5, max_new_tokens=30, eos_token_id=llm.eos_token_id, decoder_start_token_id=start,
            bos_token_id=getattr(llm, "bos_token_id", None), pad_token_id=getattr(llm, "pad_token_id", None),
        ).save_pretrained(folder)  # fmt: skip
    return config


def save_config(folder: Path, config: Any, weights: Mapping[str, Tensor]) -> None:
    """Save config.json with the class of the model and the data type of the weights.

    Args:
        folder: the folder to write into.
        config: the configuration that :func:`save_processor` returned.
        weights: the weights under transformers' names. If they have several data types, float32 is stored.
    """
    generation = INSTRUCT_CLASS if isinstance(config, InstructBlipConfig) else GENERATION_CLASS
    config.architectures = [generation if "language_projection.weight" in weights else RETRIEVAL_CLASS]
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    config.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    config.save_pretrained(folder)
