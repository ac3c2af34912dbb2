"""How close captions come to the truth.

:func:`official_scores` gives the metrics of COCO and NoCaps (paper §4.2), by the programs that define them;
:func:`score_captions` gives simple ones that need nothing else.
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
    """Lower-case words of a text, without punctuation."""
    return re.findall(r"\w+", text.lower())


def token_f1(written: str, truth: str) -> float:
    """Harmonic mean of the precision and recall of the words of a caption, in [0, 1]."""
    there, wanted = Counter(words(written)), Counter(words(truth))
    shared = sum((there & wanted).values())
    if not shared:
        return float(there == wanted)
    return 2 * shared / (there.total() + wanted.total())


ARTICLES = {"a", "an", "the", "some", "of", "and", "is"}


def content_f1(written: str, truth: str) -> float:
    """:func:`token_f1` without the words that nearly every caption has (a, an, the, some, of, and, is)."""
    kept = [" ".join(word for word in words(text) if word not in ARTICLES) for text in (written, truth)]
    return token_f1(*kept)


def score_captions(written: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """Means over all captions, each in [0, 1]: ``token_f1``, ``content_f1``, and ``exact``, the share that has the
    same words as the truth."""
    pairs = list(zip(written, truth, strict=True))
    return {
        "token_f1": sum(token_f1(a, b) for a, b in pairs) / len(pairs),
        "content_f1": sum(content_f1(a, b) for a, b in pairs) / len(pairs),
        "exact": sum(words(a) == words(b) for a, b in pairs) / len(pairs),
    }


# -- the official metrics --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Missing:
    """A metric that could not be computed here."""

    reason: str
    """One line: what is lacking and how to get it, or what went wrong."""


@dataclass(frozen=True)
class CaptionScores:
    """What COCO's evaluation says of captions."""

    metrics: dict[str, float | Missing]
    """Each of :data:`METRICS`, in [0, 1], but CIDEr in [0, 10]. Tables show them times 100."""
    cider: dict[Any, float]
    """CIDEr of each picture, by its id; empty where CIDEr is missing."""


def official_scores(
    written: Mapping[Any, str], truth: Mapping[Any, Sequence[str]], seconds: float = 3600.0
) -> CaptionScores:
    """BLEU, METEOR, ROUGE-L, CIDEr and SPICE by pycocoevalcap, behind the tokenizer of the Penn Treebank (§4.2).

    All need Java, SPICE a download as well. What cannot be computed is missing with its reason, and nothing stands in
    for it. CIDEr weighs words by how rare they are in the truth of all pictures given: it depends on which are given,
    and is 0 for one alone.

    Args:
        written: a caption for each picture, by its id; it may be blank.
        truth: what people wrote about each picture.
        seconds: time limit for each program in Java, which is ended then.

    Raises:
        InputError: there are no pictures, a picture has no caption or no truth, or a caption has no picture.
    """
    if not truth:
        raise InputError("there are no captions to score, expected at least one")
    check_ids("the captions", "image_id", written, truth)
    blank = [key for key, texts in truth.items() if not any(text.strip() for text in texts)]
    if blank:
        raise InputError(f"{len(blank)} pictures have no true caption, the first is {blank[0]!r}: leave them out")
    try:
        tokens = _tokenize([text for key in truth for text in (written[key], *truth[key])], seconds)
    except _RunError as failure:
        return CaptionScores(dict.fromkeys(METRICS, Missing(str(failure))), {})
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    rest = iter(tokens)
    ours, theirs = {}, {}
    for key, texts in truth.items():
        ours[key] = [next(rest)]
        theirs[key] = [next(rest) for _ in texts]
    bleu, _ = Bleu(4).compute_score(theirs, ours, verbose=0)
    rouge, _ = Rouge().compute_score(theirs, ours)
    cider, each = Cider().compute_score(theirs, ours)
    found: dict[str, float | Missing] = {f"BLEU@{n}": float(score) for n, score in enumerate(bleu, 1)}
    found |= {"ROUGE-L": float(rouge), "CIDEr": float(cider)}
    for name in ("METEOR", "SPICE"):
        found[name] = _by_java(name, list(theirs.values()), list(ours.values()), seconds)
    return CaptionScores({name: found[name] for name in METRICS}, dict(zip(truth, map(float, each), strict=True)))


def scores_by_domain(
    written: Mapping[Any, str],
    truth: Mapping[Any, Sequence[str]],
    domains: Mapping[Any, str],
    seconds: float = 3600.0,
) -> dict[str, CaptionScores]:
    """:func:`official_scores` of the pictures of each domain, each for itself, and of all as ``overall`` (NoCaps).

    Args:
        domains: ``in-domain``, ``near-domain`` or ``out-domain`` for each picture.

    Raises:
        InputError: as there, or a picture has no domain.
    """
    check_ids("the table of domains", "image_id", domains, truth)
    check_ids("the captions", "image_id", written, truth)
    groups: dict[str, list[Any]] = {}
    for key in truth:
        groups.setdefault(domains[key], []).append(key)
    scores = {
        name: official_scores({key: written[key] for key in keys}, {key: truth[key] for key in keys}, seconds)
        for name, keys in sorted(groups.items())
    }
    return scores | {"overall": official_scores(written, truth, seconds)}


class _RunError(Exception):
    """A program could not be run; says why in a line."""


def _tokenize(texts: Sequence[str], seconds: float) -> list[str]:
    """Words as the official metrics count them: of the Penn Treebank, in small letters, without punctuation."""
    try:
        from pycocoevalcap.tokenizer import ptbtokenizer
    except ImportError as error:
        raise _RunError("the official metrics need the extra captioning: pip install 'blip2[captioning]'") from error
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    out = _run("the tokenizer", command, "".join(f"{' '.join(text.splitlines())}\n" for text in texts), seconds)
    lines = out.split("\n")[:-1]
    if len(lines) != len(texts):
        raise _RunError(f"the tokenizer gave {len(lines)} lines for {len(texts)} captions")
    return [" ".join(word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS) for line in lines]


def _by_java(name: str, theirs: list[list[str]], ours: list[list[str]], seconds: float) -> float | Missing:
    try:
        if name == "SPICE":
            _find_corenlp()
        script = Path(__file__).with_name("java_metrics.py")
        score = float(_run(name, [sys.executable, "-P", str(script), name], json.dumps([theirs, ours]), seconds))
    except _RunError as failure:
        return Missing(str(failure))
    return score if math.isfinite(score) else Missing(f"{name} gave {score}")


def _find_corenlp() -> None:
    """SPICE's parser, which pycocoevalcap would go and download."""
    from pycocoevalcap import spice

    folder = Path(spice.__file__).parent / "lib"
    files = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
    if not all((folder / file).is_file() for file in files):
        raise _RunError(f"SPICE needs CoreNLP 3.6.0: put {' and '.join(files)} of {CORENLP} into {folder}")


def _run(name: str, command: list[str], text: str, seconds: float) -> str:
    """What a program writes. It and the programs that it started are ended in any case."""
    if shutil.which("java") is None:
        raise _RunError("Java is not installed, which the official metrics need: apt install default-jre-headless")
    # METEOR never answers to letters that its encoding does not have.
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
            out, said = process.communicate(text.encode(errors="replace"), timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise _RunError(f"{name} did not finish within {seconds:g} s and was ended") from error
        finally:
            with suppress(OSError):  # it has ended by itself
                os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
    if process.returncode:
        lines = [line.strip() for line in said.decode(errors="replace").splitlines()]
        lines = [line for line in lines if line and not line.startswith("Picked up JAVA_TOOL_OPTIONS")]
        blamed = [line for line in lines if re.search("Exception|Error", line)] + lines[-1:]
        raise _RunError(f"{name} failed: {blamed[0][:200] if blamed else f'exit status {process.returncode}'}")
    return out.decode()
