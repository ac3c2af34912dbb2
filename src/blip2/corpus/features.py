"""The frozen features that training reads, made by an engine: each unit is so many records of a table.

What the workers add to the store is found there by :func:`blip2.training.features.make_features`, which then has
nothing left to encode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from blip2.builder import choose_device
from blip2.config import Recipe
from blip2.console import Display
from blip2.corpus.job import Engine, Worker, run_units
from blip2.corpus.tar_shards import Unit
from blip2.data.assets import resolve
from blip2.data.records import Records, open_records
from blip2.errors import InputError
from blip2.training.features import cached_features, feature_sources, open_encoder

SIZE = 1024
"""Records a unit."""


def make_features_on(engine: Engine, recipe: Recipe) -> None:
    """Put the features of a recipe's data into its store.

    Raises:
        InputError: as :func:`blip2.training.features.make_features`, or Ray is missing.
    """
    units = list(_units(recipe))
    display = Display("features")
    display.start(len(units))
    try:
        for done, _ in enumerate(run_units(FeatureWork(recipe), units, engine), 1):
            display.advance(done, "units")
    finally:
        display.close()


def _units(recipe: Recipe) -> Iterator[Unit]:
    for key, source, _ in feature_sources(recipe):
        count = len(_open(recipe, source))
        for first in range(0, count, SIZE):
            yield Unit(key, source, first, min(SIZE, count - first))


def _open(recipe: Recipe, source: str) -> Records:
    records = open_records(resolve(source), recipe.data)
    if not isinstance(records, Records):
        raise InputError("cached features need a table or a folder, not a stream: set data.streaming to false")
    return records


@dataclass(frozen=True)
class FeatureWork:
    """The pass, for any engine."""

    recipe: Recipe

    def worker(self) -> Worker:
        """Load the encoder; the records of each source are opened once."""
        device = choose_device(self.recipe.training.device)
        encoder = open_encoder(self.recipe, device)
        views = {(key, source): views for key, source, views in feature_sources(self.recipe)}
        opened: dict[str, Records] = {}

        def encode(unit: Unit) -> Mapping[str, Any]:
            if unit.source not in opened:
                opened[unit.source] = _open(self.recipe, unit.source)
            part = opened[unit.source].part(unit.first, unit.count or 0)
            made = cached_features(self.recipe, part, encoder, views[unit.name, unit.source], device)
            return {"pictures": made.encoded}

        return encode
