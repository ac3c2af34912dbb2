"""Files and tables of the runs on easy-VQA (docs/results.md).

    python benchmarks/easy_vqa.py prepare runs/easy-vqa/data
    python benchmarks/easy_vqa.py table runs/easy-vqa/{conditioned,unconditioned,blind}/test

``prepare`` writes

- ``statements.jsonl`` and ``statements-val.jsonl`` for stage 1: what questions and answers of the training split say
  about each of its images, one image a row. Half of the captions that can be drawn for it say what it shows
  ("a red circle."), half are questions with their answers ("is there a red shape? yes").
- ``described.jsonl`` for a stage 2 before the questions: one question, what an image shows, with "a red circle".
- ``questions.jsonl`` for the questions: those of the training split, and what is in ``described.jsonl`` four times.
- ``blind-train.jsonl``: the questions and answers of the training split, with one blank image for all of them. A
  model that learns from these sees no image.
- ``blind-test.jsonl``: the questions of the test split with the same image, each wording once, since the answer of
  such a model depends on the words alone. They have no answers: ``table`` counts each as often as it is asked.

``table`` prints the accuracy of evaluations by type of question, and of the most frequent answers of training and val.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from blip2.data.benchmarks import read_benchmark

SHAPES = {"circle", "rectangle", "triangle"}
COLORS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
DESCRIBE = "what does the image show?"
TYPES = ("shape", "color", "yes or no", "yes or no, negated")


def rows(split: str) -> list[dict[str, Any]]:
    return list(read_benchmark(f"easy-vqa:{split}:package:easy-vqa"))


def question_type(question: str) -> str:
    """One of :data:`TYPES`. Every question of easy-VQA is of one template; what and how it asks is in its words."""
    words = question.rstrip("?").split()
    if "color" in words:
        # "what is the red shape?" has no such word.
        return "color"
    if words[0] == "what":
        return "shape"
    return "yes or no, negated" if {"no", "not"} & set(words) else "yes or no"


def prepare(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "statements"), ("val", "statements-val")):
        about: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for row in rows(split):
            about[row["image"]].append((row["question"], row["answers"][0]))
        said = {image: say(told) for image, told in about.items()}
        write(folder / f"{name}.jsonl", ({"image": image, "captions": texts} for image, texts in said.items()))
        if split == "train":
            shown = ((image, texts[-1].rstrip(".")) for image, texts in said.items() if texts[-1].startswith("a "))
            described = [{"image": image, "question": DESCRIBE, "answers": [text]} for image, text in shown]
            asked = [{key: row[key] for key in ("image", "question", "answers")} for row in rows("train")]
            write(folder / "described.jsonl", described)
            write(folder / "questions.jsonl", [*asked, *described * 4])
    Image.new("RGB", (64, 64), "white").save(folder / "blank.png")
    blank = {"image": "blank.png"}
    kept = ("question", "question_id", "answers")
    write(folder / "blind-train.jsonl", (blank | {key: row[key] for key in kept} for row in rows("train")))
    once = {row["question"]: row["question_id"] for row in rows("test")}
    write(folder / "blind-test.jsonl", (blank | {"question": q, "question_id": i} for q, i in once.items()))


def say(told: list[tuple[str, str]]) -> list[str]:
    """Captions of an image from its questions and answers; those that say what it shows as often as all others."""
    statements = [f"{question} {answer}" for question, answer in told]
    shown = {word for question, answer in told for word in facts(question, answer)}
    shape, color = shown & SHAPES, shown & COLORS
    if not (shape and color):
        return statements
    return [*statements, *[f"a {color.pop()} {shape.pop()}."] * len(statements)]


def facts(question: str, answer: str) -> set[str]:
    """The shape and the color that a question with its answer says are there, if any."""
    named = (SHAPES | COLORS) & {*question.rstrip("?").split(), answer}
    if answer not in ("yes", "no"):
        return named
    negated = question_type(question) == "yes or no, negated"
    return named if (answer == "no") == negated else set()


def write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def table(evaluations: list[Path], image: Path | None) -> None:
    """Print the table, and draw it to `image`."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in [*rows("train"), *rows("val")]:
        answers[row["question"]][row["answers"][0]] += 1
    truth = {row["question_id"]: row for row in rows("test")}
    overall = sum(answers.values(), Counter()).most_common(1)[0][0]
    columns = {
        f"the most frequent answer ({overall})": dict.fromkeys(truth, overall),
        "the most frequent answer to the question": {
            key: answers[row["question"]].most_common(1)[0][0] for key, row in truth.items()
        },
    }
    for folder in evaluations:
        predictions = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))
        given = {entry["question_id"]: entry["answer"] for entry in predictions}
        if len(given) < len(truth):  # each wording once
            by_words = {truth[key]["question"]: answer for key, answer in given.items()}
            given = {key: by_words[row["question"]] for key, row in truth.items()}
        columns[folder.parent.name] = given
    shares = {name: by_type(given, truth) for name, given in columns.items()}
    for name, each in shares.items():
        print(f"| {name} | {' | '.join(f'{100 * share:.1f}' for share in each.values())} |")
    if image is not None:
        draw(shares, {folder.parent.name: folder.parent for folder in evaluations}, image)


def by_type(given: dict[int, str], truth: dict[int, dict[str, Any]]) -> dict[str, float]:
    """Share of right answers to the questions of each type, and to all."""
    right: dict[str, list[bool]] = defaultdict(list)
    for key, row in truth.items():
        for name in (question_type(row["question"]), "all"):
            right[name].append(given[key] == row["answers"][0])
    return {name: sum(right[name]) / len(right[name]) for name in (*TYPES, "all")}


def draw(shares: dict[str, dict[str, float]], runs: dict[str, Path], path: Path) -> None:
    """Accuracy by type of question, and how it grew in training."""
    from matplotlib import pyplot as plt

    colors = dict(zip(shares, ("0.85", "0.7", "#1a6aab", "#7fb2d9", "#e0a458", "#c05f5f"), strict=False))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", width_ratios=(1.6, 1))
    width = 0.84 / len(shares)
    for number, (name, each) in enumerate(shares.items()):
        places = [place + width * (number - (len(shares) - 1) / 2) for place in range(len(each))]
        left.bar(places, [100 * share for share in each.values()], width, color=colors[name], label=name)
    left.set_xticks(range(len(TYPES) + 1), [*TYPES, "all"])
    left.set_ylabel("right answers, %")
    left.set_ylim(0, 100)
    for name, folder in runs.items():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        values = [100 * line["lm_accuracy"] for line in lines]
        smooth = [sum(values[max(0, i - 19) : i + 1]) / len(values[max(0, i - 19) : i + 1]) for i in range(len(values))]
        right.plot([line["step"] for line in lines], smooth, color=colors[name], label=name)
    right.set_xlabel("step")
    right.set_ylabel("right tokens in training, %")
    right.set_ylim(0, 100)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, ncols=3, loc="outside upper center")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("prepare")
    first.add_argument("folder", type=Path)
    first.set_defaults(run=lambda given: prepare(given.folder))
    second = commands.add_parser("table")
    second.add_argument("evaluations", type=Path, nargs="*")
    second.add_argument("--figure", type=Path, help="PNG file that shows the table and the training")
    second.set_defaults(run=lambda given: table(given.evaluations, given.figure))
    given = parser.parse_args()
    given.run(given)
