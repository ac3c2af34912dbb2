"""python benchmarks/loader.py FOLDER ROUNDS

How many images a second one core decodes and augments, compared with how many the image encoder takes on this machine:
what decodes more than the encoder takes is never waited for.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from blip2.backbones.vision import Preprocessing
from blip2.backbones.vision_loaders import wrap_transformers
from blip2.data.images import read_image, train_transform

COUNT = 32
SIZE = (640, 480)
"""Of an image, as COCO's are."""


def images() -> list[bytes]:
    """JPEGs with as much in them as photographs have: about 100 kB each."""
    random, files = np.random.default_rng(0), []
    for _ in range(COUNT):
        small = Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize(SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def rate(work: Callable[[], None]) -> float:
    """Images a second."""
    started = time.perf_counter()
    work()
    return COUNT / (time.perf_counter() - started)


def main() -> None:
    rounds = int(sys.argv[2])
    torch.manual_seed(0)
    files, preprocessing = images(), Preprocessing(224)
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    encoder = wrap_transformers(CLIPVisionModel(config).bfloat16(), preprocessing)
    pixels = torch.randn(COUNT, 3, 224, 224)

    def decode() -> None:
        for number, file in enumerate(files):
            train_transform(read_image(file), preprocessing, np.random.default_rng(number), 0.5, True)

    def encode() -> None:
        for part in pixels.split(8):
            encoder.encode(part)

    decode(), encode()
    rates = [(rate(decode), rate(encode)) for _ in range(rounds)]
    ratios = [decoded / encoded for decoded, encoded in rates]
    print(
        json.dumps(
            {
                "ours": statistics.median(decoded for decoded, _ in rates),
                "peer": statistics.median(encoded for _, encoded in rates),
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "of": "images/s",
                "bytes": sum(map(len, files)) // COUNT,
            }
        )
    )


if __name__ == "__main__":
    main()
