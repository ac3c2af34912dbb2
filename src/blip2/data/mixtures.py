"""Several sources as one: how often each is drawn, and the batches that come of it.

All of a training step is drawn from one source, in every process: then a step's losses are those of that source,
exactly, and the negatives of a contrastive loss come from the source that the pair comes from, where they are hard, and
not from another whose pictures or phrases give it away. Over many steps the sources mix. Each goes through its own
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

from blip2.data.dataset import Loaded, Plan, deal_of, order_of, plan_batches
from blip2.data.records import Records, RecordStream
from blip2.data.sampler import START, deal_anew, next_epoch
from blip2.errors import InputError


@dataclass(frozen=True)
class Source:
    """One of the sources of a mixture."""

    name: str
    """As the recipe has it."""
    records: Records | RecordStream
    share: float
    """Of the steps that are drawn from it."""


def mix(
    weights: Mapping[str, float | None], opened: Sequence[Records | RecordStream], temperature: float = 1.0
) -> list[Source]:
    """The sources of a mixture.

    Args:
        weights: what each is worth against the others; None: as much as it has records.
        temperature: shares go as weight ** (1 / temperature): 1 leaves them, more makes them more equal.

    Raises:
        InputError: the records of a stream would have to be counted, or nothing has a weight.
    """
    worth = []
    for (name, weight), records in zip(weights.items(), opened, strict=True):
        if weight is None and isinstance(records, RecordStream):
            if len(weights) > 1:
                raise InputError(
                    f"data.train gives {name} no weight, and a stream is not counted: write how many records it has"
                )
            weight = 1.0
        value = float(len(records) if weight is None and isinstance(records, Records) else weight or 0)
        worth.append(0.0 if value == 0 else math.exp(math.log(value) / temperature))
    total = sum(worth)
    if total == 0:
        raise InputError("data.train gives no source a weight above 0: give one to at least one")
    return [Source(name, records, value / total) for name, records, value in zip(weights, opened, worth, strict=True)]


def plan_mixture(
    sources: Sequence[Source],
    batch_size: int,
    seed: int,
    group_by_length: bool = True,
    process: int = 0,
    processes: int = 1,
    accumulate: int = 1,
    position: dict[str, Any] | None = None,
) -> Iterator[Plan]:
    """Batches without end, each from one source, which is drawn by (seed, step): the same in every process.

    Args:
        batch_size, seed, group_by_length, process, processes: as :func:`~blip2.data.dataset.plan_batches` takes them.
        accumulate: so many batches make a step, and are of one source.
        position: of a :class:`Plan`; batches go on behind it. A source that it does not know begins at its start.
    """
    at = position or {"number": 0, "sources": {}}
    positions: dict[str, Any] = dict(at["sources"])
    plans = [
        plan_batches(s.records, batch_size, seed, group_by_length, process, processes, positions.get(s.name))
        for s in sources
    ]
    shares = [source.share for source in sources]
    for number in count(at["number"]):
        which = int(np.random.default_rng([seed, number // accumulate, 3]).choice(len(sources), p=shares))
        plan = next(plans[which])
        positions = {**positions, sources[which].name: plan.position}
        place = {"number": number + 1, "accumulate": accumulate, "sources": positions}
        yield replace(plan, position=place, source=which)


def go_on(
    positions: Sequence[dict[str, Any]],
    sources: Sequence[Source],
    batch_size: int,
    seed: int,
    group_by_length: bool = True,
    process: int = 0,
    processes: int = 1,
    accumulate: int = 1,
) -> tuple[dict[str, Any], list[str]]:
    """Find where a process goes on.

    Where nothing has changed that decides about batches, it goes on exactly where it was. Where batches or processes
    have changed, what no process has taken of the epoch is dealt out anew. Where the order of the records itself has
    changed, a source goes on with its next epoch, and one that is new begins at its start.

    Args:
        positions: of the plans that all processes took last.
        sources, batch_size, seed, group_by_length, process, processes, accumulate: as :func:`plan_mixture` takes them.

    Returns:
        The position for :func:`plan_mixture`, and lines on what has changed.
    """
    known: dict[str, Any] = {}
    changed: dict[str, list[str]] = {}
    for source in sources:
        theirs = [position["sources"].get(source.name, START) for position in positions]
        drawn = [position for position in theirs if position is not START]
        if not drawn:
            continue
        order, deal = order_of(source.records, seed), deal_of(source.records, batch_size, group_by_length, processes)
        if _differs(drawn[0]["order"], order):
            known[source.name] = next_epoch(theirs)
            why = f"goes on with its next epoch, for its order has changed ({_differs(drawn[0]['order'], order)})"
        elif _differs(drawn[0]["deal"], deal):
            known[source.name] = deal_anew(source.records, theirs, process, processes)
            why = f"goes on within its epoch; what is left of it is dealt out anew ({_differs(drawn[0]['deal'], deal)})"
        else:
            if theirs[process] is not START:
                known[source.name] = theirs[process]
            continue
        changed.setdefault(why, []).append(source.name)
    lines = [f"{', '.join(names)}: {why}" for why, names in changed.items()]
    before = {name for position in positions for name in position["sources"]}
    gone = sorted(before - {source.name for source in sources})
    if gone:
        lines.append(f"{', '.join(gone)}: no longer in data.train; its place is forgotten")
    if len(positions) == processes and positions[0]["accumulate"] == accumulate:
        number = positions[process]["number"]
    else:  # a step begins, of which all batches are of one source
        steps = math.ceil(max(position["number"] for position in positions) / positions[0]["accumulate"])
        number = steps * accumulate
    return {"number": number, "accumulate": accumulate, "sources": known}, lines


KINDS = {
    "since": int, "taken": int, "epoch": int, "batch": int, "seen": str, "left": dict | None, "stream": list | None,
    "order": dict, "deal": dict,
}  # fmt: skip
"""Of the values of the position in a source."""


def is_position(value: Any) -> bool:
    """Whether a value of JSON is a position of :func:`plan_mixture`, as far as its kinds tell."""
    if not isinstance(value, dict) or not isinstance(value.get("sources"), dict):
        return False
    numbers = [value.get("number"), value.get("accumulate")]
    for each in value["sources"].values():
        if not isinstance(each, dict) or not all(isinstance(each.get(key), kind) for key, kind in KINDS.items()):
            return False
        numbers += [each[key] for key, kind in KINDS.items() if kind is int]
    return all(type(number) is int and number >= 0 for number in numbers)


def _differs(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is another in two descriptions; empty where they are equal."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(f"{key} from {before.get(key)} to {now.get(key)}" for key in keys)


class Preparations(Dataset[Loaded]):
    """Makes batches of plans, each by the preparation of its source."""

    def __init__(self, each: Sequence[Dataset[Loaded]]) -> None:
        self.each = each

    def __getitem__(self, plan: Plan) -> Loaded:
        return self.each[plan.source][plan]
