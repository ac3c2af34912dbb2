"""Mixtures: batches drawn from several sources.

All batches of a training step come from one source, in every process; the source is drawn again for each step. The
losses of a step are therefore the losses of one source, and the negatives of the contrastive loss come from the same
source as their pair. Negatives from another source would be too easy: the style of the image or text alone would
identify them. Each source has its own epochs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from blip2.data.dataset import LoadedBatch
from blip2.data.positions import START, MixturePosition, SourcePosition
from blip2.data.records import Records, RecordStream
from blip2.data.sampler import BatchSpec, batch_settings, order_settings, reshard, sample_batches, skip_to_next_epoch
from blip2.errors import InputError


@dataclass(frozen=True)
class MixtureSource:
    """A source of a mixture."""

    name: str
    """The source as it is written in ``data.train`` of the recipe."""
    records: Records | RecordStream
    """The opened source."""
    probability: float
    """Probability that the batches of a step come from this source."""


def build_mixture(
    weights: Mapping[str, float | None], opened: Sequence[Records | RecordStream], temperature: float = 1.0
) -> list[MixtureSource]:
    """Build a mixture in which the probability of each source is proportional to weight ** (1 / temperature).

    Args:
        weights: weight of each source, at least 0, by name; ``None``: the number of records of the source.
        opened: the opened sources, in the order of `weights`.
        temperature: a number above 0. With 1, probabilities are proportional to the weights; larger values make the
            probabilities more equal.

    Returns:
        The sources in the order of `weights`; their probabilities sum to 1.

    Raises:
        InputError: one of several sources is a stream without a weight (a stream has no number of records), or no
            weight is above 0.
    """
    scaled = []
    for (name, weight), records in zip(weights.items(), opened, strict=True):
        if weight is None and isinstance(records, RecordStream):
            if len(weights) > 1:
                raise InputError(
                    f"data.train has no weight for {name}, which is a stream, so its records cannot be counted: write"
                    " its number of records as the weight"
                )
            weight = 1.0
        value = float(len(records) if weight is None and isinstance(records, Records) else weight or 0)
        scaled.append(0.0 if value == 0 else math.exp(math.log(value) / temperature))
    total = sum(scaled)
    if total == 0:
        raise InputError(
            f"all weights of data.train are 0 ({', '.join(weights)}), expected at least one weight above 0: set one"
        )
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
    position: MixturePosition | None = None,
) -> Iterator[BatchSpec[MixturePosition]]:
    """Yield batches without end. The source of each step is drawn by (seed, step), so it is the same on all ranks.

    Args:
        sources: the sources. A stream must have been opened for `rank` and `world_size`.
        batch_size: see :func:`~blip2.data.sampler.sample_batches`, as for the next four arguments.
        seed: seed of the order and of the choice of sources.
        group_by_length: put captions of similar length into the same batch.
        rank: rank of this process.
        world_size: number of processes.
        gradient_accumulation_steps: number of batches per step, all from the same source.
        position: the position of the :class:`~blip2.data.sampler.BatchSpec` after which to resume. A source that has no
            position in it starts with its first record. ``None``: all sources start with their first record.
    """
    if position is None:
        position = {"num_batches": 0, "gradient_accumulation_steps": gradient_accumulation_steps, "sources": {}}
    positions = dict(position["sources"])
    iterators = [
        sample_batches(s.records, batch_size, own, group_by_length, rank, world_size, positions.get(s.name))
        for s, own in zip(sources, _seeds(seed, len(sources)), strict=True)
    ]
    probabilities = [source.probability for source in sources]
    for number in count(position["num_batches"]):
        rng = np.random.default_rng([seed, number // gradient_accumulation_steps, 3])
        index = int(rng.choice(len(sources), p=probabilities))
        batch = next(iterators[index])
        positions = {**positions, sources[index].name: batch.position}
        after: MixturePosition = {
            "num_batches": number + 1,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "sources": positions,
        }
        yield BatchSpec(batch.samples, after, index)


def _seeds(seed: int, count: int) -> list[int]:
    """Return the seed of each source, that of the first being `seed`.

    With one seed for all, sources with the same number of records, such as several views of the same images, would have
    the same order, and successive batches the same images.
    """
    return [seed, *(int(each) for each in np.random.SeedSequence([seed, 4]).generate_state(count - 1))]


def resume_mixture(
    positions: Sequence[MixturePosition],
    sources: Sequence[MixtureSource],
    batch_size: int,
    seed: int,
    group_by_length: bool = True,
    rank: int = 0,
    world_size: int = 1,
    gradient_accumulation_steps: int = 1,
) -> tuple[MixturePosition, list[str]]:
    """Find the position from which a rank resumes.

    For each source: if no setting that affects its batches has changed, the rank resumes exactly after its last batch.
    If the order of the records has changed, the source continues with its next epoch. If only the batches or the number
    of processes have changed, the remaining records of the current epoch are redistributed. A source that is new in the
    mixture starts with its first record.

    Args:
        positions: the position of each former rank after its last batch.
        sources: the sources of the resumed run.
        batch_size: see :func:`sample_mixture`, as for the next five arguments.
        seed: seed of the order and of the choice of sources.
        group_by_length: put captions of similar length into the same batch.
        rank: rank of this process.
        world_size: number of processes.
        gradient_accumulation_steps: number of batches per step, all from the same source.

    Returns:
        The position for :func:`sample_mixture`, and messages about the sources that do not resume exactly after their
        last batch.
    """
    resumed: dict[str, SourcePosition] = {}
    changed: dict[str, list[str]] = {}
    for source, own_seed in zip(sources, _seeds(seed, len(sources)), strict=True):
        former = [position["sources"].get(source.name, START) for position in positions]
        started = [position for position in former if position is not START]
        if not started:
            continue
        order = order_settings(source.records, own_seed)
        batching = batch_settings(source.records, batch_size, group_by_length, world_size)
        order_changes = _describe_changes(started[0]["order_settings"], order)
        batch_changes = _describe_changes(started[0]["batch_settings"], batching)
        if order_changes:
            position = skip_to_next_epoch(former)
            message = f"continues with the next epoch, because the order of the records changed ({order_changes})"
        elif batch_changes:
            position = reshard(source.records, former, rank, world_size)
            message = f"continues with the remaining records of the epoch, which are redistributed ({batch_changes})"
        else:
            if former[rank] is not START:
                resumed[source.name] = former[rank]
            continue
        # The settings are needed if the run ends again before a batch is drawn from this source.
        resumed[source.name] = {**position, "order_settings": order, "batch_settings": batching}
        changed.setdefault(message, []).append(source.name)
    messages = [f"{', '.join(names)}: {message}" for message, names in changed.items()]
    before = {name for position in positions for name in position["sources"]}
    removed = sorted(before - {source.name for source in sources})
    if removed:
        messages.append(f"{', '.join(removed)}: no longer in data.train, so the saved position is dropped")
    former_accumulation = positions[0]["gradient_accumulation_steps"]
    if len(positions) == world_size and former_accumulation == gradient_accumulation_steps:
        num_batches = positions[rank]["num_batches"]
    else:  # start a new step, because all batches of a step come from one source
        steps = math.ceil(max(position["num_batches"] for position in positions) / former_accumulation)
        num_batches = steps * gradient_accumulation_steps
    return {
        "num_batches": num_batches,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "sources": resumed,
    }, messages


def _describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the settings that differ, such as ``key from a to b``, separated by commas; empty if there are none.

    Settings that an older version did not store are not compared.
    """
    words = {"seed": "another seed", "digest": "other records"}  # numbers that nobody has seen
    keys = [key for key in before if before[key] != now.get(key)]
    return ", ".join(words.get(key) or f"{key} from {before.get(key)} to {now.get(key)}" for key in keys)


class MixtureDataset(Dataset[LoadedBatch]):
    """Loads each batch with the data set of its source.

    Args:
        datasets: the data set of each source, in the order of the mixture.
    """

    def __init__(self, datasets: Sequence[Dataset[LoadedBatch]]) -> None:
        self.datasets = datasets

    def __getitem__(self, spec: BatchSpec[MixturePosition]) -> LoadedBatch:
        return self.datasets[spec.source_index][spec]
