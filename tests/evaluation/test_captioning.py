import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from blip2.errors import InputError
from blip2.evaluation.captioning import (
    METRICS,
    CaptionScores,
    MissingMetric,
    content_f1,
    official_scores,
    score_captions,
    scores_by_domain,
    token_f1,
    words,
)


def test_words() -> None:
    assert words("Two DOGS, (one black); a cat's café!") == ["two", "dogs", "one", "black", "a", "cat", "s", "café"]


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("a red disc", "a red disc", 1.0),
        ("A red disc.", "a red disc", 1.0),
        ("disc red a", "a red disc", 1.0),
        ("a red disc", "two blue dogs", 0.0),
        ("a red disc", "a red square", 2 / 3),
        ("a disc", "a red disc here", 2 * 2 / 6),
        # A word counts as often as it is there, so that saying one over and over does not help.
        ("disc disc disc disc", "a red disc", 2 * 1 / 7),
        ("disc disc", "a disc on a disc", 2 * 2 / 7),
        ("", "a red disc", 0.0),
        ("a red disc", "", 0.0),
        ("", "", 1.0),
    ],
)
def test_token_f1(prediction: str, reference: str, expected: float) -> None:
    assert token_f1(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("a disc", "the disc", 1.0),
        ("a dog", "a cat", 0.0),
        ("the red disc is here", "a red square", 2 * 1 / 5),
        ("some birds and a cat", "a flock of birds", 2 * 1 / 4),
    ],
)
def test_content_f1_looks_past_articles(prediction: str, reference: str, expected: float) -> None:
    assert content_f1(prediction, reference) == pytest.approx(expected)


def test_score_captions() -> None:
    scores = score_captions(["A red disc.", "a dog", "red a disc"], ["a red disc", "a cat", "a red disc"])
    assert scores == pytest.approx({"token_f1": (1 + 0.5 + 1) / 3, "content_f1": 2 / 3, "exact": 1 / 3})


def test_every_caption_needs_its_reference() -> None:
    with pytest.raises(ValueError, match="shorter"):
        score_captions(["a", "b"], ["a"])


# -- the official metrics --------------------------------------------------------------------------------------------

REFERENCES = {
    901: ["A cat sits on a mat.", "A cat is sitting on the mat, looking up.", "the cat"],
    17: ["Two dogs (one black) run after a ball!", "Two dogs are playing in the grass."],
    "flickr": ["A man's riding a wave on top of a surfboard.", "A surfer rides a big wave."],
    4: ['Un café déjà vu; the sign says "Stop"', "A sign over a café"],
    5: ["A plate of food with 1,000 beans - and rice", "Beans and rice on a plate..."],
    6: ["A train at the station", "."],
    7: ["A kitchen with a stove and a sink\r\nand a window", "A white kitchen"],
}
PREDICTIONS = {
    7: "a kitchen with a\nwhite stove",
    901: "a cat sitting on a mat",
    17: "two dogs running in the grass with a ball",
    "flickr": "a man riding a wave on a surfboard",
    4: "a sign that says stop in front of a café",
    5: "",
    6: "a bus, at a stop",
}


@pytest.fixture(scope="module")
def scores() -> CaptionScores:
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("needs Java")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LC_ALL", "C")  # METEOR waits for ever in a locale without é
        return official_scores(PREDICTIONS, REFERENCES, timeout=300.0)


def test_official_scores_are_those_of_pycocoevalcap_in_any_locale(scores: CaptionScores) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenize = PTBTokenizer().tokenize
    # Its tokenizer loses count at a carriage return, so that is taken away first.
    targets = tokenize(
        {i: [{"caption": t.replace("\r", "")} for t in texts] for i, texts in enumerate(REFERENCES.values())}
    )
    candidates = tokenize({i: [{"caption": PREDICTIONS[key]}] for i, key in enumerate(REFERENCES)})
    assert candidates[5] == ["a bus at a stop"] and targets[3][0] == "un café déjà vu the sign says stop"
    expected = dict(zip(METRICS, Bleu(4).compute_score(targets, candidates, verbose=0)[0], strict=False))
    scorer = Meteor()
    try:
        expected["METEOR"], _ = scorer.compute_score(targets, candidates)
    finally:
        for pipe in (scorer.meteor_p.stdout, scorer.meteor_p.stderr):
            assert pipe is not None
            pipe.close()
    expected["ROUGE-L"], _ = Rouge().compute_score(targets, candidates)
    expected["CIDEr"], each = Cider().compute_score(targets, candidates)
    assert {name: scores.metrics[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert list(scores.metrics) == list(METRICS)
    assert scores.cider == pytest.approx(dict(zip(REFERENCES, each.tolist(), strict=True)))
    assert all(isinstance(score, float) and 0 < score < 10 for score in expected.values())
    assert scores.cider[5] == 0 < scores.cider[901]


def test_spice_is_missing_without_its_download(scores: CaptionScores) -> None:
    from pycocoevalcap import spice

    spice_score = scores.metrics["SPICE"]
    if (Path(spice.__file__).parent / "lib" / "stanford-corenlp-3.6.0.jar").exists():
        assert isinstance(spice_score, float)
        return
    assert isinstance(spice_score, MissingMetric)
    assert spice_score.reason.startswith("SPICE needs CoreNLP 3.6.0: put stanford-corenlp-3.6.0.jar and ")
    assert not (Path(spice.__file__).parent / "tmp").exists()  # it was not begun


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meteor: str) -> Path:
    """A program `java` that breaks captions at spaces, and does what `meteor` says in place of METEOR."""
    pytest.importorskip("pycocoevalcap")
    java = tmp_path / "java"
    java.write_text(f'#!/bin/sh\ncase "$*" in *PTBTokenizer*) exec tr A-Z a-z;; esac\n{meteor}\n', encoding="utf-8")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return java


SMALL_REFERENCES = {1: ["a cat on a mat", "the cat"], 2: ["two dogs run"], 3: ["a red bus"], 4: ["a bus and a dog"]}
SMALL_PREDICTIONS = {1: "a cat on a mat", 2: "two cats run", 3: "a bus", 4: "a dog"}


@pytest.mark.parametrize(
    ("meteor", "reason"),
    [
        (
            "echo 'Error: Could not reserve enough space' >&2; exit 1",
            "METEOR failed: Error: Could not reserve enough space",
        ),
        ("exit 0", "METEOR failed: "),
        ("while read line; do echo nonsense; done", "METEOR failed: ValueError: "),
        ("exec yes nan", "METEOR is nan, expected a finite number"),
    ],
)
def test_meteor_fails(meteor: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, meteor)
    scores = official_scores(SMALL_PREDICTIONS, SMALL_REFERENCES, timeout=60.0)
    failed = scores.metrics["METEOR"]
    assert isinstance(failed, MissingMetric)
    assert failed.reason.startswith(reason) and "\n" not in failed.reason
    assert [name for name in METRICS if isinstance(scores.metrics[name], MissingMetric)] == ["METEOR", "SPICE"]
    assert scores.cider[1] > scores.cider[2]


def test_meteor_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither it nor what it started lives on."""
    install(tmp_path, monkeypatch, f"sleep 600 & echo $$ $! > {tmp_path}/pids; wait")
    scores = official_scores(SMALL_PREDICTIONS, SMALL_REFERENCES, timeout=3.0)
    assert scores.metrics["METEOR"] == MissingMetric(
        "METEOR did not finish within 3 s and was terminated: score fewer images"
    )
    assert isinstance(scores.metrics["CIDEr"], float)
    for pid in (tmp_path / "pids").read_text(encoding="utf-8").split():
        stat = Path(f"/proc/{pid}/stat")
        for _ in range(1200):  # whoever inherited it has yet to collect it
            if not stat.exists() or stat.read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] == "Z":
                break
            time.sleep(0.05)
        else:
            pytest.fail(f"process {pid} is still there")


def test_a_tokenizer_that_loses_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = install(tmp_path, monkeypatch, "exit 1")
    java.write_text("#!/bin/sh\nexec head -n 3\n", encoding="utf-8")
    scores = official_scores(SMALL_PREDICTIONS, SMALL_REFERENCES)
    missing = MissingMetric("the tokenizer printed 3 lines for 9 captions: try another version of Java")
    assert scores == CaptionScores(dict.fromkeys(METRICS, missing), {})


def test_without_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = official_scores(SMALL_PREDICTIONS, SMALL_REFERENCES)
    reason = "the official metrics need Java, which is not installed: apt install default-jre-headless"
    assert scores == CaptionScores(dict.fromkeys(METRICS, MissingMetric(reason)), {})


def test_without_pycocoevalcap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.tokenizer", None)
    scores = official_scores(SMALL_PREDICTIONS, SMALL_REFERENCES)
    assert scores.cider == {}
    for score in scores.metrics.values():
        assert isinstance(score, MissingMetric)
        assert score.reason == "the official metrics need pycocoevalcap: pip install 'blip2[captioning]'"


def test_domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as if its images were all there are: CIDEr's weights of words are its own."""
    install(tmp_path, monkeypatch, "while read line; do echo nonsense; done")
    domains = {1: "near-domain", 2: "in-domain", 3: "near-domain", 4: "in-domain"}
    scores = scores_by_domain(SMALL_PREDICTIONS, SMALL_REFERENCES, domains)
    assert list(scores) == ["in-domain", "near-domain", "overall"]
    assert scores["overall"] == official_scores(SMALL_PREDICTIONS, SMALL_REFERENCES)
    for domain, keys in (("in-domain", (2, 4)), ("near-domain", (1, 3))):
        assert scores[domain] == official_scores(
            {k: SMALL_PREDICTIONS[k] for k in keys}, {k: SMALL_REFERENCES[k] for k in keys}
        )
        assert list(scores[domain].cider) == list(keys)
    assert scores["near-domain"].cider[1] != scores["overall"].cider[1]
    with pytest.raises(InputError, match=r"^the domains: 1 missing image_id \(4\), expected all 4 ids"):
        scores_by_domain(SMALL_PREDICTIONS, SMALL_REFERENCES, {1: "a", 2: "a", 3: "b"})


def test_captions_of_other_images() -> None:
    with pytest.raises(InputError, match=r"^the captions: 1 missing image_id \(2\), expected all 2 ids"):
        official_scores({1: "a"}, {1: ["a"], 2: ["b"]})
    with pytest.raises(InputError, match=r"^the captions: 1 unknown image_id \(2\), expected only ids of the data"):
        official_scores({1: "a", 2: "b"}, {1: ["a"]})
    with pytest.raises(
        InputError, match=r"^2 images have no reference caption, the first is 2: leave out these images"
    ):
        official_scores({1: "a", 2: "b", 3: "c"}, {1: ["a"], 2: [], 3: [" "]})
    with pytest.raises(InputError, match="there are no captions to score"):
        official_scores({}, {})
