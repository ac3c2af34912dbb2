"""Statistics of the training data over all processes: samples of each source, shards, and skipped records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blip2.console import Display
from blip2.data.dataset import SKIP_REASONS, LoadedBatch, SkippedRecord
from blip2.distributed import all_gather_objects
from blip2.errors import InputError
from blip2.training.metrics import JsonlLog

MAX_DISPLAYED_SKIPS = 20
"""Number of skipped records that are shown on the terminal."""
MIN_SAMPLES, MIN_SHARDS = 1000, 50
"""Numbers of samples and of shards below which the fraction of bad ones is not checked."""


class DataStats:
    """Counts over all processes, and the counts of this process in the current step.

    Args:
        sources: names of the sources of the training data.
        counts: the result of :meth:`metrics` that the checkpoint to resume from contains. None: start at 0.
    """

    def __init__(self, sources: Sequence[str], counts: dict[str, Any] | None) -> None:
        self._sources = sources
        self._names = [*(f"skipped_{reason}" for reason in SKIP_REASONS), "truncated", "shards"]
        counts = counts or {}
        self._counts = Counter({name: int(counts.get(name, 0)) for name in self._names})
        # Former sources are counted too: the records skipped in them are.
        self._samples_seen = Counter(dict.fromkeys(sources, 0) | counts.get("samples_seen", {}))
        self._skipped: list[SkippedRecord] = []
        self._local_counts: Counter[str] = Counter()
        self._local_samples_seen: Counter[str] = Counter()
        self._step_counts: Counter[str] = Counter()
        self.step_source: str | None = counts.get("source")
        """The source of all samples of the last step. None if there is only one source, or if a process drew from a
        second source because a batch of the first had no usable image."""

    def add(self, loaded: LoadedBatch) -> None:
        """Count a batch of this process."""
        self._skipped += loaded.skipped
        self._local_counts.update(f"skipped_{record.reason}" for record in loaded.skipped)
        self._local_counts.update({"truncated": loaded.num_truncated, "shards": loaded.shards_started})
        self._local_samples_seen[self._sources[loaded.source_index]] += loaded.num_samples

    def local_counts(self) -> list[float]:
        """Return the counts of this process since the last call, in a fixed order, to be summed over all processes."""
        counts = [self._local_counts[name] for name in self._names]
        counts += [self._local_samples_seen[name] for name in self._sources]
        self._local_counts.clear()
        self._local_samples_seen.clear()
        return [float(count) for count in counts]

    def end_step(self, sums: Sequence[int]) -> None:
        """Add the counts of a step.

        Args:
            sums: the sum of :meth:`local_counts` over all processes.
        """
        self._step_counts = Counter(dict(zip(self._names, sums, strict=False)))
        samples = dict(zip(self._sources, sums[len(self._names) :], strict=True))
        self._counts.update(self._step_counts)
        self._samples_seen.update(samples)
        used_sources = [name for name, number in samples.items() if number]
        self.step_source = used_sources[0] if len(used_sources) == 1 and len(samples) > 1 else None

    @property
    def num_skipped(self) -> int:
        """Number of records skipped so far."""
        return _num_skipped(self._counts)

    @property
    def num_truncated(self) -> int:
        """Number of captions truncated so far."""
        return self._counts["truncated"]

    def metrics(self) -> dict[str, Any]:
        """Return all counts so far, for the metrics file and for a checkpoint.

        Returns:
            ``samples_seen``: samples of each source, by its name; ``skipped``: skipped records, and ``skipped_REASON``
            for each of :data:`SKIP_REASONS`; ``truncated``: truncated captions; ``shards``: shards that were started;
            and ``source``, which is :attr:`step_source`, unless that is None.
        """
        source = {} if self.step_source is None else {"source": self.step_source}
        return {**source, "samples_seen": dict(self._samples_seen), "skipped": self.num_skipped, **self._counts}

    def log_skipped(self, step: int, file: JsonlLog, display: Display, max_length: int) -> None:
        """Write the records that were skipped in the last step to a file, and show the first ones of the run.

        All processes must call it.

        Args:
            step: number of the step.
            file: the file of skipped records.
            display: the terminal, on which :data:`MAX_DISPLAYED_SKIPS` records are shown.
            max_length: ``data.max_length``, for the message about the first truncated caption.
        """
        skipped_now = _num_skipped(self._step_counts)
        if skipped_now:  # the same in all processes, so all or none take part in the gathering
            local, self._skipped = self._skipped, []
            skipped = [record for rank_skipped in all_gather_objects(local) for record in rank_skipped]
            for number, record in enumerate(skipped, self.num_skipped - skipped_now):
                file.write({"step": step, "reason": record.reason, "key": record.key, "message": record.message})
                if number < MAX_DISPLAYED_SKIPS:
                    display.log(f"skipped {record}")
                elif number == MAX_DISPLAYED_SKIPS:
                    display.log(f"further skipped records are listed in {file.path} only")
        if self.num_truncated and self.num_truncated == self._step_counts["truncated"]:
            display.log(
                f"a caption is longer than data.max_length ({max_length} tokens) and was truncated; further truncated"
                " captions are only counted"
            )

    def check_bad_fraction(self, max_bad_fraction: float, file: Path) -> None:
        """Stop if too many samples or shards are bad.

        Args:
            max_bad_fraction: the largest allowed fraction, in [0, 1].
            file: the file of skipped records, for the error message.

        Raises:
            InputError: the fraction of skipped samples, or of damaged shards, exceeds `max_bad_fraction`.
        """
        for bad, total, minimum, what in (
            (self.num_skipped, self._samples_seen.total(), MIN_SAMPLES, "samples"),
            (self._counts["skipped_shard"], self._counts["shards"], MIN_SHARDS, "shards"),
        ):
            if total >= minimum and bad > max_bad_fraction * total:
                reasons = ", ".join(
                    f"{reason} {count}" for reason in SKIP_REASONS if (count := self._counts[f"skipped_{reason}"])
                )
                raise InputError(
                    f"{bad} of {total} {what} are bad, more than data.max_bad_fraction {max_bad_fraction:g} ({reasons};"
                    f" all are listed in {file}): fix the data, or raise data.max_bad_fraction, and rerun with --resume"
                )


def _num_skipped(counts: Counter[str]) -> int:
    return sum(counts[f"skipped_{reason}"] for reason in SKIP_REASONS)
