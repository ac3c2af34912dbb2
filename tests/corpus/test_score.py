import json
import os
import shutil
from pathlib import Path

import pytest

from blip2.checkpoint import find_checkpoint, write_calibration
from blip2.cli import main
from blip2.corpus import capfilt
from blip2.corpus.options import CapFiltConfig, Engine
from blip2.corpus.score import score_corpus
from blip2.corpus.selection import SelectionRules
from blip2.errors import InputError
from blip2.pipelines import load
from fixtures.checkpoints import save_transformers
from fixtures.corpus import encoded, read_tar, write_tar


@pytest.fixture(scope="module")
def models(parts, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, flavor in (("stage1", None), ("stage2", "opt")):
        save_transformers(root / name, flavor, parts.bert)
    return {name: str(root / name) for name in ("stage1", "stage2")}


def rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("by", "stage"), [("itm", "stage1"), ("pmi", "stage2")])
def test_captions_are_scored_with_their_own_image(models, shards, tmp_path, by, stage):
    metrics = score_corpus(models[stage], str(shards / "*.tar"), tmp_path / "out", by, engine=Engine(num_threads=1),
                           device="cpu")  # fmt: skip
    assert (metrics["images"], metrics["texts"], metrics["skipped"]) == (24, 36, {})
    pipeline, values = load(models[stage], "cpu"), []
    for shard in range(4):
        members, found = read_tar(shards / f"{shard:05}.tar"), rows(tmp_path / "out" / f"{shard:05}.jsonl")
        assert [row["key"] for row in found] == [f"{n:04}" for n in range(6)]
        for row in found:
            expected = pipeline.score(members[f"{row['key']}.png"], row["captions"], by)
            assert row["scores"] == pytest.approx(expected.values[0].tolist(), abs=1e-4)
            assert ("num_tokens" in row) == (by == "pmi")
            if "num_tokens" in row:
                assert row["num_tokens"] == expected.num_tokens[0].tolist()
            values += row["scores"]
    assert metrics["mean_score"] == pytest.approx(sum(values) / 36, abs=1e-5)
    assert (tmp_path / "out" / "skipped.jsonl").read_text() == ""


def test_a_table_and_a_second_run(models, parts, tmp_path):
    arguments = (models["stage1"], parts.images, tmp_path / "out", "itm")
    metrics = score_corpus(*arguments, shard_size=10, device="cpu")
    assert metrics["images"] == 24 and metrics["texts"] == 48
    found = [rows(tmp_path / "out" / f"{n:05}.jsonl") for n in range(3)]
    assert [len(each) for each in found] == [10, 10, 4]
    assert [row["key"] for each in found for row in each] == [f"{n:09}" for n in range(24)]
    (tmp_path / "out" / "00001.jsonl").unlink()
    (tmp_path / "out" / "00001.stats.json").unlink()
    before = (tmp_path / "out" / "00000.jsonl").stat().st_mtime_ns
    assert score_corpus(*arguments, shard_size=10, device="cpu") == metrics
    assert rows(tmp_path / "out" / "00001.jsonl") == found[1]
    assert (tmp_path / "out" / "00000.jsonl").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="contains another pass, whose by is itm"):
        score_corpus(*arguments[:3], "itc", device="cpu")


def test_a_pass_does_not_mix_two_versions_of_its_data_or_model(runs, parts, tmp_path):
    """A second run would take what is there for the result."""
    model = shutil.copytree(runs["stage1"], tmp_path / "model")
    folder, lines = Path(parts.images).parent, rows(Path(parts.images))[:4]
    table = tmp_path / "table.jsonl"

    def write(count):
        made = [{**row, "image": str(folder / row["image"])} for row in lines[:count]]
        table.write_text("".join(json.dumps(row) + "\n" for row in made))

    def run(shard_size=2):
        return score_corpus(str(model), str(table), tmp_path / "out", "itc", shard_size=shard_size, device="cpu")

    write(3)
    metrics = run()
    assert metrics["images"] == 3 and run() == metrics
    with pytest.raises(InputError, match="contains another pass, whose shard_size is 2 instead of 3"):
        run(shard_size=3)
    write(4)  # the second unit has another record now
    with pytest.raises(
        InputError, match=r"00000\.stats\.json has the result of .*, has changed since; give another output"
    ):
        run()
    (weights,) = find_checkpoint(model).glob("*.safetensors")
    os.utime(weights, (0, 0))  # trained again
    with pytest.raises(InputError, match="contains another pass, whose weights_version is"):
        run()


def test_a_pass_does_not_mix_two_versions_of_a_folder(models, tmp_path):
    """A folder has no version of its own, but its sorted images say which records a unit has."""
    folder = tmp_path / "images"
    folder.mkdir()

    def add(name):
        (folder / f"{name}.png").write_bytes(encoded("disc", "red"))
        (folder / f"{name}.txt").write_text("a disc")

    def run():
        return score_corpus(models["stage1"], str(folder), tmp_path / "out", "itc", shard_size=2, device="cpu")

    def remove(name):
        (folder / f"{name}.png").unlink()
        (folder / f"{name}.txt").unlink()

    for name in "acde":
        add(name)
    metrics = run()
    assert metrics["images"] == 4 and run() == metrics
    remove("e")
    with pytest.raises(InputError, match=r"00001\.stats\.json has the result of .*; give another output"):
        run()
    remove("d")
    with pytest.raises(InputError, match=r"00001\.stats\.json has the result of records that the data no longer has"):
        run()
    add("b")
    add("d")
    with pytest.raises(InputError, match=r"00000\.stats\.json has the result of .*; give another output"):
        run()


def test_samples_that_cannot_be_scored_are_named(models, tmp_path):
    good = encoded("disc", "red")
    members = {"0.png": b"no image", "0.txt": b"a disc", "1.png": good, "1.txt": b"a disc"}
    members |= {"2.png": good, "2.txt": b"a disc " * 30, "3.png": good, "3.txt": b"a red disc"}
    write_tar(tmp_path / "a.tar", members)
    metrics = score_corpus(models["stage2"], str(tmp_path / "a.tar"), tmp_path / "out", "lm", device="cpu")
    assert (metrics["images"], metrics["texts"]) == (2, 2)
    assert metrics["skipped"] == {"image not decoded": 1, "caption too long": 1}
    assert [row["key"] for row in rows(tmp_path / "out" / "a.jsonl")] == ["1", "3"]
    skipped = {row["sample"].split(" ")[0]: row for row in rows(tmp_path / "out" / "skipped.jsonl")}
    assert set(skipped) == {"0", "2"}
    assert "of the LLM's 96 positions" in skipped["2"]["message"] and "a.tar" in skipped["2"]["sample"]


def test_the_command(models, shards, tmp_path, capsys):
    out = ["--output", str(tmp_path / "out")]
    data = str(shards / "00000.tar")
    assert main(["score", data, "--model", models["stage1"], "--by", "itc", *out]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["images"], printed["texts"], printed["skipped"]) == (6, 6, {})
    assert -1 <= printed["mean_score"] <= 1
    assert main(["score", data, "--model", models["stage1"], "--by", "lm", *out]) == 2
    assert main(["score", data, "--model", models["stage1"], "--prompt", "a", "--output", str(tmp_path / "b")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "contains another pass, whose by is itc" in errors[0]
    assert "reads no prompt: leave out prompt" in errors[1]


def test_a_pass_does_not_mix_temperatures(runs, models, parts, tmp_path, monkeypatch):
    def refuse(job, units, folder, metadata, *others):
        raise InputError(json.dumps(metadata))

    model = shutil.copytree(runs["stage1"], tmp_path / "model")
    image = Path(parts.images).parent / rows(Path(parts.images))[0]["image"]
    (tmp_path / "one.jsonl").write_text(json.dumps({"image": str(image), "caption": "a disc"}))
    arguments = (str(model), str(tmp_path / "one.jsonl"), tmp_path / "out", "itm")
    assert "itm_temperature" not in score_corpus(*arguments, device="cpu")
    write_calibration(find_checkpoint(model), {"itm": 2.0})
    with pytest.raises(InputError, match="another pass, whose itm_temperature is None instead of 2"):
        score_corpus(*arguments, device="cpu")
    monkeypatch.setattr(capfilt, "run_job", refuse)
    for threshold, count in ((0.5, 1), (None, 0)):
        config = CapFiltConfig(rules=SelectionRules(min_itm=threshold))
        with pytest.raises(InputError) as error:
            capfilt.capfilt(models["stage2"], str(model), parts.images, tmp_path / "shards", config)
        assert str(error.value).count("itm_temperature") == count
