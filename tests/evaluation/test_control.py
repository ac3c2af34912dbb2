"""The control of an evaluation: the same records with shuffled and with blank images."""

import json
from pathlib import Path

import pytest
import torch

from blip2.cli import main
from blip2.config import EvaluationConfig
from blip2.data.arrays import blank_input
from blip2.decoding.search import Decoding
from blip2.errors import InputError
from blip2.evaluation import tasks
from blip2.evaluation.captioning import CaptionScores, MissingMetric
from blip2.evaluation.control import FeatureFiles, add_control, control_rows, derange
from blip2.evaluation.retrieval import recall
from blip2.evaluation.run import evaluate as evaluate_config
from blip2.evaluation.run import evaluate_predictions
from blip2.pipelines import GenerationPipeline, load
from blip2.training.metrics import read_metrics
from conftest import COLORS, SHAPES, draw
from fixtures.processes import SMALL_CHUNK, start_two, use_small_chunks

GREEDY = {"num_beams": 1, "max_new_tokens": 4}
COUNT = 30
"""Images: more than a chunk, so that the image of a record comes from another chunk."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tasks, "CHUNK_SIZE", SMALL_CHUNK)


def evaluate(model, task, data, output, seed=0, **options):
    return evaluate_config(model, EvaluationConfig(task, data, **options), output, seed=seed, device="cpu")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A question about each of the images, and a second one about each second image, one of which is broken."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for i in range(COUNT):
        color, shape = list(COLORS)[i % 4], SHAPES[i % 3]
        draw(shape, color, i).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "what color?", "answers": [color]})
        rows += [{"image": f"{i}.png", "question": "what shape?", "answers": [shape]}] * (i % 2)
    (folder / "5.png").write_bytes(b"no image")
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_no_image_keeps_its_place(count):
    donor = derange(count, 7)
    assert sorted(donor) == list(range(count))
    assert all(donor[i] != i for i in range(count))
    assert donor == derange(count, 7)
    assert count < 50 or donor != derange(count, 8)


def test_one_image_has_no_other():
    with pytest.raises(InputError, match="found 1 usable image, expected at least 2: give more records, or leave out"):
        derange(1, 0)


def test_a_blank_image_has_the_mean_color(runs):
    preprocessing = load(runs["stage1"], device="cpu").model.vision.preprocessing
    mean = torch.tensor(preprocessing.mean).view(3, 1, 1).expand(-1, 32, 32)
    normalized = (mean - torch.tensor(preprocessing.mean)[:, None, None]) / torch.tensor(preprocessing.std)[
        :, None, None
    ]
    assert torch.equal(blank_input(preprocessing)[0], normalized)


def test_gaps():
    true = {"accuracy": 0.5, "by_type": {"color": 0.75, "other": 1.0}, "CIDEr": None, "answered": 9}
    blind = {"accuracy": 0.25, "by_type": {"color": 0.5}, "CIDEr": 0.5, "answered": 9}
    metrics = add_control(true, {"shuffled": blind, "blank": {"accuracy": 0.5}})
    assert metrics["shuffled"] == {"accuracy": 0.25, "by_type": {"color": 0.5}}
    assert metrics["gap_shuffled"] == {"accuracy": 0.25, "by_type": {"color": 0.25}}
    assert (metrics["blank"], metrics["gap_blank"]) == ({"accuracy": 0.5}, {"accuracy": 0.0})
    assert control_rows(metrics) == [
        ("accuracy", "0.5000", "0.2500", "0.5000", "0.2500", "0.0000"),
        ("by_type color", "0.7500", "0.5000", "-", "0.2500", "-"),
    ]
    assert control_rows(true) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_come_back_exactly(tmp_path, dtype):
    """In half the space if the encoder's data type holds them."""
    features = torch.randn(3, 4, 5).bfloat16().float() if dtype == torch.bfloat16 else torch.randn(3, 4, 5)
    files = FeatureFiles(tmp_path, {10: 0, 11: 1, 12: 0})
    files.write(0, [10, 11, 12], features, dtype)
    files.write(1, [11], features[1:2] + 1, torch.bfloat16)
    assert torch.equal(files.read([12, 10]), features[[2, 0]])
    assert torch.equal(files.read([11]), features[1:2] + 1)  # of its own chunk, and not rounded
    stored = torch.load(tmp_path / "000000.pt", weights_only=True)
    assert sorted(stored) == [10, 12] and stored[10].dtype == dtype


def test_answers(runs, questions, tmp_path, monkeypatch):
    """The answers of the controls are those about another image, and about a blank one; each image is read once."""
    plain = evaluate(runs["llama"], "vqa", questions, tmp_path / "plain", **GREEDY)
    asked, generate, reads = [], GenerationPipeline.generate, []

    def note(self, images, prompts, decoding, num_return_sequences=1, image_index=None, questions=None, **named):
        out = generate(self, images, prompts, decoding, num_return_sequences, image_index, questions, **named)
        asked.extend(zip(image_index, questions, out, strict=True))
        return out

    read = tasks.read_input
    monkeypatch.setattr(GenerationPipeline, "generate", note)
    monkeypatch.setattr(tasks, "read_input", lambda *given: reads.append(given) or read(*given))
    metrics = evaluate(runs["llama"], "vqa", questions, tmp_path / "control", seed=3, **GREEDY, control=True)
    for name in ("accuracy", "answered", "by_question_type", "skipped"):
        assert metrics[name] == plain[name]
    rows = [json.loads(line) for line in Path(questions).read_text().splitlines()]
    kept = [row for row in rows if row["image"] != "5.png"]
    assert len(asked) == 3 * len(kept)
    shared = sum(rows[i]["image"] == rows[i - 1]["image"] for i in range(SMALL_CHUNK, len(rows), SMALL_CHUNK))
    # An image with records in two chunks is read in both, as without a control.
    assert shared == 1 and len(reads) == COUNT + shared
    names = list(dict.fromkeys(row["image"] for row in kept))
    donor = dict(zip(names, (names[i] for i in derange(len(names), 3)), strict=True))
    pipeline, folder = load(runs["llama"], device="cpu"), Path(questions).parent
    pipeline.generate = lambda *given, **named: generate(pipeline, *given, **named)
    shuffled, blank = asked[len(kept) : 2 * len(kept)], asked[2 * len(kept) :]
    for i in (0, 1, 20, len(kept) - 1):
        row = kept[i]
        expected = pipeline.answer(folder / donor[row["image"]], row["question"], Decoding(**GREEDY))
        assert shuffled[i][1:] == (row["question"], *expected)
        expected = pipeline.answer(
            pipeline.encode_pixels(blank_input(pipeline.model.vision.input_format)),
            row["question"],
            Decoding(**GREEDY),
        )
        assert blank[i][1:] == (row["question"], *expected)
    assert not (tmp_path / "control" / "parts").exists()


def test_gaps_of_a_model_that_sees(runs, questions, tmp_path, monkeypatch):
    """A model that reads the answer off its image, and falls back to one answer without one."""
    rows = [json.loads(line) for line in Path(questions).read_text().splitlines()]
    pipeline, folder = load(runs["llama"], device="cpu"), Path(questions).parent
    seen = {}
    for row in rows:
        if row["image"] != "5.png":
            features = pipeline.encode_images(folder / row["image"])[0]
            seen[tuple(features[:, :3].flatten().round(decimals=3).tolist()), row["question"]] = row["answers"][0]

    def know(self, images, prompts, decoding, image_index, questions):
        keys = [tuple(each[:, :3].flatten().round(decimals=3).tolist()) for each in images]
        return [seen.get((keys[i], q), "red") for i, q in zip(image_index, questions, strict=True)]

    monkeypatch.setattr(GenerationPipeline, "generate", know)
    metrics = evaluate(runs["llama"], "vqa", questions, tmp_path, **GREEDY, control=True)
    assert metrics["accuracy"] == 1
    answered = [row for row in rows if row["image"] != "5.png"]
    assert metrics["blank"]["accuracy"] == pytest.approx(
        sum(row["answers"] == ["red"] for row in answered) / len(answered)
    )
    assert 0.1 < metrics["shuffled"]["accuracy"] < 0.5  # a quarter of the colors, a third of the shapes
    assert metrics["gap_shuffled"]["accuracy"] == 1 - metrics["shuffled"]["accuracy"]
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Control</h2>" in page and "gap to shuffled" in page and "gap_shuffled" not in page


def test_a_killed_control_goes_on_and_two_processes_give_the_same(runs, questions, tmp_path, monkeypatch):
    whole = evaluate(runs["llama"], "vqa", questions, tmp_path / "whole", **GREEDY, control=True)
    generate, calls = GenerationPipeline.generate, []

    def stop(self, *given, **named):
        calls.append(1)
        if len(calls) == 4:  # the second part with shuffled images
            raise KeyboardInterrupt
        return generate(self, *given, **named)

    monkeypatch.setattr(GenerationPipeline, "generate", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(runs["llama"], "vqa", questions, tmp_path / "killed", **GREEDY, control=True)
    assert evaluate(runs["llama"], "vqa", questions, tmp_path / "killed", **GREEDY, control=True) == whole
    assert len(calls) == 3 * 2 + 1
    command = ["evaluate", str(runs["llama"]), "--task", "vqa", "--data", questions, "--num-beams", "1", "--device"]
    command += ["cpu", "--max-new-tokens", "4", "--control", "--output", str(tmp_path / "two")]
    start_two(command, tmp_path, use_small_chunks)
    one, two = ((tmp_path / name / "metrics.json").read_text() for name in ("whole", "two"))
    assert one == two


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.9}])
def test_captions(runs, parts, tmp_path, monkeypatch, sampling):
    """The captions are those of other images, and of blank ones. The official metrics are tested elsewhere."""
    scored = []

    def score(predictions, references):
        scored.append(dict(predictions))
        return CaptionScores(
            {"CIDEr": 1 / len(scored), "SPICE": MissingMetric("no Java")}, dict.fromkeys(references, 0.0)
        )

    monkeypatch.setattr(tasks, "official_scores", score)
    options = {"num_beams": 1, "max_new_tokens": 4, **sampling}
    metrics = evaluate(runs["llama"], "captioning", parts.images, tmp_path, seed=2, **options, limit=6, control=True)
    true, shuffled, blank = scored
    assert [shuffled[i] for i in range(6)] == [true[i] for i in derange(6, 2)]
    pipeline = load(runs["llama"], device="cpu")
    features = pipeline.encode_pixels(blank_input(pipeline.model.vision.input_format))
    if sampling:
        assert len(set(blank.values())) > 1
    else:
        assert set(blank.values()) == set(pipeline.caption(features, None, Decoding(**GREEDY)))
    assert (metrics["shuffled"], metrics["blank"]) == ({"CIDEr": 1 / 2}, {"CIDEr": 1 / 3})
    assert (metrics["gap_shuffled"], metrics["gap_blank"]) == ({"CIDEr": 1 - 1 / 2}, {"CIDEr": 1 - 1 / 3})


def test_retrieval(runs, parts, tmp_path):
    options = {"rerank_k": 5}
    plain = evaluate(runs["stage1"], "retrieval", parts.images, tmp_path / "plain", **options)
    metrics = evaluate(runs["stage1"], "retrieval", parts.images, tmp_path / "control", seed=4, **options, control=True)
    for name in ("itc", "itm"):
        assert metrics[name] == plain[name]
        assert set(metrics["blank"][name]) == {"TR@1", "TR@5", "TR@10"}  # blank images have no order
        assert set(metrics["shuffled"][name]) == set(plain[name])
    rows = [json.loads(line) for line in Path(parts.images).read_text().splitlines()]
    pipeline, folder = load(runs["stage1"], device="cpu"), Path(parts.images).parent
    texts = [text for row in rows for text in row["captions"]]
    positive = torch.eye(len(rows), dtype=torch.bool).repeat_interleave(2, dim=1)
    others = [folder / rows[i]["image"] for i in derange(len(rows), 4)]
    similarity = pipeline.similarity(others, texts)
    assert metrics["shuffled"]["itc"]["TR@5"] == pytest.approx(recall(similarity, positive)["r5"])
    assert metrics["shuffled"]["itc"]["IR@5"] == pytest.approx(recall(similarity.T, positive.T)["r5"])
    blank = pipeline.encode_pixels(blank_input(pipeline.model.vision.input_format))
    found = recall(pipeline.similarity(blank, texts).expand(len(rows), -1), positive)
    assert metrics["blank"]["itc"]["TR@10"] == pytest.approx(found["r10"])
    best = pipeline.similarity(blank, texts)[0].topk(5).indices
    logits = pipeline.match_candidates(blank, texts, best[None])[0]
    first = best[(logits[:, 1] - logits[:, 0]).argmax()]
    assert metrics["blank"]["itm"]["TR@1"] == pytest.approx(float(positive[:, first].float().mean()))
    metrics = evaluate(runs["stage1"], "retrieval", parts.images, tmp_path / "itc", rerank_k=0, control=True)
    assert set(metrics["shuffled"]) == set(metrics["blank"]) == {"itc"}


def test_the_command_prints_a_table(runs, questions, tmp_path, capsys, caplog):
    command = ["evaluate", str(runs["llama"]), "--task", "vqa", "--data", questions, "--num-beams", "1", "--device"]
    assert main([*command, "cpu", "--limit", "4", "--output", str(tmp_path / "out"), "--control"]) == 0
    assert json.loads(capsys.readouterr().out)["gap_blank"].keys() >= {"accuracy"}
    assert "gap to shuffled" in caplog.text


def test_a_run_records_the_gaps(parts, questions, tmp_path):
    from blip2.evaluation.in_training import train

    evaluation = {"task": "vqa", "data": questions, "limit": 8, "control": True, **GREEDY}
    language = {"name": parts.llama, "prompt": "Q: {} A:"}
    train(
        parts.recipe(
            tmp_path / "run", stage="generation", language=language, evaluation=evaluation,
            data={"train": questions}, training={"max_steps": 1, "save_steps": 1},
        )
    )  # fmt: skip
    last = read_metrics(tmp_path / "run")[-1]
    assert last["evaluation_gap_blank_accuracy"] == pytest.approx(
        last["evaluation_accuracy"] - last["evaluation_blank_accuracy"]
    )


def test_what_has_no_control(runs, parts, questions, tmp_path):
    with pytest.raises(InputError, match=r"no model for other images: give a model, or leave out --control"):
        evaluate_predictions("x.json", EvaluationConfig("vqa", questions, control=True), tmp_path / "a")
    image = Path(questions).parent / "0.png"
    for task, row, what in (("vqa", {"question": "what?"}, "answers"), ("captioning", {"captions": []}, "captions")):
        data = tmp_path / f"{task}.jsonl"
        data.write_text(json.dumps({"image": str(image), **row}) + "\n")
        with pytest.raises(InputError, match=f"has no reference {what}, so that a control has no score to compare"):
            evaluate(runs["llama"], task, str(data), tmp_path / task, **GREEDY, control=True)
    for task, model in (("vqa", "llama"), ("captioning", "llama"), ("retrieval", "stage1")):
        data = questions if task == "vqa" else parts.images
        with pytest.raises(InputError, match="found 1 usable image, expected at least 2"):
            evaluate(runs[model], task, data, tmp_path / f"{task}-1", limit=1, control=True)


def test_an_output_has_a_control_or_not(runs, questions, tmp_path):
    evaluate(runs["llama"], "vqa", questions, tmp_path, **GREEDY, limit=4)
    with pytest.raises(InputError, match="contains another evaluation, whose control is None instead of True"):
        evaluate(runs["llama"], "vqa", questions, tmp_path, **GREEDY, limit=4, control=True)
