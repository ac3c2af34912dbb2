"""What a run met in its data, counted over all processes: samples of each source, shards, what was skipped and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blip2.console import Display
from blip2.data.dataset import CAUSES, Loaded, Skipped
from blip2.distributed import gather_objects
from blip2.errors import InputError
from blip2.training.metrics import StepFile

NAMED = 20
"""So many skipped records are named on the terminal."""
SAMPLES, SHARDS = 1000, 50
"""The share of bad ones among fewer says nothing."""


class Tally:
    """Counts that are the same in every process, and what this one adds to them at the next step.

    Args:
        sources: names of what is trained on.
        counts: of :meth:`metrics`, to go on from.
    """

    def __init__(self, sources: Sequence[str], counts: dict[str, Any] | None) -> None:
        self._sources = sources
        self._names = [*(f"skipped_{cause}" for cause in CAUSES), "cut", "shards"]
        known = counts or {}
        self._counts = Counter({name: int(known.get(name, 0)) for name in self._names})
        self._drawn = Counter({name: int(known.get("drawn", {}).get(name, 0)) for name in sources})
        self._skipped: list[Skipped] = []
        self._own: Counter[str] = Counter()
        self._own_drawn: Counter[str] = Counter()
        self.step_source: str | None = known.get("source")
        """What all samples of the last step were drawn from; None where there is no choice, and for a step in which a
        process had to pass over a batch without a good image."""
        self._step: Counter[str] = Counter()

    def add(self, loaded: Loaded) -> None:
        """Note a batch of this process."""
        self._skipped += loaded.skipped
        self._own.update(f"skipped_{one.cause}" for one in loaded.skipped)
        self._own.update({"cut": loaded.cut, "shards": loaded.begun})
        self._own_drawn[self._sources[loaded.source]] += loaded.drawn

    def own(self) -> list[float]:
        """What this process has noted since the last step."""
        numbers = [*(self._own[name] for name in self._names), *(self._own_drawn[name] for name in self._sources)]
        self._own.clear()
        self._own_drawn.clear()
        return [float(number) for number in numbers]

    def close(self, sums: Sequence[int]) -> None:
        """End a step with the sums of :meth:`own` over all processes."""
        self._step = Counter(dict(zip(self._names, sums, strict=False)))
        drawn = dict(zip(self._sources, sums[len(self._names) :], strict=True))
        self._counts.update(self._step)
        self._drawn.update(drawn)
        of = [name for name, number in drawn.items() if number]
        self.step_source = of[0] if len(of) == 1 and len(drawn) > 1 else None

    @property
    def skipped(self) -> int:
        """So many records were skipped so far."""
        return _skips(self._counts)

    @property
    def cut(self) -> int:
        """So many captions were cut so far."""
        return self._counts["cut"]

    def metrics(self) -> dict[str, Any]:
        """All counts so far, for a line of metrics and for a checkpoint."""
        source = {} if self.step_source is None else {"source": self.step_source}
        return {**source, "drawn": dict(self._drawn), "skipped": self.skipped, **self._counts}

    def report(self, step: int, file: StepFile, display: Display, max_tokens: int) -> None:
        """Name what the last step had to leave out, in the file all, on the display the first of a run."""
        now = _skips(self._step)
        if now:  # the same in every process: all of them come here, or none
            own, self._skipped = self._skipped, []
            found = [one for theirs in gather_objects(own) for one in theirs]
            for number, one in enumerate(found, self.skipped - now):
                file.write({"step": step, **vars(one)})
                if number < NAMED:
                    display.say(f"skipped {one}")
                elif number == NAMED:
                    display.say(f"more is skipped, and named in {file.path} alone")
        if self.cut and self.cut == self._step["cut"]:
            display.say(
                f"a caption is longer than data.max_length ({max_tokens}) and was cut; the rest are only counted"
            )

    def check(self, limit: float, file: Path) -> None:
        """Stop when too much is bad.

        Args:
            limit: largest share.
            file: where the bad ones are named.

        Raises:
            InputError: the share of bad samples, or of broken shards, is above the limit.
        """
        broken = self._counts["skipped_shard"]
        for bad, of, enough, what in (
            (self.skipped, self._drawn.total(), SAMPLES, "samples"),
            (broken, self._counts["shards"], SHARDS, "shards"),
        ):
            if of >= enough and bad > limit * of:
                causes = ", ".join(f"{cause} {n}" for cause in CAUSES if (n := self._counts[f"skipped_{cause}"]))
                raise InputError(
                    f"{bad} of {of} {what} are bad, more than data.max_bad_fraction {limit:g} ({causes}; each is"
                    " named in"
                    f" {file}): mend the data, or raise data.max_bad_fraction and go on with --resume"
                )


def _skips(counts: Counter[str]) -> int:
    return sum(counts[f"skipped_{cause}"] for cause in CAUSES)
