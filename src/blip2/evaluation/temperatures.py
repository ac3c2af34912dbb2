"""Fit the temperatures of a model to held-out data, and store them in its checkpoint: ``blip2 calibrate``.

Legend: N predictions, K candidates, I images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float64, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blip2.checkpoint import open_checkpoint, write_calibration
from blip2.config import DataConfig, Precision, Stage, TemperatureName
from blip2.console import Display
from blip2.data.collate import normalize_captions
from blip2.decoding.options import Decoding
from blip2.errors import InputError
from blip2.evaluation.calibration import expected_calibration_error, fit_temperature
from blip2.evaluation.data import EvalData
from blip2.evaluation.tasks import CHUNK_SIZE, find_candidates, rank_answers, reference_answers, score_texts
from blip2.evaluation.vqa import Question, Rules
from blip2.io import convert_os_errors
from blip2.pipelines import GenerationPipeline, RepresentationPipeline, load

NAMES: dict[Stage, tuple[TemperatureName, ...]] = {
    "representation": ("itc", "itm"),
    "generation": ("lm", "pmi", "answer"),
}
"""The temperatures of each stage."""
MIN_IMAGES = 20
"""Minimum number of held-out images."""
HARD_NEGATIVES = 2
"""Number of wrong captions of each image to which ITM is fitted, besides the right one; as in training (§3.2)."""


@dataclass(frozen=True)
class Predictions:
    """Predictions for held-out records, whose confidence depends on a temperature."""

    logits: Shaped[Tensor, "N ..."]
    """The values that are divided by the temperature, in float64."""
    to_confidence: Callable[[Tensor], Tensor]
    """Maps the divided logits to N confidences in [0, 1]."""
    accuracies: Float64[Tensor, "N"]
    """The accuracy of each prediction, in [0, 1]."""
    images: Sequence[int]
    """The number of the image of each prediction."""

    def confidences(self, temperature: float) -> Float64[Tensor, "N"]:
        """Return the confidence of each prediction at a temperature."""
        return self.to_confidence(self.logits / temperature)

    def select(self, chosen: Bool[Tensor, "N"]) -> Predictions:
        """Return some of the predictions."""
        images = [image for image, keep in zip(self.images, chosen.tolist(), strict=True) if keep]
        return Predictions(self.logits[chosen], self.to_confidence, self.accuracies[chosen], images)

    def halves(self) -> tuple[Predictions, Predictions]:
        """Return the predictions for every second image, and those for the other images."""
        is_even = torch.tensor([image % 2 == 0 for image in self.images])
        return self.select(is_even), self.select(~is_even)

    def calibration_error(self, temperature: float) -> float:
        """Return the expected calibration error at a temperature."""
        return expected_calibration_error(self.confidences(temperature).tolist(), self.accuracies.tolist())


def calibrate(
    model: str | Path,
    data: str,
    by: Sequence[TemperatureName] | None = None,
    *,
    answer_list: str | None = None,
    limit: int | None = None,
    rules: Rules = "official",
    decoding: Decoding | None = None,
    device: str | None = None,
    dtype: Precision | None = None,
    overrides: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Fit temperatures to held-out data, and store them in the checkpoint.

    The temperatures are fitted to the records of every second image. The calibration errors that are returned are
    measured on the records of the other images.

    Args:
        model: a run or checkpoint folder of blip2. The temperatures are written to the ``model.yaml`` of the checkpoint
            (the last one of a run), and replace those of the same names there.
        data: held-out records: images with captions for stage 1, questions with answers for stage 2; in any format of
            data.train.
        by: what is calibrated. ``itc``, ``itm``: the scores of stage 1. ``answer``: the confidence of the answers that
            stage 2 generates. ``lm``, ``pmi``: the probabilities of candidate answers. null: itc and itm for stage 1;
            answer for stage 2, and lm if there are candidates.
        answer_list: file with candidate answers, the same for all questions, one per line or as a JSON list. null: the
            column choices of the records.
        limit: maximum number of records: only the first records are used. null: all.
        rules: rules for comparing answers, as in blip2 evaluate.
        decoding: options of text generation for ``answer``. None: ``ANSWER_DECODING`` of
            :mod:`blip2.decoding.options`.
        device: device to run on. None: a GPU if there is one.
        dtype: data type of the frozen parts. None: the dtype in the model's config, else bf16 on a CUDA GPU and fp32 on
            other devices.
        overrides: keys of the model's config to override while the model runs.

    Returns:
        For each of `by`: ``temperature``, ``fitted_to`` and ``measured_on`` (numbers of predictions), and
        ``expected_calibration_error`` ``before`` and ``after``.

    Raises:
        InputError: the model is not a checkpoint of blip2, has no such temperature, or cannot be written; the data
            cannot be read, does not fit the model, or has fewer than :data:`MIN_IMAGES` images; or no temperature fits.
    """
    checkpoint = open_checkpoint(str(model), overrides)
    if checkpoint.format != "blip2":
        raise InputError(
            f"{model} has the format of {checkpoint.format}, which has no place for temperatures: convert it with blip2"
            f" convert {model} FOLDER --to blip2, and calibrate FOLDER"
        )
    names = check_names(by, checkpoint.config.stage, str(model))
    pipeline = load(model, device, dtype, overrides=overrides)
    pipeline.config = replace(pipeline.config, calibration=None)  # an earlier calibration does not matter
    records = EvalData(DataConfig(train=data), limit, pipeline.config.vision.reads_features)
    if len(set(records.image_ids)) < MIN_IMAGES:
        raise InputError(
            f"{data} has {len(set(records.image_ids))} images, expected at least {MIN_IMAGES}, half of them to fit the"
            " temperatures and half to measure the error: give more held-out records"
        )
    if isinstance(pipeline, RepresentationPipeline):
        predictions = predict_matches(pipeline, records, names)
    else:
        predictions = predict_answers(pipeline, records, names, answer_list, rules, decoding)
    results = {name: fit(name, each) for name, each in predictions.items()}
    fitted = {name: result["temperature"] for name, result in results.items()}
    with convert_os_errors(Path(checkpoint.name)):
        write_calibration(Path(checkpoint.name), fitted)
    return results


def check_names(by: Sequence[TemperatureName] | None, stage: Stage, model: str) -> list[TemperatureName] | None:
    """Return the names without repetitions, or None; check that a model of the stage has these temperatures."""
    if by is None:
        return None
    wrong = next((name for name in by if name not in NAMES[stage]), None)
    if wrong is not None or not by:
        raise InputError(
            f"by is {', '.join(by) or 'empty'}, expected some of {', '.join(NAMES[stage])}, the temperatures of stage"
            f" {stage}, that of {model}: correct by"
        )
    return list(dict.fromkeys(by))


def fit(name: str, predictions: Predictions) -> dict[str, Any]:
    """Fit a temperature to the predictions for half of the images, and measure the error on the other half."""
    first, second = predictions.halves()
    try:
        temperature = fit_temperature(first.confidences, first.accuracies)
    except InputError as error:
        raise InputError(f"{name} cannot be calibrated: {error}; or leave out {name} (--by)") from error
    errors = {"before": second.calibration_error(1.0), "after": second.calibration_error(temperature)}
    return {
        "temperature": temperature,
        "fitted_to": len(first.images),
        "measured_on": len(second.images),
        "expected_calibration_error": errors,
    }


# -- stage 2 -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict_answers(
    pipeline: GenerationPipeline,
    data: EvalData,
    names: Sequence[TemperatureName] | None,
    answer_list: str | None,
    rules: Rules,
    decoding: Decoding | None = None,
) -> dict[str, Predictions]:
    """Answer questions: by generation for ``answer``, by ranking candidates for ``lm`` and ``pmi``.

    Args:
        pipeline: the model.
        data: questions with answers.
        names: what to predict. None: ``answer``, and ``lm`` if there are candidates.
        answer_list: file of candidates. None: the choices of the records.
        rules: the rules for comparing answers.
        decoding: options of text generation. None: ``ANSWER_DECODING``.
    """
    data.question_ids()  # checks that every record has a question
    references = reference_answers(data)
    if not references:
        raise InputError(f"{data.source} has no answers, which calibration needs: give questions with their answers")
    has_candidates = answer_list is not None or bool(data.records[0].other_columns)
    names = names or (["answer", "lm"] if has_candidates else ["answer"])
    scores: list[Literal["lm", "pmi"]] = [name for name in ("lm", "pmi") if name in names]
    if answer_list is not None and not scores:
        raise InputError(
            f"answer_list is {answer_list}, but by is {', '.join(names)}, which ranks no candidates: add lm or pmi to"
            " by, or leave out answer_list"
        )
    candidates = find_candidates(data, answer_list, references, rules) if scores else []
    logits: dict[str, list[Tensor]] = {name: [] for name in names}
    texts: dict[str, list[str]] = {name: [] for name in names}
    display = Display("calibrate")
    display.start(len(data))
    try:
        for start in range(0, len(data), CHUNK_SIZE):
            rows = range(start, min(start + CHUNK_SIZE, len(data)))
            first = {data.image_ids[i]: i for i in reversed(rows)}
            features = pipeline.encode_images([_image(data, i) for i in first.values()])
            images = features[[list(first).index(data.image_ids[i]) for i in rows]]
            questions = [data.records[i].question or "" for i in rows]
            if "answer" in names:
                made = pipeline.answer(images, questions, decoding, details=True)
                texts["answer"] += [each.text for each in made]
                logits["answer"] += [torch.tensor(each.log_prob / len(each.tokens)).double() for each in made]
            for by in scores:
                ranked = rank_answers(pipeline, images, questions, [candidates[i] for i in rows], by)
                texts[by] += [each[0].text for each in ranked]
                logits[by] += [torch.tensor([each.score for each in group]).double() for group in ranked]
            display.update(rows[-1] + 1)
    finally:
        display.close()
    return {
        name: Predictions(
            torch.stack(logits[name]) if name == "answer" else pad_sequence(logits[name], True, -torch.inf),
            torch.exp if name == "answer" else _top_probability,
            _accuracies(texts[name], references, rules),
            _image_numbers(data.image_ids),
        )
        for name in logits
    }


def _accuracies(texts: Sequence[str], references: Mapping[int, Question], rules: Rules) -> Float64[Tensor, "N"]:
    scores = score_texts(dict(enumerate(texts)), references, rules).per_question
    return torch.tensor([scores[i] for i in range(len(texts))]).double()


def _top_probability(logits: Float64[Tensor, "N K"]) -> Float64[Tensor, "N"]:
    return logits.softmax(dim=1).amax(dim=1)


def _image_numbers(image_ids: Sequence[int]) -> list[int]:
    """Return the number of each image, in the order in which the images first occur."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(image, len(numbers)) for image in image_ids]


def _image(data: EvalData, index: int) -> str | bytes:
    image = data.image(index)
    if image is None:
        raise InputError(f"{data.records[index].key} has no image: correct or remove the record")
    return image


# -- stage 1 -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict_matches(
    pipeline: RepresentationPipeline, data: EvalData, names: Sequence[TemperatureName] | None
) -> dict[str, Predictions]:
    """Compare images and captions: the first caption of each image. If images have a caption in common, ignoring case
    and punctuation, only the first of them is compared.

    For ``itc``, a prediction is the most similar of all captions. For ``itm``, it is that an image matches a caption:
    its own, or one of the :data:`HARD_NEGATIVES` most similar captions of other images.

    Args:
        pipeline: the model.
        data: images with captions.
        names: what to predict. None: ``itc`` and ``itm``.
    """
    first: dict[str, int] = {}
    for group in data.group_by_image():
        if captions := data.records[group[0]].captions:
            (key,) = normalize_captions(captions[:1], "lavis")  # most text encoders ignore the case
            first.setdefault(key, group[0])
    texts = [data.records[i].captions[0] for i in first.values()]
    images = [_image(data, i) for i in first.values()]
    if len(texts) < MIN_IMAGES:
        raise InputError(
            f"{data.source} has {len(texts)} images with captions of their own, expected at least {MIN_IMAGES}: give"
            " more held-out records with captions"
        )
    similarity = pipeline.similarity(pipeline.embed_images(images), texts).cpu()
    own = torch.arange(len(texts))
    predictions: dict[str, Predictions] = {}
    if names is None or "itc" in names:
        logits = similarity / pipeline.model.temperature.cpu().clamp(min=1e-3)
        is_right = similarity.argmax(dim=1) == own
        predictions["itc"] = Predictions(logits.double(), _top_probability, is_right.double(), own.tolist())
    if names is None or "itm" in names:
        negatives = similarity.fill_diagonal_(-torch.inf).topk(HARD_NEGATIVES).indices
        pairs = torch.cat([own[:, None], negatives], dim=1)
        logits = pipeline.match_candidates(images, texts, pairs).double().cpu()
        outcomes = torch.zeros(pairs.shape, dtype=torch.float64)
        outcomes[:, 0] = 1
        numbers = own.repeat_interleave(pairs.shape[1]).tolist()
        log_odds = (logits[..., 1] - logits[..., 0]).flatten()
        predictions["itm"] = Predictions(log_odds, torch.sigmoid, outcomes.flatten(), numbers)
    return predictions
