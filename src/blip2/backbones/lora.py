"""Low-rank adapters in a frozen LLM, by PEFT."""

from __future__ import annotations

from typing import Any

import torch

from blip2.backbones.language import LanguageModel
from blip2.backbones.pretrained import first_line
from blip2.config import LoraConfig
from blip2.errors import InputError

ADAPTERS = ".lora_"


def add_adapters(language: LanguageModel, config: LoraConfig) -> None:
    """Put an adapter beside matrices of an LLM. At first they add nothing; they are in float32 and frozen.

    The names of the LLM's own parameters change: ``q_proj.weight`` becomes ``q_proj.base_layer.weight``.

    Raises:
        InputError: PEFT is not installed, has no choice of matrices for this LLM, or finds none that is named.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError("language.lora needs PEFT: pip install 'blip2[lora]'") from error
    settings: Any = peft.LoraConfig(
        r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=config.target_modules
    )
    try:
        peft.inject_adapter_in_model(settings, language.network)
    except ValueError as error:
        raise InputError(
            f"no adapters fit the LLM, a {type(language.network).__name__} ({first_line(error)}): set"
            " language.lora.targets to ends of the names of its matrices"
        ) from error
    language.adapters = ADAPTERS
    for name, parameter in language.named_parameters():
        if ADAPTERS in name:
            parameter.data = parameter.data.to(torch.float32)
    language.freeze()
