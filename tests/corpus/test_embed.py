import json
import os

import torch
from safetensors import safe_open

from blip2.cli import main
from blip2.corpus.embed import embed_corpus
from blip2.corpus.options import Engine
from blip2.pipelines import load
from fixtures.corpus import encoded, read_tar, write_tar


def read(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["records"])  # noqa: SIM118


def test_a_corpus_is_embedded_shard_by_shard(runs, shards, tmp_path):
    metrics = embed_corpus(
        str(runs["stage1"]), str(shards / "*.tar"), tmp_path / "out", engine=Engine(num_threads=1), device="cpu"
    )
    assert (metrics["images"], metrics["texts"], metrics["skipped"]) == (24, 36, {})
    tensors, records = read(tmp_path / "out" / "00001.safetensors")
    members = read_tar(shards / "00001.tar")
    assert records["keys"] == [f"{n:04}" for n in range(6)]
    assert records["texts"] == [text for n in range(6) for text in json.loads(members[f"{n:04}.json"])["captions"]]
    assert tensors["image_index"].tolist() == [n for n in range(6) for _ in range(2)]
    model = load(runs["stage1"], "cpu")
    images = model.embed_images([members[f"{n:04}.png"] for n in range(6)])
    assert tensors["images"].dtype == torch.float16
    assert tensors["images"].shape == images.shape and (tensors["images"] - images).abs().max() < 1e-3
    assert (tensors["texts"] - model.embed_texts(records["texts"])).abs().max() < 2e-3


def test_texts_and_names_that_are_not_utf_8(runs, tmp_path):
    good = encoded("disc", "red")
    name = os.fsdecode(b"caf\xe9")
    members = {f"{name}.png": good, f"{name}.txt": b"a disc", "1.png": good, "1.json": b'{"caption": "half \\ud83d"}'}
    write_tar(tmp_path / "a.tar", members)
    metrics = embed_corpus(str(runs["stage1"]), str(tmp_path / "a.tar"), tmp_path / "out", device="cpu")
    assert (metrics["images"], metrics["texts"], metrics["skipped"]) == (1, 1, {"caption not read": 1})
    assert read(tmp_path / "out" / "a.safetensors")[1] == {"keys": [name], "texts": ["a disc"]}


def test_the_command(runs, shards, tmp_path, capsys):
    model, out = str(runs["stage1"]), ["--output", str(tmp_path / "out")]
    assert main(["embed", model, "--data", str(shards / "00000.tar"), *out]) == 0
    assert json.loads(capsys.readouterr().out) == {"images": 6, "texts": 6, "skipped": {}}
    assert main(["embed", model, "a.png", "--data", str(shards / "00000.tar"), *out]) == 2
    assert main(["embed", model, "a.png", "--engine", "ray", *out]) == 2
    assert main(["embed", model, "--data", str(shards / "00001.tar"), *out]) == 2
    errors = capsys.readouterr().err
    assert "leave out --data, or the images and --text" in errors
    assert "--engine ray embeds a corpus, but no --data was given" in errors
    assert "contains another pass, whose data is" in errors
