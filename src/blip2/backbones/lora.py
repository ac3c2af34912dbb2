"""Low-rank adapters (LoRA) in a frozen LLM, created by PEFT."""

from __future__ import annotations

from typing import Any

import torch

from blip2.backbones.language import LanguageModel
from blip2.backbones.pretrained import short_message
from blip2.config import LoraConfig
from blip2.errors import InputError

ADAPTER_KEY = ".lora_"
"""Substring of the names of all adapter parameters."""


def add_adapters(language: LanguageModel, config: LoraConfig) -> None:
    """Add low-rank adapters to an LLM. The adapters are in float32 and frozen, and their output is zero at first.

    The names of the LLM's own parameters change: ``q_proj.weight`` becomes ``q_proj.base_layer.weight``.

    Args:
        language: the LLM, changed in place.
        config: size, dropout and target modules of the adapters.

    Raises:
        InputError: PEFT is not installed, PEFT has no default target modules for this LLM, or the LLM has no module
            with a name in ``config.target_modules``.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError("language.lora needs PEFT: pip install 'blip2[lora]'") from error
    lora_config: Any = peft.LoraConfig(
        r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=config.target_modules
    )
    try:
        peft.inject_adapter_in_model(lora_config, language.network)
    except ValueError as error:
        raise InputError(
            f"no adapters fit the LLM, a {type(language.network).__name__} ({short_message(error)}): set"
            " language.lora.target_modules to suffixes of the names of its linear layers"
        ) from error
    language.adapter_key = ADAPTER_KEY
    for name, parameter in language.named_parameters():
        if ADAPTER_KEY in name:
            parameter.data = parameter.data.to(torch.float32)
    language.freeze()
