"""The feature cache of a recipe (``data.cached_views``, ``data.cached_dtype``, ``data.features``)."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from blip2.backbones.vision import ImageEncoder
from blip2.builder import build_image_encoder, choose_device, choose_dtype
from blip2.checkpoint import is_disk_full
from blip2.config import FEATURES, MODULE, Recipe
from blip2.console import Display
from blip2.data.assets import resolve
from blip2.data.records import Records, RecordStream
from blip2.data.sources import open_records
from blip2.distributed import rank
from blip2.errors import InputError
from blip2.feature_cache.cache import Augmentation, CachedFeatures, cache_features
from blip2.io import expand_home
from blip2.training.optimizer import find_pattern

MAX_LISTED_ERRORS = 20
"""Maximum number of unusable images that are listed; the others are counted."""


def load_or_compute_features(
    recipe: Recipe, records: Records | RecordStream, encoder: ImageEncoder, num_views: int, device: torch.device
) -> CachedFeatures:
    """Return the cached features of a data set. Features that are missing are computed, with a progress bar.

    All processes of a run must call it.

    Args:
        recipe: the settings of the cache and of the augmentation are in ``recipe.data``.
        records: the data set.
        encoder: the image encoder, which must be frozen.
        num_views: number of views per image. 1: only the whole image, without augmentation.
        device: device of the encoder.

    Raises:
        InputError: the data is a stream, the encoder trains, the disk is full, or the features cannot be written.
    """
    if not isinstance(records, Records):
        raise InputError(
            "data.cached_views needs a table or a folder, but the data is read as a stream: set data.streaming to false"
            " or data.cached_views to 0"
        )
    if not encoder.is_frozen:
        raise InputError(
            "data.cached_views needs a frozen image encoder, but optimizer.learning_rate trains it: set"
            ' data.cached_views to 0, or "vision.*" to frozen in optimizer.learning_rate'
        )
    data = recipe.data
    root = expand_home(recipe.output).parent / "features" if data.features is None else expand_home(data.features)
    display = Display(f"features in {pluralize(num_views, 'view')}", enabled=rank() == 0)

    def report(done: int, total: int) -> None:
        if done:
            display.update(done)
        else:
            display.start(total)

    try:
        augmentation = Augmentation(num_views, data.min_crop_scale, data.horizontal_flip)
        return cache_features(root, records, encoder, augmentation, data.cached_dtype, device, data.num_workers, report)
    except OSError as error:
        if not is_disk_full(error):
            raise InputError(
                f"features cannot be written to {root} ({error.strerror or error}): check this folder, or set"
                " data.features to a folder that can be written"
            ) from error
        raise InputError(
            f"no space left on the disk while writing features to {root}: free disk space and rerun; the features that"
            " are finished are kept"
        ) from error
    finally:
        display.close()


def make_features(recipe: Recipe) -> list[str]:
    """Compute the features that :func:`blip2.training.trainer.train` reads for a recipe, without training.

    Under ``torchrun`` or ``accelerate launch``, each process encodes its share of the images.

    Returns:
        Messages about the features of each source and about unusable images; empty on ranks other than 0.

    Raises:
        InputError: as for :func:`load_or_compute_features`, or the data or the encoder cannot be read.
    """
    if recipe.vision.name in (FEATURES, MODULE):
        raise InputError(
            f"vision.name is {recipe.vision.name}, whose features are not cached: train without blip2 features, with"
            " data.cached_views 0"
        )
    accelerator = Accelerator(cpu=choose_device(recipe.training.device).type == "cpu")
    lines: list[str] = []
    try:
        encoder = load_encoder(recipe, accelerator.device)
        for key, source, views in feature_sources(recipe):
            with accelerator.main_process_first():
                records = open_records(resolve(source), recipe.data)
            features = load_or_compute_features(recipe, records, encoder, views, accelerator.device)
            assert isinstance(records, Records)
            if accelerator.is_main_process:
                lines.append(f"{key}: {format_summary(features)}")
                errors = sorted(features.errors.items())
                lines += [f"  {records[i].key}: {message}" for i, message in errors[:MAX_LISTED_ERRORS]]
                if len(errors) > MAX_LISTED_ERRORS:
                    lines.append(f"  and {len(errors) - MAX_LISTED_ERRORS} more")
    finally:
        accelerator.end_training()
        # Otherwise the next run in this process could not use another device.
        AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]
    return lines


def load_encoder(recipe: Recipe, device: torch.device) -> ImageEncoder:
    """Load the image encoder of a recipe, and set ``requires_grad`` of its parameters as the recipe says."""
    encoder = build_image_encoder(recipe.vision, choose_dtype(recipe.vision.dtype, device)).to(device)
    for name, parameter in encoder.named_parameters():
        rate = recipe.optimizer.learning_rate[find_pattern(f"vision.{name}", recipe.optimizer)]
        parameter.requires_grad_(rate != "frozen")
    return encoder


def feature_sources(recipe: Recipe) -> list[tuple[str, str, int]]:
    """Return (recipe key, source, number of views) for each source of the training and validation data."""
    views = max(1, recipe.data.cached_views)
    sources = [("data.train", source, views) for source in recipe.data.sources]
    if recipe.data.validation is not None:
        sources.append(("data.validation", recipe.data.validation, 1))
    return sources


def format_summary(features: CachedFeatures) -> str:
    """Describe cached features in one line: number of records and images, size, format and folder."""
    row_format, encoded = features.row_format, features.num_encoded
    error = "" if features.rms_error is None else f", relative error {100 * features.rms_error:.2g} %"
    images, views = pluralize(features.num_images, "image"), pluralize(row_format.num_views, "view")
    return (
        f"{pluralize(len(features), 'record')}, {images} in {views}, {encoded} encoded now and"
        f" {features.num_images - encoded} found; {pluralize(len(features.errors), 'record')} without a usable image;"
        f" {features.num_bytes / 1e6:,.1f} MB in {row_format.dtype}{error}; in {features.folder}"
    )


def pluralize(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 image``, ``2 images``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
