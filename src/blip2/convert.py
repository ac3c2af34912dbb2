"""Checkpoints from any format to any other, number for number.

Weights go from file to file under other names, in their own dtypes; no model is built but those of frozen parts that
lie elsewhere. What a format cannot hold is said before anything is written.
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
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2VisionConfig, PreTrainedTokenizerBase

from blip2.backbones.language import read_network, set_activation
from blip2.backbones.pretrained import empty_model, first_line
from blip2.builder import choose_dtype, end_of_text, read_image_encoder, text_tokenizer
from blip2.checkpoint import open_checkpoint
from blip2.config import IMAGE_TOKEN, LanguageConfig, Recipe
from blip2.data.assets import resolve
from blip2.errors import InputError
from blip2.hub import model_card
from blip2.interop import lavis, transformers
from blip2.interop.checkpoint import LANGUAGE, QFORMER_TOKENIZER, VISION, Checkpoint, read_tokenizer
from blip2.interop.detect import open_foreign
from blip2.interop.vit import to_blip2
from blip2.interop.weights import Weights
from blip2.io import share
from blip2.model.qformer import QFormer
from blip2.recipe import dump_recipe

log = logging.getLogger("blip2")

TARGETS = ("transformers", "vllm", "lavis", "blip2")
"""Formats that can be written."""
Writer = Callable[[Path], None]
CPU = torch.device("cpu")


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    changes: Mapping[str, object] | None = None,
    stage1: str | Path | None = None,
    with_language: bool = False,
) -> Path:
    """Write a checkpoint in another format.

    Args:
        source: whatever :func:`blip2.load` takes.
        target: folder to be made; for ``lavis`` a ``.pth`` file.
        to: ``transformers``: a folder for ``Blip2ForConditionalGeneration`` (stage 2) or
            ``Blip2ForImageTextRetrieval`` (stage 1). ``vllm``: the former with nothing else in it. ``lavis``: a
            ``.pth``. ``blip2``: what was trained, beside the names of the frozen parts.
        changes: keys of the recipe, as :func:`blip2.load` takes them.
        stage1: for ``transformers``: the checkpoint of stage 1 whose text transformer and heads a stage 2 with the
            same Q-Former is written with, so that both classes load the one folder.
        with_language: for ``lavis``: put the LLM into the file too, which LAVIS's own files leave out.

    Returns:
        `target`.

    Raises:
        InputError: the source cannot be read, the format cannot hold it, or `target` is there already.
    """
    if to not in TARGETS:
        raise InputError(f"there is no format {to!r}: choose from {', '.join(TARGETS)}")
    target = Path(target).expanduser()
    if os.path.lexists(target):
        raise InputError(f"{target} is there already: give the name of a new {'file' if to == 'lavis' else 'folder'}")
    if to == "lavis" and target.suffix != ".pth":
        raise InputError(f"{target} is not the name of a .pth file, which LAVIS reads: give one")
    if stage1 is not None and to != "transformers":
        raise InputError(f"a second checkpoint for stage 1 goes with the format transformers alone, not {to}")
    checkpoint = open_checkpoint(str(source), changes)
    log.info("%s: %s", checkpoint.name, checkpoint.about)
    if checkpoint.recipe.qformer.use_qformer_text_input and to != "blip2":
        raise InputError(
            f"{checkpoint.name} has a Q-Former that reads questions, for which the BLIP-2 of {to} has no place: convert"
            " it to blip2"
        )
    if to != "blip2" and checkpoint.recipe.vision.position_encoding == "sine2d":
        raise InputError(
            f"{checkpoint.name} was trained with vision.position_encoding sine2d, which the BLIP-2 of {to} does not add"
            " to the image features: convert it to blip2"
        )
    if to != "blip2" and checkpoint.recipe.language is not None and checkpoint.recipe.language.lora is not None:
        raise InputError(f"{checkpoint.name} has adapters in its LLM, for which {to} has no place: convert it to blip2")
    if to == "blip2":
        write = _blip2(checkpoint)
    elif to == "lavis":
        write = _lavis(checkpoint, with_language)
    else:
        beginning = None if stage1 is None else open_checkpoint(str(stage1)).of_stage("representation")
        write = _transformers(checkpoint, beginning, to)
    building = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{target.name[:40]}.", suffix=".tmp", dir=target.parent))
        write(building / target.name)
        share(building / target.name)
        (building / target.name).rename(target)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and shutil.disk_usage(target.parent).free >= 2**20:
            raise  # which is torch's error for a full disk, and for much else
        raise InputError(f"{target} cannot be written ({first_line(error)}): give another place") from error
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)
    return target


# -- formats -----------------------------------------------------------------------------------------------------------


def _transformers(checkpoint: Checkpoint, stage1: Checkpoint | None, to: str) -> Writer:
    """A folder in transformers' layout; for vLLM with exactly the weights that its loader knows."""
    generates = checkpoint.recipe.stage == "generation"
    if to == "vllm":
        if not generates:
            raise InputError(f"{checkpoint.name} is of stage 1, which writes nothing for vLLM to serve: give a stage 2")
        checkpoint = replace(checkpoint, weights=checkpoint.only_stage())
    if stage1 is not None:
        checkpoint = _with_stage1(checkpoint, stage1)
    complete = _with_vision(checkpoint, clip=False)
    tokenizer: Any = None
    text: Any = None
    if generates:
        complete, tokenizer = _with_image_token(_with_language(complete))
        _check_language(complete)
        if to == "vllm":
            if complete.language_config.is_encoder_decoder:
                raise InputError(
                    f"{checkpoint.name} has an LLM of type {complete.language_config.model_type}, an encoder-decoder;"
                    " vLLM serves BLIP-2 with a decoder-only LLM alone: convert it to transformers"
                )
            language = _without_twins(complete.language_config, complete.weights.part(LANGUAGE))
            complete = replace(complete, weights=complete.weights.without(LANGUAGE) | language)
    _check_fits(complete)
    eps = (checkpoint.recipe.qformer.image_norm_eps, complete.vision_config.layer_norm_eps)
    if eps[0] != eps[1]:
        log.warning("the norm of its image features has an epsilon of %g, this format takes the ViT's own, %g", *eps)
    holder = checkpoint.of_stage("representation") if checkpoint.holds_stage_1 else None
    if holder is not None:
        text = text_tokenizer(holder.recipe.qformer, stage1 or holder)
    card = model_card(checkpoint, to, stage1=stage1)

    def write(folder: Path) -> None:
        folder.mkdir()
        config = transformers.write_settings(folder, complete, tokenizer or text)
        if generates and text is not None:
            text.save_pretrained(str(folder / QFORMER_TOKENIZER))
        weights = complete.weights.renamed(transformers.NAMES, checkpoint.name, back=True)
        transformers.write_config(folder, config, weights)
        save_torch_state_dict(dict(weights), folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    return write


def _check_language(checkpoint: Checkpoint) -> None:
    """See that transformers' BLIP-2 makes the same LLM of a configuration.

    Raises:
        InputError: it makes another, as a decoder alone of BART and Pegasus, or none.
    """
    config: Any = checkpoint.language_config
    expected = type(empty_model(config)).__name__
    try:
        with torch.device("meta"):
            made = type(Blip2ForConditionalGeneration(Blip2Config(text_config=config)).language_model).__name__
    except Exception as error:  # which configurations it does not take is nowhere said
        made = f"nothing ({first_line(error)[:160]})"
    if made != expected:
        raise InputError(
            f"{checkpoint.name} has an LLM of type {config.model_type}, a {expected}, of which transformers' BLIP-2"
            f" makes {made}: convert it to blip2"
        )


def _lavis(checkpoint: Checkpoint, with_language: bool) -> Writer:
    complete = _with_vision(checkpoint, clip=True)
    kind = None
    if checkpoint.recipe.language is not None:
        complete = _with_language(complete)
        kind = complete.language_config.model_type
        if kind not in ("opt", "t5"):
            raise InputError(
                f"{checkpoint.name} has an LLM of type {kind}; LAVIS's BLIP-2 has OPT or T5: convert it to transformers"
            )
        # What was trained goes along, and what the file of LAVIS had inside.
        own = not checkpoint.holds_language and checkpoint.weights.part(LANGUAGE)
        if not with_language and not own:
            log.info("its LLM, %s, is left out, as LAVIS does", checkpoint.recipe.language.name)
            complete = replace(complete, weights=complete.weights.without(LANGUAGE))
    _check_fits(complete)
    state = lavis.state_of(complete, is_t5=kind == "t5")
    for note in lavis.differences(complete):
        log.warning("%s", note)
    return lambda path: torch.save({"model": state}, path)


def _blip2(checkpoint: Checkpoint) -> Writer:
    frozen = (VISION,) * checkpoint.holds_vision + (LANGUAGE,) * checkpoint.holds_language
    weights = checkpoint.weights.without(*frozen)
    recipe = _with_whole_paths(checkpoint.recipe)
    _check_fits(checkpoint)
    holder = checkpoint.of_stage("representation") if checkpoint.holds_stage_1 else None
    text = None if holder is None else text_tokenizer(holder.recipe.qformer, holder)
    inside = "tokenizer" if recipe.language is None else f"tokenizer/{QFORMER_TOKENIZER}"
    card = model_card(checkpoint, "blip2")

    def write(folder: Path) -> None:
        folder.mkdir()
        save_torch_state_dict(dict(weights), folder, max_shard_size="1TB")
        if text is not None:
            text.save_pretrained(str(folder / inside))
        (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")

    return write


def _with_whole_paths(recipe: Recipe) -> Recipe:
    """Frozen parts that are files here are found from anywhere."""

    def whole(name: str) -> str:
        path = Path(name).expanduser()
        return str(path.absolute()) if path.exists() else name

    plain: Any = {"trust_remote_code": None}  # which no checkpoint can say
    vision = replace(recipe.vision, name=whole(recipe.vision.name), **plain)
    language = None if recipe.language is None else replace(recipe.language, name=whole(recipe.language.name), **plain)
    named = {key: getattr(recipe.qformer, key) for key in ("tokenizer", "bert")}
    qformer = replace(recipe.qformer, **{key: name and whole(name) for key, name in named.items()})
    return replace(recipe, vision=vision, language=language, qformer=qformer)


def _check_fits(checkpoint: Checkpoint) -> None:
    """See that the weights are those of the recipe and of the frozen parts, as loading them would.

    Raises:
        InputError: they are not; what was to be written would be of no use.
    """
    weights, recipe = checkpoint.weights, checkpoint.recipe
    width = len(weights["image_norm.weight"])
    has_text = any(".text_feed_forward." in name for name in weights)
    with torch.device("meta"):
        network = QFormer(recipe.qformer, width, has_text and "qformer.word_embedding.weight" in weights)
    expected = {f"qformer.{name}": tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.part("qformer.").items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise InputError(
            f"{checkpoint.name}: {wrong[0]} is {found.get(wrong[0], 'missing')}, the configuration says"
            f" {expected.get(wrong[0], 'nothing of it')}: correct the sizes in qformer"
        )
    for what, config, here in (
        ("image encoder", checkpoint.vision_config, width),
        ("LLM", checkpoint.language_config, len(weights.get("projection.weight", ()))),
    ):
        if config is not None and config.hidden_size != here:
            embeddings = getattr(config, "word_embed_proj_dim", None)
            if what == "LLM" and embeddings == here:
                raise InputError(
                    f"{checkpoint.name} has an LLM of type {config.model_type} whose embeddings are {here} wide and"
                    f" whose layers are {config.hidden_size} wide; transformers' BLIP-2 takes the latter for both:"
                    " convert it to blip2"
                )
            raise InputError(
                f"{checkpoint.name} is for an {what} of width {here}, the one named is {config.hidden_size} wide: name"
                " the one that it was trained with"
            )


# -- parts -------------------------------------------------------------------------------------------------------------


def _with_stage1(checkpoint: Checkpoint, stage1: Checkpoint) -> Checkpoint:
    """A stage 2 with what stage 1 alone has, if their Q-Formers are the same."""
    if checkpoint.recipe.stage != "generation":
        raise InputError(f"{checkpoint.name} is of stage 1 itself: give a second checkpoint to a stage 2 alone")
    here = checkpoint.weights.part("qformer.", "image_norm")
    other = [name for name in here if name not in stage1.weights or not torch.equal(here[name], stage1.weights[name])]
    if other:
        raise InputError(
            f"{checkpoint.name} and {stage1.name} have different Q-Formers ({len(other)} weights differ, such as"
            f" {min(other)}), and one folder holds one: convert each to a folder of its own"
        )
    sizes = {
        key: getattr(stage1.recipe.qformer, key)
        for key in ("vocabulary", "max_position_embeddings", "image_text_hidden_size")
    }
    qformer = replace(checkpoint.recipe.qformer, **sizes)
    return replace(
        checkpoint,
        weights=checkpoint.weights | stage1.weights.where(stage1.is_stage_1_alone),
        recipe=replace(checkpoint.recipe, qformer=qformer),
    )


def _with_vision(checkpoint: Checkpoint, clip: bool) -> Checkpoint:
    """The checkpoint with its image encoder inside, in the layout of BLIP-2's own, or of CLIP where it may be."""
    recipe = checkpoint.recipe
    trained = () if checkpoint.holds_vision else tuple(checkpoint.weights.part("vision."))
    holder = checkpoint if checkpoint.holds_vision else open_foreign(recipe.vision.name)
    holder = holder and holder.with_heads(recipe.vision.num_attention_heads)
    fits = holder is not None and (clip or isinstance(holder.vision_config, Blip2VisionConfig))
    if holder is not None and holder.holds_vision and fits and not trained:
        assert holder.preprocessing is not None
        config, weights = holder.resized(recipe.vision.image_size)
        preprocessing = replace(holder.preprocessing, image_size=config.image_size)
    else:
        encoder = read_image_encoder(recipe.vision, choose_dtype(recipe.vision.dtype, CPU))
        state = encoder.state_dict()
        for name in trained:
            state[name.removeprefix("vision.")].copy_(checkpoint.weights[name])
        preprocessing = encoder.preprocessing
        if clip and hasattr(encoder.network, "pre_layrnorm"):
            config, found = encoder.network.config, encoder.network.state_dict()
            found = {name: tensor for name, tensor in found.items() if not name.startswith("post_layernorm")}
        else:
            config, found = to_blip2(encoder, recipe.vision.layer)
        weights = Weights(found).with_prefix(VISION)
    return replace(
        checkpoint,
        weights=checkpoint.weights.without("vision.") | weights,
        vision_config=config,
        preprocessing=preprocessing,
    )


def _with_language(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its LLM inside."""
    named: LanguageConfig | None = checkpoint.recipe.language
    assert named is not None
    if checkpoint.holds_language:
        config, weights = copy.deepcopy(checkpoint.language_config), checkpoint.weights.part(LANGUAGE)
    else:
        holder = open_foreign(named.name)
        if holder is not None and holder.holds_language:
            config, weights = copy.deepcopy(holder.language_config), holder.weights.part(LANGUAGE)
        else:
            trusts = named.trust_remote_code is not None
            network = read_network(resolve(named.name), "auto", trust_remote_code=trusts)
            config = network.config
            weights = _without_twins(config, Weights(network.state_dict()).with_prefix(LANGUAGE))
        trained = checkpoint.weights.part(LANGUAGE)
        weights = (_without_twins(config, weights) | trained) if trained else weights
    set_activation(config, named.activation)
    return replace(checkpoint, weights=checkpoint.weights | weights, language_config=config)


def _without_twins(config: Any, weights: Weights) -> Weights:
    """Without the second of two names of one matrix, of which old files, and every module, hold both."""
    tied = empty_model(config).all_tied_weights_keys
    pairs = [(LANGUAGE + twin, LANGUAGE + first) for twin, first in tied.items()]
    twins = [a for a, b in pairs if a in weights and b in weights and torch.equal(weights[a], weights[b])]
    return weights.without(*twins)


def _with_image_token(checkpoint: Checkpoint) -> tuple[Checkpoint, PreTrainedTokenizerBase]:
    """The checkpoint and its LLM's tokenizer with a token that stands for the picture, and an embedding for it.

    The embedding is never read, since the picture takes its place, and what stands at the output is the mean of the
    other rows: its logit is the mean of theirs, so it is never the next token.
    """
    named = checkpoint.recipe.language
    assert named is not None
    tokenizer = read_tokenizer(resolve(named.name), named.trust_remote_code is not None)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, False)
    side = "right" if checkpoint.language_config.is_encoder_decoder else "left"
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = side  # the latter is what is saved
    end = end_of_text(tokenizer, named.stop_string, named.name)
    config = copy.deepcopy(checkpoint.language_config)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if end not in ends:
        config.eos_token_id = end
    weights: Mapping[str, Tensor] = checkpoint.weights
    needed = len(tokenizer)
    if config.vocab_size < needed:
        network = empty_model(config)
        ends_of = (network.get_input_embeddings(), network.get_output_embeddings())
        tables = {id(tensor) for module in ends_of for tensor in module.parameters()}
        added: dict[str, Tensor] = {}
        for name, tensor in network.named_parameters(remove_duplicate=False):
            if id(tensor) in tables and LANGUAGE + name in weights:
                rows = weights[LANGUAGE + name]
                mean = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)
                added[LANGUAGE + name] = torch.cat([rows, mean.expand(needed - len(rows), *rows.shape[1:])])
        weights = checkpoint.weights | added
        config.vocab_size = needed
    return replace(checkpoint, weights=weights, language_config=config), tokenizer
