"""What happened in CapFilt: counted unit by unit, added up, and shown on a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blip2.corpus.selection import Chosen
from blip2.corpus.tar_shards import Sample, Skipped, Unit, read_unit
from blip2.data.images import read_image
from blip2.errors import InputError
from blip2.evaluation.report import Report, new_figure
from blip2.feature_cache.store import digest

BINS = np.linspace(-1, 1, 201)
"""Of the histograms of scores."""
EXAMPLES = 12
"""Pictures that are shown with their captions."""
DROPPED = 4
"""Dropped captions that are shown of each."""
NAMED = 20
"""So many skipped pictures stand in the report; the others in the stats of their shards."""


class Summary:
    """Counts of a unit, or of all. What it holds does not grow with the corpus."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._named: list[list[str]] = []
        self._histograms = {
            f"{whose}, {what}": np.zeros(len(BINS) - 1, np.int64)
            for whose in ("original", "generated")
            for what in ("kept", "dropped")
        }
        self.examples: list[dict[str, Any]] = []
        """Drawn by a digest, so that it does not matter who counts what."""

    @property
    def written(self) -> int:
        """Pictures with a caption that stayed."""
        return self._counts["written"]

    def count(self, unit: str, sample: Sample, chosen: Chosen, seed: int) -> None:
        """A picture whose captions were ranked."""
        self._counts["pictures"] += 1
        self._counts["written"] += bool(chosen.kept)
        self._counts["with an original"] += any(c.is_original for c in (*chosen.kept, *(c for c, _ in chosen.dropped)))
        self._counts["with an original kept"] += any(caption.is_original for caption in chosen.kept)
        self._counts["with an original as the best"] += bool(chosen.kept) and chosen.kept[0].is_original
        for what, captions in (("kept", chosen.kept), ("dropped", tuple(caption for caption, _ in chosen.dropped))):
            for caption in captions:
                name = f"{'original' if caption.is_original else 'generated'}, {what}"
                self._counts[f"captions, {name}"] += 1
                at = int(np.searchsorted(BINS, caption.score, side="right")) - 1
                self._histograms[name][min(max(at, 0), len(BINS) - 2)] += 1
        for _, cause in chosen.dropped:
            self._dropped[cause] += 1
        if not chosen.kept:
            self.skip([Skipped(sample.key, "no caption left", "no caption is within the limits")])
            return
        example = {
            "order": digest(f"{seed} {unit} {sample.key}".encode()),
            "unit": unit,
            "key": sample.key,
            "kept": [[c.text, round(c.score, 4), c.is_original] for c in chosen.kept],
            "dropped": [[c.text, round(c.score, 4), c.is_original, cause] for c, cause in chosen.dropped],
        }
        self._show([example])

    def skip(self, skipped: Sequence[Skipped]) -> None:
        """What could not be used."""
        for each in skipped:
            self._skipped[each.cause] += 1
            self._named.append([each.key, each.why])

    def told(self) -> dict[str, Any]:
        """All of it, for JSON, with the number of pictures first."""
        return {
            "pictures": self._counts["pictures"],
            "counts": dict(self._counts),
            "dropped": dict(self._dropped),
            "skipped": dict(self._skipped),
            "named": self._named,
            "histograms": {name: counts.tolist() for name, counts in self._histograms.items()},
            "examples": self.examples,
        }

    def add(self, told: Mapping[str, Any]) -> None:
        """What another one told."""
        self._counts.update(told["counts"])
        self._dropped.update(told["dropped"])
        self._skipped.update(told["skipped"])
        self._named = [*self._named, *told["named"]][:NAMED]
        for name, counts in told["histograms"].items():
            self._histograms[name] += np.array(counts)
        self._show(told["examples"])

    def _show(self, examples: Sequence[dict[str, Any]]) -> None:
        self.examples = sorted([*self.examples, *examples], key=lambda example: example["order"])[:EXAMPLES]

    def metrics(self) -> dict[str, Any]:
        """The numbers alone, and some of what was skipped."""
        return {
            "counts": dict(sorted(self._counts.items())),
            "dropped": dict(sorted(self._dropped.items())),
            "skipped": dict(sorted(self._skipped.items())),
            "skipped_first": self._named[:NAMED],
            "mean_scores": {name: self._mean(name) for name in self._histograms},
        }

    def _mean(self, name: str) -> float | None:
        counts = self._histograms[name]
        return round(float(counts @ (BINS[1:] + BINS[:-1]) / 2 / counts.sum()), 4) if counts.any() else None

    def plot(self) -> Any:
        """A panel for what was there and one for what was written: scores of what stayed and of what did not."""
        used = np.flatnonzero(sum(self._histograms.values()))
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, len(BINS) - 1)
        figure = new_figure(8.0, 3.0)
        for number, whose in enumerate(("original", "generated"), 1):
            axes = figure.add_subplot(1, 2, number)
            parts = [self._histograms[f"{whose}, {what}"][first:last] for what in ("kept", "dropped")]
            left = BINS[first:last]
            axes.bar(left, parts[0], width=0.01, align="edge", color="#2a7f4f", label="kept")
            axes.bar(left, parts[1], width=0.01, align="edge", bottom=parts[0], color="#d0a0a0", label="dropped")
            axes.set_title(f"{whose} captions", fontsize=10)
            axes.set_xlabel("cosine with the picture", fontsize=9)
            axes.legend(fontsize=8)
        return figure


def write_report(folder: Path, metrics: Mapping[str, Any], summary: Summary, units: Sequence[Unit]) -> None:
    """``report.html``: how many originals stayed, scores, and pictures with their captions."""
    report = Report(
        "Captions bootstrapped",
        f"{len(units)} shards of {metrics['data']}; captions by {metrics['captioner']}, ranked by {metrics['ranker']}.",
    )
    counts = metrics["counts"]
    report.section("Counts")
    pictures = {name: count for name, count in counts.items() if "captions" not in name}
    captions = {name.removeprefix("captions, "): counts[name] for name in counts if name not in pictures}
    for title, numbers in (
        ("of pictures", pictures), ("of captions", captions), ("why captions were dropped", metrics["dropped"]),
        ("why pictures were skipped", metrics["skipped"]),
    ):  # fmt: skip
        if numbers:
            report.table([title, ""], [(name, f"{number:,}") for name, number in numbers.items()])
    if metrics["skipped"]:
        first = "; ".join(f"{key}: {why}" for key, why in metrics["skipped_first"])
        report.section("Skipped", f"{first}. All of them stand in the .stats.json of their shards.")
    report.section("Scores")
    try:
        report.plot(summary.plot(), "histograms of scores")
    except InputError as error:
        report.section("No plot", str(error))
    report.section("Examples", "Drawn at random. Green: kept. Red: dropped, the best of them.")
    report.cards([_card(folder, example) for example in summary.examples])
    report.save(folder / "report.html")


def _card(folder: Path, example: Mapping[str, Any]) -> tuple[Any, list[tuple[str, str]]]:
    shard = Unit(example["unit"], str(folder / f"{example['unit']}.tar"))
    sample = next(s for s in read_unit(shard) if isinstance(s, Sample) and s.key == example["key"])

    def line(text: str, score: float, is_original: bool, cause: str = "") -> str:
        return f"{score:.2f} {text}" + " (original)" * is_original + (f" - {cause}" if cause else "")

    kept = [("right", line(*caption)) for caption in example["kept"]]
    return read_image(sample.image), kept + [("wrong", line(*caption)) for caption in example["dropped"][:DROPPED]]
