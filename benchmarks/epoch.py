"""python benchmarks/epoch.py FOLDER ROUNDS

The second epoch of `recipes/tuxpaint-stage1.yaml` with cached features of the frozen encoder, compared with the same
without, where every image is decoded, augmented and encoded again, with and without other processes to decode: the
faster of both counts.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from blip2.data.assets import fetch
from blip2.demo.run import faster_precision
from blip2.memory import tune_malloc
from blip2.recipe import find_recipe, load_recipe
from blip2.training.metrics import read_metrics
from blip2.training.trainer import train


def main() -> None:
    tune_malloc()  # as the command does
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    images = fetch("tuxpaint-stamps")
    recipe, precision = load_recipe(find_recipe("tuxpaint-stage1")), faster_precision()
    recipe = replace(recipe, vision=replace(recipe.vision, dtype=precision))
    count = len((images / "train.jsonl").read_text(encoding="utf-8").splitlines())
    epoch = count // recipe.data.batch_size
    training = replace(recipe.training, max_steps=2 * epoch, save_steps=10_000, eval_steps=10_000, precision=precision)
    kinds = {
        "cached": (recipe.data.cached_views, 0), "not cached": (0, 0), "not cached, 2 workers": (0, 2)
    }  # fmt: skip
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind, (views, workers) in kinds.items():
            data = replace(recipe.data, cached_views=views, num_workers=workers, validation=None)
            run = replace(recipe, output=str(folder / f"{kind} {number}"), data=data, training=training)
            train(run)
            second = read_metrics(Path(run.output))[epoch:]
            seconds[kind].append(sum(step["seconds"] for step in second))
            print(f"  {kind}: {seconds[kind][-1]:.1f} s", file=sys.stderr)
    slow = min(list(kinds)[1:], key=lambda kind: statistics.median(seconds[kind]))
    ratios = [theirs / ours for ours, theirs in zip(seconds["cached"], seconds[slow], strict=True)]
    print(
        json.dumps(
            {
                "ours": statistics.median(seconds["cached"]),
                "peer": statistics.median(seconds[slow]),
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "beside": slow,
                "steps": f"{epoch} of {recipe.data.batch_size}",
            }
        )
    )


if __name__ == "__main__":
    main()
