"""Write the embeddings of images and texts to a ``.safetensors`` file, or those of a corpus to one file per shard.

Legend: I images, Q queries, T texts, C width of the contrastive embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from blip2.config import Precision
from blip2.corpus.job import Worker, run_job
from blip2.corpus.models import check_reads_images, resolve_checkpoint, weights_version
from blip2.corpus.options import LOCAL, Engine
from blip2.corpus.units import Unit, list_units, read_batches
from blip2.data.shards import SkippedSample
from blip2.errors import InputError
from blip2.io import atomic_write, convert_os_errors, expand_home, write_json
from blip2.pipelines import RepresentationPipeline, load


def embed(
    model: str,
    output: str | Path,
    images: Sequence[str] = (),
    texts: Sequence[str] = (),
    *,
    device: str | None = None,
    dtype: Precision | None = None,
    overrides: dict[str, object] | None = None,
) -> dict[str, Tensor]:
    """Embed images and texts with a stage-1 model, and write the embeddings as :func:`write_embeddings` does.

    Args:
        model: a stage-1 checkpoint of any format that :func:`blip2.pipelines.load` reads.
        output: the file to write.
        images: paths of the images.
        texts: the texts.
        device: device to run on. None: a GPU if there is one.
        dtype: data type of the frozen image encoder. None: the dtype in the model's config, else bf16 on a CUDA GPU and
            fp32 on other devices.
        overrides: keys of the model's config to override.

    Returns:
        ``images`` [I, Q, C] and ``texts`` [T, C], unit vectors in float32. If there are no images or no texts, the key
        is missing.

    Raises:
        InputError: there are no images and no texts, the model or an image cannot be read, or `output` cannot be
            written.
    """
    if not images and not texts:
        raise InputError("there is nothing to embed: give image files, --text or both, or --data for a whole corpus")
    path = expand_home(output)
    if not path.absolute().parent.is_dir():  # fail before the work
        raise InputError(f"the folder of {path} does not exist: create that folder, or give another --output")
    pipeline = _load(model, device, dtype, overrides)
    tensors = {}
    if images:
        tensors["images"] = pipeline.embed_images(images).cpu()
    if texts:
        tensors["texts"] = pipeline.embed_texts(texts).cpu()
    write_embeddings(path, tensors, images, texts)
    return tensors


def write_embeddings(path: Path, tensors: Mapping[str, Tensor], keys: Sequence[str], texts: Sequence[str]) -> None:
    """Write embeddings and the names of their rows to a ``.safetensors`` file.

    The file is written atomically, and equal arguments give equal bytes. The entry ``records`` of its metadata is a
    JSON object with ``keys`` and ``texts``.

    Args:
        path: the file to write.
        tensors: ``images`` [I, Q, C], ``texts`` [T, C] or both, and, if the texts belong to images, ``image_index``
            [T], the row of the image of each text.
        keys: the names of the I images.
        texts: the T texts.

    Raises:
        InputError: the file cannot be written.
    """
    # One entry, because safetensors writes several entries in random order.
    records = json.dumps({"keys": list(keys), "texts": list(texts)}, ensure_ascii=False)
    records = records.encode(errors="backslashreplace").decode()  # JSON escapes for names that are not UTF-8
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"records": records})
    with convert_os_errors(path), atomic_write(path) as file:
        file.write(content)


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

    One file is written for each shard, as by :func:`write_embeddings`, with ``images`` [I, Q, C], ``texts`` [T, C] and
    ``image_index`` [T], the row of the image of each text. Embeddings are unit vectors in float16. If an interrupted
    run is started again, it resumes where it stopped.

    Args:
        model: a stage-1 checkpoint of any format that :func:`blip2.pipelines.load` reads.
        data: a source that ``data.train`` of a recipe may name.
        output: folder of the results.
        shard_size: images per output file, if the corpus has no shards.
        engine: where the work is done.
        device: device to run on. None: a GPU if there is one.
        dtype: data type of the frozen image encoder. None: the dtype in the model's config, else bf16 on a CUDA GPU and
            fp32 on other devices.
        overrides: keys of the model's config to override.

    Returns:
        The content of ``metrics.json``: the settings, the number of ``images`` and ``texts``, and the number of
        ``skipped`` samples by reason.

    Raises:
        InputError: the model or the data cannot be read, or `output` cannot be written or holds the results of another
            model, data set or setting.
    """
    folder = expand_home(output)
    job = EmbedJob(resolve_checkpoint(model), str(folder.absolute()), device, dtype, overrides)
    metadata = {
        "pass": "embed", "model": job.model, "weights_version": weights_version(job.model), "data": data,
        "shard_size": shard_size, "dtype": dtype, "overrides": overrides or None,
    }  # fmt: skip
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
        """Load the model and return a worker."""
        pipeline = _load(self.model, self.device, self.dtype, self.overrides)
        check_reads_images(pipeline)

        def embed_unit(unit: Unit) -> dict[str, Any]:
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
                tensors["texts"] = pipeline.embed_texts(texts).half().cpu()
            write_embeddings(Path(self.output) / f"{unit.name}.safetensors", tensors, keys, texts)
            return {"images": len(keys), "texts": len(texts), "skipped": skipped}

        return embed_unit


def _load(
    model: str, device: str | None, dtype: Precision | None, overrides: dict[str, object] | None
) -> RepresentationPipeline:
    pipeline = load(model, device, dtype, overrides=overrides, stage="representation")
    assert isinstance(pipeline, RepresentationPipeline)
    return pipeline
