"""Load a checkpoint as a pipeline."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from blip2 import checkpoint
from blip2.builder import Built, build, check_bitsandbytes, choose_device
from blip2.config import ModelConfig, Precision, Stage
from blip2.errors import InputError
from blip2.interop.checkpoint import Checkpoint
from blip2.model.representation import RepresentationModel
from blip2.pipelines.generation import GenerationPipeline
from blip2.pipelines.representation import RepresentationPipeline

log = logging.getLogger("blip2")


def load(
    path: str | Path,
    device: str | None = None,
    dtype: Precision | None = None,
    *,
    overrides: Mapping[str, object] | None = None,
    stage: Stage | None = None,
    revision: str | None = None,
    encoder: nn.Module | None = None,
    device_map: str | Mapping[str, int | str | torch.device] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
    quantization_config: QuantizationConfigMixin | None = None,
) -> RepresentationPipeline | GenerationPipeline:
    """Load a checkpoint of ``blip2 train``, transformers or LAVIS.

    Args:
        path: folder of a run (its last checkpoint is loaded) or of a checkpoint; folder or hub name of transformers'
            ``Blip2ForConditionalGeneration``, ``Blip2ForImageTextRetrieval`` or
            ``InstructBlipForConditionalGeneration``; or a ``.pth`` file of LAVIS.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``mps``. None: a GPU if there is one.
        dtype: data type of the image encoder and the LLM: ``fp32``, ``bf16`` or ``fp16``. None: the dtype in the
            model's config; if the config sets none, bf16 on a CUDA GPU and fp32 on other devices.
        overrides: new values of keys of the model's config (``{"vision.image_size": 364}``), and values that a
            ``.pth`` file does not contain (``{"vision.name": "eva_vit_g.pth", "language.name": "facebook/opt-2.7b"}``).
        stage: the stage to load from a checkpoint that contains both stages, ``representation`` or ``generation``.
            None: the stage in the config of the checkpoint.
        revision: branch, tag or commit on the hub. None: the newest commit of the main branch.
        encoder: the image encoder with which the model was trained, if its ``vision.name`` is module, or features that
            such a module encodes; see :func:`blip2.train`.
        device_map: the devices of the LLM, as in ``from_pretrained`` of transformers: ``auto``, or a mapping from the
            names of the LLM's modules to devices. The image encoder and the Q-Former are on `device`. None: the LLM is
            there too.
        max_memory: memory that ``device_map="auto"`` may use on each device. None: what is free.
        offload_folder: folder for the weights that `device_map` places on the disk.
        quantization_config: how to quantize the linear layers of the LLM, except its output layer, and those of the
            image encoder, if it is of transformers: ``BitsAndBytesConfig(load_in_8bit=True)``. It takes precedence over
            ``language.quantization`` in the model's config. None: only the LLM is quantized, if the config says so.

    Returns:
        A :class:`RepresentationPipeline` for stage 1, a :class:`GenerationPipeline` for stage 2.

    Raises:
        InputError: there is no checkpoint at `path` or no such revision of it, or it is damaged, not a BLIP-2 or not of
            `stage`; a frozen part cannot be loaded; the device does not exist; or trained weights would have to be
            quantized or offloaded.
    """
    found = checkpoint.open_checkpoint(str(path), overrides, revision).as_stage(stage)
    log.info("%s: %s", found.name, found.description)
    config = found.config
    if found.missing_prefixes and config.stage == "representation":
        missing = " and no ".join(prefix.rstrip(".") for prefix in found.missing_prefixes)
        log.info("the checkpoint has no %s: these weights are random", missing)
    if dtype is not None:
        vision = replace(config.vision, dtype=dtype)
        language = None if config.language is None else replace(config.language, dtype=dtype)
        config = replace(config, vision=vision, language=language)
    placement = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
    load_kwargs = {key: value for key, value in placement.items() if value is not None}
    if load_kwargs and config.language is None:
        raise InputError(
            f"{found.name} is of stage 1, which has no LLM, but {' and '.join(load_kwargs)} would place one: give only"
            " device"
        )
    if quantization_config is not None:
        if isinstance(quantization_config, BitsAndBytesConfig):
            check_bitsandbytes("quantization_config")
        load_kwargs["quantization_config"] = quantization_config
    built = build(config, choose_device(device), found, encoder=encoder, load_kwargs=load_kwargs)
    _check_changeable(found, built.model)
    checkpoint.load_weights(found, built.model)
    built.model.eval()
    return make_pipeline(built, config, Path(found.name))


def _check_changeable(found: Checkpoint, model: nn.Module) -> None:
    """Check that the trained weights of a checkpoint can be loaded into a model.

    Raises:
        InputError: they would have to be quantized or offloaded.
    """
    parameters = dict(model.named_parameters())
    for name in found.trained_weights():
        if name in parameters and (parameters[name].is_meta or not parameters[name].is_floating_point()):
            raise InputError(
                f"{found.name} contains trained weights, such as {name}, which cannot be quantized or offloaded when"
                " they are loaded: convert it to transformers, and load the result"
            )


def make_pipeline(built: Built, config: ModelConfig, path: Path) -> RepresentationPipeline | GenerationPipeline:
    """Wrap a model in the pipeline of its stage. The model is not copied, moved or switched to evaluation mode.

    Args:
        built: the model and its tokenizers.
        config: the config of the model.
        path: path or name of the checkpoint, for error messages.
    """
    if isinstance(built.model, RepresentationModel):
        return RepresentationPipeline(built.model, built.tokenizer, config, path)
    assert built.eos_token_id is not None
    return GenerationPipeline(built.model, built.tokenizer, config, path, built.eos_token_id, built.question_tokenizer)
