"""Embeddings of a corpus: one ``.safetensors`` a shard.

Legend: I images, Q queries, T texts, C width in which images and texts are compared.
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
from blip2.corpus.job import HERE, Engine, Worker, do_units
from blip2.corpus.models import pin
from blip2.corpus.tar_shards import Skipped, Unit, batches, list_units
from blip2.io import explained, output_path, write_json, written
from blip2.pipelines import RepresentationPipeline, load


def embed_corpus(
    model: str,
    data: str,
    output: str | Path,
    *,
    shard_size: int = 1000,
    engine: Engine = HERE,
    device: str | None = None,
    dtype: Precision | None = None,
    changes: dict[str, object] | None = None,
) -> dict[str, Any]:
    """Embed the pictures and captions of a corpus with a model of stage 1.

    Each shard gives a file with ``images`` [I, Q, C], ``texts`` [T, C] and ``image_of`` [T], the row of the image that
    a text is about; its metadata say ``records``: keys of the images and the texts, as JSON. Unit vectors, in float16.
    A pass that was killed goes on where it was.

    Returns:
        What is in ``metrics.json``: how many there are, and what was skipped for which cause.

    Raises:
        InputError: the model or the data cannot be read, or `output` belongs to another pass.
    """
    folder = output_path(output)
    work = Embed(pin(model), str(folder.absolute()), device, dtype, changes)
    about = {"pass": "embed", "model": work.model, "data": data, "dtype": dtype, "changes": changes}
    totals: dict[str, Any] = {"pictures": 0, "texts": 0, "skipped": {}}
    for told in do_units(work, list_units(data, shard_size), folder, about, engine, "embed"):
        totals["pictures"] += told["pictures"]
        totals["texts"] += told["texts"]
        for _, cause, _ in told["skipped"]:
            totals["skipped"][cause] = totals["skipped"].get(cause, 0) + 1
    metrics = {**about, **totals}
    with explained(folder / "metrics.json"):
        write_json(folder / "metrics.json", metrics)
    return metrics


@dataclass(frozen=True)
class Embed:
    """The pass, for any engine."""

    model: str
    output: str
    device: str | None = None
    dtype: Precision | None = None
    changes: dict[str, object] | None = None

    def worker(self) -> Worker:
        """Load the model."""
        pipeline = load(self.model, self.device, self.dtype, changes=self.changes, stage="representation")
        assert isinstance(pipeline, RepresentationPipeline)

        def embed(unit: Unit) -> dict[str, Any]:
            skipped: list[Skipped] = []
            images: list[Tensor] = []
            keys: list[str] = []
            texts: list[str] = []
            image_of: list[int] = []
            for batch in batches(unit, pipeline.batch_size, skipped):
                images.append(pipeline.embed_images([image for _, image in batch]).half().cpu())
                for sample, _ in batch:
                    texts += sample.captions
                    image_of += [len(keys)] * len(sample.captions)
                    keys.append(sample.key)
            tensors = {"image_of": torch.tensor(image_of, dtype=torch.int32)}
            if images:
                tensors["images"] = torch.cat(images)
            if texts:
                tensors["texts"] = pipeline.embed_texts(texts).half().cpu().contiguous()
            records = json.dumps({"keys": keys, "texts": texts}, ensure_ascii=False)
            records = records.encode(errors="backslashreplace").decode()  # names that are not UTF-8, as JSON has them
            path = Path(self.output) / f"{unit.name}.safetensors"
            with explained(path), written(path) as file:
                file.write(save(tensors, {"records": records}))
            named = [[each.key, each.cause, each.why] for each in skipped]
            return {"pictures": len(keys), "texts": len(texts), "skipped": named}

        return embed
