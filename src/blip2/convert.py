"""Convert checkpoints between formats without changing a weight.

Weights are copied from file to file under other names, in their own data types. Only frozen parts that are stored
outside of the checkpoint are loaded as models. If the format cannot represent a checkpoint, an error says so before
anything is written.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2VisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from blip2.backbones.language import load_network, set_activation
from blip2.backbones.lora import ADAPTER_KEY, merge_adapters
from blip2.backbones.pretrained import init_empty_model, load_submodule, short_message
from blip2.builder import (
    build_image_encoder,
    choose_dtype,
    find_eos_token_id,
    load_language_tokenizer,
    load_text_tokenizer,
    with_absolute_paths,
)
from blip2.checkpoint import open_checkpoint, read_recipe, write_configs
from blip2.config import FEATURES, IMAGE_TOKEN, MODULE, QUESTION_PLACEHOLDER, CheckpointFormat, LanguageConfig
from blip2.data.assets import resolve
from blip2.data.collate import strip_eos
from blip2.errors import InputError
from blip2.hub import model_card
from blip2.interop import lavis, transformers
from blip2.interop.checkpoint import LANGUAGE_PREFIX, QFORMER_TOKENIZER, VISION_PREFIX, Checkpoint
from blip2.interop.detect import open_foreign
from blip2.interop.vit import to_blip2_vision
from blip2.interop.weights import Weights
from blip2.io import apply_umask, check_utf8, expand_home
from blip2.model.qformer import QFormer

log = logging.getLogger("blip2")

Writer = Callable[[Path], None]
CPU = torch.device("cpu")


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    overrides: Mapping[str, object] | None = None,
    stage1: str | Path | None = None,
    with_language: bool = False,
    revision: str | None = None,
) -> Path:
    """Write a checkpoint in another format.

    Args:
        source: checkpoint to convert: a run or checkpoint folder, a transformers BLIP-2 folder or hub name, or a LAVIS
            ``.pth`` file.
        target: the folder to create or, for the format ``lavis``, the ``.pth`` file.
        to: format of the output. ``transformers``: a folder for ``Blip2ForConditionalGeneration`` (stage 2),
            ``InstructBlipForConditionalGeneration`` (stage 2 with a Q-Former that reads text) or
            ``Blip2ForImageTextRetrieval`` (stage 1). ``vllm``: a folder of a stage-2 model with only the weights that
            vLLM loads. ``lavis``: a ``.pth`` file. ``blip2``: a folder with the trained weights and the names of the
            frozen parts.
        overrides: values of keys of the model's config; see :func:`blip2.load`.
        stage1: for the format ``transformers``: a stage-1 checkpoint with the same Q-Former as the stage-2 checkpoint
            to convert. Its text transformer and heads are added, so that both ``Blip2ForConditionalGeneration`` and
            ``Blip2ForImageTextRetrieval`` load the folder.
        with_language: for the format ``lavis``: include the LLM, which LAVIS's own files do not contain.
        revision: branch, tag or commit of the source, if it is a hub name. None: the newest commit of the main branch.

    Returns:
        `target`.

    Raises:
        InputError: the source cannot be read, the format cannot represent the model, or `target` already exists or
            cannot be written.
    """
    if to not in get_args(CheckpointFormat):
        raise InputError(f"there is no format {to!r}: choose one of {', '.join(get_args(CheckpointFormat))}")
    target = expand_home(target)
    check_utf8(target)
    if os.path.lexists(target):
        raise InputError(f"{target} already exists: give the name of a new {'file' if to == 'lavis' else 'folder'}")
    if to == "lavis" and target.suffix != ".pth":
        raise InputError(f"{target} does not end in .pth, as LAVIS expects: give the name of a .pth file")
    if stage1 is not None and to != "transformers":
        raise InputError(
            f"a stage-1 checkpoint can be included in the format transformers only, not in {to}: leave out stage1"
        )
    checkpoint = open_checkpoint(str(source), overrides, revision)
    log.info("%s: %s", checkpoint.name, checkpoint.description)
    reads_text = checkpoint.config.qformer.use_qformer_text_input
    if reads_text and to == "vllm":
        raise InputError(
            f"{checkpoint.name} has a Q-Former that reads questions, which the BLIP-2 of {to} does not support: convert"
            " it to transformers or blip2"
        )
    if reads_text and stage1 is not None:
        raise InputError(
            f"{checkpoint.name} has a Q-Former that reads questions, and becomes an InstructBLIP, which has no place"
            " for a stage-1 model: leave out stage1"
        )
    if to != "blip2" and checkpoint.config.vision.name in (FEATURES, MODULE):
        raise InputError(
            f"{checkpoint.name} reads "
            + ("arrays of features" if checkpoint.config.vision.reads_features else "an encoder that is a torch module")
            + f", but the BLIP-2 of {to} has an image encoder of its own: convert it to blip2"
        )
    if to != "blip2" and checkpoint.config.vision.position_encoding == "sine2d":
        raise InputError(
            f"{checkpoint.name} was trained with vision.position_encoding sine2d, which the BLIP-2 of {to} does not add"
            " to the image features: convert it to blip2"
        )
    if to != "blip2" and checkpoint.config.calibration is not None:
        log.warning(
            "%s is calibrated, but the format %s has no place for temperatures: the output is not calibrated",
            checkpoint.name,
            to,
        )
    if to != "blip2" and checkpoint.config.language is not None and checkpoint.config.language.lora is not None:
        log.info("the adapters of the LLM are merged into its weights")
    if to != "blip2" and checkpoint.config.qformer.lora is not None:
        log.info("the adapters of the Q-Former are merged into its weights")
        checkpoint = checkpoint.merge_adapters()
    if to == "blip2":
        write = _blip2(checkpoint)
    elif to == "lavis":
        write = _lavis(checkpoint, with_language)
    else:
        heads = None if stage1 is None else open_checkpoint(str(stage1)).merge_adapters().as_stage("representation")
        write = _transformers(checkpoint, heads, to)
    tmp_dir = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tmp_dir = Path(tempfile.mkdtemp(prefix=f".{target.name[:40]}.", suffix=".tmp", dir=target.parent))
        write(tmp_dir / target.name)
        apply_umask(tmp_dir / target.name)
        (tmp_dir / target.name).rename(target)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and shutil.disk_usage(target.parent).free >= 2**20:
            raise  # torch raises RuntimeError for a full disk, but also for other errors
        raise InputError(
            f"{target} cannot be written ({short_message(error)}): free disk space or check the permissions, or give"
            " another path"
        ) from error
    finally:
        if tmp_dir is not None:
            shutil.rmtree(tmp_dir, ignore_errors=True)
    return target


# -- formats -----------------------------------------------------------------------------------------------------------


def _transformers(checkpoint: Checkpoint, stage1: Checkpoint | None, to: str) -> Writer:
    """Return the writer of a folder in transformers' layout; for vLLM, with only the weights vLLM loads."""
    generates, reads_text = checkpoint.config.stage == "generation", checkpoint.config.qformer.use_qformer_text_input
    if to == "vllm":
        if not generates:
            raise InputError(
                f"{checkpoint.name} is a stage-1 model, which generates no text for vLLM to serve: give a stage-2 model"
            )
        checkpoint = replace(checkpoint, weights=checkpoint.stage_weights())
    if stage1 is not None:
        checkpoint = _with_stage1(checkpoint, stage1)
    complete = _with_vision(checkpoint, allow_clip=False)
    tokenizer: Any = None
    text: Any = None
    if generates:
        complete, tokenizer = _with_image_token(_with_language(complete))
        _check_language(complete)
        if to == "vllm":
            if complete.language_config.is_encoder_decoder:
                raise InputError(
                    f"{checkpoint.name} has an LLM of type {complete.language_config.model_type}, an encoder-decoder;"
                    " vLLM serves BLIP-2 only with a decoder-only LLM: convert it to transformers"
                )
            language = _drop_tied(complete.language_config, complete.weights.select(LANGUAGE_PREFIX))
            complete = replace(complete, weights=complete.weights.drop(LANGUAGE_PREFIX) | language)
    _check_fits(complete)
    eps = (checkpoint.config.qformer.image_norm_eps, complete.vision_config.layer_norm_eps)
    if eps[0] != eps[1]:
        log.warning(
            "the LayerNorm of the image features was trained with epsilon %g, but this format uses the epsilon of the"
            " image encoder, %g", *eps
        )  # fmt: skip
    holder = checkpoint.as_stage("representation") if checkpoint.has_stage1 else None
    if holder is not None:
        text = load_text_tokenizer(holder.config.qformer, stage1 or holder)
    if reads_text:
        text = load_text_tokenizer(checkpoint.config.qformer, checkpoint)
        _warn_other_text(checkpoint)
    card = model_card(checkpoint, to, stage1=stage1)

    def write(folder: Path) -> None:
        folder.mkdir()
        config = transformers.save_processor(folder, complete, tokenizer or text, text if reads_text else None)
        if generates and text is not None and not reads_text:
            text.save_pretrained(str(folder / QFORMER_TOKENIZER))
        key_map = transformers.layout_of(checkpoint.config).key_map
        weights = complete.weights.rename_keys(key_map, checkpoint.name, inverse=True)
        transformers.save_config(folder, config, weights)
        save_torch_state_dict(dict(weights), folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    return write


def _warn_other_text(checkpoint: Checkpoint) -> None:
    """Warn that InstructBLIP's own code gives the Q-Former another text than in training."""
    config = checkpoint.config
    if config.qformer.text_input == "question" and config.language and config.language.prompt != QUESTION_PLACEHOLDER:
        log.warning(
            "the Q-Former was trained to read the question alone, and the LLM the prompt %r; the code of InstructBLIP"
            " gives both the same text: tokenize the two texts separately", config.language.prompt,
        )  # fmt: skip


def _check_language(checkpoint: Checkpoint) -> None:
    """Check that transformers' BLIP-2 makes an LLM of the same class from the configuration of the LLM.

    Raises:
        InputError: BLIP-2 makes an LLM of another class or none, as for decoder-only BART and Pegasus.
    """
    config: Any = checkpoint.language_config
    layout = transformers.layout_of(checkpoint.config)
    expected = type(init_empty_model(config)).__name__
    try:
        with torch.device("meta"):
            model: Any = (
                InstructBlipForConditionalGeneration(InstructBlipConfig(text_config=config))
                if layout is transformers.INSTRUCTBLIP
                else Blip2ForConditionalGeneration(Blip2Config(text_config=config))
            )
        made = type(model.language_model).__name__
    except Exception as error:  # the errors for unsupported configurations are not documented
        made = f"nothing ({short_message(error)[:160]})"
    if made != expected:
        raise InputError(
            f"{checkpoint.name} has an LLM of type {config.model_type}, a {expected}, but transformers' {layout.name}"
            f" builds {made} from the LLM's configuration: convert {checkpoint.name} to blip2"
        )


def _lavis(checkpoint: Checkpoint, with_language: bool) -> Writer:
    complete = _with_vision(checkpoint, allow_clip=True)
    kind = None
    if checkpoint.config.language is not None:
        complete = _with_language(complete)
        kind = complete.language_config.model_type
        reads_text = checkpoint.config.qformer.use_qformer_text_input
        if kind not in (("llama", "t5") if reads_text else ("opt", "t5")):
            supported = "InstructBLIP supports Llama (Vicuna)" if reads_text else "BLIP-2 supports OPT"
            raise InputError(
                f"{checkpoint.name} has an LLM of type {kind}; LAVIS's {supported} and T5: convert it to transformers"
            )
        if reads_text:
            _warn_other_text(checkpoint)
            if kind == "llama" and not _begins_with_eos(checkpoint.config.language):
                log.warning(
                    "LAVIS's InstructBLIP begins each text of Vicuna with </s>, but this model does not: results differ"
                )
        # Trained weights are included, and so is an LLM that came from a LAVIS file.
        is_trained = not checkpoint.has_language and checkpoint.weights.select(LANGUAGE_PREFIX)
        if not with_language and not is_trained:
            log.info("the LLM, %s, is omitted, as in LAVIS's own files", checkpoint.config.language.name)
            complete = replace(complete, weights=complete.weights.drop(LANGUAGE_PREFIX))
    _check_fits(complete)
    state = lavis.to_state_dict(complete, kind)
    for note in lavis.compatibility_notes(complete):
        log.warning("%s", note)
    return lambda path: torch.save({"model": state}, path)


def _begins_with_eos(language: LanguageConfig) -> bool:
    """Return whether the texts of an LLM begin with </s>."""
    tokenizer = load_language_tokenizer(language)
    return tokenizer("")["input_ids"] == [tokenizer.convert_tokens_to_ids("</s>")]


def _blip2(checkpoint: Checkpoint) -> Writer:
    frozen = (VISION_PREFIX,) * checkpoint.has_vision + (LANGUAGE_PREFIX,) * checkpoint.has_language
    weights = checkpoint.weights.drop(*frozen)
    config, recipe = with_absolute_paths(checkpoint.config), read_recipe(checkpoint)
    _check_fits(checkpoint)
    holder = checkpoint.as_stage("representation") if checkpoint.has_stage1 else None
    text = None if holder is None else load_text_tokenizer(holder.config.qformer, holder)
    inside = "tokenizer" if config.language is None else f"tokenizer/{QFORMER_TOKENIZER}"
    if config.qformer.use_qformer_text_input and checkpoint.tokenizer is not None:
        text, inside = load_text_tokenizer(config.qformer, checkpoint), "tokenizer"
    card = model_card(checkpoint, "blip2")

    def write(folder: Path) -> None:
        folder.mkdir()
        save_torch_state_dict(dict(weights), folder, max_shard_size="1TB")
        if text is not None:
            text.save_pretrained(str(folder / inside))
        write_configs(folder, config, recipe)
        (folder / "README.md").write_text(card, encoding="utf-8")

    return write


def _check_fits(checkpoint: Checkpoint) -> None:
    """Check that the weights fit the config and the frozen parts. Otherwise the output could not be loaded.

    Raises:
        InputError: the weights do not fit.
    """
    weights = checkpoint.weights
    vision_width = len(weights["image_norm.weight"])
    has_text = any(".text_feed_forward." in name for name in weights) and "qformer.word_embedding.weight" in weights
    with torch.device("meta"):
        network = QFormer(checkpoint.config.qformer, vision_width, has_text)
    expected = {f"qformer.{name}": tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    own = weights.select("qformer.").filter(lambda name: ADAPTER_KEY not in name)
    found = {name: tuple(tensor.shape) for name, tensor in own.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise InputError(
            f"{checkpoint.name}: the shape of {wrong[0]} is {found.get(wrong[0], 'missing')}, but the configuration"
            f" expects {expected.get(wrong[0], 'no such weight')}: correct the sizes in its section qformer"
        )
    for part, config, width in (
        ("image encoder", checkpoint.vision_config, vision_width),
        ("LLM", checkpoint.language_config, len(weights.get("projection.weight", ()))),
    ):
        if config is not None and config.hidden_size != width:
            embeddings = getattr(config, "word_embed_proj_dim", None)
            if part == "LLM" and embeddings == width:
                raise InputError(
                    f"{checkpoint.name} has an LLM of type {config.model_type} whose embeddings are {width} wide and"
                    f" whose layers are {config.hidden_size} wide; transformers' BLIP-2 expects equal widths: convert"
                    " it to blip2"
                )
            raise InputError(
                f"{checkpoint.name} was trained with an {part} of width {width}, but the config names an {part} of"
                f" width {config.hidden_size}: give the name of the {part} that {checkpoint.name} was trained with"
            )


# -- parts -------------------------------------------------------------------------------------------------------------


def _with_stage1(checkpoint: Checkpoint, stage1: Checkpoint) -> Checkpoint:
    """Add to a stage-2 checkpoint the weights that only a stage-1 model has: text transformer, heads, temperature.

    Raises:
        InputError: `checkpoint` is not of stage 2, or the shared Q-Former weights of the two checkpoints differ.
    """
    if checkpoint.config.stage != "generation":
        raise InputError(f"{checkpoint.name} is itself a stage-1 model: give --stage1 only with a stage-2 model")
    ours, theirs = checkpoint.weights.select("qformer.", "image_norm"), stage1.weights
    different = [name for name in ours if name not in theirs or not torch.equal(ours[name], theirs[name])]
    if different:
        raise InputError(
            f"{checkpoint.name} and {stage1.name} have different Q-Formers ({len(different)} weights differ, such as"
            f" {min(different)}), but a folder holds only one: convert each to its own folder"
        )
    if stage1.config.text_normalization != checkpoint.config.text_normalization:
        raise InputError(
            f"{checkpoint.name} has the text_normalization {checkpoint.config.text_normalization} and {stage1.name}"
            f" {stage1.config.text_normalization}, but a folder has only one: convert each to its own folder"
        )
    sizes = {
        key: getattr(stage1.config.qformer, key)
        for key in ("vocab_size", "max_position_embeddings", "image_text_hidden_size")
    }
    qformer = replace(checkpoint.config.qformer, **sizes)
    return replace(
        checkpoint,
        weights=checkpoint.weights | stage1.weights.filter(stage1.is_stage1_only),
        config=replace(checkpoint.config, qformer=qformer, max_length=stage1.config.max_length),
    )


def _with_vision(checkpoint: Checkpoint, allow_clip: bool) -> Checkpoint:
    """Return the checkpoint with the weights of its image encoder in the layout of transformers' BLIP-2.

    Args:
        allow_clip: keep the layout of a CLIP.
    """
    vision = checkpoint.config.vision
    trained = () if checkpoint.has_vision else tuple(checkpoint.weights.select("vision."))
    holder = checkpoint if checkpoint.has_vision else open_foreign(vision.name)
    holder = holder and holder.with_num_attention_heads(vision.num_attention_heads)
    fits = holder is not None and (allow_clip or isinstance(holder.vision_config, Blip2VisionConfig))
    if holder is not None and holder.has_vision and fits and not trained:
        assert holder.preprocessing is not None
        config, weights = holder.resize_vision(vision.image_size or holder.preprocessing.image_size)
        preprocessing = replace(holder.preprocessing, image_size=config.image_size)
    else:
        encoder = build_image_encoder(vision, choose_dtype(vision.dtype, CPU))
        state = encoder.state_dict()
        for name in trained:
            state[name.removeprefix("vision.")].copy_(checkpoint.weights[name])
        preprocessing = encoder.preprocessing
        if allow_clip and hasattr(encoder.network, "pre_layrnorm"):
            config, found = encoder.network.config, encoder.network.state_dict()
            found = {name: tensor for name, tensor in found.items() if not name.startswith("post_layernorm")}
        else:
            config, found = to_blip2_vision(encoder, vision.layer)
        weights = Weights(found).add_prefix(VISION_PREFIX)
    return replace(
        checkpoint,
        weights=checkpoint.weights.drop("vision.") | weights,
        vision_config=config,
        preprocessing=preprocessing,
    )


def _with_language(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the weights and the configuration of its LLM."""
    language: LanguageConfig | None = checkpoint.config.language
    assert language is not None
    if checkpoint.has_language:
        config, weights = copy.deepcopy(checkpoint.language_config), checkpoint.weights.select(LANGUAGE_PREFIX)
    else:
        holder = open_foreign(language.name)
        if holder is not None and holder.has_language:
            config, weights = copy.deepcopy(holder.language_config), holder.weights.select(LANGUAGE_PREFIX)
            network = None
        else:
            trusts = language.trust_remote_code is not None
            network = load_network(resolve(language.name), "auto", trust_remote_code=trusts)
            if getattr(network, "is_quantized", False):
                raise InputError(
                    f"{language.name!r}, the LLM of {checkpoint.name}, is quantized, and only the format blip2, which"
                    " names it, keeps its quantization: convert to blip2, or set language.name to the LLM before it was"
                    " quantized"
                )
            config = network.config
            weights = _drop_tied(config, Weights(network.state_dict()).add_prefix(LANGUAGE_PREFIX))
        trained = checkpoint.weights.select(LANGUAGE_PREFIX)
        if language.lora is not None:
            if network is None:
                network = load_submodule(config, weights.strip_prefix(LANGUAGE_PREFIX), language.name, "language model")
            trained = merge_adapters(network, language.lora, trained.strip_prefix(LANGUAGE_PREFIX))
            trained = Weights(trained).add_prefix(LANGUAGE_PREFIX)
            checkpoint = replace(checkpoint, weights=checkpoint.weights.drop(LANGUAGE_PREFIX))
        weights = (_drop_tied(config, weights) | trained) if trained else weights
    set_activation(config, language.activation)
    return replace(checkpoint, weights=checkpoint.weights | weights, language_config=config)


def _drop_tied(config: Any, weights: Weights) -> Weights:
    """Remove the copies of tied matrices. State dicts and old files contain a tied matrix under both of its names."""
    tied = init_empty_model(config).all_tied_weights_keys
    pairs = [(LANGUAGE_PREFIX + copy, LANGUAGE_PREFIX + original) for copy, original in tied.items()]
    copies = [a for a, b in pairs if a in weights and b in weights and torch.equal(weights[a], weights[b])]
    return weights.drop(*copies)


def _append_no_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a tokenizer put nothing after a text. An end token after a prompt is left out in training and here, but
    transformers would not leave it out."""
    ids = tokenizer("a")["input_ids"]
    kept = strip_eos(tokenizer, ids)
    if kept == ids:
        return
    if hasattr(tokenizer, "add_eos_token"):
        tokenizer.add_eos_token = tokenizer.init_kwargs["add_eos_token"] = False
    first = kept[: len(kept) - len(tokenizer("a", add_special_tokens=False)["input_ids"])]
    tokens = tokenizer.convert_ids_to_tokens(first)
    backend: Any = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single=[*tokens, "$A"], special_tokens=list(zip(tokens, first, strict=True))
    )


def _with_image_token(checkpoint: Checkpoint) -> tuple[Checkpoint, PreTrainedTokenizerBase]:
    """Add an image placeholder token to the LLM's tokenizer, and rows for new tokens to the LLM's embeddings.

    The embedding of the placeholder is never read, because image features replace it. Each new row of the output matrix
    is the mean of the existing rows, so its logit is the mean of their logits and the placeholder is never generated.

    Returns:
        The checkpoint with the new rows, and the tokenizer.
    """
    language = checkpoint.config.language
    assert language is not None
    tokenizer = load_language_tokenizer(language)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, False)
    ids = tokenizer.get_vocab().values()
    if len(set(ids)) < len(ids):
        raise InputError(
            f"the tokenizer of {language.name!r} leaves out some ids, so that {IMAGE_TOKEN} gets the id of another"
            f" token: convert {checkpoint.name} to blip2"
        )
    if not checkpoint.language_config.is_encoder_decoder:
        _append_no_eos(tokenizer)
    side = "right" if checkpoint.language_config.is_encoder_decoder else "left"
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = side  # init_kwargs are saved
    end = find_eos_token_id(tokenizer, language.stop_string, language.name)
    config = copy.deepcopy(checkpoint.language_config)
    eos_token_ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if end not in eos_token_ids:
        config.eos_token_id = end
    weights: Mapping[str, Tensor] = checkpoint.weights
    vocab_size = max(ids) + 1
    if config.vocab_size < vocab_size:
        network = init_empty_model(config)
        embeddings = (network.get_input_embeddings(), network.get_output_embeddings())
        tables = {id(tensor) for module in embeddings for tensor in module.parameters()}
        added: dict[str, Tensor] = {}
        for name, tensor in network.named_parameters(remove_duplicate=False):
            if id(tensor) in tables and LANGUAGE_PREFIX + name in weights:
                rows = weights[LANGUAGE_PREFIX + name]
                mean = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)
                added[LANGUAGE_PREFIX + name] = torch.cat([rows, mean.expand(vocab_size - len(rows), *rows.shape[1:])])
        weights = checkpoint.weights | added
        config.vocab_size = vocab_size
    return replace(checkpoint, weights=weights, language_config=config), tokenizer
