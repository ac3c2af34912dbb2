"""CapFilt: captions are bootstrapped (paper §3.4, and BLIP).

A captioner writes N captions of every picture, a ranker compares them and the original with the picture, and the best K
stay, of which training draws one at each step.

What is sampled for a picture is decided by the seed and the bytes of the picture, not by what lies beside it. The last
digit of a network's output may depend on the batch, so batches are cut within a unit, the same ones whoever does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from blip2.config import Precision
from blip2.corpus.job import HERE, Engine, Worker, do_units
from blip2.corpus.models import Captioner, Ranker, open_captioner, open_ranker, pin
from blip2.corpus.report import Summary, write_report
from blip2.corpus.selection import Caption, Chosen, Rules, choose, read_language
from blip2.corpus.tar_shards import Sample, ShardWriter, Skipped, Unit, batches, list_units
from blip2.data.cells import CellError, read_text
from blip2.decoding.search import Decoding
from blip2.errors import InputError
from blip2.feature_cache.store import digest
from blip2.io import explained, output_path, write_json, written

SAMPLING = Decoding(top_p=0.9)
"""How captions are written unless said otherwise: BLIP's nucleus sampling."""


@dataclass(frozen=True)
class Settings:
    """How captions are bootstrapped."""

    captions: int = 10
    """N, written of each picture (§3.4)."""
    decoding: Decoding = SAMPLING
    """How they are written."""
    prompt: str | None = None
    """Text that they go on from; None: the captioner's own."""
    rules: Rules = field(default_factory=Rules)
    """Which captions stay."""
    seed: int = 0
    """Of sampling."""
    batch_size: int = 16
    """Pictures that go through the networks together."""
    shard_size: int = 1000
    """Pictures an output shard, where the corpus has no shards of its own."""

    def __post_init__(self) -> None:
        for name, smallest in (("captions", 0), ("batch_size", 1), ("shard_size", 1), ("seed", 0)):
            if getattr(self, name) < smallest:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least {smallest}")
        if self.decoding.top_p is None and self.captions > 1 and self.decoding.num_beams < self.captions:
            raise InputError(
                f"{self.captions} captions of {self.decoding.num_beams} beams are not to be had: take as many beams, or"
                " sample them"
            )


def capfilt(
    captioner: str,
    ranker: str,
    data: str,
    output: str | Path,
    settings: Settings | None = None,
    *,
    engine: Engine = HERE,
    device: str | None = None,
    dtype: Precision | None = None,
) -> dict[str, Any]:
    """Bootstrap the captions of a corpus; shards, ``metrics.json`` and ``report.html`` go to `output`.

    A pass that was killed goes on where it was, and what was done is not done again.

    Args:
        captioner: see :func:`open_captioner`.
        ranker: see :func:`open_ranker`.
        data: what ``data.train`` of a recipe may say. Each shard gives one; of the rest, so many pictures do.

    Returns:
        What is in ``metrics.json``.

    Raises:
        InputError: a model or the data cannot be read, or `output` belongs to another pass.
    """
    settings, folder = settings or Settings(), output_path(output)
    read_language(settings.rules.language)  # a missing extra is better found now than in a worker
    units = list_units(data, settings.shard_size)
    work = CapFilt(pin(captioner), pin(ranker), str(folder.absolute()), settings, device, dtype)
    about = {
        "pass": "capfilt", "captioner": work.captioner, "ranker": work.ranker, "data": data, "dtype": dtype,
        "settings": asdict(settings), "transformers": version("transformers"), "torch": version("torch"),
    }  # fmt: skip
    summary = Summary()
    for told in do_units(work, units, folder, about, engine, "capfilt"):
        summary.add(told)
    metrics = {**about, **summary.metrics()}
    write_report(folder, metrics, summary, units)
    with explained(folder / "metrics.json"):
        write_json(folder / "metrics.json", metrics)
    return metrics


@dataclass(frozen=True)
class CapFilt:
    """The pass, for any engine."""

    captioner: str
    ranker: str
    output: str
    settings: Settings
    device: str | None = None
    dtype: Precision | None = None

    def worker(self) -> Worker:
        """Load both models."""
        settings = self.settings
        captioner = open_captioner(self.captioner, settings.decoding, settings.prompt, self.device, self.dtype)
        ranker = open_ranker(self.ranker, self.device, self.dtype)
        return Bootstrap(captioner, ranker, settings, Path(self.output))


class Bootstrap:
    """Does one unit after another."""

    def __init__(self, captioner: Captioner, ranker: Ranker, settings: Settings, folder: Path) -> None:
        self._captioner, self._ranker, self._settings, self._folder = captioner, ranker, settings, folder
        self._language_of = read_language(settings.rules.language)

    def __call__(self, unit: Unit) -> dict[str, Any]:
        """Write the shard of a unit, unless nothing is left for it; tells what :class:`Summary` adds up."""
        summary, skipped = Summary(), list[Skipped]()
        path = self._folder / f"{unit.name}.tar"
        with explained(path), written(path) as file:
            shard = ShardWriter(file)
            for batch in batches(unit, self._settings.batch_size, skipped):
                for sample, chosen in self._choose(batch):
                    summary.count(unit.name, sample, chosen, self._settings.seed)
                    if chosen.kept:
                        shard.add(sample, describe(chosen))
            shard.close()
        if not summary.written:
            path.unlink()  # an empty shard would be taken for a broken one
        summary.skip(skipped)
        return summary.told()

    def _choose(self, batch: Sequence[tuple[Sample, Image]]) -> Iterator[tuple[Sample, Chosen]]:
        samples, images = zip(*batch, strict=True)
        settings, new = self._settings, [[] for _ in samples]
        if settings.captions:
            dice = [self._dice(sample) for sample in samples]
            new = self._captioner.write(images, settings.captions, torch.from_numpy(np.concatenate(dice)))
        texts = [
            [*dict.fromkeys(sample.captions), *dict.fromkeys(_usable(mine))]
            for sample, mine in zip(samples, new, strict=True)
        ]
        spoken = [at for at, own in enumerate(texts) if own]
        scores: list[list[float]] = [[] for _ in texts]
        if spoken:
            ranked = self._ranker.rank([images[at] for at in spoken], [texts[at] for at in spoken])
            for at, own in zip(spoken, ranked, strict=True):
                scores[at] = own
        for sample, own, cosines in zip(samples, texts, scores, strict=True):
            originals = len(dict.fromkeys(sample.captions))
            captions = [
                Caption(text, score, n < originals) for n, (text, score) in enumerate(zip(own, cosines, strict=True))
            ]
            yield sample, choose(captions, settings.rules, self._language_of)

    def _dice(self, sample: Sample) -> np.ndarray:
        random = np.random.default_rng([self._settings.seed, int(digest(sample.image), 16)])
        return random.random((self._settings.captions, self._settings.decoding.max_new_tokens))


def _usable(texts: Iterable[str]) -> Iterator[str]:
    """Written captions that training can read, their whitespace collapsed."""
    for text in texts:
        with suppress(CellError):
            if caption := read_text(text):
                yield caption


def describe(chosen: Chosen) -> dict[str, Any]:
    """What stands in the ``.json`` beside a picture: fields of one kind, whatever was kept."""
    return {
        "captions": [caption.text for caption in chosen.kept],
        "scores": [round(caption.score, 6) for caption in chosen.kept],
        "original": [caption.is_original for caption in chosen.kept],
    }
