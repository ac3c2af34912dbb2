"""Every program in examples/ runs on tiny models."""

import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from conftest import draw

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY_QFORMER = [
    "hidden_size=32", "num_hidden_layers=2", "num_attention_heads=4", "intermediate_size=48", "num_query_tokens=4",
    "image_text_hidden_size=16", "vocab_size=58", "max_position_embeddings=40",
]  # fmt: skip


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run an example in a folder with three captioned images, and return the lines that it prints."""
    for color in ("red", "green", "blue"):
        draw("disc", color, 0).save(tmp_path / f"{color}.png")
        (tmp_path / f"{color}.txt").write_text(f"a {color} disc")
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        (path,) = EXAMPLES.glob(f"{name}*.py")
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_begin_with_their_command(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 40
    assert lines[2].startswith(f"python examples/{path.name}")


def test_caption(run, runs):
    lines = run("01", runs["llama"], "red.png", "blue.png")
    assert [line.split(": ")[0] for line in lines if ".png: " in line] == ["red.png", "blue.png"]


def test_answer(run, runs):
    assert run("02", runs["t5"], "red.png", "What is it?")[0].startswith("What is it? ")


def test_rank_texts(run, runs):
    lines = run("03", runs["stage1"], "red.png", "a red disc", "a blue disc")
    assert [len(line.split("  ")) for line in lines] == [3, 3]
    assert float(lines[0].split()[0]) >= float(lines[1].split()[0])


def test_embed(run, runs):
    lines = run("04", runs["stage1"], "out.safetensors", "a red disc", "red.png", "green.png", "blue.png")
    assert {line.split()[-1] for line in lines} == {"red.png", "green.png", "blue.png"}
    assert load_file("out.safetensors")["images"].shape == (3, 4, 16)


def test_both_stages(run, parts, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for file in [*tmp_path.glob("*.png"), *tmp_path.glob("*.txt")]:
        shutil.copy(file, folder)
    tiny = [f"--vision.name={parts.vision}", f"--qformer.bert={parts.bert}", "--data.batch_size=2"]
    tiny += [f"--qformer.{value}" for value in TINY_QFORMER]
    tiny += ["--training.max_steps=2", "--training.device=cpu", "--optimizer.warmup_steps=1"]
    (line,) = run("05", folder, "stage1", *tiny)
    assert line.startswith("python examples/03_rank_texts.py")
    (line,) = run("06", folder, "stage1", "stage2", *tiny, f"--language.name={parts.llama}")
    assert len(run("01", line.split()[2], "red.png")) >= 1


def test_to_transformers(run, runs):
    assert len(run("07", runs["llama"], "converted", "red.png")) >= 1
    assert Path("converted/config.json").is_file()


def test_own_encoder(run):
    lines = run("08")
    assert len(lines) == 10
    first, last = (sum(float(value) for value in line.split()[2::2]) for line in (lines[0], lines[-1]))
    assert last < first


def test_audio_features(run, parts, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    sounds = tmp_path / "recordings"
    sounds.mkdir()
    for i, (rate, suffix) in enumerate([(8000, "wav"), (44100, "ogg"), (16000, "wav")]):
        seconds = np.arange((1 + i) * rate // 4) / rate
        soundfile.write(sounds / f"{i}.{suffix}", 0.3 * np.sin(2 * np.pi * 440 * (i + 1) * seconds), rate)
        (sounds / f"{i}.txt").write_text(f"a tone of {440 * (i + 1)} hertz")
    run("09", sounds, tmp_path / "features")
    arrays = [np.load(tmp_path / "features" / f"{i}.npy") for i in range(3)]
    assert [array.shape for array in arrays] == [(6, 288), (12, 288), (19, 288)]  # a token every 40 ms
    # The band with the most energy is that of the tone.
    bands = [array[:, :64].mean(axis=0).argmax() for array in arrays]
    assert bands[0] < bands[1] < bands[2]
    tiny = ["--vision.name=features", "--vision.hidden_size=288", "--vision.max_tokens=20", "--data.cached_views=0"]
    tiny += [f"--qformer.bert={parts.bert}", "--data.batch_size=2"]
    tiny += [f"--qformer.{value}" for value in TINY_QFORMER]
    tiny += ["--training.max_steps=2", "--training.device=cpu", "--optimizer.warmup_steps=1"]
    (line,) = run("05", tmp_path / "features", "stage1", *tiny)
    (line,) = run("06", tmp_path / "features", "stage1", "stage2", *tiny, f"--language.name={parts.llama}")
    assert len(run("01", line.split()[2], tmp_path / "features" / "0.npy")) >= 1
