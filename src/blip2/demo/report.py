"""The tables that the demo prints, and its page of images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from rich.console import Console
from torch import Tensor

from blip2.config import Recipe
from blip2.console import plain_table, plain_text
from blip2.data.images import read_image
from blip2.data.records import Record
from blip2.data.scene_facts import score_caption
from blip2.data.scene_texts import Truth
from blip2.demo.material import Material
from blip2.evaluation.captioning import score_captions
from blip2.evaluation.report import Report, plot_attention, plot_curves
from blip2.evaluation.retrieval import Retrieval
from blip2.pipelines import RepresentationPipeline
from blip2.training.metrics import read_metrics

ALONE = "stage 2 without stage 1"
VQA = "trained on questions"
BLANK = "shown a blank image"
MAJORITY = "most frequent answer"
FACTS = ("objects", "color", "relation", "count", "all")
ANSWERS = ("what", "color", "count", "where", "yesno", "all")
SHOWN = 24
"""Images on the page."""

Rows = list[list[str]]


@dataclass
class Findings:
    """What the page shows beside the numbers."""

    records: list[Record]
    """Images with captions; none where there are scenes."""
    features: Float[Tensor, "I P E"]
    captions: dict[str, list[str]]
    """Captions of the images, by the name of the model."""
    retrieval: Retrieval | None = None
    folder: Path = Path()
    """Folder of the scenes."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Rows of scenes, which hold the truth."""
    questions: dict[int, list[tuple[str, str, str, float]]] = field(default_factory=dict)
    """(question, answer, truth, probability of the answer) of some scenes, by their index."""
    twins: dict[str, Float[Tensor, "N 2 2"]] = field(default_factory=dict)
    """Scores of each pair's images (rows) with its texts (columns), by what scores."""
    twin_rows: list[dict[str, Any]] = field(default_factory=list)


# -- tables --------------------------------------------------------------------------------------------------------


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def tables(metrics: dict[str, Any]) -> list[tuple[tuple[str, ...], Rows]]:
    """Columns and rows of every table, in percent."""
    out: list[tuple[tuple[str, ...], Rows]] = []
    if "scenes" in metrics:
        titles = {"compositions": "held-out compositions", "images": "new images", "cutouts": "held-out cut-outs"}
        for split, title in titles.items():
            numbers = metrics["scenes"][split]
            captions, answers = numbers["captions"].items(), numbers["answers"].items()
            rows = [[name, *(_percent(each.get(fact)) for fact in FACTS)] for name, each in captions]
            out.append(((f"captions of {title}, right facts", *FACTS), rows))
            rows = [[name, *(_percent(each.get(kind)) for kind in ANSWERS)] for name, each in answers]
            out.append(((f"answers about {title}", *ANSWERS), rows))
        numbers = metrics["scenes"]["compositions"]
        out.append(_retrieval_table("held-out compositions", numbers))
        kinds = [kind for kind in numbers["twins"]["itm"] if kind != "all"]
        columns = ("twins told apart", *kinds, "all", "group")
        rows = []
        for name, title in (("itc", "by similarity (ITC)"), ("itm", "by matching (ITM)")):
            each = numbers["twins"][name]
            shares = [each[kind]["pairwise"] for kind in (*kinds, "all")]
            rows.append([title, *map(_percent, shares), _percent(each["all"]["group"])])
        out.append((columns, [*rows, ["chance", *["50.0"] * (len(kinds) + 1), "16.7"]]))
    if "images" not in metrics:
        return out
    numbers = metrics["images"]
    out.append(_retrieval_table(f"{numbers['count']} images of {numbers['source']}", numbers))
    scores = ("token_f1", "content_f1", "exact")
    rows = [[name, *(_percent(each[score]) for score in scores)] for name, each in numbers["captions"].items()]
    out.append(((f"captions of {numbers['source']}", "token F1", "content F1", "exact"), rows))
    return out


def _retrieval_table(title: str, numbers: dict[str, Any]) -> tuple[tuple[str, ...], Rows]:
    found, rows = numbers["retrieval"], []
    for key, direction in (("text_to_image", "text to image"), ("image_to_text", "image to text")):
        for name, way in (("itc", "ITC"), ("itm", "ITC, re-ranked by ITM")):
            rows.append([f"{direction}, {way}", *(_percent(found[name][key][f"r{k}"]) for k in (1, 5, 10))])
    rows.append(["chance", *(_percent(found["chance"][f"r{k}"]) for k in (1, 5, 10))])
    return (f"retrieval, {title}", "R@1", "R@5", "R@10"), rows


TABLES_TEXT = (
    "In percent. Held-out compositions show kinds together, or counts of a kind, that training never shows; new images"
    " show what training shows, in other places. A caption's fact is right when the sentence states it and it is true:"
    " all objects and no other, the background's color, the relation between two objects, the count. Twins are pairs of"
    " images whose texts differ in one word or in the order of two; group: both images find their text and both texts"
    " their image. R@k: the right one is among the k best. Token F1: words shared by caption and true sentence; content"
    " F1: without articles."
)


def show(metrics: dict[str, Any], output: Path) -> None:
    """Print the tables, and where the page is."""
    console = Console()
    for columns, rows in tables(metrics):
        console.print(plain_table(columns, rows, right=True))
    if "scenes" in metrics:
        numbers = metrics["scenes"]["compositions"]
        similarity = ", ".join(f"{name} {value:.2f}" for name, value in numbers["queries"].items())
        console.print(
            f"accuracy of ITM with hard negatives: {_percent(numbers['itm_accuracy'])} % (saying no to all: 66.7 %);"
            f" mean cosine of an image's queries: {similarity}"
        )
    lines = [
        f"in {metrics['seconds']:.0f} s",
        f"report: {output / 'report.html'}   numbers: {output / 'metrics.json'}",
        f"try: blip2 caption {output / 'stage2'} YOUR_IMAGE.jpg",
    ]
    if "scenes" in metrics:
        lines.append(f'or:  blip2 ask {output / "vqa"} YOUR_IMAGE.jpg "What is in the image?"')
    for line in lines:
        console.print(plain_text(line), soft_wrap=True)


# -- page ----------------------------------------------------------------------------------------------------------


def write_report(
    path: Path,
    metrics: dict[str, Any],
    recipes: dict[str, Recipe],
    material: Material,
    representation: RepresentationPipeline,
    scenes: Findings | None,
    others: Findings | None,
) -> None:
    """Write the page."""
    report = Report(
        "What blip2 demo learned",
        "A Q-Former between frozen EfficientNet-Lite0 and frozen SmolLM2-135M-Instruct, trained in"
        f" {metrics['seconds']:.0f} s and measured on images that were held out.",
    )
    report.section("Results", TABLES_TEXT)
    for columns, rows in tables(metrics):
        report.table(columns, rows)
    if scenes is not None:
        _show_scenes(report, scenes)
        _show_twins(report, scenes)
    if others is not None:
        _show_records(report, others)
    report.section("Training", "Dashed: the same on held-out images.")
    curves = {name: read_metrics(Path(recipe.output)) for name, recipe in recipes.items()}
    first = [("itc", "ITC"), ("itm", "ITM"), ("itm_accuracy", "ITM accuracy"), ("itg", "ITG")]
    report.plot(plot_curves({"stage 1": curves["stage 1"]}, first), "losses of stage 1")
    later = {name: rows for name, rows in curves.items() if name != "stage 1"}
    report.plot(plot_curves(later, [("lm", "LM loss"), ("lm_accuracy", "LM accuracy")]), "losses of stage 2")
    report.plot(plot_curves(curves, [("query_similarity", "cosine of an image's queries")]), "similarity of queries")
    found = scenes or others
    assert found is not None, "the demo is of scenes or of a user's own images"
    images, names = _images(found)[:6], _truths(found)[:6]
    report.section(
        "Where each query looks",
        "Attention of the last cross-attention layer of stage 1 over the image, averaged over heads.",
    )
    with torch.no_grad():
        memory = representation.model.memory(found.features[: len(images)])
        maps = representation.model.qformer.attention_maps(memory)[:, -1]
    report.plot(plot_attention(images, maps, [name[:26] for name in names]), "attention of the queries")
    report.section("Credits", f"Images: {material.credit}.")
    report.save(path)


def _images(found: Findings) -> list[Image.Image]:
    if found.rows:
        return [read_image(found.folder / row["image"]) for row in found.rows[:SHOWN]]
    return [read_image(record.image or b"") for record in found.records[:SHOWN]]


def _truths(found: Findings) -> list[str]:
    if found.rows:
        return [row["captions"][0] for row in found.rows[:SHOWN]]
    return [record.captions[0] for record in found.records[:SHOWN]]


def _show_scenes(report: Report, found: Findings) -> None:
    report.section(
        "Captions and answers",
        "Held-out compositions: no training image shows these kinds together. The true caption, the model's, the one"
        " without stage 1, and questions with the model's answer and its probability.",
    )
    cards = []
    for i, (image, truth) in enumerate(zip(_images(found), _truths(found), strict=True)):
        written, alone = found.captions["stage 2"][i], found.captions[ALONE][i]
        facts = score_caption(written, Truth.of_json(found.rows[i]["truth"]))
        wrong = [fact for fact, right in facts.items() if right is False]
        lines = [
            ("", truth),
            ("wrong", f"{written} (wrong: {', '.join(wrong)})") if wrong else ("right", written),
            ("dim", f"without stage 1: {alone}"),
        ]
        for question, answer, wanted, probability in found.questions.get(i, []):
            style = "right" if answer.strip(" .").lower() == wanted else "wrong"
            note = "" if style == "right" else f", is {wanted}"
            lines.append((style, f"{question} {answer} ({probability:.2f}{note})"))
        cards.append((image, lines))
    report.cards(cards)


def _show_twins(report: Report, found: Findings) -> None:
    report.section(
        "Twins",
        "Two images and two texts that differ in one word or in the order of two. The probability that image and text"
        " match (ITM), for each image with its own text first.",
    )
    step = max(len(found.twin_rows) // 2 // 6, 1)
    matched = found.twins["itm"].sigmoid()
    cards = []
    for pair in range(0, len(found.twin_rows) // 2, step):
        texts = [found.twin_rows[2 * pair + side]["captions"][0] for side in (0, 1)]
        for side in (0, 1):
            own, other = float(matched[pair, side, side]), float(matched[pair, side, 1 - side])
            style = "right" if own > other else "wrong"
            lines = [(style, f"{own:.2f} {texts[side]}"), ("dim", f"{other:.2f} {texts[1 - side]}")]
            cards.append((read_image(found.folder / found.twin_rows[2 * pair + side]["image"]), lines))
    report.cards(cards[:12], columns=4)


def _show_records(report: Report, found: Findings) -> None:
    report.section("Captions", "Held-out images with their true sentence, the caption, and the one without stage 1.")
    captions = zip(found.captions["stage 2"], found.captions[ALONE], strict=True)
    report.cards(
        [
            (image, [("", truth), ("right" if _close(written, truth) else "wrong", written), ("dim", alone)])
            for image, truth, (written, alone) in zip(_images(found), _truths(found), captions, strict=False)
        ]
    )
    if found.retrieval is None:
        return
    report.section("Text to image", "For a sentence, the three held-out images that match best.")
    truth = [record.captions[0] for record in found.records]
    best = found.retrieval.text_scores.topk(min(3, len(truth)), dim=0).indices.T
    cards = []
    for text in range(0, len(truth), max(len(truth) // 8, 1)):
        for rank, image in enumerate(best[text].tolist()):
            style = "right" if found.retrieval.positive[image, text] else "wrong"
            lines = [("", truth[text] if rank == 0 else " "), (style, f"{rank + 1}. {truth[image]}")]
            cards.append((read_image(found.records[image].image or b""), lines))
    report.cards(cards[:24], columns=6)  # two sentences a row


def _close(written: str, wanted: str) -> bool:
    return score_captions([written], [wanted])["content_f1"] >= 0.5
