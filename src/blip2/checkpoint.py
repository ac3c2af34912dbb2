"""Checkpoints: written to a temporary directory, then atomically renamed.

A checkpoint is a folder ``step-00001000``::

    model.safetensors   the trained weights: everything but the frozen image encoder and LLM
    tokenizer/          tokenizer of the Q-Former's text (stage 1, and stage 2 if the Q-Former reads questions)
    model.yaml          the config of the model, which names the frozen parts
    recipe.yaml         the recipe of the training run
    state.json          step, position in the data, versions, metrics of a step whose evaluation is pending
    optimizer.pt        optimizer and gradient scaler, to be read with weights_only=True

The first three suffice to use the model, or to start another training run from the checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from blip2.backbones.frozen import Freezable
from blip2.backbones.lora import ADAPTER_KEY
from blip2.backbones.pretrained import check_finite, check_floating_point, check_tied_weights, load_pickle
from blip2.builder import Built
from blip2.config import CalibrationConfig, ModelConfig, QFormerConfig, Recipe
from blip2.data.assets import resolve
from blip2.data.positions import is_position
from blip2.errors import InputError
from blip2.interop.checkpoint import Checkpoint, is_text_weight
from blip2.interop.detect import fetch_revision, is_blip2, is_pickle, open_foreign
from blip2.interop.weights import open_file
from blip2.io import atomic_write, read_json, write_tensors
from blip2.model.generation import GenerationModel
from blip2.recipe import dump_config, load_stored, override

CHECKPOINTS_FOLDER = "checkpoints"
BEST_FOLDER = "best"
WEIGHTS_FILE, CONFIG_FILE, RECIPE_FILE = "model.safetensors", "model.yaml", "recipe.yaml"
MAX_EXCESS_PARAMETERS = 1 << 26
"""A config is refused before the model is built if the number of parameters of its Q-Former exceeds the number of bytes
of the weights file by more than this number. For a smaller excess, :func:`load_weights` lists the differences."""
STATE_FORMAT = 3
"""Version of the format of state.json and optimizer.pt."""


def trained_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained weights of a model by name: all weights except those of frozen parts.

    From a part with adapters, only the adapters are returned. A tensor with two names (tied weights) is returned under
    its first name.
    """
    frozen = tuple(f"{name}." for name, part in _freezable(model).items() if part.is_frozen)
    return {name: t for name, t in _state_without_adapted(model).items() if not name.startswith(frozen)}


def _state_without_adapted(model: nn.Module) -> dict[str, Tensor]:
    """Return all weights, but from a part with adapters only the adapters."""
    adapted = {f"{name}.": part.adapter_key for name, part in _freezable(model).items() if part.adapter_key}
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


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    optimizer: dict[str, Any],
    state: dict[str, Any],
    save_total_limit: int,
) -> Path:
    """Write the checkpoint of a step, and delete all but the last `save_total_limit` checkpoints.

    Args:
        run: folder of the run.
        step: number of completed steps.
        model: the model.
        recipe: the recipe of the run.
        tokenizer: tokenizer of the Q-Former's text. None if the Q-Former reads no text.
        optimizer: state of the optimizer and the gradient scaler.
        state: other state that resuming needs, as JSON values.
        save_total_limit: number of checkpoints to keep.

    Returns:
        The folder of the checkpoint.

    Raises:
        InputError: the disk is full, or another program deleted the unfinished checkpoint. Earlier checkpoints are
            kept.
    """
    root = run / CHECKPOINTS_FOLDER
    folder = root / f"step-{step:08d}"
    tmp_dir = root / f"{folder.name}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for stale in root.glob("*.tmp"):  # left by a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        tmp_dir.mkdir()
        write_tensors(tmp_dir / WEIGHTS_FILE, {k: v.contiguous() for k, v in trained_state_dict(model).items()})
        torch.save(optimizer, tmp_dir / "optimizer.pt")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(tmp_dir / "tokenizer"))
        write_configs(tmp_dir, recipe.model, recipe)
        versions = {name: version(name) for name in ("blip2", "torch", "transformers")}
        content = {
            "format": STATE_FORMAT,
            "step": step,
            **state,
            "versions": {"python": platform.python_version(), **versions},
        }
        (tmp_dir / "state.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        for path in tmp_dir.rglob("*"):
            if path.is_file():
                _fsync(path)
        if folder.exists():
            folder.rename(root / f"{folder.name}.old.tmp")
        tmp_dir.rename(folder)
        _fsync(root)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch reports a full disk as a short write, so check the disk before deleting what was written.
        was_deleted = not tmp_dir.is_dir()
        disk_full = is_disk_full(error) or (not was_deleted and shutil.disk_usage(run).free < 2**20)
        shutil.rmtree(tmp_dir, ignore_errors=True)
        if disk_full:
            raise disk_full_error(run, f"saving the checkpoint of step {step} to {root}") from error
        if was_deleted:
            raise InputError(
                f"{tmp_dir} was deleted while the checkpoint of step {step} was being written: rerun with --resume,"
                f" which continues from {last.name if (last := latest_checkpoint(run)) else 'the start'}, and do not"
                " delete files of the run before it ends"
            ) from error
        raise
    for old in list_checkpoints(run)[:-save_total_limit]:
        shutil.rmtree(old)
    return folder


def write_configs(folder: Path, config: ModelConfig, recipe: Recipe | None) -> None:
    """Write ``model.yaml`` and, if there is a recipe, ``recipe.yaml`` to the folder of a checkpoint.

    ``trust_remote_code`` is left out of ``model.yaml``: who loads a model decides whether its code may run.
    """
    vision = replace(config.vision, trust_remote_code=None)
    language = None if config.language is None else replace(config.language, trust_remote_code=None)
    config = replace(config, vision=vision, language=language)
    (folder / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
    if recipe is not None:
        (folder / RECIPE_FILE).write_text(dump_config(recipe), encoding="utf-8")


def write_calibration(folder: Path, temperatures: Mapping[str, float]) -> None:
    """Replace temperatures in ``model.yaml`` of a checkpoint folder of blip2, atomically.

    Args:
        folder: the checkpoint.
        temperatures: new values of fields of :class:`~blip2.config.CalibrationConfig`. The other fields are kept.

    Raises:
        InputError: the file is damaged.
        OSError: the file cannot be written.
    """
    config = load_stored(ModelConfig, folder / CONFIG_FILE)
    config = replace(config, calibration=replace(config.calibration or CalibrationConfig(), **temperatures))
    with atomic_write(folder / CONFIG_FILE) as file:
        file.write(dump_config(config).encode())


def save_best(run: Path, step: int, metadata: dict[str, Any]) -> None:
    """Copy the checkpoint of a step to the folder ``best`` of the run, without the optimizer state.

    Args:
        run: folder of the run.
        step: step of the checkpoint, which must exist.
        metadata: name and value of the metric, which are stored in ``best.json``.
    """
    best = run / BEST_FOLDER
    tmp_dir, old = best.with_suffix(".tmp"), best.with_suffix(".old.tmp")
    for stale in (tmp_dir, old):  # left by a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    checkpoint = run / CHECKPOINTS_FOLDER / f"step-{step:08d}"
    shutil.copytree(checkpoint, tmp_dir, copy_function=_link, ignore=shutil.ignore_patterns("optimizer.pt"))
    (tmp_dir / "best.json").write_text(json.dumps({"step": step, **metadata}), encoding="utf-8")
    if best.exists():
        best.rename(old)
    tmp_dir.rename(best)
    shutil.rmtree(old, ignore_errors=True)


def _link(source: str, target: str) -> None:
    """Make a hard link, or a copy if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def is_disk_full(error: Exception) -> bool:
    """Return whether an error means that the disk is full or a quota is exceeded."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in codes or any(f"os error {code}" in str(error) for code in codes)


def disk_full_error(run: Path, doing: str) -> InputError:
    """Return the error to raise when the disk is full.

    Args:
        run: folder of the run.
        doing: the action that failed, such as "saving the checkpoint", for the message.
    """
    last = latest_checkpoint(run)
    return InputError(
        f"no space left on the disk while {doing}: free disk space, then rerun with --resume, which continues from"
        f" {last.name if last else 'the start'}"
    )


def _fsync(path: Path) -> None:
    """Flush a file or folder to the disk. Renaming is safe only afterwards."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def latest_checkpoint(run: Path) -> Path | None:
    """Return the folder of the last checkpoint of a run; None if the run has no checkpoint."""
    return next(reversed(list_checkpoints(run)), None)


def list_checkpoints(run: Path) -> list[Path]:
    """Return the folders of the checkpoints of a run, in the order of their steps.

    Other folders, such as a copy named ``step-original``, are not checkpoints of the run.
    """
    paths = (run / CHECKPOINTS_FOLDER).glob("step-*")
    found = [path for path in paths if re.fullmatch(r"step-[0-9]{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find_checkpoint(path: Path) -> Path:
    """Return a checkpoint folder: `path` itself, or the last checkpoint of the run in the folder `path`.

    Raises:
        InputError: `path` is neither a checkpoint nor a run that has one.
    """
    if is_checkpoint(path):
        return path
    last = latest_checkpoint(path)
    if last is None:
        if not path.is_dir():
            what = "is not a folder"
        elif (path / "config.json").is_file():
            settings = read_json(path / "config.json")
            model_type = settings.get("model_type") if isinstance(settings, dict) else None
            what = f"is a transformers model of type {model_type}, not a BLIP-2"
        else:
            what = "contains no checkpoint"
        raise InputError(
            f"{path} {what}: give the folder of a run, a folder {CHECKPOINTS_FOLDER}/step-... inside a run, a BLIP-2 of"
            " transformers, or a .pth file of LAVIS"
        )
    return last


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is a checkpoint of blip2, or would be one if ``model.yaml`` were not missing."""
    return (path / WEIGHTS_FILE).is_file() and ((path / CONFIG_FILE).exists() or not (path / "config.json").exists())


def open_checkpoint(name: str, changes: Mapping[str, object] | None = None, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint of any format.

    Args:
        name: folder of a run or checkpoint of blip2, folder or hub name of a BLIP-2 of transformers, or a ``.pth`` file
            of LAVIS.
        changes: new values of keys of the model's config (``{"vision.image_size": 364}``), or values that the file does
            not contain (``{"language.name": "facebook/opt-2.7b"}``). ``{"qformer.lora": None}`` merges the Q-Former's
            adapters into its weights.
        revision: branch, tag or commit on the hub. The checkpoint then has the name of its folder in the hub's
            cache. None: the newest commit of the main branch.

    Raises:
        InputError: there is no checkpoint, it is damaged, the folder contains checkpoints of two formats, or `changes`
            contains an unknown key or a value that does not fit the weights.
    """
    if revision is not None:
        name = str(fetch_revision(name, revision))
    path = Path(resolve(name))
    if is_checkpoint(path) or latest_checkpoint(path) is not None:
        if is_blip2(path):
            raise InputError(f"{path} contains checkpoints of two formats, blip2 and transformers (config.json): move"
                             " each of the two to its own folder")  # fmt: skip
    else:
        foreign = open_foreign(name, changes or {})
        if foreign is not None and "qformer.queries" not in foreign.weights:
            raise InputError(
                f"{name} contains {foreign.description}, expected a BLIP-2: give a BLIP-2 checkpoint, and {name} as"
                " vision.name"
            )
        if foreign is not None:
            return foreign.with_config(_change(foreign, changes))
    return open_native(find_checkpoint(path), changes)


def open_native(folder: Path, changes: Mapping[str, object] | None = None) -> Checkpoint:
    """Open a checkpoint folder of blip2.

    Args:
        folder: the checkpoint.
        changes: new values of keys of the model's config; see :func:`open_checkpoint`.

    Raises:
        InputError: the checkpoint is damaged or has no ``model.yaml``, or `changes` cannot be applied.
    """
    if not os.path.lexists(folder / CONFIG_FILE):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise InputError(
            f"checkpoint {folder} has no {CONFIG_FILE} (it contains {found}): copy the whole checkpoint. If an older"
            f" blip2 wrote it, create {CONFIG_FILE} with the keys stage, vision, qformer and language of {RECIPE_FILE}"
            " and, also at the top level, max_length and text_normalization of its section data"
        )
    config = load_stored(ModelConfig, folder / CONFIG_FILE)
    try:
        weights = open_file(folder / WEIGHTS_FILE)
    except InputError as error:
        raise InputError(
            f"checkpoint {folder} cannot be read ({error}): copy it again, or use another checkpoint"
        ) from error
    _check_sizes(config, folder / WEIGHTS_FILE)
    tokenizer = folder / "tokenizer"
    checkpoint = Checkpoint(
        name=str(folder),
        format="blip2",
        description=f"blip2's stage {1 if config.stage == 'representation' else 2}, {folder.name}",
        config=config,
        weights=weights,
        tokenizer=tokenizer if tokenizer.is_dir() else None,
    )
    if override(config, changes or {}).qformer.lora is None:
        checkpoint = checkpoint.merge_adapters()
    return replace(checkpoint, config=_change(checkpoint, changes))


def read_recipe(checkpoint: Checkpoint) -> Recipe | None:
    """Return the recipe with which a checkpoint was trained; None if the checkpoint contains no recipe.

    Raises:
        InputError: the recipe is damaged.
    """
    path = Path(checkpoint.name) / RECIPE_FILE
    return load_stored(Recipe, path) if checkpoint.format == "blip2" and path.is_file() else None


def _check_sizes(config: ModelConfig, weights: Path) -> None:
    """Refuse a config whose Q-Former is too large for its weights file, before the Q-Former is built."""
    qformer, width = config.qformer, config.qformer.hidden_size
    min_parameters = (
        qformer.num_hidden_layers * (4 * width**2 + 2 * width * qformer.intermediate_size)
        + qformer.num_query_tokens * width
    )
    if config.stage == "representation" or qformer.use_qformer_text_input:
        min_parameters += (qformer.vocab_size + qformer.max_position_embeddings) * width
    size = weights.stat().st_size
    if min_parameters > size + MAX_EXCESS_PARAMETERS:  # a parameter has at least one byte
        raise InputError(
            f"{weights.parent / CONFIG_FILE} describes a Q-Former of more than {min_parameters:,} parameters, but"
            f" {weights.name} has only {size:,} bytes: use the {CONFIG_FILE} that was written together with"
            f" {weights.name}"
        )


def _change(checkpoint: Checkpoint, changes: Mapping[str, object] | None) -> ModelConfig:
    """Return the config of a checkpoint with `changes`, which must not change the architecture of the Q-Former."""
    config = override(checkpoint.config, changes or {})
    check_qformer_config(checkpoint, config.qformer)
    return config


def check_qformer_config(checkpoint: Checkpoint, qformer: QFormerConfig) -> None:
    """Check that the config of a Q-Former fits the weights of a checkpoint.

    Raises:
        InputError: a field differs from the checkpoint's config. ``bert``, ``tokenizer`` and ``dropout`` may differ.
    """
    given = asdict(qformer)
    for name, old in asdict(checkpoint.config.qformer).items():
        new = given[name]
        if old != new and name not in ("bert", "tokenizer", "dropout"):
            raise InputError(
                f"qformer.{name} is {new}, but {checkpoint.name} was trained with {old}: leave out"
                f" qformer.{name}, or set it to {old}"
            )


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Load the trained weights of a checkpoint into a model that was built with the checkpoint's config.

    Raises:
        InputError: the file of weights is damaged, or names or shapes of weights differ; the message lists them.
    """
    weights = checkpoint.trained_weights()
    # A part that was trained is in the checkpoint, even if it is frozen in this model.
    trained = tuple(
        f"{name}."
        for name, part in _freezable(model).items()
        if part.adapter_key or any(key.startswith(f"{name}.") for key in weights)
    )
    expected = {name for name in _state_without_adapted(model) if name.startswith(trained)} | set(
        trained_state_dict(model)
    )
    expected |= set(weights) & {
        name for name in model.state_dict() if name.startswith(trained)
    }  # both names of tied weights
    _load(weights, model, checkpoint, {name for name in expected if not name.startswith(checkpoint.missing_prefixes)})


def resume_weights(checkpoint: Checkpoint, model: nn.Module) -> list[str]:
    """Load the trained weights of a checkpoint into a model that resumes training.

    A part of the model that was frozen before may train now.

    Returns:
        A message for each part that trains, or has adapters, for the first time and starts from its pretrained weights.

    Raises:
        InputError: a part that was trained is frozen now, the file of weights is damaged, or names or shapes differ.
    """
    weights, trained = checkpoint.trained_weights(), trained_state_dict(model)
    _check_kept(checkpoint, weights, model)
    new_parts = tuple(f"{part}." for part in _freezable(model) if not weights.select(f"{part}."))
    _load(weights, model, checkpoint, {name for name in trained if not name.startswith(new_parts)})
    new = sorted({name.split(".")[0] for name in trained if name.startswith(new_parts)})
    return [f"{part} trains from this step on, and starts from its pretrained weights" for part in new]


def load_previous_stage(checkpoint: Checkpoint, model: nn.Module, names: Collection[str] | None = None) -> list[str]:
    """Initialize a model from a checkpoint of the same or the previous stage: load the weights that both have.

    Args:
        checkpoint: the checkpoint.
        model: the model.
        names: names of the parameters of `model` to load. None: all parameters that train.

    Returns:
        Those of `names` that the checkpoint does not contain.

    Raises:
        InputError: the checkpoint contains no Q-Former or none of `names`, a shape or the Q-Former's number of heads
            differs, or the checkpoint contains a trained image encoder or LLM that is frozen or different in `model`.
    """
    weights = checkpoint.all_trained_weights()
    trained = set(trained_state_dict(model))
    _check_kept(checkpoint, weights, model)
    shared = trained & set(weights)
    if not any(name.startswith("qformer.") for name in shared):
        raise InputError(
            f"checkpoint {checkpoint.name} contains no weights of a Q-Former, but {sorted(weights)[:3]}: give the"
            " checkpoint of a BLIP-2 as start_from"
        )
    config: QFormerConfig = model.qformer.config  # pyright: ignore
    for key in ("num_attention_heads", "cross_attention_frequency"):  # no shape of a weight depends on them
        saved, given = getattr(checkpoint.config.qformer, key), getattr(config, key)
        if saved != given:
            raise InputError(
                f"checkpoint {checkpoint.name} was trained with qformer.{key} {saved}, but the recipe has {given}: set"
                f" qformer.{key} to {saved}"
            )
    names = trained if names is None else set(names)
    if not shared & names:
        raise InputError(
            f"checkpoint {checkpoint.name} is not needed, because the checkpoints before it in start_from contain all"
            " of its weights: remove it from start_from, or put it first"
        )
    _load(weights.filter((shared & names).__contains__), model, checkpoint, expected=shared & names)
    return sorted(names - shared)


def _check_kept(checkpoint: Checkpoint, weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse to train a model whose checkpoints would not contain weights that were trained before.

    Raises:
        InputError: a part that was trained before is frozen now, or its adapters are missing or different.
    """
    not_saved = set(model.state_dict()) - set(trained_state_dict(model))
    lost = sorted({name.split(".")[0] for name in set(weights) & not_saved})
    if lost:
        raise InputError(
            f"checkpoint {checkpoint.name} contains trained weights of {', '.join(lost)}, which new checkpoints would"
            f' not contain, because optimizer.learning_rate freezes {lost[0]}: give "{lost[0]}.*" a rate in'
            " optimizer.learning_rate (a rate of 0 does not change the weights)"
        )
    parts = tuple(f"{part}." for part in _freezable(model))
    unplaced = sorted(name for name in set(weights) - set(model.state_dict()) if name.startswith(parts))
    if unplaced:
        raise InputError(
            f"checkpoint {checkpoint.name} contains the weight {unplaced[0]}, which the model does not have: copy the"
            f" section {unplaced[0].split('.')[0]} of the checkpoint's {CONFIG_FILE} into the recipe"
        )


def load_start_from(recipe: Recipe, built: Built, log: Callable[[str], None]) -> bool:
    """Load the trained weights of the checkpoints in ``recipe.start_from``, of the same or the previous stage.

    If several checkpoints contain a weight, the first of them in ``recipe.start_from`` provides it.

    Args:
        recipe: the recipe of the run.
        built: the model, into which the weights are loaded.
        log: is called with messages about the origin of the weights.

    Returns:
        Whether the projection to the LLM is still random, because no checkpoint contains a projection.

    Raises:
        InputError: a checkpoint cannot be read, does not fit or is not needed, or neither a checkpoint nor BERT
            initializes a part of the Q-Former.
    """
    known: dict[str, object] = {
        "vision.name": recipe.vision.name,
        "qformer.num_attention_heads": recipe.qformer.num_attention_heads,
    }
    if recipe.language is not None:
        known["language.name"] = recipe.language.name
    new = sorted(trained_state_dict(built.model))
    # A LAVIS file does not name its frozen parts.
    checkpoints = [
        (open_foreign(name, known) if is_pickle(name) else None) or open_checkpoint(name)
        for name in recipe.start_checkpoints
    ]
    # Adapters belong to the weights that they adapt: a model goes on with them only if it takes both from one file.
    if any(each.config.qformer.lora != recipe.qformer.lora for each in checkpoints):
        merged = [each.name for each in checkpoints if each.config.qformer.lora is not None]
        checkpoints = [each.merge_adapters() for each in checkpoints]
        if merged:
            log(f"the Q-Former's adapters in {', '.join(merged)} are merged into its weights")
    for checkpoint in checkpoints:
        names, new = new, load_previous_stage(checkpoint, built.model, new)
        log(f"starting from {checkpoint.name} ({checkpoint.description}): {_parts(set(names) - set(new))}")
        _log_differences(checkpoint, recipe, built, log)
    missing = [name for name in new if name.startswith("qformer.") and ADAPTER_KEY not in name]
    if missing and not recipe.starts_from_bert:
        raise InputError(
            f"no checkpoint in start_from ({', '.join(recipe.start_checkpoints)}) contains all weights of"
            f" {_parts(missing)} ({missing[0]} is missing): add a checkpoint that contains them, for example that of"
            " stage 1; or start from one checkpoint and set qformer.bert"
        )
    if missing:
        log(f"from {recipe.qformer.bert}, because no checkpoint contains them: weights of {_parts(missing)}")
    if len(new) > len(missing):
        log(f"new weights, which no checkpoint contains: {_parts(set(new) - set(missing))}")
    if isinstance(built.model, GenerationModel) and "projection.weight" in new:
        built.model.initialize_projection()
    return "projection.weight" in new


def _parts(names: Collection[str]) -> str:
    """Return the parts to which weights belong, as a text; the Q-Former's text transformer is named separately."""
    parts = {f"{name.split('.')[0]}{' (text transformer)' if is_text_weight(name) else ''}" for name in names}
    return ", ".join(sorted(parts))


def _log_differences(checkpoint: Checkpoint, recipe: Recipe, built: Built, log: Callable[[str], None]) -> None:
    """Log each setting that differs from the checkpoint's setting and therefore changes the model's first outputs."""
    if checkpoint.has_vision and checkpoint.name not in (recipe.vision.name, str(Path(recipe.vision.name).absolute())):
        log(f"the image encoder in {checkpoint.name} is not used, but the one of vision.name, {recipe.vision.name}")
    both = [
        {"qformer": each.qformer, "language": each.language, "data": each} for each in (checkpoint.config, recipe.model)
    ]
    for section, key in (("qformer", "image_norm_eps"), ("language", "activation"), ("data", "text_normalization")):
        saved, given = (getattr(each[section], key, None) for each in both)
        if saved != given and both[0][section] is not None:
            log(
                f"{section}.{key} is {saved} in the checkpoint, {given} in the recipe: results differ slightly at first"
            )
    saved, given = checkpoint.config.vision.position_encoding, built.model.vision.position_encoding
    if saved not in ("auto", given):
        log(f"vision.position_encoding is {saved} in the checkpoint, {given} in the recipe: results differ at first")


def _load(weights: Mapping[str, Tensor], model: nn.Module, checkpoint: Checkpoint, expected: set[str]) -> None:
    parameters = {name: tensor for name, tensor in model.state_dict().items() if name in expected}
    missing, unknown = sorted(set(parameters) - set(weights)), sorted(set(weights) - set(parameters))
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in parameters.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    config = "model config" if checkpoint.format == "blip2" else "configuration"
    for what, names in (("other shapes", shapes), ("missing", missing), ("unknown", unknown)):
        if names:
            listed = "; ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise InputError(f"checkpoint {checkpoint.name} does not fit the {config} ({what}: {listed}): use the"
                             f" {config} with which it was trained")  # fmt: skip
    check_tied_weights(weights, parameters, f"checkpoint {checkpoint.name}")
    with torch.no_grad():
        for name, tensor in weights.items():
            check_floating_point(name, tensor, parameters[name], checkpoint.name)
            check_finite(name, tensor, checkpoint.name)
            parameters[name].copy_(tensor)


def read_training_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read state.json and optimizer.pt of a checkpoint.

    Args:
        folder: the checkpoint.

    Returns:
        The content of state.json and the content of optimizer.pt. Tensors are on the CPU.

    Raises:
        InputError: a file is damaged or contains code, or another version of blip2 wrote another format.
    """
    name = "state.json"
    try:
        state = read_json(folder / name)
        state_format, writer = state.get("format"), state["versions"]["blip2"]
        name = "optimizer.pt"
        optimizer = load_pickle(folder / name, mmap=False)
        if state_format == STATE_FORMAT:
            _check(isinstance(optimizer, dict) and isinstance(optimizer.get("scaler"), dict | None))
            _check(_is_mapping(optimizer["optimizer"], dict))
            name = "state.json"
            _check(type(state["step"]) is int and state["step"] >= 0)
            _check(isinstance(state["positions"], list) and all(is_position(each) for each in state["positions"]))
            _check(len(state["positions"]) > 0)  # without a position, the data would begin again
            unfinished, counts = state["unfinished"], state["counts"]
            _check(unfinished is None or _is_mapping(unfinished, int | float))
            _check(isinstance(counts, dict) and _is_mapping(counts.get("samples_seen", {}), int))
            _check(isinstance(counts.get("source"), str | None))
            _check(type(state.get("best_since", 0)) is int)
            _check(_is_mapping({key: counts[key] for key in counts if key not in ("source", "samples_seen")}, int))
    except Exception as error:  # unpickling damaged bytes raises nearly anything
        raise InputError(
            f"{folder / name} cannot be read ({type(error).__name__}): delete {folder} to resume from the previous"
            " checkpoint, or from the start if there is none"
        ) from error
    if state_format != STATE_FORMAT:
        raise InputError(
            f"{folder} was written by blip2 {writer} and has a training state of format {state_format}; this is blip2"
            f" {version('blip2')}, which reads format {STATE_FORMAT}: resume with blip2 {writer}, or start a new run"
            f" with `start_from: {folder}`"
        )
    return state, optimizer


def _is_mapping(value: object, kind: Any) -> bool:
    """Return whether a value is a dict whose keys are texts and whose values have a type."""
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, kind) for k, v in value.items())


def _check(condition: bool) -> None:
    """Raise TypeError if a condition is false. It is true for all files that :func:`save_checkpoint` writes."""
    if not condition:
        raise TypeError
