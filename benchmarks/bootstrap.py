"""Compare bootstrapped with original captions: a small version of the method of §3.4, in one command.

    .venv/bin/python benchmarks/bootstrap.py
    .venv/bin/python benchmarks/bootstrap.py --limit 40 --steps 4 --output runs/bootstrap-try    # to see that it works

1. Images with texts become shards (benchmarks/build_corpus.py).
2. Stage 1 trains on the shards as they are, streamed (recipes/bootstrap-stage1.yaml).
3. CapFilt goes over them with models of the recipes tuxpaint-stage1 and -stage2, which are made if they are not there.
4. Stage 1 trains on the bootstrapped shards, from the same start and for as long.
5. Both are measured by retrieval on held-out images and their original texts.

Killed and started again it goes on where it was. ``bootstrap.json`` has the numbers, and how long each part took,
``capfilt.png`` the scores of all captions, ``captions.md`` ten that stayed and ten that did not.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from blip2.config import EvaluationConfig, Precision
from blip2.corpus.capfilt import CapFiltConfig, capfilt
from blip2.corpus.options import Engine
from blip2.corpus.report import CapFiltStats
from blip2.decoding.search import Decoding
from blip2.demo.run import faster_precision, in_precision
from blip2.evaluation.run import evaluate
from blip2.io import write_json
from blip2.recipe import find_recipe, load_recipe
from blip2.training.trainer import train

ITC_ALONE = 0
"""No re-ranking: in so few steps the matching head does not learn enough for it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/bootstrap"))
    parser.add_argument(
        "--models", type=Path, help="a folder with stage1 and stage2 (default: those of runs/tuxpaint, made if need be)"
    )
    parser.add_argument("--limit", type=int, help="Number of images per source (default: all).")
    parser.add_argument("--steps", type=int, help="of each training (default: the recipe's)")
    parser.add_argument("--captions", type=int, default=10, help="written of each image (default: 10)")
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="of CapFilt (default: local)")
    options = parser.parse_args()
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    times = output / "seconds.json"
    seconds = json.loads(times.read_text()) if times.exists() else {}

    def timed(name, work):
        started = time.monotonic()
        done = work()
        seconds[name] = seconds.get(name, 0) + time.monotonic() - started
        write_json(times, seconds)
        return done

    corpus, precision = output / "corpus", faster_precision()
    limit = ["--limit", str(options.limit), "--shard-size", "25"] if options.limit else []
    build_corpus = [sys.executable, str(Path(__file__).with_name("build_corpus.py")), "--output", str(corpus), *limit]
    timed("shards", lambda: subprocess.run(build_corpus, check=True))
    counts = json.loads((corpus / "about.json").read_text())["images"]
    models = options.models or Path("runs/tuxpaint")
    if options.models is None:
        timed("models", lambda: make_models(models, precision))

    def learn(name: str, folder: Path) -> dict:
        recipe = load_recipe(find_recipe("bootstrap-stage1"))
        # A mixture: each source in proportion to its images.
        mixture = {str(folder / f"{source}-*.tar"): float(count["training"]) for source, count in counts.items()}
        recipe = replace(
            in_precision(recipe, precision, options.steps),
            output=str(output / name),
            data=replace(recipe.data, train=mixture),
        )
        timed(f"training {name}", lambda: train(recipe, resume=True))
        held_out = str(corpus / "held_out" / "*.tar")
        config = EvaluationConfig("retrieval", held_out, rerank_k=ITC_ALONE)
        return timed(f"measuring {name}", lambda: evaluate(output / name, config, output / f"{name}-retrieval"))

    before = learn("original", corpus / "train")
    config = CapFiltConfig(num_captions=options.captions, decoding=Decoding(top_p=0.9, max_new_tokens=16))
    data, bootstrapped = str(corpus / "train" / "*.tar"), output / "bootstrapped"
    found = timed(
        "capfilt",
        lambda: capfilt(
            str(models / "stage2"), str(models / "stage1"), data, bootstrapped, config,
            engine=Engine(options.engine), dtype=precision,
        ),
    )  # fmt: skip
    show(bootstrapped, output)
    after = learn("bootstrapped-stage1", bootstrapped)
    numbers = {
        "images": counts, "seconds": seconds, "before": before["itc"], "after": after["itc"],
        "held_out": {"images": before["images"], "texts": before["texts"], "chance": before["chance"]},
        "capfilt": {name: found[name] for name in ("counts", "dropped", "skipped", "mean_scores")},
    }  # fmt: skip
    write_json(output / "bootstrap.json", numbers)
    print(json.dumps(numbers, indent=1))


def make_models(folder: Path, precision: Precision) -> None:
    """Train the models that write and rank captions; what is done is not done again."""
    for name in ("stage1", "stage2"):
        recipe = load_recipe(find_recipe(f"tuxpaint-{name}"))
        recipe = replace(
            in_precision(recipe, precision),
            output=str(folder / name),
            start_from=str(folder / "stage1") if name == "stage2" else None,
        )
        train(recipe, resume=True)


def show(bootstrapped: Path, output: Path) -> None:
    """Write the histograms, and the best caption that stayed and the best that did not of ten random images."""
    stats = CapFiltStats()
    for file in sorted(bootstrapped.glob("*.stats.json")):
        stats.merge(json.loads(file.read_text(encoding="utf-8")))
    stats.plot().savefig(output / "capfilt.png", dpi=110)
    lines = ["| kept | | dropped | |", "|---|---:|---|---:|"]
    for example in [each for each in stats.examples if each["dropped"]][:10]:
        both = [(text + " (original)" * original, score) for text, score, original, *_ in
                (example["kept"][0], example["dropped"][0])]  # fmt: skip
        lines.append(f"| {' | '.join(f'{text} | {score:.2f}' for text, score in both)} |")
    (output / "captions.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
