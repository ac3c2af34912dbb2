"""Low-rank adapters (LoRA) in a frozen LLM and in a frozen Q-Former, created by PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blip2.backbones.language import LanguageModel
from blip2.backbones.pretrained import short_message
from blip2.config import LoraConfig
from blip2.errors import InputError

ADAPTER_KEY = ".lora_"
"""Substring of the names of all adapter parameters."""
BASE_LAYER_KEY = ".base_layer."
"""Substring of the names of the parameters of layers that have adapters."""
QFORMER_TARGET_MODULES = ["query", "value"]
"""PEFT's default target modules for BERT, whose layers the Q-Former has. They match self-attention and
cross-attention."""


def add_adapters(language: LanguageModel, config: LoraConfig) -> None:
    """Add low-rank adapters to an LLM. The adapters are in float32 and frozen, and their output is zero at first.

    The names of the LLM's own parameters change: ``q_proj.weight`` becomes ``q_proj.base_layer.weight``.

    Args:
        language: the LLM, changed in place.
        config: size, dropout and target modules of the adapters.

    Raises:
        InputError: PEFT is not installed, PEFT has no default target modules for this LLM, the LLM has no module with a
            name in ``config.target_modules``, or one of these modules shares its weight with another module.
    """
    what = f"the LLM, a {type(language.network).__name__}"
    _inject(language.network, config, config.target_modules, "language.lora", what)
    language.adapter_key = ADAPTER_KEY
    for name, parameter in language.named_parameters():
        if ADAPTER_KEY in name:
            parameter.data = parameter.data.to(torch.float32)
    language.freeze()


def add_qformer_adapters(qformer: nn.Module, config: LoraConfig) -> None:
    """Add low-rank adapters to linear layers of a Q-Former. The output of the adapters is zero at first.

    A checkpoint contains both the adapters and the weights that they adapt, because no other file has these weights. In
    the state dict, the adapted weights therefore keep their names (``query.weight``); only as parameters they have
    PEFT's (``query.base_layer.weight``).

    Args:
        qformer: the Q-Former, changed in place.
        config: size, dropout and target modules of the adapters.

    Raises:
        InputError: PEFT is not installed, or a name in ``config.target_modules`` matches a module that is not a linear
            layer, or all names match nothing.
    """
    targets = config.target_modules or QFORMER_TARGET_MODULES
    _inject(qformer, config, targets, "qformer.lora", "the Q-Former")
    for name, module in qformer.named_modules():
        base: Any = getattr(module, "base_layer", None)
        if base is None:
            continue
        if not isinstance(base, nn.Linear):
            raise InputError(
                f"qformer.lora.target_modules matches {name}, a {type(base).__name__}, but only linear layers of the"
                " Q-Former can have adapters: name linear layers, such as query"
            )
        module.register_state_dict_post_hook(_use_own_names)
        module.register_load_state_dict_pre_hook(_use_peft_names)


def _inject(network: nn.Module, config: LoraConfig, targets: list[str] | None, section: str, what: str) -> None:
    """Replace the target modules of a network by PEFT's layers with adapters; `section` and `what` are for errors."""
    try:
        import peft
    except ImportError as error:
        raise InputError(f"{section} needs PEFT: pip install 'blip2[lora]'") from error
    lora_config: Any = peft.LoraConfig(
        r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=targets
    )
    try:
        peft.inject_adapter_in_model(lora_config, network)
    except ValueError as error:
        raise InputError(
            f"no adapters fit {what} ({short_message(error)}): set {section}.target_modules to suffixes of the names of"
            " its linear layers"
        ) from error
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        adapted = next((name for name in tied if BASE_LAYER_KEY in name), None)
        if adapted is not None and len(tied) > 1:
            other = next(name for name in tied if name != adapted)
            raise InputError(
                f"{section}.target_modules matches {adapted.split(BASE_LAYER_KEY)[0]}, whose weight is also {other}, so"
                " that its adapter could not be merged without changing both: leave it out, or use an LLM whose"
                " embeddings are not tied"
            )


def _use_own_names(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: Any) -> None:
    """Rename the adapted weights in a state dict: ``query.base_layer.weight`` to ``query.weight``."""
    for name in [name for name in state_dict if name.startswith(f"{prefix}base_layer.")]:
        state_dict[name.replace(f"{prefix}base_layer.", prefix)] = state_dict.pop(name)


def _use_peft_names(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Undo :func:`_use_own_names` before a state dict is loaded."""
    for name in (f"{prefix}weight", f"{prefix}bias"):
        if name in state_dict:
            state_dict[f"{prefix}base_layer.{name.removeprefix(prefix)}"] = state_dict.pop(name)


@torch.no_grad()
def merge_adapters(network: nn.Module, config: LoraConfig, adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add adapters to the weights of an LLM that they adapt.

    Args:
        network: the LLM, without adapters. It is changed.
        config: the config of the adapters.
        adapters: the weights of the adapters, named as in the state dict of an LLM with adapters.

    Returns:
        The weights that change, by their names in an LLM without adapters and in its dtype.

    Raises:
        InputError: `adapters` are not those of `config`; or see :func:`add_adapters`.
    """
    what = f"the LLM, a {type(network).__name__}"
    _inject(network, config, config.target_modules, "language.lora", what)
    missing, unknown = network.load_state_dict(dict(adapters), strict=False, assign=True)
    wrong = [*unknown, *(name for name in missing if ADAPTER_KEY in name)]
    if wrong:
        raise InputError(
            f"the adapters do not fit {what} ({wrong[0]} is missing or unknown): use the config with which they were"
            " trained"
        )
    merged: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        layer: Any = module
        if hasattr(layer, "base_layer"):
            layer.merge()
            merged[f"{name}.weight"] = layer.base_layer.weight.detach()
    return merged


def merged_weights(weights: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Return W + lora_alpha / r * B A for each linear layer that has an adapter B A.

    Args:
        weights: the weights of a Q-Former with adapters, named as in its state dict.
        config: the config of the adapters.

    Returns:
        The merged weights by the name of W, in the dtype of W.
    """
    merged: dict[str, Tensor] = {}
    for name in weights:
        layer, found, adapter = name.partition(".lora_A.")
        if found:
            weight, b = weights[f"{layer}.weight"], weights[f"{layer}.lora_B.{adapter}"]
            dtype = torch.promote_types(weight.dtype, torch.float32)
            update = config.lora_alpha / config.r * (b.to(dtype) @ weights[name].to(dtype))
            merged[f"{layer}.weight"] = (weight.to(dtype) + update).to(weight.dtype)
    return merged
