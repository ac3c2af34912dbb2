"""CapFilt: bootstrap the captions of a corpus (paper §3.4, after BLIP).

A captioner generates N captions of every image, a ranker compares them and the original captions with the image, and
the best K are kept. Training then draws one of them at each step.

Sampling for an image depends only on the seed and the bytes of the image. The last digits of the outputs of a network
may depend on the batch, so a batch never contains images of two units, and all engines form the same batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from blip2.config import Precision
from blip2.corpus.check import check_recipe, check_round
from blip2.corpus.job import Worker, run_job
from blip2.corpus.models import (
    Blip2Captioner,
    Blip2Ranker,
    Captioner,
    Ranker,
    open_captioner,
    open_ranker,
    resolve_checkpoint,
    stored_itm_temperature,
    weights_version,
)
from blip2.corpus.options import LOCAL, NO_CHECK, CapFiltConfig, Check, Engine
from blip2.corpus.report import CapFiltStats, write_capfilt_report
from blip2.corpus.selection import Caption, Selection, load_language_detector, select_captions
from blip2.corpus.units import Unit, list_units, read_batches
from blip2.data.cells import CellError, read_text
from blip2.data.shards import Sample, ShardWriter, SkippedSample
from blip2.errors import InputError
from blip2.feature_cache.store import digest
from blip2.io import atomic_write, convert_os_errors, expand_home, write_json
from blip2.recipe import find_recipe, load_recipe


def capfilt(
    captioner: str,
    ranker: str,
    data: str,
    output: str | Path,
    config: CapFiltConfig | None = None,
    *,
    engine: Engine = LOCAL,
    check: Check = NO_CHECK,
    device: str | None = None,
    dtype: Precision | None = None,
) -> dict[str, Any]:
    """Bootstrap the captions of a corpus; write shards, ``metrics.json`` and ``report.html`` to a folder.

    If an interrupted run is started again, it resumes where it stopped.

    Args:
        captioner: stage-2 model of any format, or a captioning model of transformers (BLIP, GIT ...).
        ranker: stage-1 model of any format, or a dual encoder of transformers (CLIP, SigLIP ...).
        data: the corpus: any source that ``data.train`` of a recipe may name (docs/data.md). There is one output shard
            for each input shard.
        output: folder for shards (.tar), metrics.json and report.html.
        config: the options. None: the defaults.
        engine: where the work is done.
        check: how the round is checked on held-out pairs.
        device: device to run on. None: a GPU if there is one.
        dtype: data type of the frozen parts, or of all weights of a model of transformers. None: the dtype in the
            model's config, else bf16 on a CUDA GPU and fp32 on other devices.

    Returns:
        The content of ``metrics.json``: the settings, counts of images and captions, mean scores, and the result of the
        check. A round that ``metrics["check"]["accepted"]`` refuses makes a model worse than the captions before it.

    Raises:
        InputError: a model or the data cannot be read, a model cannot compute the scores of a filter, the recipe of the
            check does not evaluate retrieval, or `output` cannot be written or holds the results of another model, data
            set or setting.
    """
    config, folder = config or CapFiltConfig(), expand_home(output)
    load_language_detector(config.rules.language)  # fails early if the extra is missing
    recipe = None if check.recipe is None else load_recipe(find_recipe(check.recipe))
    if recipe is not None:
        check_recipe(recipe)
    units = list_units(data, config.shard_size)
    job = CapFiltJob(
        resolve_checkpoint(captioner), resolve_checkpoint(ranker), str(folder.absolute()), config, device, dtype
    )
    metadata = {
        "pass": "capfilt", "captioner": job.captioner, "captioner_version": weights_version(job.captioner),
        "ranker": job.ranker, "ranker_version": weights_version(job.ranker), "data": data, "dtype": dtype,
        "config": asdict(config), "transformers": version("transformers"), "torch": version("torch"),
        **({} if config.rules.min_itm is None else stored_itm_temperature(job.ranker)),
    }  # fmt: skip
    stats = CapFiltStats()
    for result in run_job(job, units, folder, metadata, engine, "capfilt"):
        stats.merge(result)
    metrics = {**metadata, **stats.metrics()}
    if recipe is not None:
        after = str(folder / "*.tar")
        metrics["check"] = check_round(recipe, data, after, folder / "check", check.runs)
    write_capfilt_report(folder, metrics, stats, units)
    with convert_os_errors(folder / "metrics.json"):
        write_json(folder / "metrics.json", metrics)
    return metrics


@dataclass(frozen=True)
class CapFiltJob:
    """CapFilt as a :class:`~blip2.corpus.job.Job`."""

    captioner: str
    ranker: str
    output: str
    config: CapFiltConfig
    device: str | None = None
    dtype: Precision | None = None

    def worker(self) -> Worker:
        """Load both models and return a worker."""
        config = self.config
        captioner = open_captioner(self.captioner, config.decoding, config.prompt, self.device, self.dtype)
        ranker = open_ranker(self.ranker, self.device, self.dtype)
        if config.rules.min_itm is not None and not isinstance(ranker, Blip2Ranker):
            raise InputError(
                f"--min-itm needs a ranker with a matching head (ITM), but {self.ranker} is a dual encoder: give a"
                " model of stage 1, or leave out --min-itm"
            )
        if config.rules.min_pmi is not None and not isinstance(captioner, Blip2Captioner):
            raise InputError(
                f"--min-pmi needs a captioner of stage 2, but {self.captioner} is another model of transformers: give a"
                " model of stage 2, or leave out --min-pmi"
            )
        return CapFiltWorker(captioner, ranker, config, Path(self.output))


class CapFiltWorker:
    """Bootstraps the captions of one unit after another."""

    def __init__(self, captioner: Captioner, ranker: Ranker, config: CapFiltConfig, folder: Path) -> None:
        self._captioner, self._ranker, self._config, self._folder = captioner, ranker, config, folder
        self._language_of = load_language_detector(config.rules.language)

    def __call__(self, unit: Unit) -> dict[str, Any]:
        """Write the output shard of a unit, unless no image has a kept caption.

        Returns:
            The result of :meth:`CapFiltStats.to_dict` for the unit.
        """
        stats, skipped = CapFiltStats(), list[SkippedSample]()
        path = self._folder / f"{unit.name}.tar"
        with convert_os_errors(path), atomic_write(path) as file:
            shard = ShardWriter(file)
            for batch in read_batches(unit, self._config.batch_size, skipped):
                for sample, selection in self._select(batch):
                    stats.add(unit.name, sample, selection, self._config.seed)
                    if selection.kept:
                        shard.add(sample.key, sample.suffix, sample.image, to_metadata(selection))
            shard.close()
        if not stats.num_written:
            path.unlink()  # readers would report an empty shard as damaged
        stats.add_skipped(skipped)
        return stats.to_dict()

    def _select(self, batch: Sequence[tuple[Sample, Image]]) -> Iterator[tuple[Sample, Selection]]:
        samples, images = zip(*batch, strict=True)
        config, generated = self._config, [[] for _ in samples]
        if config.num_captions:
            uniforms = torch.from_numpy(np.concatenate([self._uniforms(sample) for sample in samples]))
            generated = self._captioner.generate(images, config.num_captions, uniforms)
        originals = [list(dict.fromkeys(sample.captions)) for sample in samples]
        texts = [[*old, *dict.fromkeys(_normalize(new))] for old, new in zip(originals, generated, strict=True)]
        captioned = [i for i, group in enumerate(texts) if group]
        captions: list[list[Caption]] = [[] for _ in texts]
        if captioned:
            shown, groups = [images[i] for i in captioned], [texts[i] for i in captioned]
            cosines = self._ranker.score(shown, groups)
            absent: list[list[Any]] = [[None] * len(group) for group in groups]
            itm, pmi = absent, absent
            if config.rules.min_itm is not None and isinstance(self._ranker, Blip2Ranker):
                itm = self._ranker.score_itm(shown, groups)
            if config.rules.min_pmi is not None and isinstance(self._captioner, Blip2Captioner):
                pmi = self._captioner.score_pmi(shown, groups)
            for i, group, *scores in zip(captioned, groups, cosines, itm, pmi, strict=True):
                captions[i] = [
                    Caption(text, score, number < len(originals[i]), match, information)
                    for number, (text, score, match, information) in enumerate(zip(group, *scores, strict=True))
                ]
        for sample, group in zip(samples, captions, strict=True):
            yield sample, select_captions(group, config.rules, self._language_of)

    def _uniforms(self, sample: Sample) -> np.ndarray:
        """Return numbers in [0, 1), one per token to generate, that depend only on the seed and the image's bytes."""
        generator = np.random.default_rng([self._config.seed, int(digest(sample.image), 16)])
        return generator.random((self._config.num_captions, self._config.decoding.max_new_tokens))


def _normalize(texts: Iterable[str]) -> Iterator[str]:
    """Collapse whitespace, and drop captions that training cannot read."""
    for text in texts:
        with suppress(CellError):
            if caption := read_text(text):
                yield caption


def to_metadata(selection: Selection) -> dict[str, Any]:
    """Return the metadata of an image, which is stored as the ``.json`` member of its sample in the output shard.

    Returns:
        Lists of equal length: the kept ``captions``, their ``scores``, rounded to 6 decimals, for each caption whether
        it is an ``original`` caption, and, if captions are filtered by them, ``itm`` and ``pmi``.
    """
    metadata: dict[str, Any] = {
        "captions": [caption.text for caption in selection.kept],
        "scores": [round(caption.score, 6) for caption in selection.kept],
        "original": [caption.is_original for caption in selection.kept],
    }
    for name in ("itm", "pmi"):
        values = [getattr(caption, name) for caption in selection.kept]
        if None not in values:
            metadata[name] = [round(value, 6) for value in values]
    return metadata
