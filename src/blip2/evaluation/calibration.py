"""Calibration: a measure of how far the probabilities of a model can be trusted, and a temperature that corrects them.

A model is calibrated if it is right in 80 % of the cases in which it says 80 %. :func:`expected_calibration_error`
measures how far it is from that. :func:`accuracy_at_coverage` says how much is gained by answering only what the model
is sure of. :func:`fit_temperature` finds the number by which logits are divided so that probabilities agree with
accuracies (Guo et al., "On Calibration of Modern Neural Networks", 2017).

Legend: N predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from blip2.errors import InputError

NUM_BINS = 15
"""Number of bins of :func:`expected_calibration_error`."""
COVERAGES = (100, 90, 80, 70, 60, 50, 40, 30, 20, 10)
"""Shares of the predictions, in percent, for which :func:`accuracy_at_coverage` gives the accuracy."""
TEMPERATURES = (0.05, 20.0)
"""The smallest and the largest temperature that :func:`fit_temperature` returns."""
ERROR, COVERAGE = "expected_calibration_error", "accuracy_at_coverage"
"""Keys of the metrics of :func:`measure`."""


def measure(confidences: Sequence[float], accuracies: Sequence[float]) -> dict[str, Any]:
    """Return the calibration error and the accuracies at coverage, by the names that they have in ``metrics.json``."""
    return {
        ERROR: expected_calibration_error(confidences, accuracies),
        COVERAGE: accuracy_at_coverage(confidences, accuracies),
    }


def expected_calibration_error(confidences: Sequence[float], accuracies: Sequence[float]) -> float:
    """Return the difference between confidence and accuracy, averaged over predictions with similar confidence.

    The predictions are divided into :data:`NUM_BINS` bins of equal width by their confidence: [0, 1/15], (1/15, 2/15]
    and so on. The error is the sum over the bins of ``|mean accuracy - mean confidence|``, weighted by the share of the
    predictions in the bin.

    Args:
        confidences: the probability, in [0, 1], with which each prediction is right according to the model.
        accuracies: how far each prediction is right, in [0, 1].

    Returns:
        A number in [0, 1]; 0 for a calibrated model.
    """
    bins: dict[int, list[float]] = {}
    for confidence, accuracy in zip(confidences, accuracies, strict=True):
        bins.setdefault(max(math.ceil(confidence * NUM_BINS), 1), []).append(accuracy - confidence)
    return math.fsum(abs(math.fsum(gaps)) for gaps in bins.values()) / len(confidences)


def accuracy_at_coverage(confidences: Sequence[float], accuracies: Sequence[float]) -> dict[str, float]:
    """Return the mean accuracy of the most confident predictions, by their share in percent: the risk-coverage curve.

    Args:
        confidences: confidence of each prediction. Among equal ones the first counts as more confident.
        accuracies: how far each prediction is right, in [0, 1].

    Returns:
        The accuracy for each of :data:`COVERAGES`, with the share as a text. A share has at least one prediction.
    """
    order = sorted(range(len(confidences)), key=lambda i: -confidences[i])
    counts = {coverage: max(round(coverage * len(order) / 100), 1) for coverage in COVERAGES}
    return {str(share): math.fsum(accuracies[i] for i in order[:count]) / count for share, count in counts.items()}


def fit_temperature(confidences: Callable[[float], Float64[Tensor, "N"]], accuracies: Float64[Tensor, "N"]) -> float:
    """Return the temperature whose confidences predict best whether predictions are right.

    It minimizes the log loss of the confidences, ``-mean(a * log(p) + (1 - a) * log(1 - p))`` for accuracies a.

    Args:
        confidences: returns the confidence of each prediction at a temperature.
        accuracies: how far each prediction is right, in [0, 1].

    Raises:
        InputError: no temperature in the range of :data:`TEMPERATURES` is best, as when everything is right.
    """

    def loss(temperature: float) -> float:
        p = confidences(temperature).clamp(1e-12, 1 - 1e-12)
        return float(-(accuracies * p.log() + (1 - accuracies) * (-p).log1p()).mean())

    low, high = TEMPERATURES
    temperature = low
    for _ in range(3):  # each grid is twenty times as fine as the one before
        grid = torch.logspace(math.log10(low), math.log10(high), 41, dtype=torch.float64).tolist()
        losses = [loss(each) for each in grid]
        best = losses.index(min(losses))
        low, temperature, high = grid[max(best - 1, 0)], grid[best], grid[min(best + 1, len(grid) - 1)]
    if not TEMPERATURES[0] * 1.01 < temperature < TEMPERATURES[1] / 1.01:
        raise InputError(
            f"no temperature from {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g} makes the probabilities of these"
            f" {len(accuracies)} predictions, of which {100 * float(accuracies.mean()):.1f} % are right, agree with"
            " their accuracy: calibrate on more held-out data, with right and wrong predictions"
        )
    return temperature


def coverage_curves(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return the accuracies at coverage in the metrics of an evaluation, by the way in which answers were given."""
    found = {"generated": metrics.get(COVERAGE), "ranked": metrics.get("ranked", {}).get(COVERAGE)}
    return {name: curve for name, curve in found.items() if curve}
