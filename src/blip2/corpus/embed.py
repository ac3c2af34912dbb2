"""Embed a corpus: one ``.safetensors`` file per shard.

Legend: I images, Q queries, T texts, C width of the contrastive embeddings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from blip2.config import Precision
from blip2.corpus.job import LOCAL, Engine, Worker, run_job
from blip2.corpus.models import resolve_checkpoint
from blip2.corpus.tar_shards import SkippedSample, Unit, list_units, read_batches
from blip2.io import atomic_write, convert_os_errors, expand_home, write_json
from blip2.pipelines import RepresentationPipeline, load


def embed_corpus(
    model: str,
    data: str,
    output: str | Path,
    *,
    shard_size: int = 1000,
    engine: Engine = LOCAL,
    device: str | None = None,
    dtype: Precision | None = None,
    overrides: dict[str, object] | None = None,
) -> dict[str, Any]:
    """Embed the images and captions of a corpus with a stage-1 model.

    Each shard gives a file with ``images`` [I, Q, C], ``texts`` [T, C] and ``image_index`` [T], the row of each text's
    image. Its metadata ``records`` hold the keys of the images and the texts as JSON. Embeddings are unit vectors in
    float16. A run that was interrupted resumes where it stopped when it is started again.

    Args:
        model: a stage-1 checkpoint of any format that :func:`blip2.pipelines.load` reads.
        data: a source that ``data.train`` of a recipe may name.
        output: folder of the results.
        shard_size: images per output file, if the corpus has no shards.
        engine: where the work is done.
        device: device to run on; None means a GPU if there is one.
        dtype: data type of the frozen image encoder; None means the recipe's.
        overrides: recipe keys to override.

    Returns:
        The content of ``metrics.json``: the number of images and texts, and of skipped samples by reason.

    Raises:
        InputError: the model or the data cannot be read, or `output` holds other results.
    """
    folder = expand_home(output)
    job = EmbedJob(resolve_checkpoint(model), str(folder.absolute()), device, dtype, overrides)
    metadata = {"pass": "embed", "model": job.model, "data": data, "dtype": dtype, "overrides": overrides}
    totals: dict[str, Any] = {"images": 0, "texts": 0, "skipped": {}}
    for result in run_job(job, list_units(data, shard_size), folder, metadata, engine, "embed"):
        totals["images"] += result["images"]
        totals["texts"] += result["texts"]
        for _, reason, _ in result["skipped"]:
            totals["skipped"][reason] = totals["skipped"].get(reason, 0) + 1
    metrics = {**metadata, **totals}
    with convert_os_errors(folder / "metrics.json"):
        write_json(folder / "metrics.json", metrics)
    return metrics


@dataclass(frozen=True)
class EmbedJob:
    """Embedding as a :class:`~blip2.corpus.job.Job`."""

    model: str
    output: str
    device: str | None = None
    dtype: Precision | None = None
    overrides: dict[str, object] | None = None

    def worker(self) -> Worker:
        """Load the model."""
        pipeline = load(self.model, self.device, self.dtype, overrides=self.overrides, stage="representation")
        assert isinstance(pipeline, RepresentationPipeline)

        def embed(unit: Unit) -> dict[str, Any]:
            skipped: list[SkippedSample] = []
            images: list[Tensor] = []
            keys: list[str] = []
            texts: list[str] = []
            image_index: list[int] = []
            for batch in read_batches(unit, pipeline.batch_size, skipped):
                images.append(pipeline.embed_images([image for _, image in batch]).half().cpu())
                for sample, _ in batch:
                    texts += sample.captions
                    image_index += [len(keys)] * len(sample.captions)
                    keys.append(sample.key)
            tensors = {"image_index": torch.tensor(image_index, dtype=torch.int32)}
            if images:
                tensors["images"] = torch.cat(images)
            if texts:
                tensors["texts"] = pipeline.embed_texts(texts).half().cpu().contiguous()
            records = json.dumps({"keys": keys, "texts": texts}, ensure_ascii=False)
            records = records.encode(errors="backslashreplace").decode()  # JSON escapes for names that are not UTF-8
            path = Path(self.output) / f"{unit.name}.safetensors"
            with convert_os_errors(path), atomic_write(path) as file:
                file.write(save(tensors, {"records": records}))
            return {"images": len(keys), "texts": len(texts), "skipped": skipped}

        return embed
