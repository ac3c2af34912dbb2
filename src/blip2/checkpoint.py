"""Checkpoints: written beside and renamed, so there is never half a one.

A checkpoint is a folder ``step-00001000``::

    model.safetensors   what was trained: everything but the frozen image encoder and LLM
    tokenizer/          of the Q-Former's text (stage 1, and stage 2 where it reads questions)
    recipe.yaml         the recipe, which names the frozen parts
    state.json          step, position in the data, versions; the metrics of the step until its evaluation is done
    optimizer.pt        what resuming needs besides, read with weights_only=True
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from blip2.backbones.frozen import Freezable
from blip2.backbones.pretrained import check_finite, check_twins, read_pickle
from blip2.builder import Built
from blip2.config import QFormerConfig, Recipe
from blip2.data.assets import resolve
from blip2.data.mixtures import is_position
from blip2.errors import InputError
from blip2.interop.checkpoint import Checkpoint, is_text_weight
from blip2.interop.detect import is_blip2, is_pickle, open_foreign
from blip2.interop.weights import open_file
from blip2.io import read_json, write_tensors
from blip2.model.generation import GenerationModel
from blip2.recipe import dump_recipe, load_recipe, override

FOLDER = "checkpoints"
BEST = "best"
ROOM = 1 << 26
"""So many numbers may a Q-Former have that its weights do not: what is not theirs is said better later on."""
STATE_FORMAT = 2
"""Of state.json and optimizer.pt; another number when they hold something else."""


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything that does not belong to a frozen part, and only the adapters of one that has some; a tensor with two
    names (tied weights) under its first."""
    frozen = tuple(f"{name}." for name, part in _freezable(model).items() if part.is_frozen)
    return {name: t for name, t in _own_state(model).items() if not name.startswith(frozen)}


def _own_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything but what has adapters."""
    adapted = {f"{name}.": part.adapters for name, part in _freezable(model).items() if part.adapters}
    return {
        name: tensor
        for name, tensor in _untied_state(model).items()
        if all(adapters in name for part, adapters in adapted.items() if name.startswith(part))
    }


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
        optimizer: tensors and numbers that resuming needs (optimizer, gradient scaler).
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
        write_tensors(building / "model.safetensors", {k: v.contiguous() for k, v in trained_state(model).items()})
        torch.save(optimizer, building / "optimizer.pt")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(building / "tokenizer"))
        (building / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        versions = {name: version(name) for name in ("blip2", "torch", "transformers")}
        about = {
            "format": STATE_FORMAT,
            "step": step,
            **state,
            "versions": {"python": platform.python_version(), **versions},
        }
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
        gone = not building.is_dir()
        full = is_full(error) or (not gone and shutil.disk_usage(run).free < 2**20)
        shutil.rmtree(building, ignore_errors=True)
        if full:
            raise no_room(run, f"saving the checkpoint of step {step} to {root}") from error
        if gone:
            raise InputError(
                f"{building} was deleted while the checkpoint of step {step} was written: leave the run's folder alone,"
                f" and go on with --resume from {last.name if (last := latest(run)) else 'the start'}"
            ) from error
        raise
    for old in sorted(root.glob("step-????????"))[:-keep]:
        shutil.rmtree(old)
    return folder


def keep_best(run: Path, step: int, about: dict[str, Any]) -> None:
    """Keep the checkpoint of a step as the run's best, without what only resuming needs, beyond all others.

    Args:
        about: what it is the best of, for ``best.json`` in it.
    """
    best = run / BEST
    building, old = best.with_suffix(".tmp"), best.with_suffix(".old.tmp")
    for stale in (building, old):  # of a process that was killed here
        shutil.rmtree(stale, ignore_errors=True)
    shutil.copytree(
        run / FOLDER / f"step-{step:08d}", building, copy_function=_link, ignore=shutil.ignore_patterns("optimizer.pt")
    )
    (building / "best.json").write_text(json.dumps({"step": step, **about}), encoding="utf-8")
    if best.exists():
        best.rename(old)
    building.rename(best)
    shutil.rmtree(old, ignore_errors=True)


def _link(source: str, target: str) -> None:
    """The same bytes under another name, or a copy where the file system cannot do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


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
    if is_checkpoint(path):
        return path
    last = latest(path)
    if last is None:
        if not path.is_dir():
            what = "is not a folder"
        elif (path / "config.json").is_file():
            settings = read_json(path / "config.json")
            kind = settings.get("model_type") if isinstance(settings, dict) else None
            what = f"is a model of type {kind} of transformers, not a BLIP-2"
        else:
            what = "holds no checkpoint"
        raise InputError(
            f"{path} {what}: give the folder of a run, or a folder {FOLDER}/step-... inside one; or a BLIP-2 of"
            " transformers, or a .pth file of LAVIS"
        )
    return last


def is_checkpoint(path: Path) -> bool:
    return (path / "model.safetensors").is_file() and (path / "recipe.yaml").is_file()


def open_checkpoint(name: str, changes: Mapping[str, object] | None = None) -> Checkpoint:
    """A checkpoint of any format: a run or checkpoint of this project, transformers' layout, a file of LAVIS.

    Args:
        changes: keys of its recipe that are to have another value (``{"vision.image_size": 364}``), and those that
            its format does not say (``{"language.name": "facebook/opt-2.7b"}``).

    Raises:
        InputError: there is none, it is damaged, or two formats lie in one folder.
    """
    path = Path(resolve(name))
    if is_checkpoint(path) or latest(path) is not None:
        if is_blip2(path):
            raise InputError(f"{path} holds two formats: a checkpoint of this project (recipe.yaml) and one of"
                             " transformers (config.json); give each a folder of its own")  # fmt: skip
    else:
        foreign = open_foreign(name, changes or {})
        if foreign is not None and "qformer.num_query_tokens" not in foreign.weights:
            raise InputError(f"{name} holds {foreign.about}: name it as vision.name")
        if foreign is not None:
            return foreign.with_recipe(_change(foreign, changes))
    return open_own(find(path), changes)


def open_own(folder: Path, changes: Mapping[str, object] | None = None) -> Checkpoint:
    """A checkpoint folder of this project.

    Raises:
        InputError: it is damaged.
    """
    recipe = load_recipe(folder / "recipe.yaml", is_own=False)
    try:
        weights = open_file(folder / "model.safetensors")
    except InputError as error:
        raise InputError(f"checkpoint {folder} cannot be read ({error}): use another, or train again") from error
    _check_sizes(recipe, folder / "model.safetensors")
    tokenizer = folder / "tokenizer"
    found = Checkpoint(
        name=str(folder),
        format="blip2",
        about=f"this project's stage {1 if recipe.stage == 'representation' else 2}, {folder.name}",
        recipe=recipe,
        weights=weights,
        tokenizer=tokenizer if tokenizer.is_dir() else None,
    )
    return replace(found, recipe=_change(found, changes))


def _check_sizes(recipe: Recipe, weights: Path) -> None:
    """Refuse a recipe whose Q-Former its weights cannot hold, before anything of that size is made."""
    qformer, width = recipe.qformer, recipe.qformer.hidden_size
    least = (
        qformer.num_hidden_layers * (4 * width**2 + 2 * width * qformer.intermediate_size)
        + qformer.num_query_tokens * width
    )
    if recipe.stage == "representation" or qformer.use_qformer_text_input:
        least += (qformer.vocab_size + qformer.max_position_embeddings) * width
    size = weights.stat().st_size
    if least > size + ROOM:  # even with a byte each
        raise InputError(
            f"the recipe in {weights.parent} has a Q-Former of more than {least:,} numbers, its {weights.name} is of"
            f" {size:,} bytes: use the recipe that it was made with"
        )


def _change(checkpoint: Checkpoint, changes: Mapping[str, object] | None) -> Recipe:
    """The recipe of a checkpoint with `changes`, which may not change what its weights are."""
    recipe = override(checkpoint.recipe, changes or {})
    check_qformer(checkpoint, recipe)
    return recipe


def check_qformer(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse a recipe whose Q-Former is another than the one that the weights of a checkpoint are for.

    Raises:
        InputError: a field of ``qformer`` differs which decides what the weights compute.
    """
    for field in fields(QFormerConfig):
        had, given = getattr(checkpoint.recipe.qformer, field.name), getattr(recipe.qformer, field.name)
        if had != given and field.name not in ("bert", "tokenizer", "dropout"):
            raise InputError(
                f"qformer.{field.name} of {checkpoint.name} is {had}, which its weights are for; it cannot be {given}:"
                " leave it out"
            )


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Load what was trained into a model of the same recipe.

    Raises:
        InputError: the file is damaged, or names or shapes differ; the message lists them.
    """
    weights = checkpoint.trained()
    # A part that was trained is in the checkpoint, though it may be frozen here.
    trained = tuple(
        f"{name}."
        for name, part in _freezable(model).items()
        if part.adapters or any(key.startswith(f"{name}.") for key in weights)
    )
    expected = {name for name in _own_state(model) if name.startswith(trained)} | set(trained_state(model))
    expected |= set(weights) & {name for name in model.state_dict() if name.startswith(trained)}  # both of two tied
    _load(weights, model, checkpoint, {name for name in expected if not name.startswith(checkpoint.absent)})


def resume_weights(checkpoint: Checkpoint, model: nn.Module) -> list[str]:
    """Load what was trained into a model that goes on training; other parts of it may train than before.

    Returns:
        A line for each frozen part that trains, or has adapters, for the first time and begins as it was pretrained.

    Raises:
        InputError: what was trained is frozen now, the file is damaged, or names or shapes differ.
    """
    weights, here = checkpoint.trained(), trained_state(model)
    _check_kept(checkpoint, weights, model)
    begins = tuple(f"{part}." for part in _freezable(model) if not weights.part(f"{part}."))
    _load(weights, model, checkpoint, {name for name in here if not name.startswith(begins)})
    new = sorted({name.split(".")[0] for name in here if name.startswith(begins)})
    return [f"{part} trains from here on, and begins as it was pretrained" for part in new]


def load_previous_stage(checkpoint: Checkpoint, model: nn.Module, wanted: Collection[str] | None = None) -> list[str]:
    """Start a model from a checkpoint of another stage: what both have is loaded.

    Args:
        wanted: names of the parameters of `model` to load; None: all that it trains.

    Returns:
        Those of the wanted names that the checkpoint does not have.

    Raises:
        InputError: a shape differs, the checkpoint lacks the Q-Former or has another number of heads, or it holds a
            trained image encoder or LLM that is frozen or another here.
    """
    weights = checkpoint.not_frozen()
    here = set(trained_state(model))
    _check_kept(checkpoint, weights, model)
    shared = here & set(weights)
    if not any(name.startswith("qformer.") for name in shared):
        raise InputError(
            f"checkpoint {checkpoint.name} holds no Q-Former that fits: its first names are {sorted(weights)[:3]}"
        )
    config: QFormerConfig = model.qformer.config  # pyright: ignore
    for key in ("heads", "cross_attention_frequency"):  # which no shape tells
        theirs, ours = getattr(checkpoint.recipe.qformer, key), getattr(config, key)
        if theirs != ours:
            raise InputError(
                f"checkpoint {checkpoint.name} has qformer.{key} {theirs}, the recipe {ours}: set it to {theirs}"
            )
    wanted = here if wanted is None else set(wanted)
    if not shared & wanted:
        raise InputError(
            f"checkpoint {checkpoint.name} holds nothing that those before it in start_from lack: leave it out, or put"
            " it first"
        )
    _load(weights.where((shared & wanted).__contains__), model, checkpoint, expected=shared & wanted)
    return sorted(wanted - shared)


def _check_kept(checkpoint: Checkpoint, weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse to train a model whose checkpoints would lack what was trained before.

    Raises:
        InputError: a part that was trained is frozen, or has no adapters, or others.
    """
    lost = sorted({name.split(".")[0] for name in set(weights) & set(model.state_dict()) - set(trained_state(model))})
    if lost:
        raise InputError(
            f"checkpoint {checkpoint.name} holds trained weights of {', '.join(lost)}, which optimizer.learning_rate"
            " freezes:"
            f' give "{lost[0]}.*" a rate (0 leaves them as they are), or they would be lost'
        )
    parts = tuple(f"{part}." for part in _freezable(model))
    homeless = sorted(name for name in set(weights) - set(model.state_dict()) if name.startswith(parts))
    if homeless:
        raise InputError(
            f"checkpoint {checkpoint.name} holds {homeless[0]}, for which there is no place: set"
            f" {homeless[0].split('.')[0]} (its name and its lora) to what the checkpoint's recipe.yaml says"
        )


def start_from(recipe: Recipe, built: Built, say: Callable[[str], None]) -> bool:
    """Load the trained weights of checkpoints of any format, of this stage or of the one before.

    Where two have a weight, the one that ``recipe.start_from`` names first wins.

    Args:
        say: is told what comes from which.

    Returns:
        Whether the projection to the LLM is still random, because no checkpoint has one.

    Raises:
        InputError: one of them cannot be read, does not fit or adds nothing, or none holds a part of the Q-Former that
            BERT does not give either.
    """
    known: dict[str, object] = {
        "vision.name": recipe.vision.name,
        "qformer.num_attention_heads": recipe.qformer.num_attention_heads,
    }
    if recipe.language is not None:
        known["language.name"] = recipe.language.name
    new = sorted(trained_state(built.model))
    for name in recipe.starts:
        # A pickle says nothing of its frozen parts.
        found = (open_foreign(name, known) if is_pickle(name) else None) or open_checkpoint(name)
        wanted, new = new, load_previous_stage(found, built.model, new)
        say(f"starting from {found.name} ({found.about}): {_parts(set(wanted) - set(new))}")
        _say_what_differs(found, recipe, built, say)
    homeless = [name for name in new if name.startswith("qformer.")]
    if homeless and not recipe.begins_with_bert:
        raise InputError(
            f"{' and '.join(recipe.starts)} {'hold' if len(recipe.starts) > 1 else 'holds'} no {_parts(homeless)}"
            f" (such as {homeless[0]}): add a checkpoint that does to start_from, for example a stage 1, or start from"
            " one and set qformer.bert"
        )
    if homeless:
        say(f"from {recipe.qformer.bert}, as the checkpoint has none: {_parts(homeless)}")
    if len(new) > len(homeless):
        say(f"new: {_parts(set(new) - set(homeless))}")
    if isinstance(built.model, GenerationModel) and "projection.weight" in new:
        built.model.initialize_projection()
    return "projection.weight" in new


def _parts(names: Collection[str]) -> str:
    """The parts of a model that weights are of, the Q-Former's text transformer apart from what it shares."""
    found = {f"{name.split('.')[0]}{' (text transformer)' if is_text_weight(name) else ''}" for name in names}
    return ", ".join(sorted(found))


def _say_what_differs(found: Checkpoint, recipe: Recipe, built: Built, say: Callable[[str], None]) -> None:
    if found.holds_vision and found.name not in (recipe.vision.name, str(Path(recipe.vision.name).absolute())):
        say(f"its own image encoder is left out for vision.name {recipe.vision.name}")
    for key, of in (("image_norm_eps", "qformer"), ("activation", "language"), ("text_normalization", "data")):
        theirs, ours = (getattr(getattr(each, of), key, None) for each in (found.recipe, recipe))
        if theirs != ours and getattr(found.recipe, of) is not None:
            say(f"its {of}.{key} is {theirs}, the recipe's {ours}: results begin a little apart")
    theirs, ours = found.recipe.vision.position_encoding, built.model.vision.position_encoding
    if theirs not in ("auto", ours):
        say(f"its vision.position_encoding is {theirs}, here it is {ours}: results begin apart")


def _load(weights: Mapping[str, Tensor], model: nn.Module, checkpoint: Checkpoint, expected: set[str]) -> None:
    here = {name: tensor for name, tensor in model.state_dict().items() if name in expected}
    missing, left = sorted(set(here) - set(weights)), sorted(set(weights) - set(here))
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in here.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    says = "recipe" if checkpoint.format == "blip2" else "configuration"
    for what, names in (("of other shapes", shapes), ("without", missing), ("with unknown", left)):
        if names:
            listed = "; ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise InputError(f"checkpoint {checkpoint.name} does not fit the {says} ({what}: {listed}): use the {says}"
                             " it was made with, which lies beside it")  # fmt: skip
    check_twins(weights, here, f"checkpoint {checkpoint.name}")
    with torch.no_grad():
        for name, tensor in weights.items():
            check_finite(name, tensor, checkpoint.name)
            here[name].copy_(tensor)


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state.json, optimizer.pt) of a checkpoint; the latter on the CPU.

    Raises:
        InputError: one of them is damaged, carries code, or is of a version that wrote something else.
    """
    name = "state.json"
    try:
        state = read_json(folder / name)
        found, by = state.get("format"), state["versions"]["blip2"]
        name = "optimizer.pt"
        optimizer = read_pickle(folder / name, mmap=False)
        if found == STATE_FORMAT:
            _check(isinstance(optimizer, dict) and isinstance(optimizer["optimizer"], dict))
            _check(all(isinstance(each, dict) for each in optimizer["optimizer"].values()))
            name = "state.json"
            _check(type(state["step"]) is int and state["step"] >= 0)
            _check(isinstance(state["positions"], list) and all(is_position(each) for each in state["positions"]))
            _check(isinstance(state["counts"], dict) and isinstance(state["unfinished"], dict | None))
    except Exception as error:  # unpickling damaged bytes raises nearly anything
        raise InputError(
            f"{folder / name} cannot be read ({type(error).__name__}): delete {folder} to go on from the checkpoint"
            " before it, or from the start"
        ) from error
    if found != STATE_FORMAT:
        raise InputError(
            f"{folder} was written by blip2 {by}, with a state of format {found}; this is blip2 {version('blip2')}"
            f" and format {STATE_FORMAT}: go on with that version, or begin anew with `start_from: {folder}`"
        )
    return state, optimizer


def _check(holds: bool) -> None:
    """Refuse a value of another kind than is written here."""
    if not holds:
        raise TypeError
