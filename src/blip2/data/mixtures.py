"""Mixtures: batches drawn from several sources.

All batches of a training step come from one source, in every process. The losses of a step are then exactly those of
that source, and the negatives of the contrastive loss come from the source of the pair, where they are hard, and not
from another source that different images or phrases give away. The sources mix over many steps. Each source has its own
epochs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from blip2.data.dataset import LoadedBatch
from blip2.data.records import Records, RecordStream
from blip2.data.sampler import (
    START,
    BatchSpec,
    batch_settings,
    order_settings,
    reshard,
    sample_batches,
    skip_to_next_epoch,
)
from blip2.errors import InputError


@dataclass(frozen=True)
class MixtureSource:
    """A source of a mixture."""

    name: str
    """Name of the source in the recipe."""
    records: Records | RecordStream
    probability: float
    """Probability that a step is drawn from this source."""


def build_mixture(
    weights: Mapping[str, float | None], opened: Sequence[Records | RecordStream], temperature: float = 1.0
) -> list[MixtureSource]:
    """Turn the weights of sources into probabilities, proportional to weight ** (1 / temperature).

    Args:
        weights: weight of each source relative to the others; ``None``: its number of records.
        temperature: 1 leaves the proportions as they are; larger values make them more equal.

    Raises:
        InputError: a stream, whose records cannot be counted, has no weight, or no weight is above 0.
    """
    scaled = []
    for (name, weight), records in zip(weights.items(), opened, strict=True):
        if weight is None and isinstance(records, RecordStream):
            if len(weights) > 1:
                raise InputError(
                    f"data.train gives {name} no weight, and a stream is not counted: write how many records it has"
                )
            weight = 1.0
        value = float(len(records) if weight is None and isinstance(records, Records) else weight or 0)
        scaled.append(0.0 if value == 0 else math.exp(math.log(value) / temperature))
    total = sum(scaled)
    if total == 0:
        raise InputError("data.train gives no source a weight above 0: give one to at least one")
    return [
        MixtureSource(name, records, value / total)
        for name, records, value in zip(weights, opened, scaled, strict=True)
    ]


def sample_mixture(
    sources: Sequence[MixtureSource],
    batch_size: int,
    seed: int,
    group_by_length: bool = True,
    rank: int = 0,
    world_size: int = 1,
    gradient_accumulation_steps: int = 1,
    position: dict[str, Any] | None = None,
) -> Iterator[BatchSpec]:
    """Yield batches without end, each from one source, which is drawn by (seed, step): the same source on all ranks.

    Args:
        batch_size, seed, group_by_length, rank, world_size: see :func:`~blip2.data.sampler.sample_batches`.
        gradient_accumulation_steps: number of batches per step, all from one source.
        position: of a :class:`BatchSpec`; sampling resumes after that batch. A source without a position in it starts
            at its beginning.
    """
    position = position or {"number": 0, "sources": {}}
    positions: dict[str, Any] = dict(position["sources"])
    iterators = [
        sample_batches(s.records, batch_size, seed, group_by_length, rank, world_size, positions.get(s.name))
        for s in sources
    ]
    probabilities = [source.probability for source in sources]
    for number in count(position["number"]):
        rng = np.random.default_rng([seed, number // gradient_accumulation_steps, 3])
        index = int(rng.choice(len(sources), p=probabilities))
        batch = next(iterators[index])
        positions = {**positions, sources[index].name: batch.position}
        after = {"number": number + 1, "accumulate": gradient_accumulation_steps, "sources": positions}
        yield replace(batch, position=after, source_index=index)


def resume_mixture(
    positions: Sequence[dict[str, Any]],
    sources: Sequence[MixtureSource],
    batch_size: int,
    seed: int,
    group_by_length: bool = True,
    rank: int = 0,
    world_size: int = 1,
    gradient_accumulation_steps: int = 1,
) -> tuple[dict[str, Any], list[str]]:
    """Find the position from which a rank resumes.

    Without a change that affects batches, it resumes exactly after its last batch. If the batches or the number of
    processes changed, the remaining records of the epoch are redistributed. If the order of the records of a source
    changed, the source continues with its next epoch; a new source starts at its beginning.

    Args:
        positions: of the last batch of each former rank.
        sources, batch_size, seed, group_by_length, rank, world_size, gradient_accumulation_steps: see
            :func:`sample_mixture`.

    Returns:
        The position for :func:`sample_mixture`, and messages about what changed.
    """
    resumed: dict[str, Any] = {}
    changed: dict[str, list[str]] = {}
    for source in sources:
        former = [position["sources"].get(source.name, START) for position in positions]
        started = [position for position in former if position is not START]
        if not started:
            continue
        order = _describe_changes(started[0]["order"], order_settings(source.records, seed))
        batches = _describe_changes(
            started[0]["deal"], batch_settings(source.records, batch_size, group_by_length, world_size)
        )
        if order:
            resumed[source.name] = skip_to_next_epoch(former)
            message = f"continues with its next epoch, because the order of its records changed ({order})"
        elif batches:
            resumed[source.name] = reshard(source.records, former, rank, world_size)
            message = f"continues within its epoch, whose remaining records are redistributed ({batches})"
        else:
            if former[rank] is not START:
                resumed[source.name] = former[rank]
            continue
        changed.setdefault(message, []).append(source.name)
    messages = [f"{', '.join(names)}: {message}" for message, names in changed.items()]
    before = {name for position in positions for name in position["sources"]}
    removed = sorted(before - {source.name for source in sources})
    if removed:
        messages.append(f"{', '.join(removed)}: no longer in data.train, its position is dropped")
    if len(positions) == world_size and positions[0]["accumulate"] == gradient_accumulation_steps:
        number = positions[rank]["number"]
    else:  # start a new step, whose batches all come from one source
        steps = math.ceil(max(position["number"] for position in positions) / positions[0]["accumulate"])
        number = steps * gradient_accumulation_steps
    return {"number": number, "accumulate": gradient_accumulation_steps, "sources": resumed}, messages


POSITION_TYPES = {
    "since": int, "taken": int, "epoch": int, "batch": int, "seen": str, "left": dict | None, "stream": list | None,
    "order": dict, "deal": dict,
}  # fmt: skip
"""Types of the values of a position in a source."""


def is_position(value: Any) -> bool:
    """Return whether a JSON value has the keys and types of a position of :func:`sample_mixture`."""
    if not isinstance(value, dict) or not isinstance(value.get("sources"), dict):
        return False
    numbers = [value.get("number"), value.get("accumulate")]
    for source in value["sources"].values():
        if not isinstance(source, dict):
            return False
        if not all(isinstance(source.get(key), type_) for key, type_ in POSITION_TYPES.items()):
            return False
        numbers += [source[key] for key, type_ in POSITION_TYPES.items() if type_ is int]
    return all(type(number) is int and number >= 0 for number in numbers)


def _describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the values that differ, as ``key from a to b``; empty if there are none."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(f"{key} from {before.get(key)} to {now.get(key)}" for key in keys)


class MixtureDataset(Dataset[LoadedBatch]):
    """Loads each batch with the data set of its source."""

    def __init__(self, datasets: Sequence[Dataset[LoadedBatch]]) -> None:
        self.datasets = datasets

    def __getitem__(self, spec: BatchSpec) -> LoadedBatch:
        return self.datasets[spec.source_index][spec]
