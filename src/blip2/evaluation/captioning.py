"""Caption metrics.

:func:`official_scores` computes the metrics of COCO and NoCaps (paper §4.2) with the programs that define them.
:func:`score_captions` computes simple metrics without further dependencies.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2.errors import InputError
from blip2.evaluation.predictions import check_ids

METRICS = ("BLEU@1", "BLEU@2", "BLEU@3", "BLEU@4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")
CORENLP = "https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"


def words(text: str) -> list[str]:
    """Return the lower-case words of a text, without punctuation."""
    return re.findall(r"\w+", text.lower())


def token_f1(prediction: str, reference: str) -> float:
    """Compute the harmonic mean of the precision and the recall of the words of `prediction`, in [0, 1]."""
    predicted, expected = Counter(words(prediction)), Counter(words(reference))
    shared = sum((predicted & expected).values())
    if not shared:
        return float(predicted == expected)
    return 2 * shared / (predicted.total() + expected.total())


STOP_WORDS = {"a", "an", "the", "some", "of", "and", "is"}


def content_f1(prediction: str, reference: str) -> float:
    """Compute :func:`token_f1` without :data:`STOP_WORDS`, which nearly every caption contains."""
    kept = [" ".join(word for word in words(text) if word not in STOP_WORDS) for text in (prediction, reference)]
    return token_f1(*kept)


def score_captions(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Compute simple caption metrics.

    Args:
        predictions: the captions to score, at least one.
        references: one reference for each caption.

    Returns:
        The means over all captions of :func:`token_f1`, :func:`content_f1` and ``exact`` (1 if the captions have the
        same words in the same order, else 0), by name, in [0, 1].
    """
    pairs = list(zip(predictions, references, strict=True))
    return {
        "token_f1": sum(token_f1(a, b) for a, b in pairs) / len(pairs),
        "content_f1": sum(content_f1(a, b) for a, b in pairs) / len(pairs),
        "exact": sum(words(a) == words(b) for a, b in pairs) / len(pairs),
    }


# -- the official metrics --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MissingMetric:
    """A metric that could not be computed."""

    reason: str
    """One line that names the missing dependency and the way to install it, or the error."""


@dataclass(frozen=True)
class CaptionScores:
    """Scores of COCO's evaluation."""

    metrics: dict[str, float | MissingMetric]
    """Each of :data:`METRICS`: CIDEr in [0, 10], the others in [0, 1]. Publications report them times 100."""
    cider: dict[Any, float]
    """CIDEr of each image, by its id; empty if CIDEr is missing."""


def official_scores(
    predictions: Mapping[Any, str], references: Mapping[Any, Sequence[str]], timeout: float = 3600.0
) -> CaptionScores:
    """Compute BLEU, METEOR, ROUGE-L, CIDEr and SPICE with pycocoevalcap and the Penn Treebank tokenizer (§4.2).

    All metrics need Java, and SPICE needs a download as well. A metric that cannot be computed is a
    :class:`MissingMetric` with the reason; there is no substitute. CIDEr weights words by their rarity in the
    references of all given images, so that it depends on the set of images, and is 0 for a single image.

    Args:
        predictions: one caption for each image, by image id. A caption may be blank.
        references: the reference captions of each image, by image id.
        timeout: time limit of each Java program in seconds, after which the program is terminated.

    Raises:
        InputError: there are no images, an image has no caption or no reference, or a caption has no image.
    """
    if not references:
        raise InputError("there are no captions to score, expected at least one: give references")
    check_ids("the captions", "image_id", predictions, references)
    blank = [key for key, texts in references.items() if not any(text.strip() for text in texts)]
    if blank:
        raise InputError(
            f"{len(blank)} images have no reference caption, the first is {blank[0]!r}: leave out these images"
        )
    try:
        tokens = _tokenize([text for key in references for text in (predictions[key], *references[key])], timeout)
    except _RunError as failure:
        return CaptionScores(dict.fromkeys(METRICS, MissingMetric(str(failure))), {})
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    tokenized = iter(tokens)
    candidates, targets = {}, {}
    for key, texts in references.items():
        candidates[key] = [next(tokenized)]
        targets[key] = [next(tokenized) for _ in texts]
    bleu, _ = Bleu(4).compute_score(targets, candidates, verbose=0)
    rouge, _ = Rouge().compute_score(targets, candidates)
    cider, per_image = Cider().compute_score(targets, candidates)
    scores: dict[str, float | MissingMetric] = {f"BLEU@{n}": float(score) for n, score in enumerate(bleu, 1)}
    scores |= {"ROUGE-L": float(rouge), "CIDEr": float(cider)}
    for name in ("METEOR", "SPICE"):
        scores[name] = _score_in_java(name, list(targets.values()), list(candidates.values()), timeout)
    return CaptionScores(
        {name: scores[name] for name in METRICS}, dict(zip(references, map(float, per_image), strict=True))
    )


def scores_by_domain(
    predictions: Mapping[Any, str],
    references: Mapping[Any, Sequence[str]],
    domains: Mapping[Any, str],
    timeout: float = 3600.0,
) -> dict[str, CaptionScores]:
    """Compute :func:`official_scores` of each domain separately, and of all images as ``overall`` (NoCaps).

    Args:
        predictions: as for :func:`official_scores`.
        references: as for :func:`official_scores`.
        domains: ``in-domain``, ``near-domain`` or ``out-domain`` for each image, by image id.
        timeout: as for :func:`official_scores`.

    Returns:
        The scores of each domain by its name, and ``overall``.

    Raises:
        InputError: as for :func:`official_scores`, or an image has no domain.
    """
    check_ids("the domains", "image_id", domains, references)
    check_ids("the captions", "image_id", predictions, references)
    groups: dict[str, list[Any]] = {}
    for key in references:
        groups.setdefault(domains[key], []).append(key)
    scores = {
        name: official_scores({key: predictions[key] for key in keys}, {key: references[key] for key in keys}, timeout)
        for name, keys in sorted(groups.items())
    }
    return scores | {"overall": official_scores(predictions, references, timeout)}


class _RunError(Exception):
    """A program could not be run, or failed. The message gives the reason in one line."""


def _tokenize(texts: Sequence[str], timeout: float) -> list[str]:
    """Tokenize as the official metrics do: Penn Treebank tokens in lower case, without punctuation."""
    try:
        from pycocoevalcap.tokenizer import ptbtokenizer
    except ImportError as error:
        raise _RunError("the official metrics need pycocoevalcap: pip install 'blip2[captioning]'") from error
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    out = _run("the tokenizer", command, "".join(f"{' '.join(text.splitlines())}\n" for text in texts), timeout)
    lines = out.split("\n")[:-1]
    if len(lines) != len(texts):
        raise _RunError(
            f"the tokenizer printed {len(lines)} lines for {len(texts)} captions: try another version of Java"
        )
    return [" ".join(word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS) for line in lines]


def _score_in_java(
    name: str, references: list[list[str]], predictions: list[list[str]], timeout: float
) -> float | MissingMetric:
    try:
        if name == "SPICE":
            _check_corenlp()
        script = Path(__file__).with_name("java_metrics.py")
        data = json.dumps([references, predictions])
        score = float(_run(name, [sys.executable, "-P", str(script), name], data, timeout))
    except _RunError as failure:
        return MissingMetric(str(failure))
    return score if math.isfinite(score) else MissingMetric(f"{name} is {score}, expected a finite number")


def _check_corenlp() -> None:
    """Check that the parser of SPICE is installed, because pycocoevalcap would download a missing parser."""
    from pycocoevalcap import spice

    folder = Path(spice.__file__).parent / "lib"
    files = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
    if not all((folder / file).is_file() for file in files):
        raise _RunError(f"SPICE needs CoreNLP 3.6.0: put {' and '.join(files)} of {CORENLP} into {folder}")


def _run(name: str, command: list[str], text: str, timeout: float) -> str:
    """Run a program with the input `text`, and return its output. Its whole process group is killed at the end."""
    if shutil.which("java") is None:
        raise _RunError("the official metrics need Java, which is not installed: apt install default-jre-headless")
    # METEOR hangs on characters that its default encoding lacks.
    options = f"{os.environ.get('JAVA_TOOL_OPTIONS', '')} -Dfile.encoding=UTF-8"
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"JAVA_TOOL_OPTIONS": options},
        start_new_session=True,
    )
    with process:
        try:
            out, stderr = process.communicate(text.encode(errors="replace"), timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise _RunError(
                f"{name} did not finish within {timeout:g} s and was terminated: score fewer images"
            ) from error
        finally:
            with suppress(OSError):  # it has already exited
                os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
    if process.returncode:
        lines = [line.strip() for line in stderr.decode(errors="replace").splitlines()]
        lines = [line for line in lines if line and not line.startswith("Picked up JAVA_TOOL_OPTIONS")]
        errors = [line for line in lines if re.search("Exception|Error", line)] + lines[-1:]
        raise _RunError(f"{name} failed: {errors[0][:200] if errors else f'exit status {process.returncode}'}")
    return out.decode()
