"""The tables and the HTML report of the demo."""

from __future__ import annotations

from collections.abc import Sequence
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
from blip2.demo.data import DemoData
from blip2.evaluation.captioning import score_captions
from blip2.evaluation.report import Report, plot_attention, plot_curves
from blip2.evaluation.retrieval import RetrievalResult
from blip2.pipelines import RepresentationPipeline
from blip2.training.metrics import read_metrics

WITHOUT_STAGE1 = "stage 2 without stage 1"
TWINS = "stage 1 on near twins"
VQA = "trained on questions"
BLANK = "shown a blank image"
MAJORITY = "most frequent answer"
FACTS = ("objects", "color", "relation", "all")
ANSWERS = ("what", "color", "where", "yesno", "all")
CONVERSATIONS = "conversations.html"
MAX_IMAGES = 24
"""Maximum number of images whose generated captions the report shows."""

Rows = list[list[str]]


@dataclass
class DemoResults:
    """Outputs of the models, for the report."""

    records: list[Record]
    """Images with captions; empty for scenes."""
    features: Float[Tensor, "I P E"]
    """Output of the image encoder: P tokens of width E for each of I images."""
    captions: dict[str, list[str]]
    """Generated captions of the images, by the name of the model or baseline."""
    retrieval: RetrievalResult | None = None
    folder: Path = Path()
    """Folder of the scenes data set."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the evaluated scenes, each with its ``truth``."""
    questions: dict[int, list[tuple[str, str, str, float]]] = field(default_factory=dict)
    """For some scenes, by index in `rows`: a list of (question, generated answer, reference answer, probability of the
    generated answer)."""
    twins: dict[str, Float[Tensor, "N 2 2"]] = field(default_factory=dict)
    """Scores of the two images (rows) with the two texts (columns) of N pairs of twins, for ``itc`` and ``itm``."""
    twin_rows: list[dict[str, Any]] = field(default_factory=list)

    def image(self, i: int) -> Image.Image:
        """Return an image."""
        if self.rows:
            return read_image(self.folder / self.rows[i]["image"])
        return read_image(self.records[i].image or b"")

    def reference(self, i: int) -> str:
        """Return the reference caption of an image."""
        return self.rows[i]["captions"][0] if self.rows else self.records[i].captions[0]


# -- tables --------------------------------------------------------------------------------------------------------


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def tables(metrics: dict[str, Any]) -> list[tuple[tuple[str, ...], Rows]]:
    """Return all tables of the results as (column titles, rows of cells). All numbers are in percent.

    Args:
        metrics: the content of ``metrics.json``.
    """
    out: list[tuple[tuple[str, ...], Rows]] = []
    if "scenes" in metrics:
        titles = {"compositions": "held-out compositions", "images": "new images", "cutouts": "held-out cut-outs"}
        for split, title in titles.items():
            numbers = metrics["scenes"][split]
            out.append(_shares_table(f"captions of {title}, correct facts", numbers["captions"], FACTS))
            out.append(_shares_table(f"answers about {title}", numbers["answers"], ANSWERS))
        numbers = metrics["scenes"]["compositions"]
        out.append(_retrieval_table("held-out compositions", numbers))
        kinds = [kind for kind in numbers["twins"]["itm"] if kind != "all"]
        columns = ("pairwise accuracy on twins", *kinds, "all", "group")
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


def _shares_table(
    title: str, shares: dict[str, dict[str, float | None]], names: Sequence[str]
) -> tuple[tuple[str, ...], Rows]:
    """Return a table with a row per model and a column per name that any model has a share of."""
    found = [name for name in names if any(each.get(name) is not None for each in shares.values())]
    return (title, *found), [[model, *(_percent(each.get(name)) for name in found)] for model, each in shares.items()]


def _retrieval_table(title: str, numbers: dict[str, Any]) -> tuple[tuple[str, ...], Rows]:
    recalls, rows = numbers["retrieval"], []
    for key, direction in (("text_to_image", "text to image"), ("image_to_text", "image to text")):
        for name, way in (("itc", "ITC"), ("reranked", "re-ranked by ITM and ITC")):
            rows.append([f"{direction}, {way}", *(_percent(recalls[name][key][f"r{k}"]) for k in (1, 5, 10))])
    rows.append(["chance", *(_percent(recalls["chance"][f"r{k}"]) for k in (1, 5, 10))])
    return (f"retrieval, {title}", "R@1", "R@5", "R@10"), rows


TABLES_TEXT = (
    "In percent. Held-out compositions show pairs of kinds that training never shows together; new images show the"
    " compositions of training in other arrangements. Correct facts: share of captions that name all objects and no"
    " others, the color of the background, the relation between the objects, or all facts of the image correctly. Twins"
    " are pairs of images whose texts differ in one word or in the order of two words; group: both images prefer their"
    " own text and both texts prefer their own image. R@k: the match is among the k best. Token F1: overlap of the"
    " words of the caption and the reference; content F1: the same without articles and other function words; exact:"
    " the same words in the same order."
)


def print_tables(metrics: dict[str, Any], output: Path) -> None:
    """Print the tables, the paths of the results and commands to try.

    Args:
        metrics: the content of ``metrics.json``.
        output: folder of the demo.
    """
    console = Console()
    for columns, rows in tables(metrics):
        console.print(plain_table(columns, rows, right=True))
    if "scenes" in metrics:
        numbers = metrics["scenes"]["compositions"]
        similarity = ", ".join(f"{name} {value:.2f}" for name, value in numbers["queries"].items())
        console.print(
            f'accuracy of ITM with hard negatives: {_percent(numbers["itm_accuracy"])} % (always "no": 66.7 %);'
            f" mean cosine similarity of an image's queries: {similarity}"
        )
    lines = [
        f"in {metrics['seconds']:.0f} s",
        f"report: {output / 'report.html'}, {output / CONVERSATIONS}   numbers: {output / 'metrics.json'}",
        f"try: blip2 caption {output / 'stage2'} YOUR_IMAGE.jpg",
    ]
    if "scenes" in metrics:
        lines.append(f'or:  blip2 ask {output / "vqa"} YOUR_IMAGE.jpg "What is in the image?"')
    for line in lines:
        console.print(plain_text(line), soft_wrap=True)


# -- report --------------------------------------------------------------------------------------------------------


def write_demo_report(
    path: Path,
    metrics: dict[str, Any],
    recipes: dict[str, Recipe],
    demo_data: DemoData,
    representation: RepresentationPipeline,
    scenes: DemoResults | None,
    images: DemoResults | None,
) -> None:
    """Write the HTML report of the demo. At least one of `scenes` and `images` is given.

    Args:
        path: the HTML file to write.
        metrics: the content of ``metrics.json``.
        recipes: the recipe of each run, by the name of the run.
        demo_data: the data sources of the demo.
        representation: the pipeline of the stage-1 model.
        scenes: results on scenes; None if the demo trained on a user's images.
        images: results on the images of ``demo_data.held_out``; None if there is no such file.
    """
    report = Report(
        "What blip2 demo learned",
        "A Q-Former between frozen EfficientNet-Lite0 and frozen SmolLM2-135M-Instruct, trained in"
        f" {metrics['seconds']:.0f} s and evaluated on held-out images.",
    )
    report.section("Results", TABLES_TEXT)
    for columns, rows in tables(metrics):
        report.table(columns, rows)
    if scenes is not None:
        _add_scenes(report, scenes)
        _add_twins(report, scenes)
    if images is not None:
        _add_records(report, images)
    report.section("Training", "Dashed lines: held-out images.")
    curves = {name: read_metrics(Path(recipe.output)) for name, recipe in recipes.items()}
    first = [("itc", "ITC"), ("itm", "ITM"), ("itm_accuracy", "ITM accuracy"), ("itg", "ITG")]
    stage1 = {name: rows for name, rows in curves.items() if recipes[name].stage == "representation"}
    report.plot(plot_curves(stage1, first), "losses of stage 1")
    later = {name: rows for name, rows in curves.items() if name not in stage1}
    report.plot(plot_curves(later, [("lm", "LM loss"), ("lm_accuracy", "LM accuracy")]), "losses of stage 2")
    report.plot(plot_curves(curves, [("query_similarity", "cosine similarity of queries")]), "similarity of queries")
    results = scenes or images
    assert results is not None
    examples, titles = zip(*_examples(results, 6), strict=True)
    report.section(
        "Attention of the queries",
        "Attention of each query over the image, in the last cross-attention layer of stage 1, averaged over heads.",
    )
    with torch.no_grad():
        memory = representation.model.build_image_memory(results.features[: len(examples)])
        maps = representation.model.qformer.attention_maps(memory)[:, -1]
    report.plot(plot_attention(examples, maps, [title[:26] for title in titles]), "attention of the queries")
    report.section("Credits", f"Images: {demo_data.credit}.")
    report.save(path)


def _examples(results: DemoResults, limit: int = MAX_IMAGES) -> list[tuple[Image.Image, str]]:
    """Return the first images, each with its reference caption."""
    count = min(limit, len(results.rows or results.records))
    return [(results.image(i), results.reference(i)) for i in range(count)]


def _add_scenes(report: Report, results: DemoResults) -> None:
    report.section(
        "Captions and answers",
        "Held-out compositions: no training image shows these kinds together. Each card shows the reference caption,"
        " the caption of the model, the caption of the model without stage 1, and questions with the answer of the"
        " model and the probability of the answer.",
    )
    cards = []
    for i, (image, reference) in enumerate(_examples(results)):
        caption, baseline = results.captions["stage 2"][i], results.captions[WITHOUT_STAGE1][i]
        wrong = wrong_facts(caption, Truth.from_json(results.rows[i]["truth"]))
        lines = [
            ("", reference),
            ("wrong", f"{caption} (wrong: {', '.join(wrong)})") if wrong else ("right", caption),
            ("dim", f"without stage 1: {baseline}"),
        ]
        for question, answer, expected, probability in results.questions.get(i, []):
            style = "right" if is_right(answer, expected) else "wrong"
            note = "" if style == "right" else f", correct: {expected}"
            lines.append((style, f"{question} {answer} ({probability:.2f}{note})"))
        cards.append((image, lines))
    report.cards(cards)


def _add_twins(report: Report, results: DemoResults) -> None:
    report.section(
        "Twins",
        "Pairs of images whose texts differ in one word or in the order of two words. Each card shows the probability"
        " (ITM) that the image matches its own text, and the probability that the image matches the other text.",
    )
    step = max(len(results.twin_rows) // 2 // 6, 1)
    matched = results.twins["itm"].sigmoid()
    cards = []
    for pair in range(0, len(results.twin_rows) // 2, step):
        texts = [results.twin_rows[2 * pair + side]["captions"][0] for side in (0, 1)]
        for side in (0, 1):
            match, other = float(matched[pair, side, side]), float(matched[pair, side, 1 - side])
            style = "right" if match > other else "wrong"
            lines = [(style, f"{match:.2f} {texts[side]}"), ("dim", f"{other:.2f} {texts[1 - side]}")]
            cards.append((read_image(results.folder / results.twin_rows[2 * pair + side]["image"]), lines))
    report.cards(cards[:12], columns=4)


def _add_records(report: Report, results: DemoResults) -> None:
    report.section(
        "Captions",
        "Held-out images with the reference caption, the caption of the model and that of the model without stage 1.",
    )
    captions = zip(results.captions["stage 2"], results.captions[WITHOUT_STAGE1], strict=True)
    report.cards(
        [
            (
                image,
                [("", reference), ("right" if is_close(caption, reference) else "wrong", caption), ("dim", baseline)],
            )
            for (image, reference), (caption, baseline) in zip(_examples(results), captions, strict=False)
        ]
    )
    if results.retrieval is None:
        return
    report.section("Text to image", "The three best-matching held-out images for a sentence.")
    texts = [record.captions[0] for record in results.records]
    best = results.retrieval.scores_t2i.topk(min(3, len(texts)), dim=0).indices.T
    cards = []
    for text in range(0, len(texts), max(len(texts) // 8, 1)):
        for rank, image in enumerate(best[text].tolist()):
            style = "right" if results.retrieval.positive[image, text] else "wrong"
            lines = [("", texts[text] if rank == 0 else " "), (style, f"{rank + 1}. {texts[image]}")]
            cards.append((read_image(results.records[image].image or b""), lines))
    report.cards(cards[:24], columns=6)  # two sentences per row


def wrong_facts(caption: str, truth: Truth) -> list[str]:
    """Return the names of the facts that are wrong in a caption of a scene."""
    return [fact for fact, is_correct in score_caption(caption, truth).items() if is_correct is False]


def is_right(answer: str, expected: str) -> bool:
    """Return whether a generated answer is the expected one."""
    return answer.strip(" .").lower() == expected


def is_close(caption: str, reference: str) -> bool:
    """Return whether a caption has at least about half of its content words in common with a reference."""
    return score_captions([caption], [reference])["content_f1"] >= 0.5
