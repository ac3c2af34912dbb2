"""Compute the cached features of a recipe's data with an :class:`~blip2.corpus.job.Engine`.

A unit is a range of records. The workers add the features of its images to the feature cache. If
:func:`blip2.training.features.make_features` is called afterwards, it finds all features there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from blip2.builder import choose_device
from blip2.config import Recipe
from blip2.console import Display
from blip2.corpus.job import Worker, run_units
from blip2.corpus.options import Engine
from blip2.corpus.units import Unit
from blip2.data.assets import resolve
from blip2.data.records import Records
from blip2.data.sources import open_records
from blip2.errors import InputError
from blip2.training.features import feature_sources, load_encoder, load_or_compute_features

UNIT_SIZE = 1024
"""Number of records in a unit."""


def make_features_with_engine(engine: Engine, recipe: Recipe) -> None:
    """Add the features of a recipe's data to its feature cache.

    Raises:
        InputError: as for :func:`blip2.training.features.make_features`, or Ray is missing.
    """
    units = list(_list_units(recipe))
    display = Display("features")
    display.start(len(units))
    try:
        for done, _ in enumerate(run_units(FeatureJob(recipe), units, engine), 1):
            display.update(done, "units")
    finally:
        display.close()


def _list_units(recipe: Recipe) -> Iterator[Unit]:
    for key, source, _ in feature_sources(recipe):
        count = len(_open(recipe, source))
        for start in range(0, count, UNIT_SIZE):
            yield Unit(key, source, start, min(UNIT_SIZE, count - start))


def _open(recipe: Recipe, source: str) -> Records:
    records = open_records(resolve(source), recipe.data)
    if not isinstance(records, Records):
        raise InputError(
            "cached features need a table or a folder, but the data is read as a stream: set data.streaming to false"
        )
    return records


@dataclass(frozen=True)
class FeatureJob:
    """A :class:`~blip2.corpus.job.Job` that encodes images."""

    recipe: Recipe

    def worker(self) -> Worker:
        """Load the image encoder. The worker opens the records of each source only once."""
        device = choose_device(self.recipe.training.device)
        encoder = load_encoder(self.recipe, device)
        views = {(key, source): views for key, source, views in feature_sources(self.recipe)}
        opened: dict[str, Records] = {}

        def encode(unit: Unit) -> Mapping[str, Any]:
            if unit.source not in opened:
                opened[unit.source] = _open(self.recipe, unit.source)
            records = opened[unit.source].select_range(unit.start, unit.count or 0)
            features = load_or_compute_features(self.recipe, records, encoder, views[unit.name, unit.source], device)
            return {"images": features.num_encoded}

        return encode
