"""Statistics of CapFilt: collected unit by unit, merged, and shown in a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blip2.corpus.selection import Selection
from blip2.corpus.units import Unit, read_unit
from blip2.data.images import read_image
from blip2.data.shards import Sample, SkippedSample
from blip2.errors import InputError
from blip2.evaluation.report import Report, new_figure
from blip2.feature_cache.store import digest

BINS = np.linspace(-1, 1, 201)
"""Bin edges of the score histograms."""
MAX_EXAMPLES = 12
"""Number of images that the report shows with their captions."""
MAX_DROPPED = 4
"""Number of dropped captions that the report shows per image."""
MAX_LISTED = 20
"""Number of skipped images that the report lists; the ``.stats.json`` files list all of them."""
ORIGINS = ("original", "generated")


class CapFiltStats:
    """Statistics of one unit or of all units. Their size after merging is bounded."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._dropped_by_origin: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._listed: list[Sequence[str]] = []
        self._histograms = {
            f"{origin}, {decision}": np.zeros(len(BINS) - 1, np.int64)
            for origin in ORIGINS
            for decision in ("kept", "dropped")
        }
        self.examples: list[dict[str, Any]] = []
        """Examples for the report, selected by a digest, so that the order of the units does not matter."""

    @property
    def num_written(self) -> int:
        """Number of images with at least one kept caption."""
        return self._counts["written"]

    def add(self, unit: str, sample: Sample, selection: Selection, seed: int) -> None:
        """Add an image whose captions were ranked.

        Args:
            unit: name of the unit of the image.
            sample: the image.
            selection: its kept and dropped captions.
            seed: determines which images become examples.
        """
        dropped = tuple(caption for caption, _ in selection.dropped)
        self._counts["images"] += 1
        self._counts["written"] += bool(selection.kept)
        self._counts["with an original"] += any(caption.is_original for caption in (*selection.kept, *dropped))
        self._counts["with an original kept"] += any(caption.is_original for caption in selection.kept)
        self._counts["with an original as the best"] += bool(selection.kept) and selection.kept[0].is_original
        for decision, captions in (("kept", selection.kept), ("dropped", dropped)):
            for caption in captions:
                name = f"{ORIGINS[not caption.is_original]}, {decision}"
                self._counts[f"captions, {name}"] += 1
                index = int(np.searchsorted(BINS, caption.score, side="right")) - 1
                self._histograms[name][min(max(index, 0), len(BINS) - 2)] += 1
        self._dropped.update(reason for _, reason in selection.dropped)
        self._dropped_by_origin.update(
            f"{ORIGINS[not caption.is_original]}, {reason}" for caption, reason in selection.dropped
        )
        if not selection.kept:
            self.add_skipped([SkippedSample(sample.key, "no caption left", "the rules keep none of its captions")])
            return
        example = {
            "order": digest(f"{seed} {unit} {sample.key}".encode()),
            "unit": unit,
            "key": sample.key,
            "kept": [[c.text, round(c.score, 4), c.is_original] for c in selection.kept],
            "dropped": [[c.text, round(c.score, 4), c.is_original, reason] for c, reason in selection.dropped],
        }
        self._add_examples([example])

    def add_skipped(self, skipped: Sequence[SkippedSample]) -> None:
        """Add samples that cannot be used."""
        for sample in skipped:
            self._skipped[sample.reason] += 1
            self._listed.append([sample.key, sample.message])

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics as JSON-serializable values, for :meth:`merge`."""
        return {
            "images": self._counts["images"],
            "counts": dict(self._counts),
            "dropped": dict(self._dropped),
            "dropped_by_origin": dict(self._dropped_by_origin),
            "skipped": dict(self._skipped),
            "listed": self._listed,
            "histograms": {name: counts.tolist() for name, counts in self._histograms.items()},
            "examples": self.examples,
        }

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add the result of :meth:`to_dict` of other statistics."""
        self._counts.update(other["counts"])
        self._dropped.update(other["dropped"])
        self._dropped_by_origin.update(other["dropped_by_origin"])
        self._skipped.update(other["skipped"])
        self._listed = [*self._listed, *other["listed"]][:MAX_LISTED]
        for name, counts in other["histograms"].items():
            self._histograms[name] += np.array(counts)
        self._add_examples(other["examples"])

    def _add_examples(self, examples: Sequence[dict[str, Any]]) -> None:
        self.examples = sorted([*self.examples, *examples], key=lambda example: example["order"])[:MAX_EXAMPLES]

    def metrics(self) -> dict[str, Any]:
        """Return ``counts``, ``dropped`` and ``skipped`` by reason, ``keep_rates`` and ``dropped_by_origin``,
        ``skipped_first`` and ``mean_scores``, for JSON. An origin is ``original`` or ``generated``."""
        return {
            "counts": dict(sorted(self._counts.items())),
            "dropped": dict(sorted(self._dropped.items())),
            "dropped_by_origin": dict(sorted(self._dropped_by_origin.items())),
            "keep_rates": {origin: self._keep_rate(origin) for origin in ORIGINS},
            "skipped": dict(sorted(self._skipped.items())),
            "skipped_first": self._listed[:MAX_LISTED],
            "mean_scores": {name: self._mean(name) for name in self._histograms},
        }

    def _keep_rate(self, origin: str) -> float | None:
        """Return the share of the captions of an origin that are kept; None if there are no such captions."""
        kept, dropped = (self._counts[f"captions, {origin}, {decision}"] for decision in ("kept", "dropped"))
        return round(kept / (kept + dropped), 4) if kept + dropped else None

    def _mean(self, name: str) -> float | None:
        counts = self._histograms[name]
        return round(float(counts @ (BINS[1:] + BINS[:-1]) / 2 / counts.sum()), 4) if counts.any() else None

    def plot(self) -> Any:
        """Plot the scores of kept and dropped captions, in a panel for original and a panel for generated captions.

        Returns:
            The matplotlib figure.

        Raises:
            InputError: matplotlib is not installed.
        """
        used = np.flatnonzero(sum(self._histograms.values()))
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, len(BINS) - 1)
        figure = new_figure(8.0, 3.0)
        for i, origin in enumerate(ORIGINS, 1):
            axes = figure.add_subplot(1, 2, i)
            kept, dropped = (self._histograms[f"{origin}, {decision}"][first:last] for decision in ("kept", "dropped"))
            left = BINS[first:last]
            axes.bar(left, kept, width=0.01, align="edge", color="#2a7f4f", label="kept")
            axes.bar(left, dropped, width=0.01, align="edge", bottom=kept, color="#d0a0a0", label="dropped")
            axes.set_title(f"{origin} captions", fontsize=10)
            axes.set_xlabel("cosine similarity with the image", fontsize=9)
            axes.legend(fontsize=8)
        return figure


def write_capfilt_report(folder: Path, metrics: Mapping[str, Any], stats: CapFiltStats, units: Sequence[Unit]) -> None:
    """Write ``report.html`` with counts, scores, and example images with their captions.

    Args:
        folder: the folder of the report and of the output shards.
        metrics: the content of ``metrics.json``.
        stats: the merged statistics of all units.
        units: the units of the corpus.
    """
    report = Report(
        "Bootstrapped captions",
        f"{len(units)} shards of {metrics['data']}; captions by {metrics['captioner']}, ranked by {metrics['ranker']}.",
    )
    counts = metrics["counts"]
    report.section("Counts")
    images = {name: count for name, count in counts.items() if "captions" not in name}
    captions = {name.removeprefix("captions, "): counts[name] for name in counts if name not in images}
    for title, numbers in (
        ("images", images), ("captions", captions), ("reasons for dropped captions", metrics["dropped"]),
        ("reasons for skipped images", metrics["skipped"]),
    ):  # fmt: skip
        if numbers:
            report.table([title, ""], [(name, f"{number:,}") for name, number in numbers.items()])
    report.section("Keep rates", "Captions by their source: those of the corpus, and those of the captioner.")
    report.table(*_keep_table(metrics))
    if "check" in metrics:
        check = metrics["check"]
        text = f"{check['reason']}. Stage 1 was trained for {check['steps']} steps on each."
        report.section("Check on held-out pairs", text[0].upper() + text[1:])
        report.table(
            [f"R@1 on {check['held_out']}, %", *(f"run {i + 1}" for i in range(len(check["before"])))],
            [[side, *(f"{100 * value:.1f}" for value in check[side])] for side in ("before", "after")],
        )
    if metrics["skipped"]:
        listed = "; ".join(f"{key}: {message}" for key, message in metrics["skipped_first"])
        report.section("Skipped", f"{listed}. The .stats.json files of the shards list all skipped images.")
    report.section("Scores")
    try:
        report.plot(stats.plot(), "histograms of scores")
    except InputError as error:
        report.section("No plot", str(error))
    report.section("Examples", "Drawn at random. Green: kept. Red: the best dropped captions.")
    report.cards([_card(folder, example) for example in stats.examples])
    report.save(folder / "report.html")


def _keep_table(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of the table of keep rates: a row per origin, with a column for each reason."""
    counts, dropped = metrics["counts"], metrics["dropped_by_origin"]
    rows = []
    for origin in ORIGINS:
        kept, rest = (counts.get(f"captions, {origin}, {decision}", 0) for decision in ("kept", "dropped"))
        rate = metrics["keep_rates"][origin]
        by_reason = [f"{dropped.get(f'{origin}, {reason}', 0):,}" for reason in metrics["dropped"]]
        rows.append(
            [origin, f"{kept + rest:,}", f"{kept:,}", "-" if rate is None else f"{100 * rate:.1f} %", *by_reason]
        )
    return ["captions", "number", "kept", "keep rate", *(f"dropped: {reason}" for reason in metrics["dropped"])], rows


def _card(folder: Path, example: Mapping[str, Any]) -> tuple[Any, list[tuple[str, str]]]:
    shard = Unit(example["unit"], str(folder / f"{example['unit']}.tar"))
    sample = next(s for s in read_unit(shard) if isinstance(s, Sample) and s.key == example["key"])

    def line(text: str, score: float, is_original: bool, reason: str = "") -> str:
        return f"{score:.2f} {text}" + " (original)" * is_original + (f" - {reason}" if reason else "")

    kept = [("right", line(*caption)) for caption in example["kept"]]
    return read_image(sample.image), kept + [("wrong", line(*caption)) for caption in example["dropped"][:MAX_DROPPED]]
