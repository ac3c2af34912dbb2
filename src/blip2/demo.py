"""``blip2 demo``: both stages on real pictures with real frozen models, and what was learned.

Stage 1 trains a Q-Former that starts from MiniLM and looks at EfficientNet-Lite0; stage 2 connects it to SmolLM2-135M.
Beside it the same stage 2 is trained without stage 1, which is the comparison of the paper's Figure 5. Everything is
judged on pictures that were held out.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from blip2.config import Precision, Recipe, find_recipe, load_recipe
from blip2.data.assets import fetch
from blip2.data.images import read_image
from blip2.data.records import Record, Records, open_records
from blip2.errors import InputError
from blip2.evaluation.captioning import score_captions
from blip2.evaluation.report import Report, new_figure, plot_attention, plot_curves
from blip2.evaluation.retrieval import Retrieval, evaluate_retrieval
from blip2.inference import GenerationPipeline, RepresentationPipeline, load
from blip2.model.decoding import Decoding
from blip2.training.features import cached_features
from blip2.training.loop import train
from blip2.training.progress import read_metrics

log = logging.getLogger("blip2")

CANDIDATES = 0
"""The similarity (ITC) ranks alone: in so few steps the matching head (ITM) does not learn enough to rank anew."""
DECODING = Decoding(beams=5, max_new_tokens=12)


@dataclass
class Clock:
    """Seconds that each part took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        log.info("-- %s", part)
        started = time.monotonic()
        yield
        self.seconds[part] = time.monotonic() - started


def demo(output: Path, quick: bool = False) -> dict[str, Any]:
    """Train, judge and show; ``metrics.json`` and ``report.html`` are written to `output`.

    A demo that was killed goes on where it was.

    Args:
        quick: a few steps of each, to see that all works.

    Returns:
        What is in ``metrics.json``.

    Raises:
        InputError: a package cannot be had, or `output` holds something else.
    """
    new_figure(1, 1)  # a missing extra is better found now than at the end
    pictures = fetch_all()
    clock = Clock()
    recipes = demo_recipes(output, pictures, quick)
    for name, recipe in recipes.items():
        with clock.measure(f"training {name}"):
            train(recipe, resume=True)

    held_out = open_records(str(pictures / "held_out.jsonl"), recipes["stage 1"].data)
    assert isinstance(held_out, Records)
    records = list(held_out)
    with clock.measure("retrieval on held-out pictures"):
        representation = load(recipes["stage 1"].output)
        assert isinstance(representation, RepresentationPipeline)
        # Training has made them already.
        device = representation.device
        cached = cached_features(recipes["stage 1"], held_out, representation.model.vision, 1, device)
        features = cached.read_all().to(device)
        retrieval = evaluate_retrieval(representation, features, _truth(records), _positive(records), CANDIDATES)
    captions = {}
    for name in ("stage 2", "stage 2 without stage 1"):
        with clock.measure(f"captions of held-out pictures, {name}"):
            # To write one token at a time, fp32 is the faster on CPUs, whatever it was trained in.
            generation = load(recipes[name].output, dtype=None if torch.cuda.is_available() else "fp32")
            assert isinstance(generation, GenerationPipeline)
            captions[name] = generation.caption(features, decoding=replace(DECODING, beams=1) if quick else DECODING)

    metrics = {
        "seconds": sum(clock.seconds.values()),
        "seconds_by_part": clock.seconds,
        "quick": quick,
        "pictures": {"source": pictures.name, "train": _count(pictures / "train.jsonl"), "held_out": len(records)},
        "retrieval": {
            "image_to_text": retrieval.image_to_text,
            "text_to_image": retrieval.text_to_image,
            "candidates": len(records),
            "chance": retrieval.chance,
        },
        "captioning": score_captions(captions["stage 2"], _truth(records)),
        "captioning_without_stage1": score_captions(captions["stage 2 without stage 1"], _truth(records)),
    }
    for key, name in (("captioning", "stage 2"), ("captioning_without_stage1", "stage 2 without stage 1")):
        metrics[key]["loss"] = read_metrics(Path(recipes[name].output))[-1]["validation_lm"]
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    write_report(output / "report.html", metrics, recipes, representation, features, records, retrieval, captions)
    show(metrics, output)
    return metrics


def fetch_all() -> Path:
    """Everything the demo needs; the folder of its pictures."""
    for name in ("efficientnet-lite0", "minilm", "smollm2-135m-instruct"):
        fetch(name)
    try:
        return fetch("tuxpaint-stamps")
    except InputError as error:
        log.info("%s; the demo takes OpenMoji's pictures instead", error)
        return fetch("openmoji")


def demo_recipes(output: Path, pictures: Path, quick: bool) -> dict[str, Recipe]:
    """The three runs: ``stage 1``, ``stage 2`` and ``stage 2 without stage 1``."""
    precision = faster_precision()
    recipes = {}
    for name, file, folder, start in (
        ("stage 1", "demo-stage1", "stage1", None),
        ("stage 2", "demo-stage2", "stage2", "stage1"),
        ("stage 2 without stage 1", "demo-stage2", "stage2-without-stage1", None),
    ):
        recipe = load_recipe(find_recipe(file))
        steps = 12 if quick else recipe.training.steps
        recipes[name] = replace(
            recipe,
            output=str(output / folder),
            start_from=str(output / start) if start else None,
            data=replace(
                recipe.data,
                train=str(pictures / "train.jsonl"),
                validation=str(pictures / "held_out.jsonl"),
                cached_views=2 if quick else recipe.data.cached_views,
            ),
            vision=replace(recipe.vision, dtype=precision),
            language=recipe.language and replace(recipe.language, dtype=precision),
            training=replace(recipe.training, steps=steps, precision=precision, save_every=50),
        )
    return recipes


def faster_precision() -> Precision:
    """bf16 where this machine multiplies matrices faster in it, else fp32."""
    if torch.cuda.is_available():
        return "bf16"

    matrices = {dtype: torch.ones(1024, 1024, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}

    def seconds(dtype: torch.dtype) -> float:
        started = time.perf_counter()
        torch.mm(matrices[dtype], matrices[dtype])
        return time.perf_counter() - started

    # The best of many, in turns: what else runs on the machine must not decide.
    rounds = [[seconds(dtype) for dtype in matrices] for _ in range(20)]
    bf16, fp32 = map(min, zip(*rounds, strict=True))
    return "bf16" if bf16 < fp32 else "fp32"


def _truth(records: list[Record]) -> list[str]:
    return [record.captions[0] for record in records]


def _positive(records: list[Record]) -> Tensor:
    truth = _truth(records)
    return torch.tensor([[a == b for b in truth] for a in truth])


def _count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


# -- showing -------------------------------------------------------------------------------------------------------


def results(metrics: dict[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    """The rows of the two tables: retrieval and captioning, in per cent."""

    def percent(value: float) -> str:
        return f"{100 * value:.1f}"

    retrieval = metrics["retrieval"]
    first = [
        [title, *(percent(retrieval[key][cutoff]) for cutoff in ("r1", "r5", "r10"))]
        for title, key in (
            ("text to image", "text_to_image"), ("image to text", "image_to_text"), ("chance", "chance")
        )
    ]  # fmt: skip
    second = [
        [
            title,
            *(percent(metrics[key][score]) for score in ("token_f1", "content_f1", "exact")),
            f"{metrics[key]['loss']:.2f}",
        ]
        for title, key in (("stage 1, then stage 2", "captioning"), ("stage 2 alone", "captioning_without_stage1"))
    ]
    return first, second


RESULTS_TEXT = (
    "In per cent. R@k: the right one is among the k best. Token F1: words that caption and true sentence share; content"
    " F1: the same without articles and the like; exact: all words. Loss: nats a token of the true sentences."
)
RETRIEVAL_COLUMNS = ("retrieval", "R@1", "R@5", "R@10")
CAPTION_COLUMNS = ("captioning", "token F1", "content F1", "exact", "loss")


def show(metrics: dict[str, Any], output: Path) -> None:
    console = Console()
    first, second = results(metrics)
    for columns, rows in ((RETRIEVAL_COLUMNS, first), (CAPTION_COLUMNS, second)):
        table = Table(title=None)
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    counts = metrics["pictures"]
    console.print(
        f"trained on {counts['train']} pictures, judged on {counts['held_out']} others, in {metrics['seconds']:.0f} s"
    )
    console.print(f"report: {output / 'report.html'}   numbers: {output / 'metrics.json'}", soft_wrap=True)
    console.print(f"try: blip2 caption {output / 'stage2'} YOUR_PICTURE.jpg", soft_wrap=True)


def write_report(
    path: Path,
    metrics: dict[str, Any],
    recipes: dict[str, Recipe],
    representation: RepresentationPipeline,
    features: Float[Tensor, "I P E"],
    records: list[Record],
    retrieval: Retrieval,
    captions: dict[str, list[str]],
) -> None:
    images: list[Image.Image] = [read_image(record.image or "") for record in records]
    truth = _truth(records)
    counts = metrics["pictures"]
    report = Report(
        "What blip2 demo learned",
        f"A Q-Former between frozen EfficientNet-Lite0 and frozen SmolLM2-135M-Instruct, trained on {counts['train']}"
        f" pictures ({counts['source']}) and judged on {counts['held_out']} others, in {metrics['seconds']:.0f} s.",
    )
    first, second = results(metrics)
    report.section("Results on held-out pictures", RESULTS_TEXT)
    report.table(RETRIEVAL_COLUMNS, first)
    report.table(CAPTION_COLUMNS, second)

    report.section("Training", "Dashed: the same on the held-out pictures.")
    curves = {name: read_metrics(Path(recipe.output)) for name, recipe in recipes.items()}
    report.plot(
        plot_curves({"stage 1": curves.pop("stage 1")}, [("itc", "ITC"), ("itm", "ITM"), ("itg", "ITG")]),
        "losses of stage 1",
    )
    report.plot(plot_curves(curves, [("lm", "LM loss"), ("lm_accuracy", "LM accuracy")]), "losses of stage 2")

    report.section("Captions", "Held-out pictures with their true sentence, the caption, and the one without stage 1.")
    with_stage1, without = captions["stage 2"], captions["stage 2 without stage 1"]
    report.cards(
        [
            (image, [("", wanted), ("right" if _close(written, wanted) else "wrong", written), ("dim", other)])
            for image, wanted, written, other in list(zip(images, truth, with_stage1, without, strict=True))[:40]
        ]
    )

    report.section("Text to image", "For a sentence, the three held-out pictures that fit best.")
    best = retrieval.text_scores.topk(min(3, len(images)), dim=0).indices.T
    cards = []
    for text in range(0, len(truth), max(len(truth) // 8, 1)):
        for place, image in enumerate(best[text].tolist()):
            style = "right" if retrieval.positive[image, text] else "wrong"
            cards.append(
                (images[image], [("", truth[text] if place == 0 else " "), (style, f"{place + 1}. {truth[image]}")])
            )
    report.cards(cards[:24], columns=6)  # two sentences a row

    report.section(
        "What each query looks at",
        "Attention of the last cross-attention layer over the picture, averaged over heads.",
    )
    shown = list(range(0, len(images), max(len(images) // 6, 1)))[:6]
    with torch.no_grad():
        memory = representation.model.memory(features[shown])
        maps = representation.model.qformer.attention_maps(memory)[:, -1]
    report.plot(
        plot_attention([images[i] for i in shown], maps, [truth[i][:22] for i in shown]), "attention of the queries"
    )
    licence = {
        "tuxpaint": "Tux Paint stamps, GPL-2, by Bill Kendrick and contributors",
        "openmoji": "OpenMoji, CC BY-SA 4.0",
    }
    credit = next(text for key, text in licence.items() if counts["source"].startswith(key))
    report.section("Credits", f"Pictures: {credit}.")
    report.save(path)


def _close(written: str, wanted: str) -> bool:
    return score_captions([written], [wanted])["content_f1"] >= 0.5
