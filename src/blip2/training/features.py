"""Cached features as a recipe asks for them: ``data.cached_views``, ``data.cached_dtype``, ``data.features``."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from blip2.backbones.vision import ImageEncoder
from blip2.builder import choose_device, choose_dtype, read_image_encoder
from blip2.checkpoint import is_full
from blip2.config import Recipe
from blip2.console import Display
from blip2.data.assets import resolve
from blip2.data.records import Records, RecordStream, open_records
from blip2.distributed import process_index
from blip2.errors import InputError
from blip2.feature_cache.cache import Augmentation, CachedFeatures, cache_features
from blip2.io import output_path
from blip2.training.optimizer import pattern_of

NAMED = 20
"""So many images that cannot be used are named; the others are counted."""


def cached_features(
    recipe: Recipe, records: Records | RecordStream, encoder: ImageEncoder, views: int, device: torch.device
) -> CachedFeatures:
    """The features of a data set, made where they are missing and shown while they are.

    Where there are several processes, all of them call this.

    Args:
        views: how many of each image; 1 is the whole image alone.

    Raises:
        InputError: the data is a stream, the encoder trains, or the disk is full.
    """
    if not isinstance(records, Records):
        raise InputError("data.cached_views needs a table or a folder, not a stream: set it to 0")
    if not encoder.is_frozen:
        raise InputError(
            "data.cached_views needs a frozen image encoder, but optimizer.learning_rate trains it: set it to 0"
        )
    data = recipe.data
    root = output_path(recipe.output).parent / "features" if data.features is None else output_path(data.features)
    display = Display(f"features in {count(views, 'view')}", enabled=process_index() == 0)

    def report(done: int, total: int) -> None:
        if done:
            display.advance(done)
        else:
            display.start(total)

    try:
        return cache_features(
            root, records, encoder, Augmentation(views, data.min_crop_scale, data.horizontal_flip), data.cached_dtype,
            device,
            data.num_workers, report,
        )  # fmt: skip
    except OSError as error:
        if not is_full(error):
            raise InputError(
                f"features cannot be written to {root} ({error.strerror or error}): make it writable, or set"
                " data.features to a folder that is"
            ) from error
        raise InputError(
            f"no space left on the disk while writing features to {root}: make room and start again; what was made"
            " stays"
        ) from error
    finally:
        display.close()


def make_features(recipe: Recipe) -> list[str]:
    """Make the features that :func:`blip2.training.trainer.train` reads with a recipe, without training.

    Under ``torchrun`` or ``accelerate launch`` each process encodes its share.

    Returns:
        Lines that say what there is now; none but in the first process.

    Raises:
        InputError: as :func:`cached_features`, or the data or the encoder cannot be read.
    """
    accelerator = Accelerator(cpu=choose_device(recipe.training.device).type == "cpu")
    lines: list[str] = []
    try:
        encoder = open_encoder(recipe, accelerator.device)
        for key, source, views in feature_sources(recipe):
            with accelerator.main_process_first():
                records = open_records(resolve(source), recipe.data)
            features = cached_features(recipe, records, encoder, views, accelerator.device)
            assert isinstance(records, Records)
            if accelerator.is_main_process:
                lines.append(f"{key}: {summary(features)}")
                broken = [f"  {records[i].key}: {why}" for i, why in sorted(features.broken.items())[:NAMED]]
                more = len(features.broken) - len(broken)
                lines += broken + ([f"  and {more} more"] if more else [])
    finally:
        accelerator.end_training()
        # Otherwise the next run of this process could not have another device.
        AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]
    return lines


def open_encoder(recipe: Recipe, device: torch.device) -> ImageEncoder:
    """The image encoder of a recipe, with what trains of it marked."""
    encoder = read_image_encoder(recipe.vision, choose_dtype(recipe.vision.dtype, device)).to(device)
    for name, parameter in encoder.named_parameters():
        rate = recipe.optimizer.learning_rate[pattern_of(f"vision.{name}", recipe.optimizer)]
        parameter.requires_grad_(rate != "frozen")
    return encoder


def feature_sources(recipe: Recipe) -> list[tuple[str, str, int]]:
    """(key of the recipe, source, views) of all data that a recipe trains on or measures with."""
    views = max(1, recipe.data.cached_views)
    sources = [("data.train", source, views) for source in recipe.data.sources]
    if recipe.data.validation is not None:
        sources.append(("data.validation", recipe.data.validation, 1))
    return sources


def summary(features: CachedFeatures) -> str:
    """How many images there are, how they are kept and where, in one line."""
    layout, encoded = features.layout, features.encoded
    error = "" if features.error is None else f", relative error {100 * features.error:.2g} %"
    return (
        f"{count(len(features), 'record')}, {count(features.images, 'image')} in {count(layout.views, 'view')},"
        f" {encoded} encoded now and {features.images - encoded} found; {count(len(features.broken), 'record')} without"
        f" a usable image; {features.bytes / 1e6:,.1f} MB in {layout.dtype}{error}; in {features.folder}"
    )


def count(number: int, what: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{number} {what}{'' if number == 1 else 's'}"
