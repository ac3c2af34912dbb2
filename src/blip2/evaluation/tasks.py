"""The evaluation tasks: captioning (paper §4.2), visual question answering (§4.1, §4.3) and retrieval (§4.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate.utils import set_seed
from jaxtyping import Float
from torch import Tensor

from blip2.config import QUESTION_PLACEHOLDER, EvaluationConfig
from blip2.data.arrays import blank_input, read_input, stack_inputs
from blip2.data.images import ImageError
from blip2.decoding.options import ANSWER_DECODING, CAPTION_DECODING, Decoding
from blip2.errors import InputError
from blip2.evaluation.calibration import measure
from blip2.evaluation.captioning import CaptionScores, MissingMetric, official_scores, scores_by_domain
from blip2.evaluation.control import FeatureFiles, add_control, derange
from blip2.evaluation.data import EvalData, read_answer_list
from blip2.evaluation.predictions import PredictionFormat, read_predictions
from blip2.evaluation.report import Example
from blip2.evaluation.retrieval import (
    Candidates,
    Recall,
    RetrievalResult,
    itm_logits,
    ranks,
    recall,
    rerank,
    select_candidates,
)
from blip2.evaluation.vqa import AnswerScores, Question, Rules, lemmatize, score_answers, score_exact
from blip2.model.losses import image_text_similarity
from blip2.pipelines import Candidate, GenerationPipeline, Pipeline, RepresentationPipeline
from blip2.resumable import ResumableMap

Key = TypeVar("Key")
Output = TypeVar("Output")
Answered = dict[str, Any]
"""The answer to a question in plain values, which can be stored: ``answer``, the generated text; with ``calibration``
its ``confidence``; with ``rank_by`` the best candidate, ``ranked``, and its ``probability``."""
LEMMATIZED = "accuracy_lemmatized"
MAX_LISTED = 20
"""Maximum number of unusable images that are listed in the metrics; their total number is there too."""
CHUNK_SIZE = 64
"""Number of records or images in a chunk of work. It is fixed, because the last digits of results may depend on it."""
MAX_RANKED = 20_000
"""Maximum number of pairs of a question and a candidate that are ranked together."""


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluation."""

    metrics: dict[str, Any]
    format: PredictionFormat | None
    """Format of the predictions; None if the task has none."""
    predictions: dict[Any, str]
    """Predicted texts, by question id or image id."""
    examples: list[Example]
    """An example for each image, text or question that was evaluated."""
    ranked: list[dict[str, Any]] = field(default_factory=list)
    """The best candidate of each question: ``question_id``, ``answer`` and ``probability``."""


def decoding_for(config: EvaluationConfig) -> Decoding:
    """Return how the model generates text: the default of the task, overridden by the options that `config` sets."""
    return (ANSWER_DECODING if config.task == "vqa" else CAPTION_DECODING).override(config)


# -- visual question answering ---------------------------------------------------------------------------------------


@torch.no_grad()
def answer(
    pipeline: GenerationPipeline, data: EvalData, config: EvaluationConfig, seed: int, resumable: ResumableMap
) -> EvalResult:
    """Answer the questions, and compute the accuracy if the data has reference answers.

    Args:
        pipeline: the model.
        data: the records to evaluate on.
        config: the options of the task.
        seed: seed of sampling, and of the shuffled images of the control.
        resumable: stores finished chunks of work, and divides the others among the processes.

    Raises:
        InputError: the prompt has no place for the question, a record has no question, the questions have different
            numbers of reference answers, a record has no choices to rank, or a control is requested without reference
            answers or with a single image.
    """
    prompt = config.prompt or pipeline.question_template
    if QUESTION_PLACEHOLDER not in prompt:
        raise InputError(
            f"the prompt {prompt!r} has no {QUESTION_PLACEHOLDER}, which stands for the question: add"
            f" {QUESTION_PLACEHOLDER} to the prompt"
        )
    ids, references = data.question_ids(), reference_answers(data)
    candidates = None if config.rank_by is None else find_candidates(data, config.answer_list, references, config.rules)
    if config.control and not references:
        raise _nothing_to_compare(data, "answers")
    first: dict[int, int] = {}
    for i, image in enumerate(data.image_ids):
        first.setdefault(image, i)
    chunk_of_image = {image: i // CHUNK_SIZE for image, i in first.items()}
    encoded = FeatureFiles(resumable.folder / "features", chunk_of_image) if config.control else None

    def ask(features: Float[Tensor, "I P E"], rows: Sequence[int], image_index: Sequence[int]) -> dict[int, Answered]:
        questions = [data.records[i].question or "" for i in rows]
        found: list[Answered]
        if config.calibration:
            described = pipeline.answer(features[list(image_index)], questions, decoding_for(config), details=True)
            found = [{"answer": each.text, "confidence": each.confidence} for each in described]
        else:
            answers = pipeline.generate(
                features, pipeline.format_questions(questions, prompt), decoding_for(config),
                image_index=image_index, questions=questions,
            )  # fmt: skip
            found = [{"answer": text} for text in answers]
        if candidates is not None and config.rank_by is not None:
            chosen, images = [candidates[i] for i in rows], features[list(image_index)]
            for each, ranked in zip(
                found, rank_answers(pipeline, images, questions, chosen, config.rank_by, prompt), strict=True
            ):
                each |= {"ranked": ranked[0].text, "probability": ranked[0].probability}
        return dict(zip(rows, found, strict=True))

    def generate(chunk: range) -> tuple[dict[int, Answered], list[str]]:
        usable, features, skipped = _encode_images(
            pipeline, data, {(key := data.image_ids[i]): first[key] for i in chunk}
        )
        rows = [i for i in chunk if data.image_ids[i] in usable]
        if features is None:
            return {}, skipped
        if encoded is not None:
            encoded.write(chunk.start // CHUNK_SIZE, usable, features, pipeline.model.vision.dtype)
        return ask(features, rows, [usable.index(data.image_ids[i]) for i in rows]), skipped

    answers, skipped = _generate("answers", len(data), generate, resumable, seed)
    _check_any(data, answers, skipped)
    result = _score_answers(data, ids, references, answers, config, _count_skipped(skipped))
    if encoded is None:
        return result

    images = list(dict.fromkeys(data.image_ids[i] for i in answers))
    donor = {image: images[i] for image, i in zip(images, derange(len(images), seed), strict=True)}

    def generate_shuffled(chunk: range) -> tuple[dict[int, Answered], list[str]]:
        rows = [i for i in chunk if i in answers]
        if not rows:
            return {}, []
        donors = list(dict.fromkeys(donor[data.image_ids[i]] for i in rows))
        features = encoded.read(donors).to(pipeline.device)
        return ask(features, rows, [donors.index(donor[data.image_ids[i]]) for i in rows]), []

    def generate_blank(chunk: range) -> tuple[dict[int, Answered], list[str]]:
        rows = [i for i in chunk if i in answers]
        return (ask(_encode_blank(pipeline), rows, [0] * len(rows)) if rows else {}), []

    controls = {}
    for name, work in (("shuffled", generate_shuffled), ("blank", generate_blank)):
        blind, _ = _generate(f"answers-{name}", len(data), work, resumable, seed)
        controls[name] = _score_answers(data, ids, references, blind, config, {}).metrics
    return replace(result, metrics=add_control(result.metrics, controls))


def score_answer_predictions(
    data: EvalData, file: str | Path, config: EvaluationConfig, resumable: ResumableMap
) -> EvalResult:
    """Compute the accuracy of the answers in a file.

    Args:
        data: the records with the questions.
        file: the answers, in the format of the benchmark.
        config: the options of the task.
        resumable: unused; all tasks have the same parameters.

    Raises:
        InputError: the file cannot be read, or ids are missing, repeated or unknown.
    """
    ids, references = data.question_ids(), reference_answers(data)
    answers: dict[int, Answered] = {i: {"answer": text} for i, text in enumerate(_read(file, "answer", ids))}
    return _score_answers(data, ids, references, answers, config, {})


def find_candidates(
    data: EvalData, answer_list: str | None, references: Mapping[int, Question], rules: Rules
) -> list[tuple[str, ...]]:
    """Return the candidate answers to each question: those of a file, or the choices of each record.

    Args:
        data: the records with the questions.
        answer_list: the file; see :func:`~blip2.evaluation.data.read_answer_list`. None: the choices of the records.
        references: the reference answers, by record index.
        rules: the rules for comparing answers.

    Raises:
        InputError: the file cannot be used, or a record has no choices, or its only reference answer is not among its
            choices, as if the answer were the number of a choice.
    """
    if answer_list is not None:
        return [read_answer_list(answer_list)] * len(data)
    candidates = data.choices()
    for i, question in references.items():
        if len(question.answers) == 1 and not _is_among(candidates[i], question, rules):
            raise InputError(
                f"{data.records[i].key} has the answer {question.answers[0]!r}, which is not one of its choices"
                f" {list(candidates[i])}: write the text of the right choice as the answer"
            )
    return candidates


def _is_among(candidates: Sequence[str], question: Question, rules: Rules) -> bool:
    return any(score_exact({0: text}, {0: question}, rules).accuracy for text in candidates)


def rank_answers(
    pipeline: GenerationPipeline,
    images: Float[Tensor, "N P E"],
    questions: Sequence[str],
    candidates: Sequence[tuple[str, ...]],
    by: Literal["lm", "pmi"],
    prompt: str | None = None,
) -> list[list[Candidate]]:
    """Rank the candidates of each question, the best first, at most :data:`MAX_RANKED` pairs at a time.

    Args:
        pipeline: the model.
        images: features of the image of each question.
        questions: the questions.
        candidates: the candidate answers to each question.
        by: the score.
        prompt: prompt with {} in the place of the question. None: the model's own.
    """
    ranked: list[list[Candidate]] = []
    size = max(MAX_RANKED // max(map(len, candidates)), 1)
    for start in range(0, len(questions), size):
        part = slice(start, start + size)
        listed = [list(each) for each in candidates[part]]
        ranked += pipeline.rank(images[part], listed, questions[part], by, prompt=prompt)
    return ranked


def reference_answers(data: EvalData) -> dict[int, Question]:
    """Return the reference answers, by record index. Blank answers beside others count, as in the official scripts.

    Raises:
        InputError: the questions are not all without an answer, all with one answer, or all with several answers.
    """
    references: dict[int, Question] = {}
    groups: dict[str, list[int]] = {"no answers": [], "one answer": [], "several answers": []}
    for i, record in enumerate(data.records):
        answers = (*record.captions, *[""] * record.num_blank) if record.captions else ()
        groups["no answers" if not answers else "one answer" if len(answers) == 1 else "several answers"].append(i)
        if answers:
            types = (str(record.metadata.get(key, "")) for key in ("question_type", "answer_type"))
            references[i] = Question(answers, *types)
    found = {kind: rows for kind, rows in groups.items() if rows}
    if len(found) > 1:
        counts = ", ".join(
            f"{len(rows)} with {kind} (the first: {data.records[rows[0]].key})" for kind, rows in found.items()
        )
        raise InputError(
            f"{data.source} has questions that cannot be scored together: {counts}; give every question one answer, or"
            " every question several"
        )
    return references


def _score_answers(
    data: EvalData,
    ids: Sequence[Any],
    references: Mapping[int, Question],
    found: Mapping[int, Answered],
    config: EvaluationConfig,
    extra: Mapping[str, Any],
) -> EvalResult:
    """Score answers, given by record index. `extra` is added to the metrics."""
    answers: dict[int, str] = {i: each["answer"] for i, each in found.items()}
    metrics: dict[str, Any] = {"answered": len(answers), **extra}
    references = {i: references[i] for i in answers if i in references}
    per_question: dict[Any, float] = {}
    if references:
        scores = score_texts(answers, references, config.rules)
        metrics |= _format_accuracy(scores)
        per_question = scores.per_question
        if config.calibration:
            metrics |= measure([found[i]["confidence"] for i in references], list(per_question.values()))
        if config.rank_by is not None:
            ranked = score_texts({i: each["ranked"] for i, each in found.items()}, references, config.rules)
            certainty = measure([found[i]["probability"] for i in references], list(ranked.per_question.values()))
            metrics["ranked"] = {**_format_accuracy(ranked), **certainty}
        if config.lemmatize:
            try:
                lemmas = dict(zip(references, lemmatize([answers[i] for i in references]), strict=True))
                metrics[LEMMATIZED] = score_texts(lemmas, references, config.rules).accuracy
            except InputError as error:
                metrics |= {LEMMATIZED: None, "missing": {LEMMATIZED: str(error)}}
    examples = []
    for i, text in answers.items():
        expected = f"true: {_format_counts(references[i].answers)}" if i in references else ""
        lines = (data.records[i].question or "", text, expected)
        if "ranked" in found[i]:
            lines += (f"ranked first: {found[i]['ranked']} ({found[i]['probability']:.2f})",)
        examples.append(Example(per_question.get(i), partial(data.image, i), lines))
    result = _to_result(metrics, "answer", {ids[i]: text for i, text in answers.items()}, examples)
    ranked_rows = [
        {"question_id": ids[i], "answer": each["ranked"], "probability": each["probability"]}
        for i, each in found.items()
        if "ranked" in each
    ]
    return replace(result, ranked=ranked_rows)


def score_texts(answers: Mapping[int, str], references: Mapping[int, Question], rules: Rules) -> AnswerScores:
    """Compute the accuracy of answers, by the rules for one reference answer or for several, whichever there are.

    Args:
        answers: answers by record index. Those without reference answers are left out.
        references: the reference answers, by record index; all questions have one, or all have several.
        rules: the rules for comparing answers.
    """
    single = all(len(question.answers) == 1 for question in references.values())
    return (score_exact if single else score_answers)({i: answers[i] for i in references}, references, rules)


def _format_accuracy(scores: AnswerScores) -> dict[str, Any]:
    return {
        "accuracy": scores.accuracy, "by_question_type": scores.by_question_type,
        "by_answer_type": scores.by_answer_type,
    }  # fmt: skip


# -- captioning ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def caption(
    pipeline: GenerationPipeline, data: EvalData, config: EvaluationConfig, seed: int, resumable: ResumableMap
) -> EvalResult:
    """Caption the images, and score the captions if the data has reference captions.

    Args:
        pipeline: the model.
        data: the records to evaluate on.
        config: the options of the task.
        seed: seed of sampling, and of the shuffled images of the control.
        resumable: stores finished chunks of work, and divides the others among the processes.

    Raises:
        InputError: some of the images have no caption, or a control is requested without reference captions or with a
            single image.
    """
    rows = group_captioned_images(data)
    decoding = decoding_for(config)
    if config.control and not any(record.captions for record in data.records):
        raise _nothing_to_compare(data, "captions")

    def generate(chunk: range) -> tuple[dict[int, str], list[str]]:
        usable, features, skipped = _encode_images(pipeline, data, {i: rows[i][0] for i in chunk})
        if features is None:
            return {}, skipped
        return dict(zip(usable, pipeline.caption(features, config.prompt, decoding), strict=True)), skipped

    captions, skipped = _generate("captions", len(rows), generate, resumable, seed)
    _check_any(data, captions, skipped)
    result = _score_captions(data, rows, captions, resumable, _count_skipped(skipped))
    if not config.control:
        return result

    # All images have the same prompt, so that the caption of another image is already there.
    images = list(captions)
    others = derange(len(images), seed)
    shuffled = {image: captions[images[i]] for image, i in zip(images, others, strict=True)}

    def generate_blank(chunk: range) -> tuple[dict[int, str], list[str]]:
        features = _encode_blank(pipeline).expand(len(chunk), -1, -1)
        return dict(zip(chunk, pipeline.caption(features, config.prompt, decoding), strict=True)), []

    # Without sampling, all blank images have the same caption.
    count = len(images) if decoding.do_sample else 1
    written, _ = _generate("captions-blank", count, generate_blank, resumable, seed)
    blank = {image: written[min(i, count - 1)] for i, image in enumerate(images)}
    controls = {
        name: _score_captions(data, rows, texts, resumable, {}, f"scores-{name}").metrics
        for name, texts in (("shuffled", shuffled), ("blank", blank))
    }
    return replace(result, metrics=add_control(result.metrics, controls))


def score_caption_predictions(
    data: EvalData, file: str | Path, config: EvaluationConfig, resumable: ResumableMap
) -> EvalResult:
    """Score the captions in a file.

    Args:
        data: the records with the images and their reference captions.
        file: the captions, in the format of the benchmark.
        config: unused; all tasks have the same parameters.
        resumable: stores the scores.

    Raises:
        InputError: some of the images have no caption, the file cannot be read, or ids are missing, repeated or
            unknown.
    """
    rows = group_captioned_images(data)
    return _score_captions(data, rows, dict(enumerate(_read(file, "caption", _image_ids(data, rows)))), resumable, {})


def _score_captions(
    data: EvalData,
    rows: Sequence[list[int]],
    captions: Mapping[int, str],
    resumable: ResumableMap,
    extra: Mapping[str, Any],
    part: str = "scores",
) -> EvalResult:
    """Score captions, given by image index. `extra` is added to the metrics; `part` names the work in `resumable`."""
    references = {i: [text for n in rows[i] for text in data.records[n].captions] for i in captions}
    references = {i: texts for i, texts in references.items() if texts}
    domains = {i: str(data.records[rows[i][0]].metadata.get("domain", "")) for i in references}
    metrics: dict[str, Any] = {"images": len(captions), **extra}

    def score(chunk: int) -> dict[str, Any]:
        predictions = {i: captions[i] for i in references}
        if not all(domains.values()):
            scores = official_scores(predictions, references)
            return {"metrics": _format_scores(scores), "cider": scores.cider}
        by_domain = scores_by_domain(predictions, references, domains)
        scores = by_domain.pop("overall")
        formatted = {"by_domain": {name: _format_scores(each) for name, each in by_domain.items()}}
        return {"metrics": {**_format_scores(scores), **formatted}, "cider": scores.cider}

    cider: Mapping[int, float] = {}
    if references:
        (scores,) = resumable.run(part, 1, score)  # one chunk, so that only one process runs Java
        metrics |= scores["metrics"]
        cider = scores["cider"]
    examples = [
        Example(
            cider.get(i),
            partial(data.image, rows[i][0]),
            (text, *(f"true: {reference}" for reference in references.get(i, ())[:2])),
        )
        for i, text in captions.items()
    ]
    ids = _image_ids(data, rows)
    return _to_result(metrics, "caption", {ids[i]: text for i, text in captions.items()}, examples)


def _image_ids(data: EvalData, rows: Sequence[list[int]]) -> list[Any]:
    """Return the ``image_id`` of each image, or the index of the image if there is no ``image_id``.

    Raises:
        InputError: two images would have the same id in a file of predictions.
    """
    ids = [data.records[group[0]].metadata.get("image_id", i) for i, group in enumerate(rows)]
    repeated = next((key for key, count in Counter(map(str, ids)).items() if count > 1), None)  # 5 and "5" are one id
    if repeated is not None:
        raise InputError(
            f"two images of {data.source} have the id {repeated}, which is the image_id of one and the image_id or the"
            " number of the other: give each image its own image_id, or leave out the column"
        )
    return ids


def _format_scores(scores: CaptionScores) -> dict[str, Any]:
    """Return the metrics for JSON. A missing metric is None, and ``missing`` maps its name to the reason."""
    missing = {name: value.reason for name, value in scores.metrics.items() if isinstance(value, MissingMetric)}
    return {**scores.metrics, **dict.fromkeys(missing), **({"missing": missing} if missing else {})}


# -- retrieval -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def retrieve(
    pipeline: RepresentationPipeline, data: EvalData, config: EvaluationConfig, seed: int, resumable: ResumableMap
) -> EvalResult:
    """Compute the recall in both directions, ranked by similarity (ITC) and then re-ranked by matching (ITM).

    Args:
        pipeline: the model.
        data: the records to evaluate on.
        config: the options of the task.
        seed: seed of the shuffled images of the control.
        resumable: stores finished chunks of work, and divides the others among the processes.

    Raises:
        InputError: some of the images have no caption, no usable image has one, or a control is requested with a single
            image.
    """
    rows = group_captioned_images(data)
    image_chunks = _chunks(len(rows))

    def encode(chunk: int) -> tuple[list[int], Float[Tensor, "I P E"] | None, list[str]]:
        return _encode_images(pipeline, data, {i: rows[i][0] for i in image_chunks[chunk]})

    def embed_images(chunk: int) -> dict[str, Any]:
        usable, features, skipped = encode(chunk)
        vectors = None if features is None else pipeline.embed_images(features).cpu()
        return {"images": usable, "vectors": vectors, "skipped": skipped}

    embedded = resumable.run("images", len(image_chunks), embed_images)
    index = {image: number for number, image in enumerate(i for chunk in embedded for i in chunk["images"])}
    pairs = [(index[i], text) for i in index for n in rows[i] for text in data.records[n].captions]
    if not pairs:
        raise InputError(
            f"{data.source} has no usable image with a caption, which the task retrieval needs: correct the images and"
            " captions, or choose another task"
        )
    texts = [text for _, text in pairs]
    others = derange(len(index), seed) if config.control else []
    positive = torch.zeros(len(index), len(texts), dtype=torch.bool)
    positive[[image for image, _ in pairs], range(len(texts))] = True
    text_chunks = _chunks(len(texts))

    def embed_texts(chunk: int) -> Tensor:
        return pipeline.embed_texts([texts[i] for i in text_chunks[chunk]]).cpu()

    vectors = torch.cat(resumable.run("texts", len(text_chunks), embed_texts))
    similarity = torch.cat(
        [image_text_similarity(chunk["vectors"], vectors) for chunk in embedded if chunk["vectors"] is not None]
    )
    result = RetrievalResult(similarity, similarity, positive)
    metrics: dict[str, Any] = {
        "images": len(index),
        "texts": len(texts),
        "chance": result.chance,
        "itc": _format_recall(result),
    }

    if config.rerank_k:
        candidates = select_candidates(similarity, config.rerank_k)
        ids, mask = pipeline.tokenize(texts)

        def match(chunk: int) -> list[Tensor]:
            usable, features, _ = encode(chunk)
            if features is None:
                return []
            images = zip(features.split(1), usable, strict=True)
            return [itm_logits(pipeline, image, ids, mask, candidates.union[index[i]]) for image, i in images]

        logits = [row for chunk in resumable.run("pairs", len(image_chunks), match) for row in chunk]
        result = rerank(similarity, positive, candidates, logits, config.fusion, pipeline.itc_temperature)
        metrics[config.fusion] = _format_recall(result)

    if config.control:
        # Only the names of the images change, so that the scores of all pairs are already there.
        shuffled = [result] if result.itc is None else [result.itc, result]
        blank = _blank_scores(pipeline, vectors, texts, config, resumable)
        names = ("itc", config.fusion)[: len(shuffled)]
        controls = {
            "shuffled": {
                name: _format_recall(
                    replace(each, scores_i2t=each.scores_i2t[others], scores_t2i=each.scores_t2i[others])
                )
                for name, each in zip(names, shuffled, strict=True)
            },
            "blank": {
                name: _name_recall("TR", recall(scores.expand(len(index), -1), positive))
                for name, scores in zip(names, blank, strict=True)
            },
        }
        metrics = add_control(metrics, controls)
    metrics |= _count_skipped([message for chunk in embedded for message in chunk["skipped"]])
    image_ranks = ranks(result.scores_t2i.T, positive.T).tolist()
    first_rows = [rows[i][0] for i in index]
    examples = [
        Example(
            1 / (1 + rank),
            partial(data.image, first_rows[image]),
            (text, f"rank of its image: {rank + 1} of {len(index)}"),
        )
        for (image, text), rank in zip(pairs, image_ranks, strict=True)
    ]
    return EvalResult(metrics, None, {}, examples)


def _blank_scores(
    pipeline: RepresentationPipeline,
    vectors: Float[Tensor, "T C"],
    texts: Sequence[str],
    config: EvaluationConfig,
    resumable: ResumableMap,
) -> list[Float[Tensor, "1 T"]]:
    """Score all texts for a blank image, by similarity and, if candidates are re-ranked, by `config.fusion`."""

    def score(part: int) -> list[Tensor]:
        image = _encode_blank(pipeline)
        similarity = image_text_similarity(pipeline.embed_images(image).cpu(), vectors)
        if not config.rerank_k:
            return [similarity]
        best = select_candidates(similarity, config.rerank_k).i2t
        logits = itm_logits(pipeline, image, *pipeline.tokenize(texts), best[0])
        result = rerank(similarity, best, Candidates(best, best), [logits], config.fusion, pipeline.itc_temperature)
        return [similarity, result.scores_i2t]

    return resumable.run("blank", 1, score)[0]


def _format_recall(result: RetrievalResult) -> dict[str, float]:
    """Return the recall by its published name: ``TR@k`` for texts of an image, ``IR@k`` for images of a text."""
    return {**_name_recall("TR", result.image_to_text), **_name_recall("IR", result.text_to_image)}


def _name_recall(side: str, recall: Recall) -> dict[str, float]:
    return {f"{side}@{key.removeprefix('r')}": value for key, value in recall.items()}


# -- chunks of work --------------------------------------------------------------------------------------------------


def _encode_images(
    pipeline: Pipeline[Any], data: EvalData, rows: Mapping[Key, int]
) -> tuple[list[Key], Float[Tensor, "I P E"] | None, list[str]]:
    """Encode the images that can be decoded.

    Args:
        pipeline: the model.
        data: the records.
        rows: the index of a record with each image.

    Returns:
        The keys of the usable images, the features of these images (None if no image is usable), and a message, which
        names the record, for each of the other images.
    """
    pixels: dict[Key, Tensor] = {}
    skipped = []
    for key, row in rows.items():
        try:
            image = data.image(row)
            if image is None:
                raise ImageError("it has no image")
            pixels[key] = read_input(image, pipeline.model.vision.input_format)
        except ImageError as error:
            skipped.append(f"{data.records[row].key}: {error}")
    return list(pixels), pipeline.encode_pixels(stack_inputs(list(pixels.values()))) if pixels else None, skipped


def _encode_blank(pipeline: Pipeline[Any]) -> Float[Tensor, "1 P E"]:
    """Return the features of a blank image."""
    return pipeline.encode_pixels(blank_input(pipeline.model.vision.input_format))


def _nothing_to_compare(data: EvalData, what: str) -> InputError:
    return InputError(
        f"{data.source} has no reference {what}, so that a control has no score to compare: leave out --control, or"
        f" give data with {what}"
    )


def group_captioned_images(data: EvalData) -> list[list[int]]:
    """Return the indices of the records of each image, for a task that compares captions.

    Raises:
        InputError: some of the images have no caption, so that they would not be scored, or would count as not found;
            or two images have the same id.
    """
    rows = data.group_by_image()
    _image_ids(data, rows)
    bare = [group for group in rows if not any(data.records[i].captions for i in group)]
    if 0 < len(bare) < len(rows):
        raise InputError(
            f"{len(bare)} of the {len(rows)} images of {data.source} have no caption (the first:"
            f" {data.records[bare[0][0]].key}), and every image is scored: add captions, or remove these images"
        )
    return rows


def _chunks(count: int) -> list[range]:
    return [range(start, min(start + CHUNK_SIZE, count)) for start in range(0, count, CHUNK_SIZE)]


def _generate(
    name: str,
    count: int,
    generate: Callable[[range], tuple[dict[int, Output], list[str]]],
    resumable: ResumableMap,
    seed: int,
) -> tuple[dict[int, Output], list[str]]:
    """Generate texts chunk by chunk. Each chunk has its own seed, so that any process can process it at any time.

    Returns:
        What was generated, by index in ``range(count)``, and the messages about images that were skipped.
    """
    chunks = _chunks(count)

    def work(chunk: int) -> tuple[dict[int, Output], list[str]]:
        set_seed((seed * 1_000_003 + chunk) % 2**32)
        return generate(chunks[chunk])

    results = resumable.run(name, len(chunks), work)
    texts = {i: text for generated, _ in results for i, text in generated.items()}
    return texts, [message for _, skipped in results for message in skipped]


# -- results ---------------------------------------------------------------------------------------------------------


def _check_any(data: EvalData, results: Mapping[int, Any], skipped: Sequence[str]) -> None:
    if not results:
        raise InputError(
            f"none of the {len(data)} records of {data.source} has an image that can be used (the first: {skipped[0]}):"
            " correct the images"
        )


def _count_skipped(messages: Sequence[str]) -> dict[str, Any]:
    messages = list(dict.fromkeys(messages))  # the records of an image may be in several chunks
    return {"images_skipped": len(messages), "skipped": messages[:MAX_LISTED]}


def _read(file: str | Path, format: PredictionFormat, ids: Sequence[Any]) -> list[str]:
    """Read predictions in the order of `ids`."""
    format, keys = _format_for_ids(format, ids)
    predictions = read_predictions(file, format, keys)
    return [predictions[key] for key in keys]


def _format_for_ids(format: PredictionFormat, ids: Sequence[Any]) -> tuple[PredictionFormat, list[Any]]:
    """Return the format and the ids of predictions to write.

    If all ids are integers, both are unchanged. Otherwise the ids become strings, and the format one with string ids:
    ``gqa`` instead of ``answer``, ``named`` instead of any other.
    """
    if all(isinstance(key, int) for key in ids):
        return format, list(ids)
    return "gqa" if format == "answer" else "named", [str(key) for key in ids]


def _to_result(
    metrics: dict[str, Any], format: PredictionFormat, predictions: dict[Any, str], examples: list[Example]
) -> EvalResult:
    format, keys = _format_for_ids(format, list(predictions))
    return EvalResult(metrics, format, dict(zip(keys, predictions.values(), strict=True)), examples)


def _format_counts(answers: Sequence[str]) -> str:
    """Format the distinct answers and how often each occurs, the most frequent first."""
    counts = Counter(answers).most_common()
    return ", ".join(answer if count == 1 else f"{answer} ({count})" for answer, count in counts)
