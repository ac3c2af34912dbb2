"""Arrays of features in place of images: training, methods and commands, with records of different lengths."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import blip2
from blip2 import InputError
from blip2.cli import main
from blip2.training.metrics import read_metrics
from fixtures.runs import assert_same_run, cut_short

WIDTH, LONGEST = 24, 9
NAMES = ("a red disc", "a blue disc", "the green square", "a stripe")
VISION = {"name": "features", "hidden_size": WIDTH, "max_tokens": LONGEST}
SHORT = {"max_steps": 3, "save_steps": 2, "device": "cpu", "precision": "fp32"}


def arrays(count: int = 12, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(len(NAMES), WIDTH))
    return [
        (means[i % len(NAMES)] + 0.3 * rng.normal(size=(1 + rng.integers(LONGEST), WIDTH))).astype(np.float32)
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """A JSONL file whose records name the same kind of array in each of the ways in which that is possible."""
    folder = tmp_path_factory.mktemp("arrays")
    found = arrays()
    np.savez(folder / "some.npz", **{f"clip{i}": found[i] for i in range(4, 6)})
    save_file({f"clip{i}": torch.from_numpy(found[i]).double() for i in range(6, 8)}, folder / "some.safetensors")
    rows = []
    for i, array in enumerate(found):
        np.save(folder / f"{i}.npy", array)
        source = {4: "some.npz#clip4", 5: "some.npz#clip5", 6: "some.safetensors#clip6", 7: "some.safetensors#clip7"}
        cell = array.tolist() if i in (8, 9) else source.get(i, f"{i}.npy")
        rows.append({"features": cell, "caption": NAMES[i % len(NAMES)], "image_id": i})
    path = folder / "clips.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [{**row, "question": "what is it?", "answer": row["caption"].split()[-1]} for row in rows]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return path


@pytest.fixture(scope="module")
def trained(parts, table, tmp_path_factory) -> dict[str, Path]:
    from blip2.training.trainer import train

    root = tmp_path_factory.mktemp("runs")
    data = {"train": str(table), "validation": str(table)}
    train(parts.recipe(root / "stage1", vision=VISION, data=data, training={**SHORT, "eval_steps": 2}))
    for name in ("llama", "t5"):
        train(
            parts.recipe(
                root / name, stage="generation", vision=VISION, data=data, training=SHORT,
                language={"name": getattr(parts, name)}, start_from=str(root / "stage1"),
            )
        )  # fmt: skip
    return {name: root / name for name in ("stage1", "llama", "t5")}


# -- training ----------------------------------------------------------------------------------------------------------


def test_records_of_every_kind_are_read_and_none_is_skipped(trained):
    for run in trained.values():
        assert read_metrics(run)[-1]["skipped"] == 0
    assert "validation_loss" in read_metrics(trained["stage1"])[-1]


def test_a_killed_run_continues_exactly(parts, table, trained):
    from blip2.training.trainer import train

    run = cut_short(trained["stage1"], 2)
    data = {"train": str(table), "validation": str(table)}
    train(parts.recipe(run, vision=VISION, data=data, training={**SHORT, "eval_steps": 2}), resume=True)
    assert_same_run(run, trained["stage1"])


def test_stage_2_with_windows(parts, table, trained, tmp_path, capsys):
    """It starts from a stage 1 without windows, continues exactly, and each sequence has its own result in a batch."""
    from blip2.training.trainer import train

    def recipe(folder):
        return parts.recipe(
            folder, stage="generation", vision=VISION, data={"train": str(table), "validation": str(table)},
            qformer={"window": 4, "stride": 3}, training={**SHORT, "eval_steps": 2},
            language={"name": parts.llama, "projection_init": "least_squares"}, start_from=str(trained["stage1"]),
        )  # fmt: skip

    train(recipe(tmp_path / "whole"))
    cut = cut_short(tmp_path / "whole", 2)
    train(recipe(cut), resume=True)
    assert_same_run(cut, tmp_path / "whole")

    model, found = blip2.load(tmp_path / "whole", "cpu"), arrays()
    assert model.caption(found) == [model.caption([each])[0] for each in found]
    texts = ["a red disc", "the green square"]
    for by in ("lm", "pmi"):
        alone = torch.cat([model.score([each], texts, by=by).values for each in found])
        torch.testing.assert_close(model.score(found, texts, by=by).values, alone, rtol=0, atol=1e-4)
    long = max(found, key=len)
    assert model.explain(long, "a red disc").effects.shape[1] == 4 * model.config.qformer.count_windows(len(long)) > 4

    assert main(["convert", str(tmp_path / "whole"), str(tmp_path / "blip2"), "--to", "blip2"]) == 0
    assert "for each window of 4 tokens" in (tmp_path / "blip2" / "README.md").read_text()
    assert blip2.load(tmp_path / "blip2", "cpu").caption(found) == model.caption(found)
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "whole"), str(tmp_path / "hf"), "--to", "transformers"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


# -- methods -----------------------------------------------------------------------------------------------------------


def test_records_together_are_records_alone(trained):
    compare, found = blip2.load(trained["stage1"], "cpu"), arrays()
    texts = list(NAMES)
    alone = torch.cat([compare.embed_images(each) for each in found])
    torch.testing.assert_close(compare.embed_images(found), alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        compare.match(found, texts), torch.cat([compare.match(each, texts) for each in found]), rtol=0, atol=1e-6
    )
    encoded = compare.encode_images(found)
    assert encoded.shape == (12, max(map(len, found)), WIDTH) and encoded.isnan().any()
    assert torch.equal(compare.embed_images(encoded), compare.embed_images(found))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_captions_and_answers_together_are_those_alone(trained, name):
    model, found = blip2.load(trained[name], "cpu"), arrays()
    assert model.caption(found) == [model.caption([each])[0] for each in found]
    questions = ["what is it?", "which color?"] * 6
    answers = [model.answer([each], question)[0] for each, question in zip(found, questions, strict=True)]
    assert model.answer(found, questions) == answers


# -- commands ----------------------------------------------------------------------------------------------------------


def test_commands(trained, table, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # without Java, because its metrics take seconds
    clip, keyed = str(table.parent / "0.npy"), f"{table.parent / 'some.npz'}#clip4"

    def lines(*arguments: object) -> list[str]:
        assert main([str(each) for each in arguments]) == 0
        return capsys.readouterr().out.splitlines()

    assert [line.split("\t")[0] for line in lines("caption", trained["llama"], clip, keyed)] == [clip, keyed]
    assert len(lines("ask", trained["t5"], clip, "what is it?")) == 1
    assert len(lines("match", trained["stage1"], clip, "a red disc", "a stripe")) == 3
    lines("embed", trained["stage1"], clip, keyed, "--output", tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["images"].shape == (2, 4, 16)
    for name, task, data in (("stage1", "retrieval", table), ("llama", "captioning", table), ("t5", "vqa", None)):
        data = data or table.parent / "questions.jsonl"
        lines("evaluate", trained[name], "--task", task, "--data", data, "--output", tmp_path / task)
        metrics = json.loads((tmp_path / task / "metrics.json").read_text())
        assert metrics["images_skipped"] == 0


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vision", "data", "message"),
    [
        ({"name": "features"}, {}, "vision.name is features, but vision.hidden_size is null: set"),
        ({"name": "features", "hidden_size": 4}, {}, "vision.max_tokens is null"),
        ({**VISION, "layer": "last"}, {}, "vision.layer is last, but vision.name is features, for which it has no"),
        ({**VISION, "image_size": 4}, {}, "vision.image_size is 4, but vision.name is features"),
        ({**VISION, "position_encoding": "sine2d"}, {}, "no grid of rows and columns"),
        ({"name": "vit", "max_tokens": 4}, {}, "vision.max_tokens is 4, but vision.name is vit, whose own"),
        ({"name": "module", "layer": "last"}, {}, "vision.layer is last, but vision.name is module"),
        (VISION, {"cached_views": 1}, "features are read as they are, and cannot be cached"),
        ({"name": "module"}, {"cached_views": 1}, "its features cannot be cached"),
    ],
)
def test_keys_that_do_not_fit_are_refused(parts, tmp_path, vision, data, message):
    with pytest.raises(InputError, match=message):
        parts.recipe(tmp_path, vision={**dict.fromkeys(("layer",)), **vision}, data=data)


def test_bad_records_are_skipped_counted_and_named(parts, tmp_path):
    from blip2.training.trainer import train

    for i, array in enumerate(arrays(5)):
        np.save(tmp_path / f"{i}.npy", array)
    np.save(tmp_path / "5.npy", np.full((2, WIDTH), np.nan))
    np.save(tmp_path / "6.npy", np.zeros((LONGEST + 1, WIDTH)))
    (tmp_path / "7.npy").write_bytes((tmp_path / "0.npy").read_bytes()[:-1])
    rows = [{"features": f"{i}.npy", "caption": "a red disc"} for i in range(8)] + [{"features": "", "caption": "a"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "t.jsonl"), "batch_size": 9, "group_by_length": False}
    train(parts.recipe(tmp_path / "run", vision=VISION, data=data, training={**SHORT, "max_steps": 1}))
    assert read_metrics(tmp_path / "run")[-1]["skipped_image"] == 4
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    messages = [row["message"] for row in skipped]
    for expected in ("holds nan", "has the shape", "ends after", "has no features"):
        assert any(expected in message for message in messages), (expected, messages)


@pytest.mark.parametrize("content", ["nan", "wide", "truncated", "absent"])
def test_commands_refuse_a_bad_array_in_one_line(trained, tmp_path, capsys, content):
    path = tmp_path / "a.npy"
    if content != "absent":
        np.save(path, np.full((2, WIDTH), np.nan) if content == "nan" else np.zeros((2, WIDTH + (content == "wide"))))
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    assert main(["embed", str(trained["stage1"]), str(path), "--output", str(tmp_path / "o.safetensors")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and str(path) in error[-1]


def test_features_that_are_given_must_be_whole(trained):
    compare = blip2.load(trained["stage1"], "cpu")
    encoded = compare.encode_images(arrays(3))
    for spoil in ((0, 0, 3, torch.nan), (1, 0, 0, torch.inf), (0, slice(None), slice(None), torch.nan)):
        bad = encoded.clone()
        bad[spoil[0], spoil[1], spoil[2]] = spoil[3]
        with pytest.raises(InputError, match="the features hold NaN or infinity"):
            compare.embed_images(bad)


def test_commands_on_images_refuse_the_model_in_one_line(trained, table, tmp_path, capsys):
    recipe = ["--output", str(tmp_path / "x"), "--vision.name", "features", "--vision.hidden_size", "24"]
    recipe += ["--vision.max_tokens", "9", "--data.cached_views", "0", "--data.train", str(table)]
    for arguments, message in (
        (["convert", trained["stage1"], tmp_path / "out", "--to", "transformers"], "reads arrays of features"),
        (["features", "demo-stage1", *recipe], "vision.name is features, whose features are not cached"),
        (["caption", trained["llama"], table], "is not an array"),
        (["embed", trained["stage1"], "--data", table, "--output", tmp_path / "corpus"], "has no image column"),
    ):
        assert main([str(each) for each in arguments]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


# -- a module of one's own ---------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(WIDTH, 10, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


@pytest.mark.parametrize("rate", ["frozen", 1e-3])
def test_train_and_load_with_a_module(parts, table, tmp_path, rate):
    torch.manual_seed(0)
    encoder = Encoder()
    rates = {"vision.*": rate, "language.*": "frozen", "*": 1e-3}
    recipe = parts.recipe(
        tmp_path / "run", vision=VISION, data={"train": str(table)}, training=SHORT, optimizer={"learning_rate": rates}
    )
    blip2.train(recipe, encoder=encoder)
    again = Encoder()
    if rate == "frozen":
        again.load_state_dict(encoder.state_dict())
    pipeline = blip2.load(tmp_path / "run", "cpu", encoder=again)
    assert pipeline.embed_images(arrays(3)).shape == (3, 4, 16)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters(), strict=True))
    with pytest.raises(InputError):  # the Q-Former was trained for features of another width
        blip2.load(tmp_path / "run", "cpu")
