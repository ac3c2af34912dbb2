"""The steps that set up a training run: model, data, initialization, sharding."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from blip2 import checkpoint
from blip2.backbones.language import LanguageModel
from blip2.backbones.vision import ImageEncoder
from blip2.builder import Built, build, build_collator
from blip2.config import Recipe
from blip2.console import Display
from blip2.data.assets import resolve
from blip2.data.dataset import BatchDataset, LoadedBatch, to_device
from blip2.data.mixtures import MixtureDataset, build_mixture, resume_mixture, sample_mixture
from blip2.data.overlap import OpenedSource, check_overlap
from blip2.data.positions import MixturePosition
from blip2.data.records import Records, RecordStream
from blip2.data.sampler import sequential_batches
from blip2.data.sources import open_records
from blip2.data.workers import prefetch
from blip2.errors import InputError
from blip2.interop.checkpoint import Checkpoint
from blip2.model.generation import GenerationBatch, GenerationModel
from blip2.training.features import format_summary, load_or_compute_features
from blip2.training.optimizer import configure_trainable, summarize_parts
from blip2.training.projection import fit_projection
from blip2.training.sharding import enable_gradient_checkpointing, shard_frozen

NUM_PROJECTION_IMAGES = 768
"""Number of images to which the projection is fitted."""
INITIALIZATION_KEYS = ("start_from", "qformer.bert", "language.projection_init")
"""Keys that matter only at the start of a run."""


@dataclass
class TrainingModel:
    """A model with its weights loaded."""

    built: Built
    recipe: Recipe
    """The recipe with its ``auto`` settings resolved."""
    rates: dict[str, float]
    """Peak learning rate of each parameter that trains."""
    has_new_projection: bool
    """Whether no checkpoint provided the projection to the LLM."""


@dataclass
class TrainingData:
    """The data of a run."""

    batches: Iterator[LoadedBatch]
    """The batches of this process, without end."""
    datasets: Sequence[BatchDataset]
    """The data set of each source of ``data.train``."""
    validation: BatchDataset | None
    opened: list[OpenedSource] = field(default_factory=list)
    """All sources that were opened, to be checked for overlap."""


def is_sharded(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Return whether the frozen parts are sharded across the processes."""
    return recipe.training.shard_frozen and accelerator.num_processes > 1


def load_model(
    recipe: Recipe,
    accelerator: Accelerator,
    resume_from: Checkpoint | None,
    display: Display,
    encoder: nn.Module | None = None,
) -> TrainingModel:
    """Build the model, freeze what does not train, and load the weights of a checkpoint.

    Args:
        recipe: the recipe of the run.
        accelerator: the accelerator of the run.
        resume_from: the checkpoint to resume from. None: start as ``recipe.start_from`` says.
        display: the terminal, on which the parts of the model are listed.
        encoder: the module for ``vision.name`` module or features.

    Raises:
        InputError: a part or a checkpoint cannot be loaded, or does not fit the recipe.
    """
    if resume_from is not None:
        if recipe.vision.position_encoding == "auto":
            # Keep what was detected when the run started: on another machine, the test could have another result.
            recipe = _with_position_encoding(recipe, resume_from.config.vision.position_encoding)
        for line in compare_recipes(resume_from, recipe):
            display.log(line)
    weights_device = torch.device("cpu") if is_sharded(recipe, accelerator) else None
    built = build(
        recipe.model,
        accelerator.device,
        resume_from,
        weights_device,
        recipe.objectives,
        recipe.starts_from_bert,
        encoder,
    )
    recipe = _with_position_encoding(recipe, built.model.vision.position_encoding)
    rates = configure_trainable(built.model, recipe.optimizer)
    has_new_projection = resume_from is None
    if resume_from is not None:
        for line in checkpoint.resume_weights(resume_from, built.model):
            display.log(line)
    elif recipe.start_checkpoints:
        has_new_projection = checkpoint.load_start_from(recipe, built, display.log)
    if accelerator.is_main_process:
        columns = ["part", "parameters", "state", "dtype"]
        display.table(f"stage: {recipe.stage}", columns, summarize_parts(built.model, rates))
    return TrainingModel(built, recipe, rates, has_new_projection)


def compare_recipes(resume_from: Checkpoint, recipe: Recipe) -> list[str]:
    """Compare the recipe of a resumed run with that of its checkpoint.

    Returns:
        Messages about the keys that have changed, and about changed keys that have no effect on a resumed run.

    Raises:
        InputError: the recipe is of another stage, its Q-Former does not fit the weights, or the checkpoint contains no
            recipe.
    """
    if resume_from.config.stage != recipe.stage:
        raise InputError(
            f"{resume_from.name} is of stage {resume_from.config.stage}, but the recipe is of stage {recipe.stage}:"
            f" give another output, and set start_from to {resume_from.name} to start from its weights"
        )
    checkpoint.check_qformer_config(resume_from, recipe.qformer)
    stored = checkpoint.read_recipe(resume_from)
    if stored is None:
        raise InputError(
            f"checkpoint {resume_from.name} has no {checkpoint.RECIPE_FILE}, expected the recipe of its run: copy that"
            f" file there, or give another output, and set start_from to {resume_from.name} to start from its weights"
        )
    old, new = dict(_flatten(asdict(stored))), dict(_flatten(asdict(recipe)))
    changed = [key for key in old | new if old.get(key) != new.get(key) and key != "output"]
    lines = []
    used = [f"{key} from {old.get(key)} to {new.get(key)}" for key in changed if key not in INITIALIZATION_KEYS]
    if used:
        lines.append(f"the recipe has changed since the checkpoint, and its new values are used: {', '.join(used)}")
    unused = [key for key in changed if key in INITIALIZATION_KEYS]
    if unused:
        lines.append(f"changes of {', '.join(unused)} have no effect, because the run has already started")
    return lines


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each key of a recipe with its value. A key in a section is written ``section.key``."""
    for key, value in values.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" not in ("optimizer.learning_rate", "data.train"):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _with_position_encoding(recipe: Recipe, position_encoding: Any) -> Recipe:
    return replace(recipe, vision=replace(recipe.vision, position_encoding=position_encoding))


def configure_model(recipe: Recipe, built: Built, accelerator: Accelerator, display: Display) -> None:
    """Apply the recipe's stochastic depth, gradient checkpointing and compilation to the model.

    Raises:
        InputError: ``vision.drop_path_rate`` is set, but the image encoder is frozen or is not a ViT.
    """
    model = built.model
    if recipe.vision.drop_path_rate:
        if model.vision.is_frozen:
            raise InputError(
                f"vision.drop_path_rate is {recipe.vision.drop_path_rate}, but optimizer.learning_rate freezes the"
                ' image encoder: set vision.drop_path_rate to 0, or give "vision.*" a rate in optimizer.learning_rate'
            )
        model.vision.set_drop_path(recipe.vision.drop_path_rate)
    if recipe.training.gradient_checkpointing:
        for line in enable_gradient_checkpointing(model):
            display.log(line)
    sharded = is_sharded(recipe, accelerator)
    if recipe.training.torch_compile:
        model.qformer.compile_blocks()
        if model.vision.is_frozen and not sharded:
            model.vision.compile_network()
    if sharded and recipe.data.cached_views:
        model.vision.to(accelerator.device)  # it runs only before training, so it is not sharded


def open_data(
    recipe: Recipe, built: Built, accelerator: Accelerator, display: Display, positions: list[MixturePosition]
) -> TrainingData:
    """Open ``data.train`` and ``data.validation``, and compute the cached features that are missing.

    Args:
        recipe: the recipe of the run.
        built: the model, its tokenizers and its preprocessing.
        accelerator: the accelerator of the run.
        display: the terminal, on which the sources are described.
        positions: the position of each process in the data, from the checkpoint to resume from; empty for a new run.

    Raises:
        InputError: the data is unusable or does not fit the recipe.
    """
    data, rank, world_size = recipe.data, accelerator.process_index, accelerator.num_processes
    texts = build_collator(recipe.model, built)
    encoder = built.model.vision
    opened: list[OpenedSource] = []

    def open_source(source: str, train: bool) -> tuple[Records | RecordStream, BatchDataset]:
        with accelerator.main_process_first():
            records = open_records(resolve(source), data, rank, world_size, reads_features=recipe.vision.reads_features)
        opened.append(("data.train" if train else "data.validation", source, records))
        features = None
        if data.cached_views:
            num_views = data.cached_views if train else 1
            features = load_or_compute_features(recipe, records, encoder, num_views, accelerator.device)
            display.log(f"features of {source}: {format_summary(features)}")
        return records, BatchDataset(
            records, texts, encoder.input_format, train, data.min_crop_scale, data.horizontal_flip, features
        )

    records, datasets = zip(*(open_source(source, train=True) for source in data.sources), strict=True)
    if data.group_column is not None and all(isinstance(r, Records) and r.group_ids is None for r in records):
        raise InputError(
            f"data.group_column is {data.group_column}, which no source of data.train has: name a column of a table"
            " with captions, or leave out data.group_column"
        )
    sources = build_mixture(data.sources, records, data.temperature)
    if len(sources) > 1:
        rows = [(source.name, f"{100 * source.probability:.3g} %") for source in sources]
        display.table("data.train", ["source", "share of the steps"], rows)
    batching = (
        data.batch_size, recipe.training.seed, data.group_by_length, rank, world_size,
        recipe.training.gradient_accumulation_steps,
    )  # fmt: skip
    position = None
    if positions:
        position, lines = resume_mixture(positions, sources, *batching)
        for line in lines:
            display.log(line)
    specs = sample_mixture(sources, *batching, position)
    validation = None
    if data.validation is not None:
        held_out, validation = open_source(data.validation, train=False)
        if not isinstance(held_out, Records):
            raise InputError("data.validation is a stream, expected a table or a folder: set data.streaming to false")
    batches = prefetch(specs, MixtureDataset(datasets), data.num_workers)
    return TrainingData(batches, datasets, validation, opened)


def initialize_projection(recipe: Recipe, model: GenerationModel, data: TrainingData, display: Display) -> None:
    """Initialize the projection of stage 2 by least squares on the training data (``language.projection_init``).

    Raises:
        InputError: ``data.train`` has no table.
    """
    dataset = next((each for each in data.datasets if each.records is not None), None)
    if dataset is None or dataset.records is None:
        raise InputError(
            "language.projection_init is least_squares, which needs a table in data.train, but data.train has only"
            " streams: set language.projection_init to random, or data.streaming to false"
        )
    records, dataset = dataset.records, copy.copy(dataset)
    dataset.train = False  # no augmentation
    batch_size = recipe.data.batch_size
    specs = islice(sequential_batches(records, batch_size), math.ceil(NUM_PROJECTION_IMAGES / batch_size))
    batches = (loaded.batch for loaded in prefetch(specs, dataset, 0) if isinstance(loaded.batch, GenerationBatch))
    device = model.image_norm.weight.device
    explained = fit_projection(model, (to_device(batch, device) for batch in batches))
    display.log(
        f"the projection is initialized by least squares, which explains {100 * explained:.1f} % of the variance of the"
        " captions' token embeddings"
    )


def check_held_out(recipe: Recipe, opened: list[OpenedSource], display: Display) -> None:
    """Check that the held-out data has no images of the training data, unless ``data.allow_overlap`` is true.

    Raises:
        InputError: training and held-out data share images.
    """
    if recipe.data.allow_overlap:
        return
    train = [source for source in opened if source[0] == "data.train"]
    for line in check_overlap(train, [source for source in opened if source not in train]):
        display.log(line)


def shard_model(recipe: Recipe, built: Built, device: torch.device, display: Display) -> None:
    """Shard the frozen image encoder and LLM, and move the rest of the model to the device."""
    methods = {} if recipe.data.cached_views else {"vision": ImageEncoder.encode.__name__}
    if recipe.language is not None:
        methods["language"] = LanguageModel.hidden_states.__name__
    sharded = shard_frozen(built.model, methods, device)
    display.log(f"{sharded:,} frozen weights are sharded across the processes of each machine")
