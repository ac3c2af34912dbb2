"""Which parameters train at which rate, and how the rate changes (paper §3.4)."""

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

UNDECAYED = ("temperature", "qformer.num_query_tokens")
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names that AdamW has for the moments of a parameter."""


def pattern_of(name: str, config: OptimizerConfig) -> str:
    """The pattern of ``config.rates`` that decides about a parameter.

    Raises:
        InputError: there is none.
    """
    pattern = next((p for p in config.learning_rate if fnmatchcase(name, p)), None)
    if pattern is None:
        raise InputError(f'no pattern of optimizer.learning_rate matches {name}: end the list with "*"')
    return pattern


def set_rates(model: nn.Module, config: OptimizerConfig) -> dict[str, float]:
    """Freeze and unfreeze the parameters of `model` as ``config.rates`` says.

    Returns:
        The peak rate of each parameter that trains; in the image encoder lower from layer to layer, as
        ``config.layer_decay`` says (Tables 7-9).

    Raises:
        InputError: a pattern matches nothing, a parameter is matched by no pattern, nothing trains, what trains is in
            half precision, adapters are frozen or what they adapt is not, or rates are to decay in an image encoder
            that is frozen or is no ViT.
    """
    rates: dict[str, float] = {}
    used: set[str] = set()
    for name, parameter in model.named_parameters():
        pattern = pattern_of(name, config)
        used.add(pattern)
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
    # The usual two are in every recipe, whether the stage has an LLM or not.
    unused = [p for p in config.learning_rate if p not in used and p not in ("language.*", "vision.*", "*")]
    if unused:
        parts = ", ".join(sorted({name.split(".")[0] for name, _ in model.named_parameters()}))
        raise InputError(
            f"optimizer.learning_rate has {', '.join(unused)}, which match no parameter: their names begin {parts}"
        )
    if not rates:
        raise InputError("every parameter is frozen by optimizer.learning_rate: give some of them a rate")
    _check_adapters(model, rates)
    model.train()  # a part that was unfrozen may now leave eval()
    return _decayed_by_layer(model, rates, config.layer_decay)


def _check_adapters(model: nn.Module, rates: dict[str, float]) -> None:
    """Adapters train, and what they adapt does not."""
    for part, module in model.named_children():
        if not isinstance(module, Freezable) or not module.adapters:
            continue
        trained = [name for name in rates if name.startswith(f"{part}.")]
        beside = [name for name in trained if module.adapters not in name]
        if beside or not trained:
            found = f"gives {beside[0]} a rate beside them" if beside else "freezes them"
            raise InputError(
                f"{part} has adapters, and optimizer.learning_rate {found}: begin optimizer.learning_rate with"
                f' "{part}.*lora_*": 1e-4 and "{part}.*": frozen'
            )


def _decayed_by_layer(model: nn.Module, rates: dict[str, float], decay: float) -> dict[str, float]:
    """The rates with those of the image encoder lowered from its last layer to its first."""
    if decay == 1:
        return rates
    vision = model.get_submodule("vision")
    assert isinstance(vision, ImageEncoder)
    if vision.is_frozen:
        raise InputError(
            f"optimizer.layer_decay is {decay}, but optimizer.learning_rate freezes the image encoder: give"
            ' "vision.*" a rate,'
            " or set it to 1"
        )
    depths, last = vision.depths(), len(vision.blocks)
    own = {f"vision.{name}": decay ** (last + 1 - depth) for name, depth in depths.items()}
    return {name: rate * own.get(name, 1.0) for name, rate in rates.items()}


def build_optimizer(model: nn.Module, rates: dict[str, float], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with one parameter group for each (rate, decayed or not); ``group["peak"]`` is its peak rate."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name in rates:
            decayed = parameter.ndim > 1 and name not in UNDECAYED
            groups.setdefault((rates[name], decayed), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "peak": rate, "lr": rate, "weight_decay": config.weight_decay if decayed else 0.0}
            for (rate, decayed), parameters in groups.items()
        ],
        betas=config.betas,
        fused=True,
    )


def set_schedule(optimizer: Any, step: int, steps: int, config: OptimizerConfig) -> float:
    """Set the rates of a step (0 is the first) of `steps` and return their share of the peak.

    Linear warm-up, then a cosine down to ``final_rate`` at the last step.
    """
    warmup = min(config.warmup_steps, steps - 1)
    if step < warmup:
        share = (step + 1) / warmup
    else:
        progress = (step - warmup) / max(steps - 1 - warmup, 1)
        share = config.min_lr_rate + (1 - config.min_lr_rate) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return share


def named_state(optimizer: Any, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the state of each parameter that an optimizer trains by its name; empty where it had no gradient yet."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {names[parameter]: dict(optimizer.state.get(parameter, {})) for parameter in trained}


def restore_optimizer(optimizer: Any, model: nn.Module, saved: dict[str, dict[str, Any]]) -> list[str]:
    """Give each parameter the state that was saved under its name.

    Rates, betas and decay stay those of the recipe, which may have changed. A parameter without a saved state begins
    without one, as in a new run.

    Args:
        saved: as :func:`named_state` returned it.

    Returns:
        A line on the parameters that begin without a state, and one on the saved states that no parameter takes.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    current = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    taken: set[str] = set()
    fresh: list[str] = []
    for group, indices in zip(optimizer.param_groups, current["param_groups"], strict=True):
        for parameter, index in zip(group["params"], indices["params"], strict=True):
            name = names[parameter]
            found = saved.get(name)
            if found is None or any(found[moment].shape != parameter.shape for moment in MOMENTS if found):
                fresh.append(name)
                continue
            taken.add(name)
            if found:
                state[index] = found
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})
    lost = [name for name in saved if name not in taken]
    lines = []
    if fresh:
        lines.append(f"the optimizer's state begins anew for {_some(fresh)}, of which the checkpoint has none")
    if lost:
        lines.append(f"the optimizer's state of {_some(lost)} is dropped: it no longer trains, or has another shape")
    return lines


def _some(names: list[str]) -> str:
    """How many parameters there are, and the first of them."""
    listed = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    return f"{len(names)} parameter{'' if len(names) == 1 else 's'} ({listed})"


def describe(model: nn.Module, rates: dict[str, float]) -> list[tuple[str, str, str, str]]:
    """(part, parameters, state, dtype) of each part of a stage: what is frozen and what trains, with counts."""
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
