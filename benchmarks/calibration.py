"""python benchmarks/calibration.py RUN [--data FOLDER] [--fit 200] [--test 300] [--generated 200]

Answers questions about scenes with the model that `blip2 demo` trains (RUN is its folder, such as runs/demo/vqa), by
generation and by ranking choices: the answers that training gives to questions of the same type. Temperatures are
fitted to questions about validation images, and the errors measured on questions about held-out compositions. Prints
the tables of docs/calibration.md; "by chance" is the error that a calibrated model would have on as many questions.

Answers are written to files in the output folder, from which the program continues if it is started again.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

CHUNK = 20
"""Number of questions that are answered and written together."""
Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the model, which is not changed")
    parser.add_argument("--data", default="package:scenes-pairs", help="scenes on which the model was trained")
    parser.add_argument("--fit", type=int, default=200, help="questions to which the temperatures are fitted")
    parser.add_argument("--test", type=int, default=300, help="questions on which the errors are measured")
    parser.add_argument("--generated", type=int, default=200, help="of both, how many are also generated")
    parser.add_argument("--output", type=Path, default=Path("calibration"))
    options = parser.parse_args()
    import blip2
    from blip2.data.assets import resolve

    scenes = Path(resolve(options.data))
    pipeline: Any = blip2.load(options.run)
    choices = choices_by_type(read(scenes / "train_questions.jsonl"))
    options.output.mkdir(parents=True, exist_ok=True)
    files = {"fit": "validation_questions.jsonl", "test": "test_compositions_questions.jsonl"}
    questions = {name: read(scenes / file)[: getattr(options, name)] for name, file in files.items()}
    ranked = {
        name: complete(
            options.output / f"ranked-{name}.jsonl", rows, lambda part: rank(pipeline, scenes, part, choices)
        )
        for name, rows in questions.items()
    }
    generated = {
        name: complete(
            options.output / f"generated-{name}.jsonl",
            rows[: options.generated],
            lambda part: generate(pipeline, scenes, part),
        )
        for name, rows in questions.items()
    }
    report(questions, ranked, generated)


def read(file: Path) -> Rows:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def choices_by_type(rows: Rows) -> dict[str, list[str]]:
    """Return the answers of the training data to each type of question."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        found[row["question_type"]].add(row["answers"][0])
    return {kind: sorted(answers) for kind, answers in found.items()}


def complete(file: Path, rows: Rows, answer: Any) -> Rows:
    """Answer the questions for which the file has no line yet, and return all its lines."""
    done = len(read(file)) if file.exists() else 0
    for start in range(done, len(rows), CHUNK):
        with file.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(each) + "\n" for each in answer(rows[start : start + CHUNK]))
    return read(file)[: len(rows)] if rows else []


def images(pipeline: Any, folder: Path, rows: Rows) -> torch.Tensor:
    """Return the features of the image of each question. Each image is encoded once."""
    names = list(dict.fromkeys(row["image"] for row in rows))
    return pipeline.encode_images([folder / name for name in names])[[names.index(row["image"]) for row in rows]]


def rank(pipeline: Any, folder: Path, rows: Rows, choices: dict[str, list[str]]) -> Iterable[Any]:
    candidates = [choices[row["question_type"]] for row in rows]
    for each in pipeline.rank(images(pipeline, folder, rows), candidates, [row["question"] for row in rows], "lm"):
        yield {"answer": each[0].text, "scores": [candidate.score for candidate in each]}


def generate(pipeline: Any, folder: Path, rows: Rows) -> Iterable[Any]:
    from blip2 import Decoding

    greedy = Decoding(num_beams=1, max_new_tokens=4)  # as in the demo
    questions = [row["question"] for row in rows]
    for each in pipeline.answer(images(pipeline, folder, rows), questions, greedy, details=True):
        yield {"answer": each.text, "log_prob": each.log_prob / len(each.tokens)}


# -- numbers ---------------------------------------------------------------------------------------------------------


def confidences(answers: Rows, temperature: float) -> torch.Tensor:
    """Return the confidence of answers, as results with details and ranked candidates have it."""
    if "log_prob" in answers[0]:
        return torch.tensor([each["log_prob"] for each in answers]).double().div(temperature).exp()
    scores = [torch.tensor(each["scores"]).double() / temperature for each in answers]
    return torch.stack([each.softmax(dim=0).amax() for each in scores])


def right(answers: Rows, questions: Rows) -> list[float]:
    return [float(each["answer"] == row["answers"][0]) for each, row in zip(answers, questions, strict=False)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def error_by_chance(confidences: torch.Tensor, count: int | None = None, draws: int = 200) -> float:
    """Return the mean calibration error of a model that is right exactly as often as its confidences say.

    With `count`, the error is that of so many answers, whose confidences are drawn from those given.
    """
    from blip2.evaluation.calibration import expected_calibration_error

    generator, errors = torch.Generator().manual_seed(0), []
    for _ in range(draws):
        drawn = confidences
        if count is not None:
            drawn = confidences[torch.randint(len(confidences), (count,), generator=generator)]
        outcomes = torch.rand(len(drawn), generator=generator) < drawn
        errors.append(expected_calibration_error(drawn.tolist(), outcomes.double().tolist()))
    return mean(errors)


def report(questions: dict[str, Rows], ranked: dict[str, Rows], generated: dict[str, Rows]) -> None:
    from blip2.evaluation.calibration import accuracy_at_coverage, expected_calibration_error, fit_temperature

    ways = {"generated": generated, "ranked": ranked} if generated["test"] else {"ranked": ranked}
    count = min(len(answers["test"]) for answers in ways.values())
    asked = questions["test"][:count]
    print(f"\nthe first {count} questions\n")
    kinds = sorted({row["question_type"] for row in asked})
    print("| answers | all |", " | ".join(kinds), "|")
    for name, answers in ways.items():
        found = right(answers["test"][:count], asked)
        by_kind = [[a for a, row in zip(found, asked, strict=True) if row["question_type"] == kind] for kind in kinds]
        print(f"| {name} | {mean(found):.3f} |", " | ".join(f"{mean(each):.3f}" for each in by_kind), "|")
    titles = ("fitted to", "temperature", "measured on", "error before", "error after", "by chance")
    print("\n| answers |", " | ".join(titles), "| right at coverage 100 % | 90 % | 80 % | 50 % |")
    by_count = []
    for name, answers in ways.items():
        target = torch.tensor(right(answers["fit"], questions["fit"])).double()
        temperature = fit_temperature(lambda t, a=answers["fit"]: confidences(a, t), target)
        outcomes = right(answers["test"], questions["test"])
        errors = [
            expected_calibration_error(confidences(answers["test"], each).tolist(), outcomes)
            for each in (1.0, temperature)
        ]
        errors.append(error_by_chance(confidences(answers["test"], temperature)))
        curve = accuracy_at_coverage(confidences(answers["test"], temperature).tolist(), outcomes)
        cells = [len(target), f"{temperature:.2f}", len(outcomes), *(f"{each:.3f}" for each in errors)]
        print("|", name, "|", " | ".join(map(str, cells)), "|", end=" ")
        print(" | ".join(f"{curve[share]:.3f}" for share in ("100", "90", "80", "50")), "|")
        fitted = confidences(answers["test"], temperature)
        counts = {count: error_by_chance(fitted, count) for count in (100, 300, 1000, 3000)}
        by_count.append(", ".join(f"{error:.3f} with {count}" for count, error in counts.items()) + f" ({name})")
    print("\nby chance, with other numbers of answers:", *by_count, sep="\n")


if __name__ == "__main__":
    main()
