"""CapFilt on web-like noise (paper §3.4): stage 1 on noisy, on bootstrapped and on true captions.

    python benchmarks/claims/capfilt.py --output runs/claims/capfilt
    python benchmarks/claims/capfilt.py --output runs/claims/capfilt-large --scale 8      # larger, on a GPU
    python benchmarks/claims/capfilt.py --output runs/claims/capfilt-try --quick          # to see that it works

1. The noisy corpus has images of package:scenes-pairs, a third with their caption, a third with another image's, and a
   third with empty words such as "image" or "click here". Which is which does not depend on the seed.
2. Stage 1 trains on the noisy captions.
3. The ranker continues from it on a few clean pairs of other images, and the captioner is stage 2 on the same pairs, as
   BLIP tunes both on COCO.
4. CapFilt writes captions of the noisy corpus and keeps, of these and the given ones, the best two by similarity that
   pass the filter by PMI.
5. Stage 1 trains on the result, from the same start and for the same number of steps. From the second round on, ranker
   and captioner continue from the model of the round before.
6. Stage 1 trains on the true captions, which no other part sees.

Steps 2, 5 and 6 are repeated with each seed; models and captions of the rounds are made with the first seed, or, with
--every-seed, with each, which takes longer. All models are compared on held-out compositions: recall at 1
of images and texts, by ITC and after re-ranking by ITM, and the accuracy of ITM on hard negatives. A round is judged as
blip2 capfilt --check does.

Results go to results.json, capfilt.png and table.md in the output folder. A run that was killed continues; what is done
is not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    SCENES,
    demo_recipe,
    is_same_plan,
    learn,
    load_stage1,
    markdown,
    mean_spread,
    once,
    read_images,
    recall_at_1,
    same_text,
    seconds,
    write_rows,
)

from blip2.corpus.capfilt import capfilt
from blip2.corpus.check import judge
from blip2.corpus.options import CapFiltConfig
from blip2.corpus.selection import SelectionRules
from blip2.data.assets import fetch
from blip2.decoding.options import Decoding
from blip2.evaluation.report import new_figure
from blip2.evaluation.retrieval import evaluate_retrieval
from blip2.evaluation.scenes import matching_accuracy, read_rows
from blip2.io import write_json
from blip2.memory import tune_malloc

EMPTY_WORDS = ("image", "photo {}", "click here", "picture {}", "untitled", "IMG_{}", "buy now", "no description")
"""Captions without information; {} is replaced by a number."""
SCORES = {"itc": "R@1, ITC", "itm": "R@1, re-ranked by ITM", "itm_accuracy": "ITM on hard negatives"}


@dataclass(frozen=True)
class Plan:
    """Sizes of the experiment."""

    images: int = 500
    """Images of the noisy corpus."""
    clean: int = 400
    """Other images, with true captions, for the ranker and the captioner."""
    steps: int = 80
    """Steps of stage 1 on each corpus."""
    ranker_steps: int = 80
    """Steps of the ranker on the clean pairs."""
    captioner_steps: int = 100
    """Steps of the captioner on the clean pairs."""
    captions: int = 2
    """Captions that are written of each image."""
    held_out: int = 160
    """Held-out images that are compared."""
    min_itm: float | None = None
    """The filter by ITM. It is off, as in BLIP-2: after so few steps the probability of a match is a third for all."""
    min_pmi: float = 0.0
    """The filter by PMI."""


QUICK = Plan(
    images=12, clean=8, steps=2, ranker_steps=2, captioner_steps=2, captions=1, held_out=8, min_itm=0.0, min_pmi=-100.0
)


def scaled(plan: Plan, scale: float) -> Plan:
    """Return a plan with more images and steps. There are 5000 images with captions at most."""
    names = ("images", "clean", "steps", "ranker_steps", "captioner_steps")
    larger = {name: max(1, round(scale * getattr(plan, name))) for name in names}
    total = larger["images"] + larger["clean"]
    if total > 5000:
        larger |= {name: larger[name] * 5000 // total for name in ("images", "clean")}
    return replace(plan, **larger)


# -- the corpora -------------------------------------------------------------------------------------------------------


def make_noisy(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows whose captions are noisy: in each three successive rows of a fixed random order, the first keeps its
    caption, the second gets that of another image, and the third empty words. ``noise`` says which."""
    order = sorted(range(len(rows)), key=lambda i: hashlib.sha256(rows[i]["key"].encode()).digest())
    others = order[1::3]
    noisy = list(rows)
    for place, i in enumerate(order):
        kind = ("true", "another's", "empty")[place % 3]
        caption = rows[i]["caption"]
        if kind == "another's":
            caption = rows[others[(place // 3 + 1) % len(others)]]["caption"]
        elif kind == "empty":
            caption = EMPTY_WORDS[place // 3 % len(EMPTY_WORDS)].format(100 + place)
        noisy[i] = {**rows[i], "caption": caption, "noise": kind}
    return noisy


def make_corpora(folder: Path, plan: Plan) -> dict[str, str]:
    """Write the tables ``noisy``, ``true`` and ``clean``, and return their paths."""
    scenes = fetch(SCENES)
    rows = read_rows(scenes / "train_descriptions.jsonl")[: plan.images + plan.clean]
    rows = [{**row, "image": str(scenes / row["image"])} for row in rows]
    corpus, clean = rows[: plan.images], rows[plan.images :]
    paths = {}
    for name, table in (("noisy", make_noisy(corpus)), ("true", corpus), ("clean", clean)):
        path = folder / f"{name}.jsonl"
        # CapFilt continues only with a file that was not written again.
        paths[name] = str(path) if path.is_file() else write_rows(path, table)
    return paths


# -- training and measuring --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """One output folder."""

    output: Path
    plan: Plan
    rounds: int

    def learn(self, name: str, source: str, seed: int, stage: str = "stage1", **options: Any) -> Path:
        """Train a model, or continue its training, and return its folder.

        Args:
            options: ``steps``, and ``start`` for a run that continues from another.
        """
        folder = self.output / "runs" / f"{name}-{seed}"
        steps = options.get("steps", self.plan.steps)
        recipe = demo_recipe(stage, folder, self.output / "features", seed, steps, source)
        start = options.get("start")
        return learn(replace(recipe, start_from=None if start is None else str(start)))

    def measure(self, name: str, source: str, seed: int) -> dict[str, float]:
        """Train stage 1 on a source, and return its scores on held-out compositions."""
        run = self.learn(name, source, seed)
        return once(self.output / "done" / f"scores-{name}-{seed}.json", lambda: score(run, self.plan.held_out))

    def bootstrap(self, number: int, before: Path, noisy: str, clean: str, seed: int) -> tuple[str, dict[str, Any]]:
        """Make the captions of a round, and return their source and the statistics of the round.

        Args:
            number: number of the round, from 1.
            before: the stage-1 model from which ranker and captioner continue.
            noisy: the noisy corpus.
            clean: the clean pairs.
            seed: seed of the models and the captions.
        """
        plan = self.plan
        ranker = self.learn(f"ranker-{number}", clean, seed, steps=plan.ranker_steps, start=before)
        captioner = self.learn(
            f"captioner-{number}", clean, seed, stage="stage2", steps=plan.captioner_steps, start=ranker
        )
        folder = self.output / f"bootstrapped-{number}-{seed}"
        config = CapFiltConfig(
            num_captions=plan.captions, shard_size=100, seed=seed,
            rules=SelectionRules(keep=2, min_itm=plan.min_itm, min_pmi=plan.min_pmi),
            decoding=Decoding(num_beams=1, top_p=0.9, max_new_tokens=20),
        )  # fmt: skip

        def work() -> dict[str, Any]:
            found = capfilt(str(captioner), str(ranker), noisy, folder, config)
            return {name: found[name] for name in ("counts", "keep_rates", "dropped_by_origin", "mean_scores")}

        found = once(self.output / "done" / f"capfilt-{number}-{seed}.json", work)
        return str(folder / "*.tar"), {**found, "kept_by_noise": kept_by_noise(folder, Path(noisy))}


def score(run: Path, limit: int) -> dict[str, float]:
    """Return recall and ITM accuracy of a stage-1 model on held-out compositions, and the recall of chance."""
    pipeline = load_stage1(run)
    rows, features = read_images(pipeline, "test_compositions_descriptions.jsonl", limit)
    texts = [row["caption"] for row in rows]
    result = evaluate_retrieval(pipeline, features, texts, same_text(texts), rerank_k=16)
    assert result.itc is not None
    return {
        "itc": recall_at_1(result.itc),
        "itm": recall_at_1(result),
        "itm_accuracy": matching_accuracy(pipeline, features, texts),
        "chance": result.chance["r1"],
    }


def kept_by_noise(folder: Path, noisy: Path) -> dict[str, float]:
    """Return the share of the given captions that a round kept, by the kind of their noise."""
    from blip2.data.shards import KEY_COLUMN, read_shard

    rows = read_rows(noisy)
    kept = dict.fromkeys(("true", "another's", "empty"), 0)
    for shard in sorted(folder.glob("*.tar")):
        for sample in read_shard(str(shard)):
            row = rows[int(sample[KEY_COLUMN])]
            kept[row["noise"]] += row["caption"] in sample["captions"]
    totals = {kind: sum(row["noise"] == kind for row in rows) for kind in kept}
    return {kind: kept[kind] / max(totals[kind], 1) for kind in kept}


def run(experiment: Experiment, seeds: list[int], every_seed: bool) -> dict[str, Any]:
    """Make all models that are missing, and return the results."""
    corpora = make_corpora(experiment.output / "corpora", experiment.plan)
    names = ["noisy", *(f"round {number}" for number in range(1, experiment.rounds + 1)), "true"]
    scores: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    rounds: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names[1:-1]}
    sources: dict[tuple[int, int], str] = {}
    for seed in seeds:
        origin = seed if every_seed else seeds[0]
        scores["noisy"][seed] = experiment.measure("noisy", corpora["noisy"], seed)
        before = experiment.output / "runs" / f"noisy-{origin}"
        for number in range(1, experiment.rounds + 1):
            name = f"round {number}"
            if (number, origin) not in sources:
                sources[number, origin], rounds[name][origin] = experiment.bootstrap(
                    number, before, corpora["noisy"], corpora["clean"], origin
                )
            model = f"bootstrapped-{number}-of-{origin}"
            scores[name][seed] = experiment.measure(model, sources[number, origin], seed)
            before = experiment.output / "runs" / f"{model}-{origin}"
        scores["true"][seed] = experiment.measure("true", corpora["true"], seed)
    return {
        "plan": asdict(experiment.plan), "seeds": seeds, "every_seed": every_seed,
        "scores": scores, "rounds": rounds, "checks": check(scores), "won_back": won_back(scores),
        "seconds": seconds(experiment.output / "done"),
    }  # fmt: skip


def check(scores: dict[str, dict[int, dict[str, float]]]) -> dict[str, Any]:
    """Judge each round by R@1 (ITC) against the captions before it, as ``blip2 capfilt --check`` does."""
    names = list(scores)[:-1]
    found = {}
    for before, after in pairwise(names):
        recalls = {name: [each["itc"] for each in scores[name].values()] for name in (before, after)}
        found[after] = judge(recalls[before], recalls[after], next(iter(scores[before].values()))["chance"])
    return found


def won_back(scores: dict[str, dict[int, dict[str, float]]]) -> dict[str, dict[str, float | None]]:
    """Return the share of what the noise cost that each round wins back, by score; None if the noise cost nothing."""
    means = {
        name: {key: statistics.mean(each[key] for each in by_seed.values()) for key in SCORES}
        for name, by_seed in scores.items()
    }
    lost = {key: means["true"][key] - means["noisy"][key] for key in SCORES}
    return {
        name: {
            key: (means[name][key] - means["noisy"][key]) / lost[key] if lost[key] > 0 else None for key in SCORES
        }
        for name in list(scores)[1:-1]
    }  # fmt: skip


# -- output ------------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """Return the results as tables in Markdown."""
    rows = []
    for name, by_seed in results["scores"].items():
        cells = [mean_spread([each[key] for each in by_seed.values()]) for key in SCORES]
        shares = results["won_back"].get(name)
        cells += [
            "" if shares is None or shares[key] is None else f"{100 * shares[key]:.0f} %" for key in ("itc", "itm")
        ]
        rows.append([f"stage 1 on {name} captions" if name in ("noisy", "true") else name, *cells])
    columns = ["held-out compositions, %", *SCORES.values(), "won back, ITC", "won back, ITM"]
    lines = [markdown(columns, rows), ""]
    kinds = ("true", "another's", "empty")
    kept = []
    for name, by_seed in results["rounds"].items():
        rates = [mean_spread([each["kept_by_noise"][kind] for each in by_seed.values()]) for kind in kinds]
        generated = [each["keep_rates"]["generated"] or 0.0 for each in by_seed.values()]
        kept.append([name, *rates, mean_spread(generated)])
    lines += [markdown(["kept captions, %", *(f"given: {kind}" for kind in kinds), "generated"], kept), ""]
    lines += [f"{name}: {found['reason']}." for name, found in results["checks"].items()]
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the scores of each corpus, a point for each seed and a line at the mean."""
    figure = new_figure(10.0, 3.2)
    names = list(results["scores"])
    for number, (key, title) in enumerate(SCORES.items(), 1):
        axes = figure.add_subplot(1, len(SCORES), number)
        for place, name in enumerate(names):
            values = [100 * each[key] for each in results["scores"][name].values()]
            axes.plot([place] * len(values), values, "o", color=f"C{place}", markersize=4)
            axes.plot([place - 0.25, place + 0.25], [statistics.mean(values)] * 2, color=f"C{place}", linewidth=2)
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set_title(f"{title}, %", fontsize=10)
        axes.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/claims/capfilt"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for images and steps (default: 1)")
    parser.add_argument("--every-seed", action="store_true", help="bootstrap with every seed, not only with the first")
    parser.add_argument("--quick", action="store_true", help="a few images and steps, which show nothing")
    options = parser.parse_args()
    if options.scale <= 0 or options.rounds < 1:
        parser.error("--scale has to be above 0, and --rounds at least 1")
    tune_malloc()
    plan = QUICK if options.quick else scaled(Plan(), options.scale)
    if not is_same_plan(options.output, asdict(plan)):
        parser.error(f"{options.output} has other results, of another size, recipe or scenes: give another --output")
    results = run(Experiment(options.output, plan, options.rounds), options.seeds, options.every_seed)
    write_json(options.output / "results.json", results)
    draw(results, options.output / "capfilt.png")
    (options.output / "table.md").write_text(table(results) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
