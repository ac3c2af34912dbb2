"""Checkpoints: written beside and renamed, so there is never half a one.

A checkpoint is a folder ``step-00001000``::

    model.safetensors   what was trained: everything but the frozen image encoder and LLM
    tokenizer/          of the Q-Former's text (stage 1)
    recipe.yaml         the recipe, which names the frozen parts
    state.json          step, position in the data, versions
    optimizer.pt        what resuming needs besides, read with weights_only=True
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from blip2.config import Recipe, dump_recipe
from blip2.errors import InputError
from blip2.model.frozen import Freezable

FOLDER = "checkpoints"


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything that does not belong to a frozen part; a tensor with two names (tied weights) under its first."""
    frozen = tuple(f"{name}." for name, part in _freezable(model).items() if part.is_frozen)
    return {name: tensor for name, tensor in _untied_state(model).items() if not name.startswith(frozen)}


def _freezable(model: nn.Module) -> dict[str, Freezable]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Freezable)}


def _untied_state(model: nn.Module) -> dict[str, Tensor]:
    seen: set[int] = set()
    state = model.state_dict(keep_vars=True)
    return {name: t.detach() for name, t in state.items() if not (id(t) in seen or seen.add(id(t)))}


def save(
    run: Path,
    step: int,
    model: nn.Module,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    optimizer: dict[str, Any],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of a step and delete all but the last `keep`.

    Args:
        optimizer: tensors and numbers that resuming needs (optimiser, gradient scaler).
        state: numbers and texts that resuming needs, as JSON.

    Raises:
        InputError: the disk is full. Nothing is lost: what was there before is still there.
    """
    root = run / FOLDER
    folder = root / f"step-{step:08d}"
    building = root / f"{folder.name}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for stale in root.glob("*.tmp"):  # of a process that was killed while it wrote
            shutil.rmtree(stale, ignore_errors=True)
        building.mkdir()
        save_file({k: v.contiguous() for k, v in trained_state(model).items()}, building / "model.safetensors")
        torch.save(optimizer, building / "optimizer.pt")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(building / "tokenizer"))
        (building / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        versions = {name: version(name) for name in ("blip2", "torch", "transformers")}
        about = {"step": step, **state, "versions": {"python": platform.python_version(), **versions}}
        (building / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        for path in building.rglob("*"):
            if path.is_file():
                _flush(path)
        if folder.exists():
            folder.rename(root / f"{folder.name}.old.tmp")
        building.rename(folder)
        _flush(root)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch reports a full disk as a short write; what was written must not be deleted before we look.
        full = is_full(error) or shutil.disk_usage(run).free < 2**20
        shutil.rmtree(building, ignore_errors=True)
        if full:
            raise no_room(run, f"saving the checkpoint of step {step} to {root}") from error
        raise
    for old in sorted(root.glob("step-????????"))[:-keep]:
        shutil.rmtree(old)
    return folder


def is_full(error: Exception) -> bool:
    """Whether an error says that a disk is full, or a quota used up."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in codes or any(f"os error {code}" in str(error) for code in codes)


def no_room(run: Path, doing: str) -> InputError:
    """What to say when the disk is full."""
    last = latest(run)
    return InputError(
        f"no space left on the disk while {doing}: make room, then go on with --resume from"
        f" {last.name if last else 'the start'}"
    )


def _flush(path: Path) -> None:
    """Have the disk hold what was written before anything is renamed."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def latest(run: Path) -> Path | None:
    """The last checkpoint of a run, if it has any."""
    return max((run / FOLDER).glob("step-????????"), default=None)


def find(path: Path) -> Path:
    """A checkpoint folder: the path itself, or the last checkpoint of the run at that path.

    Raises:
        InputError: there is none.
    """
    if (path / "model.safetensors").is_file() and (path / "recipe.yaml").is_file():
        return path
    last = latest(path)
    if last is None:
        what = "is not a folder" if not path.is_dir() else "holds no checkpoint"
        raise InputError(f"{path} {what}: give the folder of a run, or a folder {FOLDER}/step-... inside one")
    return last


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load what was trained into a model of the same recipe.

    Raises:
        InputError: the file is damaged, or names or shapes differ; the message lists them.
    """
    weights = read_weights(folder)
    # A part that was trained is in the checkpoint, though it may be frozen here.
    trained = tuple(f"{part}." for part in _freezable(model) if any(name.startswith(f"{part}.") for name in weights))
    expected = {name for name in _untied_state(model) if name.startswith(trained)} | set(trained_state(model))
    _load(weights, model, folder, expected)


def read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(f"checkpoint {folder} cannot be read ({error}): use another, or train again") from error


def load_previous_stage(folder: Path, model: nn.Module) -> list[str]:
    """Start a model from a checkpoint of another stage: what both have is loaded.

    Returns:
        Names of parameters of `model` that the checkpoint does not have.

    Raises:
        InputError: a shape differs, the checkpoint lacks the Q-Former, or it holds a trained image encoder or LLM that
            is frozen here.
    """
    weights = read_weights(folder)
    here = set(trained_state(model))
    lost = sorted({name.split(".")[0] for name in set(weights) & set(model.state_dict()) - here})
    if lost:
        raise InputError(
            f"checkpoint {folder} holds trained weights of {', '.join(lost)}, which optimizer.rates freezes: give"
            f' "{lost[0]}.*" a rate, or they would be lost'
        )
    shared = here & set(weights)
    if not any(name.startswith("qformer.") for name in shared):
        raise InputError(f"checkpoint {folder} holds no Q-Former that fits: its first names are {sorted(weights)[:3]}")
    _load({name: weights[name] for name in shared}, model, folder, expected=shared)
    return sorted(here - shared)


def _load(weights: dict[str, Tensor], model: nn.Module, folder: Path, expected: set[str]) -> None:
    here = {name: tensor for name, tensor in model.state_dict().items() if name in expected}
    missing, left = sorted(set(here) - set(weights)), sorted(set(weights) - set(here))
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in here.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    for what, names in (("of other shapes", shapes), ("without", missing), ("with unknown", left)):
        if names:
            listed = "; ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise InputError(f"checkpoint {folder} does not fit the recipe ({what}: {listed}): use the recipe it was"
                             " made with, which lies beside it")  # fmt: skip
    with torch.no_grad():
        for name, tensor in weights.items():
            here[name].copy_(tensor)


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state.json, optimizer.pt) of a checkpoint; the latter on the CPU.

    Raises:
        InputError: one of them is damaged, or carries code.
    """
    name = "state.json"
    try:
        state = json.loads((folder / name).read_text(encoding="utf-8"))
        name = "optimizer.pt"
        return state, torch.load(folder / name, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes raises nearly anything
        raise InputError(
            f"{folder / name} cannot be read ({type(error).__name__}): delete {folder} to go on from the checkpoint"
            " before it, or from the start"
        ) from error
