"""Evaluating a model on any records: captions (paper §4.2), answers (§4.1, §4.3), retrieval (§4.4)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from jaxtyping import Float
from torch import Tensor

from blip2.build import choose_device
from blip2.config import QUESTION_PLACE, DataConfig, Precision
from blip2.data.assets import resolve
from blip2.data.images import ImageError, read_image, to_pixels
from blip2.data.records import Record, Records, open_records
from blip2.data.texts import fill_prompts
from blip2.errors import InputError
from blip2.evaluation.captioning import CaptionScores, Missing, official_scores, scores_by_domain
from blip2.evaluation.parts import Parts
from blip2.evaluation.predictions import Kind, write_predictions
from blip2.evaluation.report import Case, write_cases
from blip2.evaluation.retrieval import Fusion, Retrieval, choose, match, ranks, rerank
from blip2.evaluation.vqa import Question, Rules, score_answers, score_exact
from blip2.inference import ANSWER, GenerationPipeline, Pipeline, RepresentationPipeline, load
from blip2.model.decoding import Decoding
from blip2.model.distributed import process_index
from blip2.model.objectives import image_text_similarity
from blip2.training.checkpoint import trained_state

Task = Literal["captioning", "vqa", "retrieval"]
TASKS: tuple[Task, ...] = ("captioning", "vqa", "retrieval")
NAMED = 20
"""So many images that cannot be used are named; the others are counted."""
METRICS = "metrics.json"
PART = 64
"""Records, or images, that are a part of the work. Results may depend on it in the last digit, so it is fixed."""


@dataclass(frozen=True)
class Findings:
    """What an evaluation found."""

    metrics: dict[str, Any]
    kind: Kind | None
    """Of the predictions; None where none are handed in."""
    predictions: dict[Any, str]
    """By the id of their question or image."""
    cases: list[Case]
    """Every image, text or question, to be shown."""


@dataclass(frozen=True)
class Settings:
    """What results depend on beside model and records."""

    decoding: Decoding | None = None
    """How texts are written; None: :data:`blip2.inference.CAPTION` or :data:`~blip2.inference.ANSWER`."""
    prompt: str | None = None
    """Of captions, or of questions with {} where the question goes; None: the model's own."""
    candidates: int = 128
    """Of retrieval: how many the similarity (ITC) gives to the matching score (ITM); 0 leaves it to the similarity."""
    fusion: Fusion = "itm"
    """Of retrieval: what ranks the candidates."""
    rules: Rules = "official"
    """Of answers: see :mod:`blip2.evaluation.vqa`."""


def evaluate(
    model: str | Path,
    task: Task,
    data: str | DataConfig,
    output: str | Path,
    settings: Settings = Settings(),
    *,
    limit: int | None = None,
    device: str | None = None,
    dtype: Precision | None = None,
    changes: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint of any format; ``metrics.json``, ``predictions.json`` and ``report.html`` go to `output`.

    Under ``torchrun`` or ``accelerate launch`` the processes share the work. A killed evaluation goes on where it was
    when it is started again, and one that was done is not done again; an output of another model, task, data or
    settings is refused.

    Args:
        data: what ``data.train`` of a recipe may say, or a section of a recipe that says it.
        limit: only so many records, the first ones.

    Returns:
        The metrics.

    Raises:
        InputError: the model cannot do the task, the data cannot be read or do not fit the task, or `output` belongs
            to another evaluation.
    """
    state = PartialState(cpu=choose_device(device).type == "cpu")
    stage = "representation" if task == "retrieval" else "generation"
    pipeline = load(model, device or str(state.device), dtype, changes=changes, stage=stage)
    config = DataConfig(train=data, streaming=False) if isinstance(data, str) else replace(data, streaming=False)
    records = open_records(resolve(config.train), config)
    assert isinstance(records, Records)
    count = len(records) if limit is None else min(limit, len(records))
    folder = Path(output)
    about = {
        "task": task, "model": str(pipeline.path), "weights": _digest(pipeline.model), "data": config.train,
        "records": count, "dtype": str(pipeline.model.vision.dtype), **json.loads(json.dumps(asdict(settings))),
    }  # fmt: skip
    parts = _claim(folder, about)
    if (folder / METRICS).exists():  # it was done before
        return json.loads((folder / METRICS).read_text(encoding="utf-8"))
    findings = _WORK[task](pipeline, [records[i] for i in range(count)], settings, parts)
    metrics = {**about, **findings.metrics}
    if process_index() == 0:
        if findings.kind is not None:
            write_predictions(folder / "predictions.json", findings.kind, findings.predictions)
        write_cases(folder / "report.html", metrics, findings.cases)
        # What says that it is done comes last.
        (folder / METRICS).write_text(json.dumps(metrics, indent=1), encoding="utf-8")
        parts.forget()
    state.wait_for_everyone()
    return metrics


def _claim(folder: Path, about: dict[str, Any]) -> Parts:
    """The parts of an evaluation in a folder that is its own.

    Raises:
        InputError: the folder cannot be made, or holds another evaluation.
    """
    file = folder / "evaluation.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            beside = file.with_suffix(f".{process_index()}.tmp")
            beside.write_text(json.dumps(about, indent=1), encoding="utf-8")
            beside.replace(file)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): give another output") from error
    found = json.loads(file.read_text(encoding="utf-8"))
    other = sorted(key for key in found.keys() | about.keys() if found.get(key) != about.get(key))
    if other:
        raise InputError(
            f"{folder} holds another evaluation: its {other[0]} is {found.get(other[0])}, not {about.get(other[0])}:"
            " give another output"
        )
    return Parts(folder / "parts")


def _digest(model: torch.nn.Module) -> str:
    """Of what was trained."""
    weights = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(trained_state(model).items()):
        weights.update(name.encode())
        weights.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return weights.hexdigest()


# -- images ----------------------------------------------------------------------------------------------------------


def _read(pipeline: Pipeline[Any], images: Sequence[str | bytes | None]) -> tuple[list[Tensor | None], list[str]]:
    """Pixels of images, None for those that cannot be used, and why they cannot."""
    pixels: list[Tensor | None] = []
    skipped = []
    for image in images:
        try:
            if image is None:
                raise ImageError("there is no image")
            pixels.append(to_pixels(read_image(image), pipeline.model.vision.preprocessing))
        except ImageError as error:
            pixels.append(None)
            skipped.append(str(error))
    return pixels, skipped


def _by_image(records: Sequence[Record]) -> dict[Any, list[int]]:
    """The records of each image, in the order in which images come."""
    owners: dict[Any, list[int]] = {}
    for number, record in enumerate(records):
        owners.setdefault(record.about.get("image_id", record.image_id), []).append(number)
    return owners


def _spans(count: int) -> list[range]:
    return [range(start, min(start + PART, count)) for start in range(0, count, PART)]


# -- tasks -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _answers(pipeline: GenerationPipeline, records: Sequence[Record], settings: Settings, parts: Parts) -> Findings:
    """Answers to questions, and their accuracy where the true answers are there."""
    prompt = settings.prompt or pipeline.question_prompt
    if QUESTION_PLACE not in prompt:
        raise InputError(f"the prompt {prompt!r} has no {QUESTION_PLACE} where the question goes: put it in")
    unasked = next((record.key for record in records if record.question is None), None)
    if unasked is not None:
        raise InputError(f"{unasked} has no question, which the task vqa needs: choose another task")
    ids = [record.about.get("question_id", i) for i, record in enumerate(records)]
    doubled = [key for key, times in Counter(ids).items() if times > 1]
    if doubled:
        raise InputError(
            f"question_id {doubled[0]!r} and {len(doubled) - 1} others stand more than once in the data, expected one a"
            " question"
        )
    spans = _spans(len(records))

    def work(part: int) -> dict[str, Any]:
        chosen = [records[i] for i in spans[part]]
        names = list(dict.fromkeys(record.image for record in chosen))
        pixels, skipped = _read(pipeline, names)
        good = [name for name, image in zip(names, pixels, strict=True) if image is not None]
        asked = [i for i in spans[part] if records[i].image in good]
        if not asked:
            return {"answers": {}, "skipped": skipped}
        features = pipeline.encode(torch.stack([image for image in pixels if image is not None]))
        questions = [records[i].question or "" for i in asked]
        written = pipeline.generate(
            features, fill_prompts(prompt, questions), settings.decoding or ANSWER,
            image_of=[good.index(records[i].image) for i in asked], questions=questions,
        )  # fmt: skip
        return {"answers": dict(zip(asked, written, strict=True)), "skipped": skipped}

    done = parts.do("answers", len(spans), work)
    answers = {number: answer for part in done for number, answer in part["answers"].items()}
    skipped = [message for part in done for message in part["skipped"]]
    metrics: dict[str, Any] = {"answered": len(answers), "images_skipped": len(skipped), "skipped": skipped[:NAMED]}
    truth = {
        i: Question(
            records[i].captions, *(str(records[i].about.get(key, "")) for key in ("question_type", "answer_type"))
        )
        for i in answers
        if records[i].captions
    }
    scores: dict[Any, float] = {}
    if truth:
        one = all(len(question.answers) == 1 for question in truth.values())
        found = (score_exact if one else score_answers)({i: answers[i] for i in truth}, truth, settings.rules)
        metrics |= {
            "accuracy": found.accuracy, "by_question_type": found.by_question_type,
            "by_answer_type": found.by_answer_type,
        }  # fmt: skip
        scores = found.each
    cases = [
        Case(
            scores.get(i),
            records[i].image or "",
            (records[i].question or "", answer, f"true: {_often(truth[i].answers)}" if i in truth else ""),
        )
        for i, answer in answers.items()
    ]
    named = {ids[i]: answer for i, answer in answers.items()}
    return _told(metrics, "answer", named, cases)


@torch.no_grad()
def _captions(pipeline: GenerationPipeline, records: Sequence[Record], settings: Settings, parts: Parts) -> Findings:
    """Captions of images, and their scores where the true captions are there."""
    owners = list(_by_image(records).values())
    spans = _spans(len(owners))

    def work(part: int) -> dict[str, Any]:
        pixels, skipped = _read(pipeline, [records[owners[i][0]].image for i in spans[part]])
        good = [i for i, image in zip(spans[part], pixels, strict=True) if image is not None]
        if not good:
            return {"captions": {}, "skipped": skipped}
        features = pipeline.encode(torch.stack([image for image in pixels if image is not None]))
        written = pipeline.caption(features, settings.prompt, settings.decoding)
        return {"captions": dict(zip(good, written, strict=True)), "skipped": skipped}

    done = parts.do("captions", len(spans), work)
    captions = {i: caption for part in done for i, caption in part["captions"].items()}
    skipped = [message for part in done for message in part["skipped"]]
    truth = {i: [text for n in owners[i] for text in records[n].captions] for i in captions}
    truth = {i: texts for i, texts in truth.items() if texts}
    domains = {i: str(records[owners[i][0]].about.get("domain", "")) for i in truth}
    metrics: dict[str, Any] = {"images": len(captions), "images_skipped": len(skipped), "skipped": skipped[:NAMED]}

    def score(part: int) -> dict[str, Any]:
        written = {i: captions[i] for i in truth}
        found = official_scores(written, truth)
        shown = _shown(found)
        if all(domains.values()):
            shown["by_domain"] = {
                name: _shown(each)
                for name, each in scores_by_domain(written, truth, domains).items()
                if name != "overall"
            }
        return {"metrics": shown, "cider": found.cider}

    scores: Mapping[int, float] = {}
    if truth:
        (found,) = parts.do("scores", 1, score)  # Java runs in one of the processes
        metrics |= found["metrics"]
        scores = found["cider"]
    cases = [
        Case(
            scores.get(i),
            records[owners[i][0]].image or "",
            (caption, *(f"true: {text}" for text in truth.get(i, ())[:2])),
        )
        for i, caption in captions.items()
    ]
    named = {records[owners[i][0]].about.get("image_id", i): caption for i, caption in captions.items()}
    return _told(metrics, "caption", named, cases)


@torch.no_grad()
def _retrieval(
    pipeline: RepresentationPipeline, records: Sequence[Record], settings: Settings, parts: Parts
) -> Findings:
    """Recall of both directions, by similarity (ITC) and, among its candidates, by matching (ITM)."""
    owners = list(_by_image(records).values())
    spans = _spans(len(owners))

    def read(part: int) -> tuple[list[int], Float[Tensor, "I P E"] | None, list[str]]:
        pixels, skipped = _read(pipeline, [records[owners[i][0]].image for i in spans[part]])
        good = [i for i, image in zip(spans[part], pixels, strict=True) if image is not None]
        return good, pipeline.encode(torch.stack([p for p in pixels if p is not None])) if good else None, skipped

    def embed(part: int) -> dict[str, Any]:
        good, features, skipped = read(part)
        vectors = None if features is None else pipeline.embed_images(features).cpu()
        return {"images": good, "vectors": vectors, "skipped": skipped}

    done = parts.do("images", len(spans), embed)
    place = {image: number for number, image in enumerate(i for part in done for i in part["images"])}
    told = [(place[i], text) for i in place for n in owners[i] for text in records[n].captions]
    if not told:
        raise InputError("the task retrieval needs images with captions, and there are none that can be used")
    texts = [text for _, text in told]
    positive = torch.zeros(len(place), len(texts), dtype=torch.bool)
    positive[[number for number, _ in told], range(len(texts))] = True
    text_spans = _spans(len(texts))
    vectors = torch.cat(
        parts.do(
            "texts", len(text_spans), lambda part: pipeline.embed_texts([texts[i] for i in text_spans[part]]).cpu()
        )
    )
    similarity = torch.cat(
        [image_text_similarity(part["vectors"], vectors) for part in done if part["vectors"] is not None]
    )
    found = Retrieval(similarity, similarity, positive)
    metrics: dict[str, Any] = {
        "images": len(place),
        "texts": len(texts),
        "chance": found.chance,
        "itc": _recalls(found),
    }

    if settings.candidates:
        chosen = choose(similarity, settings.candidates)
        ids, mask = pipeline.encode_texts(texts)

        def rank(part: int) -> list[Tensor]:
            good, features, _ = read(part)
            if features is None:
                return []
            rows = zip(features.split(1), good, strict=True)
            return [match(pipeline, image, ids, mask, chosen.any[place[i]]) for image, i in rows]

        logits = [row for part in parts.do("pairs", len(spans), rank) for row in part]
        found = rerank(similarity, positive, chosen, logits, settings.fusion)
        metrics[settings.fusion] = _recalls(found)

    skipped = [message for part in done for message in part["skipped"]]
    metrics |= {"images_skipped": len(skipped), "skipped": skipped[:NAMED]}
    order = ranks(found.text_scores.T, positive.T).tolist()
    images = [records[owners[i][0]].image or "" for i in place]
    cases = [
        Case(1 / (1 + rank), images[number], (text, f"its image is number {rank + 1} of {len(place)}"))
        for (number, text), rank in zip(told, order, strict=True)
    ]
    return Findings(metrics, None, {}, cases)


def _shown(found: CaptionScores) -> dict[str, Any]:
    """The metrics; null where one is missing, and why."""
    missing = {name: value.reason for name, value in found.metrics.items() if isinstance(value, Missing)}
    return {**found.metrics, **dict.fromkeys(missing), **({"missing": missing} if missing else {})}


def _recalls(found: Retrieval) -> dict[str, float]:
    """As tables have them: TR of texts for an image, IR of images for a text."""
    sides = {"TR": found.image_to_text, "IR": found.text_to_image}
    return {f"{side}@{key.removeprefix('r')}": value for side, recall in sides.items() for key, value in recall.items()}


def _told(metrics: dict[str, Any], kind: Kind, predictions: dict[Any, str], cases: list[Case]) -> Findings:
    """Findings whose predictions are of another kind where their ids are names."""
    if all(isinstance(key, int) for key in predictions):
        return Findings(metrics, kind, predictions, cases)
    named = {str(key): text for key, text in predictions.items()}
    return Findings(metrics, "gqa" if kind == "answer" else "named", named, cases)


def _often(answers: Sequence[str]) -> str:
    """Answers with how often they were given, the most frequent first."""
    counts = Counter(answers).most_common()
    return ", ".join(answer if count == 1 else f"{answer} ({count})" for answer, count in counts)


_WORK: dict[Task, Any] = {"captioning": _captions, "vqa": _answers, "retrieval": _retrieval}
