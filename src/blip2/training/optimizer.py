"""Trainable parameters, AdamW and its learning-rate schedule (paper §3.4)."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from blip2.backbones.frozen import Freezable
from blip2.backbones.vision import ImageEncoder
from blip2.config import OptimizerConfig
from blip2.errors import InputError

NO_WEIGHT_DECAY = ("temperature", "qformer.queries")
"""Parameters without weight decay, in addition to biases and norms."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Keys of a parameter's moments in AdamW's state."""


def find_pattern(name: str, config: OptimizerConfig) -> str:
    """Return the first pattern of ``config.learning_rate`` that matches a parameter.

    Raises:
        InputError: no pattern matches.
    """
    pattern = next((p for p in config.learning_rate if fnmatchcase(name, p)), None)
    if pattern is None:
        raise InputError(f'no pattern of optimizer.learning_rate matches {name}: end the list with "*"')
    return pattern


def configure_trainable(model: nn.Module, config: OptimizerConfig) -> dict[str, float]:
    """Freeze and unfreeze the parameters of `model` as ``config.learning_rate`` says.

    Returns:
        The peak learning rate of each parameter that trains, with ``config.layer_decay`` applied to the image encoder
        (Tables 7-9).

    Raises:
        InputError: a pattern matches no parameter, a parameter is matched by no pattern, nothing trains, a parameter
            that trains is in half precision, adapters are frozen or the weights that they adapt are not, or
            ``config.layer_decay`` is set for an image encoder that is frozen or is no ViT.
    """
    rates: dict[str, float] = {}
    used_patterns: set[str] = set()
    for name, parameter in model.named_parameters():
        pattern = find_pattern(name, config)
        used_patterns.add(pattern)
        rate = config.learning_rate[pattern]
        parameter.requires_grad_(rate != "frozen")
        if rate == "frozen":
            continue
        rates[name] = float(rate)
        if parameter.dtype != torch.float32:
            raise InputError(
                f"{name} trains at {rate} but is in {str(parameter.dtype).removeprefix('torch.')}: set the dtype of"
                f" {name.split('.')[0]} to fp32, or freeze it"
            )
    # The defaults are allowed to match nothing: a stage 1 has no LLM.
    unused = [p for p in config.learning_rate if p not in used_patterns and p not in ("language.*", "vision.*", "*")]
    if unused:
        parts = ", ".join(sorted({name.split(".")[0] for name, _ in model.named_parameters()}))
        raise InputError(
            f"optimizer.learning_rate has {', '.join(unused)}, which match no parameter: names begin with {parts}"
        )
    if not rates:
        raise InputError("every parameter is frozen by optimizer.learning_rate: give some of them a rate")
    _check_adapters(model, rates)
    model.train()  # parts that were unfrozen leave evaluation mode
    return _apply_layer_decay(model, rates, config.layer_decay)


def _check_adapters(model: nn.Module, rates: dict[str, float]) -> None:
    """Refuse adapters that are frozen, and other parameters of their part that train."""
    for part, module in model.named_children():
        if not isinstance(module, Freezable) or not module.adapter_key:
            continue
        trained = [name for name in rates if name.startswith(f"{part}.")]
        others = [name for name in trained if module.adapter_key not in name]
        if others or not trained:
            problem = f"gives {others[0]} a rate in addition to them" if others else "freezes them"
            raise InputError(
                f"{part} has adapters, and optimizer.learning_rate {problem}: begin optimizer.learning_rate with"
                f' "{part}.*lora_*": 1e-4 and "{part}.*": frozen'
            )


def _apply_layer_decay(model: nn.Module, rates: dict[str, float], decay: float) -> dict[str, float]:
    """Return the rates with those of the image encoder decayed from its last layer to its first."""
    if decay == 1:
        return rates
    vision = model.get_submodule("vision")
    assert isinstance(vision, ImageEncoder)
    if vision.is_frozen:
        raise InputError(
            f"optimizer.layer_decay is {decay}, but optimizer.learning_rate freezes the image encoder: give"
            ' "vision.*" a rate, or set it to 1'
        )
    num_blocks = len(vision.blocks)
    scales = {f"vision.{name}": decay ** (num_blocks + 1 - layer) for name, layer in vision.layer_ids().items()}
    return {name: rate * scales.get(name, 1.0) for name, rate in rates.items()}


def build_optimizer(model: nn.Module, rates: dict[str, float], config: OptimizerConfig) -> torch.optim.AdamW:
    """Make AdamW with one parameter group for each (peak rate, weight decay); ``group["peak"]`` is the peak rate."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name in rates:
            has_decay = parameter.ndim > 1 and name not in NO_WEIGHT_DECAY
            groups.setdefault((rates[name], has_decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "peak": rate, "lr": rate, "weight_decay": config.weight_decay if has_decay else 0.0}
            for (rate, has_decay), parameters in groups.items()
        ],
        betas=config.betas,
        fused=True,
    )


def update_learning_rate(optimizer: Any, step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Set the learning rates of a step: linear warm-up, then a cosine to ``config.min_lr_rate`` at the last step.

    Args:
        step: 0 is the first.

    Returns:
        The factor by which the peak rates are multiplied.
    """
    warmup = min(config.warmup_steps, max_steps - 1)
    if step < warmup:
        scale = (step + 1) / warmup
    else:
        progress = (step - warmup) / max(max_steps - 1 - warmup, 1)
        scale = config.min_lr_rate + (1 - config.min_lr_rate) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale
    return scale


def optimizer_state_by_name(optimizer: Any, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the optimizer state of each trained parameter by name; it is empty before the first gradient."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {names[parameter]: dict(optimizer.state.get(parameter, {})) for parameter in trained}


def restore_optimizer(optimizer: Any, model: nn.Module, saved: dict[str, dict[str, Any]]) -> list[str]:
    """Restore the state of each parameter by name.

    Learning rates, betas and weight decay are those of the recipe, which may have changed. A parameter without a saved
    state starts without one, as in a new run.

    Args:
        saved: the result of :func:`optimizer_state_by_name`.

    Returns:
        Messages about parameters without a saved state, and about saved states that no parameter uses.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    current = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    restored: set[str] = set()
    new: list[str] = []
    for group, indices in zip(optimizer.param_groups, current["param_groups"], strict=True):
        for parameter, index in zip(group["params"], indices["params"], strict=True):
            name = names[parameter]
            saved_state = saved.get(name)
            if saved_state is None or any(saved_state[m].shape != parameter.shape for m in MOMENTS if saved_state):
                new.append(name)
                continue
            restored.add(name)
            if saved_state:
                state[index] = saved_state
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})
    unused = [name for name in saved if name not in restored]
    lines = []
    if new:
        lines.append(f"the optimizer starts without a state for {_abbreviate(new)}, for which the checkpoint has none")
    if unused:
        lines.append(
            f"the optimizer's state of {_abbreviate(unused)} is dropped: no such parameter of this shape trains"
        )
    return lines


def _abbreviate(names: list[str]) -> str:
    """Return the number of parameters and the first few names."""
    listed = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    return f"{len(names)} parameter{'' if len(names) == 1 else 's'} ({listed})"


def summarize_parts(model: nn.Module, rates: dict[str, float]) -> list[tuple[str, str, str, str]]:
    """Return a row (part, parameters, state, dtype) for each part of a model: what is frozen and what trains."""
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(name.split(".")[0], []).append((name, parameter))
    rows = []
    for part, named in parts.items():
        total = sum(parameter.numel() for _, parameter in named)
        trained = sum(parameter.numel() for name, parameter in named if name in rates)
        peaks = [f"{peak:.3g}" for peak in sorted({rates[name] for name, _ in named if name in rates})]
        listed = ", ".join(peaks) if len(peaks) <= 3 else f"{peaks[0]} to {peaks[-1]}"
        state = f"trains at {listed}" if trained else "frozen"
        if 0 < trained < total:
            state = f"{trained:,} {state}"
        dtype = next(parameter.dtype for _, parameter in named if parameter.is_floating_point())
        rows.append((part, f"{total:,}", state, str(dtype).removeprefix("torch.")))
    return rows
