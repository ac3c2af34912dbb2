"""What a model can be evaluated at: captions (paper §4.2), answers (§4.1, §4.3), retrieval (§4.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import set_seed
from jaxtyping import Float
from torch import Tensor

from blip2.config import QUESTION_PLACE
from blip2.data.images import ImageError, read_image, to_pixels
from blip2.decoding.search import Decoding
from blip2.errors import InputError
from blip2.evaluation.captioning import CaptionScores, Missing, official_scores, scores_by_domain
from blip2.evaluation.data import Table
from blip2.evaluation.predictions import Kind, read_predictions
from blip2.evaluation.report import Case
from blip2.evaluation.retrieval import Fusion, Retrieval, choose, match, ranks, rerank
from blip2.evaluation.vqa import Question, Rules, lemmatize, score_answers, score_exact
from blip2.model.losses import image_text_similarity
from blip2.pipelines import ANSWER, GenerationPipeline, Pipeline, RepresentationPipeline
from blip2.resumable import Parts

Key = TypeVar("Key")
LEMMATIZED = "accuracy_lemmatized"
NAMED = 20
"""So many images that cannot be used are named; the others are counted."""
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
    """How texts are written; None: :data:`blip2.pipelines.CAPTION` or :data:`~blip2.pipelines.ANSWER`."""
    prompt: str | None = None
    """Of captions, or of questions with {} where the question goes; None: the model's own."""
    rerank_k: int = 128
    """Of retrieval: how many the similarity (ITC) gives to the matching score (ITM); 0 leaves it to the similarity."""
    fusion: Fusion = "itm"
    """Of retrieval: what ranks the candidates."""
    rules: Rules = "official"
    """Of answers: see :mod:`blip2.evaluation.vqa`."""
    lemmatize: bool = False
    """Of answers: score them in base forms, too."""
    seed: int = 0
    """Of sampling; each part of the work begins with its own, so that it may be done by any process at any time."""


DEFAULTS = Settings()


# -- tasks -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def answer(pipeline: GenerationPipeline, table: Table, settings: Settings, parts: Parts) -> Findings:
    """Answers to questions, and their accuracy where the true answers are there."""
    prompt = settings.prompt or pipeline.question_prompt
    if QUESTION_PLACE not in prompt:
        raise InputError(f"the prompt {prompt!r} has no {QUESTION_PLACE} where the question goes: put it in")
    ids, truth = table.question_ids(), _true_answers(table)

    def write(span: range) -> tuple[dict[int, str], list[str]]:
        first: dict[int, int] = {}
        for i in span:
            first.setdefault(table.image_ids[i], i)
        good, features, skipped = _see(pipeline, {key: table.image(i) for key, i in first.items()})
        asked = [i for i in span if table.image_ids[i] in good]
        if features is None:
            return {}, skipped
        questions = [table.said[i].question or "" for i in asked]
        written = pipeline.generate(
            features, pipeline.question_prompts(questions, prompt), settings.decoding or ANSWER,
            image_of=[good.index(table.image_ids[i]) for i in asked], questions=questions,
        )  # fmt: skip
        return dict(zip(asked, written, strict=True)), skipped

    answers, skipped = _write("answers", len(table), write, parts, settings.seed)
    return _judge_answers(table, ids, truth, answers, settings, _skips(skipped))


def judge_given_answers(table: Table, file: str | Path, settings: Settings, parts: Parts) -> Findings:
    """The accuracy of a file of answers.

    Raises:
        InputError: it cannot be read, or ids are missing, doubled or unknown.
    """
    ids, truth = table.question_ids(), _true_answers(table)
    return _judge_answers(table, ids, truth, dict(enumerate(_read(file, "answer", ids))), settings, {})


def _true_answers(table: Table) -> dict[int, Question]:
    """What people answered, by the number of the question; blank answers count, as the official scripts count them.

    Raises:
        InputError: some questions have answers and others none, or some have one answer and others several.
    """
    truth: dict[int, Question] = {}
    numbers: dict[str, list[int]] = {"no answers": [], "one answer": [], "several answers": []}
    for i, record in enumerate(table.said):
        blank = [""] * record.blank if len(record.captions) + record.blank > 1 else []
        answers = (*record.captions, *blank)
        numbers["no answers" if not answers else "one answer" if len(answers) == 1 else "several answers"].append(i)
        if answers:
            types = (str(record.about.get(key, "")) for key in ("question_type", "answer_type"))
            truth[i] = Question(answers, *types)
    found = {kind: rows for kind, rows in numbers.items() if rows}
    if len(found) > 1:
        counts = ", ".join(
            f"{len(rows)} with {kind} (the first: {table.said[rows[0]].key})" for kind, rows in found.items()
        )
        raise InputError(
            f"{table.source} has questions {counts}, which no rule scores together: give all of them one answer, or all"
            " of them several"
        )
    return truth


def _judge_answers(
    table: Table,
    ids: Sequence[Any],
    true: Mapping[int, Question],
    answers: Mapping[int, str],
    settings: Settings,
    about: Mapping[str, Any],
) -> Findings:
    metrics: dict[str, Any] = {"answered": len(answers), **about}
    truth = {i: true[i] for i in answers if i in true}
    scores: dict[Any, float] = {}
    if truth:
        one = all(len(question.answers) == 1 for question in truth.values())
        score = partial(score_exact if one else score_answers, questions=truth, rules=settings.rules)
        found = score({i: answers[i] for i in truth})
        metrics |= {
            "accuracy": found.accuracy, "by_question_type": found.by_question_type,
            "by_answer_type": found.by_answer_type,
        }  # fmt: skip
        scores = found.each
        if settings.lemmatize:
            try:
                lemmas = lemmatize([answers[i] for i in truth])
                metrics[LEMMATIZED] = score(dict(zip(truth, lemmas, strict=True))).accuracy
            except InputError as error:
                metrics |= {LEMMATIZED: None, "missing": {LEMMATIZED: str(error)}}
    cases = [
        Case(
            scores.get(i),
            partial(table.image, i),
            (table.said[i].question or "", answer, f"true: {_often(truth[i].answers)}" if i in truth else ""),
        )
        for i, answer in answers.items()
    ]
    return _told(metrics, "answer", {ids[i]: answer for i, answer in answers.items()}, cases)


@torch.no_grad()
def caption(pipeline: GenerationPipeline, table: Table, settings: Settings, parts: Parts) -> Findings:
    """Captions of images, and their scores where the true captions are there."""
    owners = table.by_image()

    def write(span: range) -> tuple[dict[int, str], list[str]]:
        good, features, skipped = _see(pipeline, {i: table.image(owners[i][0]) for i in span})
        if features is None:
            return {}, skipped
        return dict(zip(good, pipeline.caption(features, settings.prompt, settings.decoding), strict=True)), skipped

    captions, skipped = _write("captions", len(owners), write, parts, settings.seed)
    return _judge_captions(table, owners, captions, parts, _skips(skipped))


def judge_given_captions(table: Table, file: str | Path, settings: Settings, parts: Parts) -> Findings:
    """The scores of a file of captions.

    Raises:
        InputError: it cannot be read, or ids are missing, doubled or unknown.
    """
    owners = table.by_image()
    return _judge_captions(table, owners, dict(enumerate(_read(file, "caption", _names(table, owners)))), parts, {})


def _judge_captions(
    table: Table, owners: Sequence[list[int]], captions: Mapping[int, str], parts: Parts, about: Mapping[str, Any]
) -> Findings:
    truth = {i: [text for n in owners[i] for text in table.said[n].captions] for i in captions}
    truth = {i: texts for i, texts in truth.items() if texts}
    domains = {i: str(table.said[owners[i][0]].about.get("domain", "")) for i in truth}
    metrics: dict[str, Any] = {"images": len(captions), **about}

    def score(part: int) -> dict[str, Any]:
        written = {i: captions[i] for i in truth}
        if not all(domains.values()):
            found = official_scores(written, truth)
            return {"metrics": _shown(found), "cider": found.cider}
        by_domain = scores_by_domain(written, truth, domains)
        found = by_domain.pop("overall")
        shown = {"by_domain": {name: _shown(each) for name, each in by_domain.items()}}
        return {"metrics": {**_shown(found), **shown}, "cider": found.cider}

    scores: Mapping[int, float] = {}
    if truth:
        (found,) = parts.do("scores", 1, score)  # Java runs in one of the processes
        metrics |= found["metrics"]
        scores = found["cider"]
    cases = [
        Case(
            scores.get(i),
            partial(table.image, owners[i][0]),
            (text, *(f"true: {each}" for each in truth.get(i, ())[:2])),
        )
        for i, text in captions.items()
    ]
    names = _names(table, owners)
    return _told(metrics, "caption", {names[i]: text for i, text in captions.items()}, cases)


@torch.no_grad()
def retrieve(pipeline: RepresentationPipeline, table: Table, settings: Settings, parts: Parts) -> Findings:
    """Recall of both directions, by similarity (ITC) and, among its candidates, by matching (ITM)."""
    owners = table.by_image()
    spans = _spans(len(owners))

    def see(part: int) -> tuple[list[int], Float[Tensor, "I P E"] | None, list[str]]:
        return _see(pipeline, {i: table.image(owners[i][0]) for i in spans[part]})

    def embed(part: int) -> dict[str, Any]:
        good, features, skipped = see(part)
        vectors = None if features is None else pipeline.embed_images(features).cpu()
        return {"images": good, "vectors": vectors, "skipped": skipped}

    done = parts.do("images", len(spans), embed)
    place = {image: number for number, image in enumerate(i for part in done for i in part["images"])}
    told = [(place[i], text) for i in place for n in owners[i] for text in table.said[n].captions]
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

    if settings.rerank_k:
        chosen = choose(similarity, settings.rerank_k)
        ids, mask = pipeline.encode_texts(texts)

        def rank(part: int) -> list[Tensor]:
            good, features, _ = see(part)
            if features is None:
                return []
            rows = zip(features.split(1), good, strict=True)
            return [match(pipeline, image, ids, mask, chosen.any[place[i]]) for image, i in rows]

        logits = [row for part in parts.do("pairs", len(spans), rank) for row in part]
        found = rerank(similarity, positive, chosen, logits, settings.fusion)
        metrics[settings.fusion] = _recalls(found)

    metrics |= _skips([message for part in done for message in part["skipped"]])
    order = ranks(found.text_scores.T, positive.T).tolist()
    shown = [owners[i][0] for i in place]
    cases = [
        Case(
            1 / (1 + rank),
            partial(table.image, shown[number]),
            (text, f"its image is number {rank + 1} of {len(place)}"),
        )
        for (number, text), rank in zip(told, order, strict=True)
    ]
    return Findings(metrics, None, {}, cases)


# -- images and parts ------------------------------------------------------------------------------------------------


def _see(
    pipeline: Pipeline[Any], images: Mapping[Key, str | bytes | None]
) -> tuple[list[Key], Float[Tensor, "I P E"] | None, list[str]]:
    """Which of some images can be used, their features (None where there are none), and why the others cannot."""
    pixels: dict[Key, Tensor] = {}
    skipped = []
    for key, image in images.items():
        try:
            if image is None:
                raise ImageError("there is no image")
            pixels[key] = to_pixels(read_image(image), pipeline.model.vision.preprocessing)
        except ImageError as error:
            skipped.append(str(error))
    return list(pixels), pipeline.encode(torch.stack(list(pixels.values()))) if pixels else None, skipped


def _spans(count: int) -> list[range]:
    return [range(start, min(start + PART, count)) for start in range(0, count, PART)]


def _write(
    name: str, count: int, write: Callable[[range], tuple[dict[int, str], list[str]]], parts: Parts, seed: int
) -> tuple[dict[int, str], list[str]]:
    """What `write` gives for `count` numbers, part by part: texts by number, and why images were skipped."""
    spans = _spans(count)

    def work(part: int) -> tuple[dict[int, str], list[str]]:
        set_seed((seed * 1_000_003 + part) % 2**32)
        return write(spans[part])

    done = parts.do(name, len(spans), work)
    texts = {number: text for written, _ in done for number, text in written.items()}
    return texts, [message for _, skipped in done for message in skipped]


# -- what was found --------------------------------------------------------------------------------------------------


def _skips(messages: list[str]) -> dict[str, Any]:
    return {"images_skipped": len(messages), "skipped": messages[:NAMED]}


def _shown(found: CaptionScores) -> dict[str, Any]:
    """The metrics; null where one is missing, and why."""
    missing = {name: value.reason for name, value in found.metrics.items() if isinstance(value, Missing)}
    return {**found.metrics, **dict.fromkeys(missing), **({"missing": missing} if missing else {})}


def _recalls(found: Retrieval) -> dict[str, float]:
    """As tables have them: TR of texts for an image, IR of images for a text."""
    sides = {"TR": found.image_to_text, "IR": found.text_to_image}
    return {f"{side}@{key.removeprefix('r')}": value for side, recall in sides.items() for key, value in recall.items()}


def _names(table: Table, owners: Sequence[list[int]]) -> list[Any]:
    """What each image is called: its image_id, or its number."""
    return [table.said[numbers[0]].about.get("image_id", i) for i, numbers in enumerate(owners)]


def _read(file: str | Path, kind: Kind, ids: Sequence[Any]) -> list[str]:
    """Predictions in the order of their ids."""
    kind, keys = _kind(kind, ids)
    found = read_predictions(file, kind, keys)
    return [found[key] for key in keys]


def _kind(kind: Kind, ids: Sequence[Any]) -> tuple[Kind, list[Any]]:
    """Of predictions with these ids, which are texts unless all are whole numbers."""
    if all(isinstance(key, int) for key in ids):
        return kind, list(ids)
    return "gqa" if kind == "answer" else "named", [str(key) for key in ids]


def _told(metrics: dict[str, Any], kind: Kind, predictions: dict[Any, str], cases: list[Case]) -> Findings:
    kind, keys = _kind(kind, list(predictions))
    return Findings(metrics, kind, dict(zip(keys, predictions.values(), strict=True)), cases)


def _often(answers: Sequence[str]) -> str:
    """Answers with how often they were given, the most frequent first."""
    counts = Counter(answers).most_common()
    return ", ".join(answer if count == 1 else f"{answer} ({count})" for answer, count in counts)
