"""Score the captions of a corpus against their images: one JSONL file per shard."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from blip2.config import Precision, ScoreName
from blip2.corpus.job import Worker, run_job
from blip2.corpus.models import resolve_checkpoint, stored_itm_temperature, weights_version
from blip2.corpus.options import LOCAL, Engine
from blip2.corpus.units import Unit, list_units, read_batches
from blip2.data.shards import Sample, SkippedSample
from blip2.io import atomic_write, convert_os_errors, expand_home, write_json
from blip2.pipelines import GenerationPipeline, RepresentationPipeline, Scores, load
from blip2.pipelines.scoring import LIKELIHOODS, TextLengthError

SKIPPED_FILE = "skipped.jsonl"


def score_corpus(
    model: str,
    data: str,
    output: str | Path,
    by: ScoreName = "itm",
    *,
    prompt: str | None = None,
    shard_size: int = 1000,
    engine: Engine = LOCAL,
    device: str | None = None,
    dtype: Precision | None = None,
    overrides: dict[str, object] | None = None,
) -> dict[str, Any]:
    """Score each image of a corpus with its own captions.

    One file, ``NAME.jsonl``, is written for each shard, with one object per image in the order of the corpus: ``key``,
    ``captions`` and ``scores``, and for likelihoods ``num_tokens``. The key is that of the sample in its shard, or the
    number of the record if the corpus has no shards; it is the key that :func:`~blip2.corpus.embed.embed_corpus`
    writes. If an interrupted run is started again, it resumes where it stopped.

    Args:
        model: a checkpoint of any format that :func:`blip2.pipelines.load` reads, of the stage that has the score.
        data: a source that ``data.train`` of a recipe may name.
        output: folder of the results.
        by: the score: ``itc``, ``itm`` or ``itg`` of stage 1, ``lm`` or ``pmi`` of stage 2
            (:mod:`blip2.pipelines.scoring`).
        prompt: text that each caption continues, for ``lm`` and ``pmi``. None: the prompt with which the model was
            trained.
        shard_size: images per output file, if the corpus has no shards.
        engine: where the work is done.
        device: device to run on. None: a GPU if there is one.
        dtype: data type of the frozen parts. None: the dtype in the model's config, else bf16 on a CUDA GPU and fp32 on
            other devices.
        overrides: keys of the model's config to override.

    Returns:
        The content of ``metrics.json``: the settings, the number of ``images`` and ``texts``, the ``mean_score`` of the
        texts (None without texts), and the number of ``skipped`` samples by reason. ``skipped.jsonl`` names them.

    Raises:
        InputError: the model or the data cannot be read, the model has no such score or needs a prompt, or `output`
            cannot be written or holds the results of another model, data set or setting.
    """
    folder = expand_home(output)
    job = ScoreJob(resolve_checkpoint(model), str(folder.absolute()), by, prompt, device, dtype, overrides)
    metadata = {
        "pass": "score", "model": job.model, "weights_version": weights_version(job.model), "data": data, "by": by,
        "shard_size": shard_size, "prompt": prompt, "dtype": dtype, "overrides": overrides or None,
        **(stored_itm_temperature(job.model) if by == "itm" else {}),
    }  # fmt: skip
    totals: dict[str, Any] = {"images": 0, "texts": 0, "skipped": {}}
    total, lines = 0.0, []
    for result in run_job(job, list_units(data, shard_size), folder, metadata, engine, "score"):
        totals["images"] += result["images"]
        totals["texts"] += result["texts"]
        total += result["total"]
        for sample, reason, message in result["skipped"]:
            totals["skipped"][reason] = totals["skipped"].get(reason, 0) + 1
            lines.append(_to_line({"sample": sample, "reason": reason, "message": message}))
    with convert_os_errors(folder / SKIPPED_FILE), atomic_write(folder / SKIPPED_FILE) as file:
        file.write(b"".join(lines))
    metrics = {**metadata, **totals, "mean_score": total / totals["texts"] if totals["texts"] else None}
    with convert_os_errors(folder / "metrics.json"):
        write_json(folder / "metrics.json", metrics)
    return metrics


@dataclass(frozen=True)
class ScoreJob:
    """Scoring as a :class:`~blip2.corpus.job.Job`."""

    model: str
    output: str
    by: ScoreName
    prompt: str | None = None
    device: str | None = None
    dtype: Precision | None = None
    overrides: dict[str, object] | None = None

    def worker(self) -> Worker:
        """Load the model and return a worker."""
        stage = "representation" if self.by in RepresentationPipeline.score_names else "generation"
        pipeline = load(self.model, self.device, self.dtype, overrides=self.overrides, stage=stage)
        return ScoreWorker(pipeline, self.by, self.prompt, Path(self.output))


class ScoreWorker:
    """Scores the captions of one unit after another."""

    def __init__(
        self, pipeline: RepresentationPipeline | GenerationPipeline, by: ScoreName, prompt: str | None, folder: Path
    ) -> None:
        self._pipeline, self._by, self._prompt, self._folder = pipeline, by, prompt, folder

    def __call__(self, unit: Unit) -> dict[str, Any]:
        """Write the file of a unit.

        Returns:
            The number of ``images`` and ``texts``, the ``total`` of the scores, and the ``skipped`` samples.
        """
        skipped: list[SkippedSample] = []
        images, texts, total = 0, 0, 0.0
        path = self._folder / f"{unit.name}.jsonl"
        with convert_os_errors(path), atomic_write(path) as file:
            for batch in read_batches(unit, self._pipeline.batch_size, skipped):
                for sample, scores in self._score(unit, batch, skipped):
                    row: dict[str, Any] = {"key": sample.key, "captions": list(sample.captions)}
                    row["scores"] = [round(value, 6) for value in scores.values.tolist()]
                    if self._by in LIKELIHOODS:
                        row["num_tokens"] = [] if scores.num_tokens is None else scores.num_tokens.tolist()
                    file.write(_to_line(row))
                    images, texts = images + 1, texts + len(sample.captions)
                    total += float(scores.values.double().sum())
        return {"images": images, "texts": texts, "total": total, "skipped": skipped}

    def _score(
        self, unit: Unit, batch: Sequence[tuple[Sample, Image]], skipped: list[SkippedSample]
    ) -> Iterator[tuple[Sample, Scores]]:
        """Yield each sample of a batch with the scores of its captions.

        A sample whose caption is too long for the LLM is appended to `skipped`; the others are then scored one by one.
        """
        texts = [text for sample, _ in batch for text in sample.captions]
        sizes = [len(sample.captions) for sample, _ in batch]
        if not texts:
            yield from ((sample, Scores(torch.empty(0))) for sample, _ in batch)
            return
        image_index = torch.arange(len(batch)).repeat_interleave(torch.tensor(sizes)).tolist()
        try:
            scores = self._pipeline.score(
                [image for _, image in batch], texts, self._by, image_index=image_index, prompt=self._prompt
            )
        except TextLengthError as error:
            if len(batch) == 1:
                (sample, _) = batch[0]
                skipped.append(SkippedSample(f"{sample.key} in {unit.source}", "caption too long", str(error)))
                return
            for each in batch:
                yield from self._score(unit, [each], skipped)
            return
        values = scores.values.split(sizes)
        counts = [None] * len(batch) if scores.num_tokens is None else scores.num_tokens.split(sizes)
        for (sample, _), each, count in zip(batch, values, counts, strict=True):
            yield sample, Scores(each, count)


def _to_line(row: dict[str, Any]) -> bytes:
    """Return a line of JSONL. Names that are not UTF-8 become escapes of JSON."""
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
