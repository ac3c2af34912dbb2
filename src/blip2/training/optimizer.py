"""Trainable parameters, AdamW and its learning-rate schedule (paper §3.4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from blip2.backbones.frozen import Freezable
from blip2.backbones.lora import ADAPTER_KEY, BASE_LAYER_KEY
from blip2.backbones.vision import ImageEncoder
from blip2.config import OptimizerConfig
from blip2.errors import InputError

NO_WEIGHT_DECAY = ("temperature", "qformer.queries")
"""Parameters without weight decay, in addition to biases and norms."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Keys of a parameter's moments in AdamW's state."""


def find_pattern(name: str, config: OptimizerConfig) -> str:
    """Return the first pattern of ``config.learning_rate`` that matches the name of a parameter.

    Raises:
        InputError: no pattern matches.
    """
    pattern = next((p for p in config.learning_rate if fnmatchcase(name, p)), None)
    if pattern is None:
        raise InputError(f'no pattern of optimizer.learning_rate matches {name}: add "*" as the last pattern')
    return pattern


def configure_trainable(model: nn.Module, config: OptimizerConfig) -> dict[str, float]:
    """Set ``requires_grad`` of the parameters of `model` as ``config.learning_rate`` says.

    Returns:
        The peak learning rate of each parameter that trains, by parameter name, with ``config.layer_decay`` applied to
        the image encoder (Tables 7-9).

    Raises:
        InputError: a pattern matches no parameter, a parameter is matched by no pattern, nothing trains, a parameter
            that trains is in half precision, adapters are frozen or the weights that they adapt are not, or
            ``config.layer_decay`` is set for an image encoder that is frozen or is not a ViT.
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
                f"{name} trains at {rate} but is in {str(parameter.dtype).removeprefix('torch.')}: set"
                f' {name.split(".")[0]}.dtype to fp32, or "{name.split(".")[0]}.*" to frozen in'
                " optimizer.learning_rate"
            )
    # The patterns of the defaults may match nothing: there is no LLM in stage 1.
    unused = [p for p in config.learning_rate if p not in used_patterns and p not in ("language.*", "vision.*", "*")]
    if unused:
        parts = ", ".join(sorted({name.split(".")[0] for name, _ in model.named_parameters()}))
        raise InputError(
            f"patterns of optimizer.learning_rate match no parameter ({', '.join(unused)}): correct or remove them;"
            f" the names of parameters begin with {parts}"
        )
    if not rates:
        raise InputError("optimizer.learning_rate freezes every parameter: give at least one pattern a rate")
    _check_adapters(model, rates)
    model.train()  # parts that were unfrozen leave evaluation mode
    return _apply_layer_decay(model, rates, config.layer_decay)


def _check_adapters(model: nn.Module, rates: dict[str, float]) -> None:
    """Check that adapters train, and that the weights that they adapt are frozen.

    In a :class:`Freezable`, whose checkpoint has the adapters alone, all other parameters must be frozen.
    """
    for part, module in model.named_children():
        if not any(ADAPTER_KEY in name for name, _ in module.named_parameters()):
            continue
        trained = [name for name in rates if name.startswith(f"{part}.")]
        adapters = [name for name in trained if ADAPTER_KEY in name]
        others = [
            name
            for name in trained
            if name not in adapters and (isinstance(module, Freezable) or BASE_LAYER_KEY in name)
        ]
        if others or not adapters:
            problem = f"also trains {others[0]}, which is not an adapter" if others else "freezes the adapters"
            raise InputError(
                f"{part} has adapters, but optimizer.learning_rate {problem}: begin optimizer.learning_rate with"
                f' "{part}.*lora_*": 1e-4 and "{part}.*": frozen'
            )


def _apply_layer_decay(model: nn.Module, rates: dict[str, float], decay: float) -> dict[str, float]:
    """Return the rates, with the rates of the image encoder multiplied by `decay` once more for each lower layer."""
    if decay == 1:
        return rates
    vision = model.get_submodule("vision")
    assert isinstance(vision, ImageEncoder)
    if vision.is_frozen:
        raise InputError(
            f"optimizer.layer_decay is {decay}, but optimizer.learning_rate freezes the image encoder: set"
            ' optimizer.layer_decay to 1, or give "vision.*" a rate in optimizer.learning_rate'
        )
    num_blocks = len(vision.blocks)
    scales = {f"vision.{name}": decay ** (num_blocks + 1 - layer) for name, layer in vision.layer_ids().items()}
    return {name: rate * scales.get(name, 1.0) for name, rate in rates.items()}


def build_optimizer(model: nn.Module, rates: dict[str, float], config: OptimizerConfig) -> torch.optim.AdamW:
    """Make AdamW with one parameter group for each (peak rate, weight decay); ``group["peak"]`` is the peak rate.

    Args:
        model: the model whose parameters train.
        rates: the result of :func:`configure_trainable`.
        config: weight decay and betas.
    """
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
        optimizer: the result of :func:`build_optimizer`, or its wrapper.
        step: number of the step; the first step is 0.
        max_steps: number of steps of the run.
        config: number of warm-up steps and the final rate.

    Returns:
        The factor by which the peak rates were multiplied, in [0, 1].
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
    """Return the optimizer state of each trained parameter, by name. A state is empty before the first gradient."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {names[parameter]: dict(optimizer.state.get(parameter, {})) for parameter in trained}


def restore_optimizer(optimizer: Any, model: nn.Module, saved: dict[str, dict[str, Any]]) -> list[str]:
    """Restore the optimizer state of each parameter by name.

    Learning rates, betas and weight decay are not restored: the optimizer keeps the values of the recipe. A parameter
    without a saved state of its shape starts without a state, as in a new run.

    Args:
        optimizer: the optimizer.
        model: the model whose parameters the optimizer updates.
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
            if saved_state is None or (saved_state and not _fits(saved_state, parameter)):
                new.append(name)
                continue
            restored.add(name)
            if saved_state:
                state[index] = saved_state
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})
    unused = [name for name in saved if name not in restored]
    lines = []
    if new:
        lines.append(
            f"the optimizer starts without a state for {_abbreviate(new)}: the checkpoint has no state of this shape"
        )
    if unused:
        lines.append(
            f"the optimizer's state of {_abbreviate(unused)} is dropped: no parameter of this name and shape trains"
        )
    return lines


def _fits(state: Mapping[str, Any], parameter: Tensor) -> bool:
    """Return whether a saved state is one of AdamW for a parameter of this shape."""
    shapes = {name: value.shape for name, value in state.items() if isinstance(value, Tensor)}
    return all(shapes.get(name) == parameter.shape for name in MOMENTS) and "step" in shapes


def _abbreviate(names: list[str]) -> str:
    """Return the number of parameters and the first few names."""
    listed = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    return f"{len(names)} parameter{'' if len(names) == 1 else 's'} ({listed})"


def summarize_parts(model: nn.Module, rates: dict[str, float]) -> list[tuple[str, str, str, str]]:
    """Describe what is frozen and what trains.

    Args:
        model: the model.
        rates: the result of :func:`configure_trainable`.

    Returns:
        A row (part, number of parameters, state, dtype) for each part of the model, as text.
    """
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
