"""python benchmarks/sweep.py [--rounds 3]

What a step of stage 1 costs against batch, caption length, image tokens and queries, compared with LAVIS, and what
cached features cost against the size of a data set. Writes docs/performance.png. The Q-Former has 6 blocks of 384.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import compare
import peers
import run
import stage1

HERE = Path(__file__).resolve().parent
SMALL = stage1.Case(batch=16, layers=6, hidden=384)
SWEEPS = {
    "pairs in a batch": [(n, replace(SMALL, batch=n)) for n in (4, 12, 24)],
    "tokens in a caption": [(n, replace(SMALL, shortest=n - 2, longest=n)) for n in (8, 16, 32)],
    "image tokens": [(n, replace(SMALL, tokens=n)) for n in (50, 257, 577)],
    "queries": [(n, replace(SMALL, queries=n)) for n in (8, 32, 64)],
}
IMAGES = (64, 128, 256, 512)


def steps(rounds: int) -> dict[str, list[tuple[int, float, float]]]:
    """(size, seconds of blip2, seconds of LAVIS) of every sweep."""
    points: dict[str, list[tuple[int, float, float]]] = {}
    for title, cases in SWEEPS.items():
        for size, case in cases:
            with tempfile.TemporaryDirectory() as folder:
                stage1.prepare(case, Path(folder))
                both = compare.run_in_turns(peers.stage1_sides("step", Path(folder)), rounds)
            run.measured(both["blip2"], both["LAVIS"], run.LOOSE)
            points.setdefault(title, []).append((size, both["blip2"].median, both["LAVIS"].median))
            print(title, *points[title][-1], file=sys.stderr, flush=True)
    return points


def features() -> list[tuple[int, float, float]]:
    """(images, seconds to encode them, seconds to find their features again)."""
    import torch

    from blip2.backbones.vision_loaders import load_image_encoder
    from blip2.config import DataConfig
    from blip2.data.assets import fetch, resolve
    from blip2.data.sources import open_records
    from blip2.feature_cache.cache import Augmentation, cache_features
    from blip2.memory import tune_malloc

    tune_malloc()  # as the commands of blip2 do
    images = fetch("tuxpaint-stamps")
    table = (images / "train.jsonl").read_text(encoding="utf-8").splitlines()
    encoder, points = load_image_encoder(resolve("package:efficientnet-lite0")), []
    for count in IMAGES:
        with tempfile.TemporaryDirectory() as folder:
            rows = [json.loads(line) for line in table[:count]]
            source = Path(folder) / "some.jsonl"
            source.write_text("".join(json.dumps({**row, "image": str(images / row["image"])}) + "\n" for row in rows))
            records = open_records(str(source), DataConfig(train=str(source), cached_views=1))
            seconds = []
            for _ in range(2):
                started = time.perf_counter()
                cache_features(Path(folder) / "store", records, encoder, Augmentation(1, 0.5, True), "bf16",
                               torch.device("cpu"))  # fmt: skip
                seconds.append(time.perf_counter() - started)
        points.append((count, *seconds))
        print("features", *points[-1], file=sys.stderr, flush=True)
    return points


def draw(points: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(points), figsize=(3.4 * len(points), 3.2), layout="constrained")
    for axis, (title, rows) in zip(axes, points.items(), strict=True):
        sizes, first, second = zip(*rows, strict=True)
        names = ("encoding", "finding again") if title == "images" else ("blip2", "LAVIS")
        for values, name, color in zip((first, second), names, ("#1b6ca8", "#b8b8b8"), strict=True):
            axis.plot(sizes, values, marker="o", label=name, color=color)
        axis.set_xlabel(title)
        axis.set_xticks(sizes)
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("seconds a step")
    axes[-1].set_ylabel("seconds")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    options = parser.parse_args()
    points = {**steps(options.rounds), "images": features()}
    results = HERE / "results.json"
    known = json.loads(results.read_text()) if results.exists() else {}
    results.write_text(json.dumps({**known, "sweep": points}, indent=1) + "\n")
    draw(points, HERE.parent / "docs" / "performance.png")


if __name__ == "__main__":
    main()
