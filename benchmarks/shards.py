"""python benchmarks/shards.py FOLDER ROUNDS

How many images a second are read from WebDataset shards, decoded and augmented by two loader workers, compared with
`datasets` alone and `webdataset` alone on the same shards with the same decoding. Shards are made in FOLDER; each side
runs in a process of its own, in turn.
"""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader import images

from blip2.backbones.vision import Preprocessing
from blip2.data.images import read_image, train_transform

HERE = Path(__file__).resolve().parent
HOME = HERE.parent / ".venv-webdataset"
SHARDS, SIZE, BATCH, WORKERS = 8, 256, 32, 2
WARM = 8
"""Batches before time is taken: starting is not what is measured."""
PREPROCESSING = Preprocessing(224)
SIDES = ("blip2", "datasets", "webdataset")


def write(folder: Path) -> None:
    """Shards of JPEGs with captions."""
    files = images()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for number in range(SIZE):
                members = {"jpg": files[number % len(files)], "txt": b"a image of colors"}
                for kind, data in members.items():
                    entry = tarfile.TarInfo(f"{shard:03d}{number:05d}.{kind}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))


def decode(sample: dict[str, Any]) -> torch.Tensor:
    image = sample["jpg"]
    data = image["bytes"] if isinstance(image, dict) else image
    return train_transform(read_image(data), PREPROCESSING, np.random.default_rng(len(data)), 0.5, True)


def ours(files: list[str]) -> Iterator[Any]:
    from blip2.config import DataConfig
    from blip2.data.dataset import BatchDataset
    from blip2.data.sampler import sample_batches
    from blip2.data.sources import open_records
    from blip2.data.workers import prefetch
    from blip2.model.representation import RepresentationBatch

    class NoTexts:
        """Captions are not tokenized: the others do not either."""

        requires_question = False

        def __call__(self, images: Any, captions: Any, questions: Any, ids: Any, rng: Any) -> tuple[Any, int]:
            return RepresentationBatch(
                images, torch.zeros(len(images), 1).long(), torch.ones(len(images), 1).bool(), ids
            ), 0

    source = str(Path(files[0]).parent / "*.tar")
    records = open_records(source, DataConfig(train=source))
    preparation = BatchDataset(records, NoTexts(), PREPROCESSING, train=True)
    return prefetch(sample_batches(records, BATCH, 0), preparation, WORKERS)


def their_datasets(files: list[str]) -> Iterator[Any]:
    import datasets

    stream = datasets.load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True)
    stream = stream.cast_column("jpg", datasets.Image(decode=False)).shuffle(seed=0, buffer_size=1000)
    stream = stream.map(lambda sample: {"pixels": decode(sample)}, remove_columns=stream.column_names)
    loader = torch.utils.data.DataLoader(stream, BATCH, num_workers=WORKERS)  # type: ignore
    while True:
        yield from loader


def their_webdataset(files: list[str]) -> Iterator[Any]:
    sys.path.append(str(HOME))
    import webdataset  # type: ignore

    stream = webdataset.WebDataset(files, shardshuffle=100, seed=0).shuffle(1000).map(decode).batched(BATCH)
    while True:
        yield from webdataset.WebLoader(stream, batch_size=None, num_workers=WORKERS)


def measure(side: str, folder: str) -> None:
    """Print images a second over what is left of an epoch."""
    torch.set_num_threads(1)
    files = [str(path) for path in sorted(Path(folder).glob("*.tar"))]
    batches = dict(zip(SIDES, (ours, their_datasets, their_webdataset), strict=True))[side](files)
    for _ in islice(batches, WARM):
        pass
    count = SHARDS * SIZE // BATCH - WARM
    started = time.perf_counter()
    for _ in islice(batches, count):
        pass
    print(count * BATCH / (time.perf_counter() - started), flush=True)


def main() -> None:
    if len(sys.argv) == 4:
        measure(sys.argv[3], sys.argv[1])
        return
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    if not HOME.is_dir():
        packages = ["webdataset==1.0.2", "braceexpand"]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", HOME, *packages], check=True
        )
    write(folder)
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            command = [sys.executable, __file__, str(folder), str(rounds), side]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rates[side].append(float(done.stdout.split()[-1]))
    medians = {side: statistics.median(found) for side, found in rates.items()}
    print(json.dumps({"of": "images/s", "workers": WORKERS, "medians": medians, "all": rates}))


if __name__ == "__main__":
    main()
