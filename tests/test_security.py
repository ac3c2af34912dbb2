"""Attacks on each door through which a downloaded file comes in (docs/security.md)."""

import ast
import gzip
import importlib
import io
import json
import logging
import os
import re
import shutil
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import datasets
import pyarrow.parquet
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from blip2.backbones.pretrained import load_pickle
from blip2.builder import build_image_encoder, build_language_model
from blip2.checkpoint import open_checkpoint, write_configs
from blip2.cli import main
from blip2.config import DataConfig, LanguageConfig, Recipe, VisionConfig
from blip2.console import Display
from blip2.corpus.units import Unit, read_unit
from blip2.data.images import ImageError, read_image
from blip2.data.shards import ERROR_COLUMN, Sample, SkippedSample, read_shard
from blip2.data.sources import open_records
from blip2.errors import InputError, escape_control_characters
from blip2.interop.checkpoint import load_tokenizer
from blip2.interop.weights import open_file, open_folder
from blip2.io import MAX_DEPTH, parse_json, parse_yaml, read_json, write_tensors
from blip2.recipe import load_recipe, load_stored, override
from fixtures.corpus import write_tar

SOURCE = Path(__file__).parents[1] / "src" / "blip2"
SECRET = "hunter2-the-secret"
MINIMAL = {"stage": "representation", "output": "run", "vision": {"name": "vit"}, "data": {"train": "pairs.jsonl"}}
MINIMAL_MODEL = {key: MINIMAL[key] for key in ("stage", "vision")}
TINY = {
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 4,
    "num_query_tokens": 1,
}
TINY |= {"vocab_size": 4, "max_position_embeddings": 2, "image_text_hidden_size": 4}


def one_line(raised) -> str:
    text = str(raised.value)
    assert "\n" not in text
    assert SECRET not in text
    return text


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """The file that a module ``notes`` writes when it is imported, as it can be from here."""
    marker = tmp_path / "IT_RAN"
    code = f"import pathlib\npathlib.Path({str(marker)!r}).write_text('x')\nclass X: pass\ndef f(*a, **k): pass\n"
    (tmp_path / "notes.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    importlib.import_module("notes")
    assert marker.exists()  # it can run
    marker.unlink()
    del sys.modules["notes"]
    return marker


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a checkpoint whose model and recipe are the smallest ones, changed."""

    def write(text=None, **changes):
        folder = tmp_path / "checkpoint"
        folder.mkdir(exist_ok=True)
        save_file({"a": torch.zeros(64)}, folder / "model.safetensors")
        for name, values in (("model.yaml", MINIMAL_MODEL), ("recipe.yaml", MINIMAL)):
            (folder / name).write_text(yaml.safe_dump({**values, "qformer": TINY, **changes}) if text is None else text)
        return folder

    return write


def read_stored_recipe(folder):
    return load_stored(Recipe, folder / "recipe.yaml")


def read_stored_model(folder):
    return open_checkpoint(str(folder)).config


READERS = {"recipe.yaml": read_stored_recipe, "model.yaml": read_stored_model}
"""What reads each file of a checkpoint that is YAML."""


# -- recipes -------------------------------------------------------------------------------------------------------

CLASS = {"class_path": "notes.X", "init_args": {}}
RECIPES = {
    "a dotted name for a section": {"evaluation": "notes.X"},
    "a function": {"evaluation": "notes.f"},
    "a class for a section": {"evaluation": CLASS},
    "a class for one that has to be": {"vision": CLASS},
    "a class within": {"vision": {"name": "vit", **CLASS}},
    "arguments alone": {"evaluation": {"init_args": {"task": "retrieval"}}},
    "a class for an optional one below": {"stage": "generation", "language": {"name": "x", "lora": "notes.X"}},
    "a class for a value": {"data": {"train": CLASS, "batch_size": "notes.X"}},
    "a class in a list": {"training": {"report_to": [CLASS]}},
    "a dotted key": {"evaluation.class_path": "notes.X"},
    "other arguments": {"vision": {"name": "vit", "dict_kwargs": {"a": 1}}},
    "a path": {"vision": {"__path__": "notes.py"}},
}


@pytest.mark.parametrize("changes", RECIPES.values(), ids=list(RECIPES))
def test_a_recipe_names_no_class(marker, checkpoint, tmp_path, changes):
    folder = checkpoint(**changes)
    for name, read in READERS.items():
        with pytest.raises(InputError) as raised:
            read(folder)
        assert f"{name}: " in one_line(raised)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**MINIMAL, **changes}))
    assert main(["train", str(tmp_path / "own.yaml")]) == 2
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:notes.f []",
        "stage: !!python/name:notes.X",
        "stage: !!python/module:notes\noutput: x",
        'data: {train: "!!python/object/apply:notes.f []"}',
        'data: {train: x, batch_size: "!!python/object/apply:notes.f []"}',
    ],
)
def test_a_recipe_makes_no_object(marker, checkpoint, text):
    for read in READERS.values():
        with pytest.raises(InputError) as raised:
            read(checkpoint(text))
        one_line(raised)
    assert not marker.exists()


@pytest.mark.parametrize(
    "arguments",
    [["--evaluation", "notes.X"], ["--evaluation.class_path=notes.X"], ["--vision", '{"class_path": "notes.X"}']],
)
def test_neither_does_the_command_line(marker, tmp_path, arguments):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(MINIMAL))
    recipe = load_recipe(tmp_path / "own.yaml")
    with pytest.raises(InputError) as raised:
        load_recipe(tmp_path / "own.yaml", arguments)
    one_line(raised)
    for changes in ({"evaluation": "notes.X"}, {"evaluation": CLASS}, {"evaluation.class_path": "notes.X"}):
        with pytest.raises(InputError):
            override(recipe, changes)
    assert not marker.exists()


NESTED = "&a{n} [" + ", ".join(["*a{m}"] * 9) + "]"
BOMBS = {
    "aliases": "a0: &a0 [x, x]\n" + "".join(f"a{n}: {NESTED.format(n=n, m=n - 1)}\n" for n in range(1, 12)),
    "merges": "a0: &a0 {x: 1}\n"
    + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)),
    "itself": "a: &a [*a]",
    "depth": "a: " + "[" * 5000 + "]" * 5000,
    "maps": "".join(f"{' ' * n}a:\n" for n in range(MAX_DEPTH + 2)),
    "size": "a: [" + "1, " * 200_000 + "]",
    "values": "a: [" + "1, " * 50_000 + "]",
    "digits": f"stage: {'9' * 5000}",
    "sexagesimal": "stage: 1" + ":59" * 5000,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_yaml_bombs(tmp_path, checkpoint, bomb):
    for read in READERS.values():
        with pytest.raises(InputError) as raised:
            read(checkpoint(BOMBS[bomb]))
        assert len(one_line(raised)) < 500


@pytest.mark.parametrize("text", ["a: 1\nb: {a: 1}\na: 2", "b:\n- {x: 1, 'x': 1}"])
def test_no_key_is_dropped_silently(text):
    with pytest.raises(InputError, match=r"it has a key twice in the mapping of line \d: remove one"):
        parse_yaml(text)


@pytest.mark.parametrize(
    ("section", "key"), [("data", "batch_size"), ("training", "report_to"), ("optimizer", "betas")]
)
def test_a_bomb_within_a_text(checkpoint, section, key):
    """A text where a number or a list is due is never read as YAML in its turn."""
    values = {**MINIMAL, section: {**MINIMAL.get(section, {}), key: BOMBS["aliases"].replace("\n", " ")}}
    with pytest.raises(InputError, match=rf"{section}\.{key} is '") as raised:
        read_stored_recipe(checkpoint(**values))
    assert len(one_line(raised)) < 400
    with pytest.raises(InputError, match=r"max_length is '") as raised:
        read_stored_model(checkpoint(max_length=BOMBS["aliases"].replace("\n", " ")))
    assert len(one_line(raised)) < 500


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999"])
def test_numbers_that_are_none(checkpoint, value):
    text = f"stage: representation\noutput: x\nvision: {{name: v}}\ndata: {{train: x, temperature: {value}}}"
    with pytest.raises(InputError, match=r"data\.temperature is .*, expected a finite number"):
        read_stored_recipe(checkpoint(text))
    text = f"stage: representation\nvision: {{name: v, drop_path_rate: {value}}}"
    with pytest.raises(InputError, match=r"vision\.drop_path_rate is .*, expected a finite number"):
        read_stored_model(checkpoint(text))


def test_a_base_shows_no_file(tmp_path):
    secret = tmp_path / "passwd"
    secret.write_text(f"root:{SECRET}\n")
    (tmp_path / "secret.yaml").write_text(f"token {SECRET}")
    (tmp_path / "keys.yml").write_text(f"api: {SECRET}")
    (tmp_path / "broken.yaml").write_text(f"stage: [{SECRET}")
    (tmp_path / "tag.yaml").write_text(f"stage: !{SECRET} x")
    for name in (str(secret), "passwd", "secret.yaml", "keys.yml", "broken.yaml", "tag.yaml"):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**MINIMAL, "base": name}))
        with pytest.raises(InputError) as raised:
            load_recipe(tmp_path / "recipe.yaml")
        one_line(raised)


def test_a_base_of_a_checkpoint_is_not_read(tmp_path, checkpoint):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"output": SECRET}))
    for read, kind in ((read_stored_recipe, "recipe"), (read_stored_model, "model config")):
        match = rf"it has a base, '\.\./base\.yaml', expected a {kind} without base"
        with pytest.raises(InputError, match=match) as raised:
            read(checkpoint(base="../base.yaml"))
        one_line(raised)


def test_bases_in_a_ring_by_other_names(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "other.yaml").symlink_to(tmp_path / "one.yaml")
    for base in ("./one.yaml", "folder/../one.yaml", "link/../one.yaml", str(tmp_path / "one.yaml"), "other.yaml"):
        (tmp_path / "one.yaml").write_text(yaml.safe_dump({**MINIMAL, "base": base}))
        with pytest.raises(InputError, match="is in turn based on this recipe") as raised:
            load_recipe(tmp_path / "one.yaml")
        one_line(raised)


def test_files_that_are_no_recipe(tmp_path):
    folder, pipe = tmp_path / "folder.yaml", tmp_path / "pipe.yaml"
    folder.mkdir()
    os.mkfifo(pipe)
    (tmp_path / "latin.yaml").write_bytes(yaml.safe_dump(MINIMAL).encode() + "# déjà vu".encode("latin-1"))
    (tmp_path / "zeros.yaml").write_bytes(bytes(100))
    with (tmp_path / "sparse.yaml").open("wb") as file:
        file.truncate(1 << 40)
    expected = {
        folder: "is a folder", pipe: "is a pipe", tmp_path / "latin.yaml": "it is not UTF-8",
        tmp_path / "zeros.yaml": "it is not YAML", tmp_path / "sparse.yaml": "more than the 262,144 allowed",
        tmp_path / "none.yaml": "No such file",
    }  # fmt: skip
    for path, why in expected.items():
        with pytest.raises(InputError, match=why) as raised:
            load_recipe(path)
        assert str(path) in one_line(raised)


@pytest.mark.parametrize("spoil", ["missing", "a folder", "a pipe"])
def test_a_checkpoint_without_a_model_config(tmp_path, checkpoint, spoil):
    run = tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    config = checkpoint().rename(run / "step-00000001") / "model.yaml"
    config.unlink()
    config.mkdir() if spoil == "a folder" else os.mkfifo(config) if spoil == "a pipe" else None
    for name in (config.parent, tmp_path / "run"):
        with pytest.raises(InputError, match=r"model\.yaml") as raised:
            open_checkpoint(str(name))
        one_line(raised)


@pytest.mark.parametrize(
    "sizes",
    [{"hidden_size": 10**6}, {"intermediate_size": 10**6, "num_hidden_layers": 1000}, {"vocab_size": 2 * 10**9}],
)
def test_sizes_that_the_weights_do_not_have(checkpoint, sizes):
    """Nothing of that size is made."""
    with pytest.raises(InputError, match=r"a Q-Former of more than [\d,]+ parameters, but model\.safetensors has"):
        open_checkpoint(str(checkpoint(qformer={**TINY, **sizes})))
    with pytest.raises(InputError, match=r"qformer\.num_hidden_layers is 1000000000, expected at most 1000"):
        open_checkpoint(str(checkpoint(qformer={**TINY, "num_hidden_layers": 10**9})))
    open_checkpoint(str(checkpoint()))


# -- JSON ----------------------------------------------------------------------------------------------------------


def test_json_that_is_none(tmp_path):
    path = tmp_path / "a.json"
    for text in ("[" * 200_000, '{"a":' * 200_000, "9" * 10_000, "", "{", "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match=r"a\.json") as raised:
            read_json(path)
        one_line(raised)
        with pytest.raises(InputError):
            parse_json(text.encode("latin-1"))
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match=r"1,099,511,627,776 bytes, more than the 268,435,456 allowed"):
        read_json(path)


# -- models of transformers ----------------------------------------------------------------------------------------

CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("x")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ViTConfig, ViTModel
class Config({kind}Config):
    model_type = "mine"
class Model({kind}{model}):
    config_class = Config
class Words(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch, parts):
    """Makes a model folder that needs code of its own, and says where that leaves its mark."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    marker = tmp_path / "IT_RAN"

    def make(part):
        folder = tmp_path / part
        shutil.copytree(getattr(parts, part), folder)
        kind, model = ("ViT", "Model") if part == "vision" else ("Llama", "ForCausalLM")
        auto = "AutoModel" if part == "vision" else "AutoModelForCausalLM"
        settings = json.loads((folder / "config.json").read_text())
        settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", auto: "code.Model"}}
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "code.py").write_text(CODE.format(marker=str(marker), kind=kind, model=model))
        return folder, marker

    return make


def test_the_code_of_a_model_does_not_run(own_code, parts):
    for part, key, read in (
        ("llama", "language", lambda name, **more: build_language_model(LanguageConfig(name, **more), torch.float32)),
        ("vision", "vision", lambda name, **more: build_image_encoder(VisionConfig(name, **more), torch.float32)),
    ):
        folder, marker = own_code(part)
        with pytest.raises(InputError) as raised:
            read(str(folder))
        assert "needs Python code from its folder (auto_map), which is not run" in one_line(raised)
        assert f"set {key}.trust_remote_code to {folder}" in str(raised.value)
        assert not marker.exists()
        assert sys.stdin.tell() == 0  # nothing was asked
        with suppress(InputError):  # its weights have other names than those of a ViT
            read(str(folder), trust_remote_code=str(folder))
        assert marker.exists()  # it can run
        marker.unlink()


def test_neither_does_that_of_a_tokenizer(own_code):
    folder, marker = own_code("llama")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": [None, "code.Words"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"no tokenizer|needs Python code") as raised:
        load_tokenizer(folder)
    one_line(raised)
    assert not marker.exists() and sys.stdin.tell() == 0
    load_tokenizer(folder, trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize("key", ["vocab", "vocab_file", "merges_file"])
def test_a_tokenizer_names_no_file(parts, tmp_path, key):
    """transformers would read it as the vocabulary."""
    (tmp_path / "private.txt").write_text("secret\n")
    shutil.copytree(parts.llama, tmp_path / "llm")
    path = tmp_path / "llm" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {key: str(tmp_path / "private.txt")}))
    with pytest.raises(InputError, match=f"private.txt' as {key}, expected files of its own folder") as raised:
        load_tokenizer(tmp_path / "llm")
    one_line(raised)
    path.write_text(json.dumps(settings | {key: "/home/someone-else/.cache/vocab.txt"}))  # nothing is read there
    load_tokenizer(tmp_path / "llm")


def test_a_checkpoint_cannot_allow_code(own_code, checkpoint, tmp_path):
    folder, marker = own_code("vision")
    named = {"name": str(folder), "trust_remote_code": str(folder)}
    for read in READERS.values():
        assert read(checkpoint(vision=named)).vision.trust_remote_code is None
    found = read_stored_model(checkpoint(vision=named))
    with pytest.raises(InputError):
        build_image_encoder(found.vision, torch.float32)
    assert not marker.exists()
    found = open_checkpoint(str(checkpoint(vision=named)), {"vision.trust_remote_code": str(folder)}).config
    write_configs(tmp_path, found, None)
    assert found.vision.trust_remote_code == str(folder)
    assert yaml.safe_load((tmp_path / "model.yaml").read_text())["vision"]["trust_remote_code"] is None
    with suppress(InputError):
        build_image_encoder(found.vision, torch.float32)
    assert marker.exists()


def test_code_is_allowed_by_name(tmp_path):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(MINIMAL))
    assert load_recipe(tmp_path / "own.yaml", ["--vision.trust_remote_code", "vit"]).vision.trust_remote_code == "vit"
    for name in ("true", "another"):
        with pytest.raises(InputError, match=f"vision.trust_remote_code is {name}, expected vit, the value of"):
            load_recipe(tmp_path / "own.yaml", ["--vision.trust_remote_code", name])


def spoiled(parts, tmp_path, **settings):
    folder = tmp_path / "llm"
    shutil.copytree(parts.llama, folder)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"attn_implementation": "someone/kernel"},
            "has attn_implementation 'someone/kernel', which would download code",
        ),
        ({"num_hidden_layers": 10**9}, "has num_hidden_layers 1000000000, more than the 2000 allowed"),
        ({"attn_implementation": "flash_attention_2"}, "no language model could be loaded"),
        ({"hidden_size": "notes.X"}, "no language model could be loaded"),
        ({"hidden_size": 10**9}, "has a config.json with other sizes than its weights"),
    ],
)
def test_what_a_configuration_may_say(parts, tmp_path, settings, why):
    with pytest.raises(InputError, match=why) as raised:
        build_language_model(LanguageConfig(str(spoiled(parts, tmp_path, **settings))), torch.float32)
    one_line(raised)


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "x")


def test_pickles_do_not_run(parts, tmp_path):
    folder, marker = spoiled(parts, tmp_path), tmp_path / "IT_RAN"
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    for content in ({"a": Runs(marker)}, Runs(marker), {"model.norm.weight": Runs(marker), "b": torch.zeros(1)}):
        for old in (False, True):
            torch.save(content, path, _use_new_zipfile_serialization=not old)
            for read in (
                lambda: build_language_model(LanguageConfig(str(folder)), torch.float32),
                lambda: open_folder(folder),
                lambda: load_pickle(path, mmap=False),
            ):
                with pytest.raises(InputError) as raised:
                    read()
                one_line(raised)
                assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it can run


def test_pickles_hold_what_they_say(tmp_path):
    path, packed = tmp_path / "a.pth", tmp_path / "b.pth"
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, path)
    with pytest.raises(
        InputError, match=r"a claims the shape \(1099511627776,\), for which the file has too few bytes"
    ):
        open_file(path)
    torch.save({"a": torch.zeros(1 << 16)}, path)
    with zipfile.ZipFile(path) as one, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as two:
        for name in one.namelist():
            two.writestr(name, one.read(name))
    open_file(path)
    with pytest.raises(InputError, match="is compressed, which"):
        open_file(packed)


@pytest.mark.parametrize("name", ["../other.safetensors", "/tmp/other.safetensors", "a/../../other.safetensors"])
def test_shards_of_weights_lie_beside_their_index(parts, tmp_path, name):
    """Else a folder could name any file of weights on the machine, such as another user's."""
    folder = spoiled(parts, tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
    names = open_file(tmp_path / "other.safetensors")
    (folder / "a").mkdir()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for read in (
        lambda: open_folder(folder),
        lambda: build_language_model(LanguageConfig(str(folder)), torch.float32),
    ):
        with pytest.raises(InputError, match="expected files in the same folder") as raised:
            read()
        one_line(raised)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"])
def test_parts_are_regular_files(parts, tmp_path, name):
    folder = spoiled(parts, tmp_path)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for read in (
        lambda: build_language_model(LanguageConfig(str(folder)), torch.float32),
        lambda: load_tokenizer(folder),
    ):
        with pytest.raises(InputError, match=r"is a pipe, a socket or a device, expected a regular file"):
            read()


@pytest.mark.parametrize("name", ["timm:x@{}", "timm:hf-hub:someone/x", "timm:local-dir:x"])
def test_what_timm_would_unpickle(tmp_path, monkeypatch, name):
    """timm reads files of its own users with ``weights_only=False``; here it is one that does so and nothing else."""
    marker, path = tmp_path / "IT_RAN", tmp_path / "x.pth"
    torch.save(Runs(marker), path)
    timm = ModuleType("timm")
    timm.create_model = lambda *_, **__: torch.load(path, weights_only=False)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    name = name.format(path)
    with pytest.raises(InputError) as raised:
        build_image_encoder(VisionConfig(name), torch.float32)
    one_line(raised)
    assert not marker.exists()
    with suppress(AttributeError):  # it gives no network
        build_image_encoder(VisionConfig(name, trust_remote_code=name), torch.float32)
    assert marker.exists()


def test_an_encoder_for_images_of_any_size(parts, tmp_path):
    folder = tmp_path / "vit"
    shutil.copytree(parts.vision, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 8 * 10**6}))
    with pytest.raises(InputError, match="is for images of 8000000 pixels per side, expected 1 to 8192"):
        build_image_encoder(VisionConfig(str(folder)), torch.float32)


# -- images --------------------------------------------------------------------------------------------------------


def test_images_are_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for path, why in {
        tmp_path / "pipe.png": "is a pipe",
        tmp_path / "zero.png": "is a pipe, a socket or a device",
        "/dev/zero": "is a pipe, a socket or a device",
        "/dev/full": "is a pipe, a socket or a device",
        tmp_path: "is a folder",
        tmp_path / "sparse.png": r"1,099,511,627,776 bytes, more than the 480,000,000 allowed",
        "/proc/self/environ": "is empty",
    }.items():
        with pytest.raises(ImageError, match=why) as raised:
            read_image(path)
        one_line(raised)


def test_no_file_is_shown_that_is_no_image(tmp_path):
    (tmp_path / "a.png").write_text(SECRET)
    with pytest.raises(ImageError, match="is not an image") as raised:
        read_image(tmp_path / "a.png")
    assert SECRET[:6] not in one_line(raised)


def scans(times: int, size: int) -> bytes:
    """A progressive JPEG whose last scan is there again and again."""
    buffer = io.BytesIO()
    Image.new("L", (size, size), 90).save(buffer, "JPEG", progressive=True, quality=50)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * times + data[-2:]


def test_a_jpeg_of_many_scans(monkeypatch):
    assert read_image(scans(20, 256)).size == (256, 256)
    with pytest.raises(ImageError, match="has 3005 scans of 1000 x 1000 pixels, more than the 2400 allowed at this"):
        read_image(scans(3000, 1000))


def test_more_pixels_than_allowed():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match="pixels"):
        read_image(data)


# -- shards --------------------------------------------------------------------------------------------------------


def png(color="red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def local(tmp_path):
    """An image that is not the shard's, in a folder beside the shards."""
    path = tmp_path / "private" / "local.png"
    path.parent.mkdir()
    path.write_bytes(png("blue"))
    (tmp_path / "shards").mkdir()
    return path


def records(source, **config):
    found = open_records(str(source), DataConfig(train=str(source), **config))
    return [found[n] for n in range(len(found))] if hasattr(found, "captions") else list(found.read())


@pytest.mark.parametrize("key", ["image", "jpg", "png", "image_path", "path"])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_tar_names_no_file(local, tmp_path, key, streaming):
    for name in (str(local), "../private/local.png", {"path": str(local)}, {"bytes": None, "path": str(local)}):
        path = tmp_path / "shards" / f"{len(list((tmp_path / 'shards').iterdir()))}.tar"
        said = json.dumps({key: name, "caption": "a"}).encode()
        write_tar(path, {f"{n}.json": said for n in range(3)})
        for record in records(path, streaming=streaming):
            assert record.image is None
            assert "which is not read: expected the bytes" in record.key
        for sample in read_unit(Unit("a", str(path))):
            assert isinstance(sample, SkippedSample)


def test_what_a_shard_says_beside_its_image(local, tmp_path):
    said = {
        "image": str(local),
        "png": str(local),
        "jpg": str(local),
        "caption": "a",
        "__broken__": "x",
        "__where__": 3,
    }
    write_tar(tmp_path / "a.tar", {"1.png": png(), "1.json": json.dumps(said).encode()})
    (record,) = records(tmp_path / "a.tar", image_column="image")
    assert record.image == png() and record.error is None and record.key.endswith("a.tar 1")
    (sample,) = read_unit(Unit("a", str(tmp_path / "a.tar")))
    assert isinstance(sample, Sample) and sample.image == png()


@pytest.mark.parametrize("streaming", [True, False])
def test_a_parquet_names_files_beside_it_alone(local, tmp_path, streaming):
    folder = tmp_path / "shards"
    (folder / "own.png").write_bytes(png())
    (folder / "link.png").symlink_to(local)
    for name in (str(local), "../private/local.png", "link.png"):
        for cell in (name, {"bytes": None, "path": name}):
            datasets.Dataset.from_dict({"image": [cell], "caption": ["a"]}).to_parquet(folder / "a.parquet")
            (record,) = records(folder / "a.parquet", streaming=streaming)
            assert record.image is None and "which is not read" in record.key
    datasets.Dataset.from_dict({"image": ["own.png"], "caption": ["a"]}).to_parquet(folder / "b.parquet")
    (record,) = records(folder / "b.parquet", streaming=streaming)
    assert read_image(record.image or "").getpixel((0, 0)) == (255, 0, 0)


def test_no_other_column_opens_a_file(local, tmp_path):
    """An image column that nobody asked for would be opened by the datasets library."""
    shutil.copy(local, tmp_path / "pipe.png")
    kinds = {"image": datasets.Image(), "mask": datasets.Image(), "caption": datasets.Value("string")}
    path = str(tmp_path / "pipe.png")
    rows = {"image": [{"bytes": png(), "path": None}], "mask": [{"bytes": None, "path": path}], "caption": ["a"]}
    datasets.Dataset.from_dict(rows, datasets.Features(kinds)).to_parquet(tmp_path / "b.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "b.parquet")  # the library put the bytes of the file there
    mask = pyarrow.array([{"bytes": None, "path": path}], table.schema.field("mask").type)
    Path(path).unlink()
    os.mkfifo(path)
    pyarrow.parquet.write_table(table.set_column(1, "mask", mask), tmp_path / "a.parquet")
    (record,) = records(tmp_path / "a.parquet", streaming=False)
    assert record.image == png()


def header(name: str, size: int, kind: bytes = b"0", **more: bytes) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def sparse_gnu() -> bytes:
    """A member of 512 bytes which is said to have 3 GB."""
    raw = bytearray(header("1.png", 512, b"S"))
    raw[386:482] = bytes(96)
    raw[386:398], raw[398:410] = b"00000000000\0", b"00000001000\0"
    raw[482] = 0
    raw[483:495] = b"%011o\0" % (3 << 30)
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw) + bytes(512)


def pax(attributes: dict[str, str], size: int = 512) -> bytes:
    member = tarfile.TarInfo("1.png")
    member.size, member.pax_headers = size, attributes
    return member.tobuf(tarfile.PAX_FORMAT) + bytes(512)


TARS = {
    "GNU sparse": (sparse_gnu(), "sparse file"),
    "sparse 0.1": (pax({"GNU.sparse.map": "0,512", "GNU.sparse.size": str(3 << 30)}), "sparse"),
    "sparse 1.0": (
        pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40)}),
        "sparse",
    ),
    "claims": (header("1.png", 3 << 30) + bytes(1024), "3,221,225,472 bytes, expected at most"),
    "claims by an attribute": (pax({"size": str(1 << 50)}), "bytes, expected at most"),
    "less than nothing": (pax({"size": "-5"}), "-5 bytes|negative|invalid"),
    "a long text": (header("1.txt", 1 << 30) + bytes(1024), "expected at most 16,777,216"),
    "a long name": (header("././@LongLink", 1 << 34, b"L") + bytes(1024), "a header has 17,179,869,184 bytes"),
    "long attributes": (header("x", 1 << 34, b"x") + bytes(1024), "a header has 17,179,869,184 bytes"),
    "digits": (header("x", 1 << 14, b"x") + b"1" * (1 << 14) + bytes(1024), "a thousand digits"),
}  # fmt: skip


@pytest.mark.parametrize("attack", TARS)
def test_what_a_tar_may_claim(tmp_path, attack):
    data, why = TARS[attack]
    write_tar(tmp_path / "good.tar", {"0.png": png(), "0.txt": b"a", "x.png": png()})
    good = (tmp_path / "good.tar").read_bytes()[: 6 * 512]
    path = tmp_path / "a.tar"
    path.write_bytes(good + data + bytes(1024))
    first, *_, last = read_shard(str(path))
    assert first["txt"] == "a" and re.search(why, last[ERROR_COLUMN])
    with pytest.raises(InputError) as raised:
        records(path, streaming=False)
    one_line(raised)


def test_a_compressed_member_is_not_unpacked(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.png": png(), "0.txt.gz": gzip.compress(bytes(1 << 20))})
    with pytest.raises(InputError, match="no caption column: its columns are image"):
        records(tmp_path / "a.tar", streaming=False)


def test_json_of_a_shard_that_is_nested(tmp_path):
    members = {"0.png": png(), "0.txt": b"a", "0.json": b"[" * 200_000, "1.png": png(), "1.txt": b"b"}
    write_tar(tmp_path / "a.tar", members)
    assert [record.captions for record in records(tmp_path / "a.tar")] == [("a",), ("b",)]


def test_a_shard_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(InputError, match="no file"):
        records(tmp_path / "a.tar")


# -- the terminal --------------------------------------------------------------------------------------------------

ESCAPE = "a\x1b[2J\x9b31mb\nc\r\x07\u202e[/x][abc]:cat:"


def test_visible():
    assert escape_control_characters(ESCAPE) == r"a\x1b[2J\x9b31mb\nc\r\x07\u202e[/x][abc]:cat:"
    for text in ("naïve 猫", "\u05d0\u200f\u06cc\u200c", "👩\u200d🚀", "\\n"):  # what is written in any language stays
        assert escape_control_characters(text) == text
    assert escape_control_characters("a\udcff") == r"a\udcff"
    assert escape_control_characters("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_errors_show_what_is_in_them():
    error = InputError(f"no {ESCAPE}")
    assert str(error) == f"no {escape_control_characters(ESCAPE)}" == str(ImageError(error.args[0]))
    assert str(InputError(str(error))) == str(error)


def harmless(text: str) -> bool:
    return not any(
        character in text
        for character in ESCAPE
        if escape_control_characters(character) != character and character != "\n"
    )


def test_names_in_errors_and_logs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging, "root", logging.RootLogger(logging.WARNING))
    monkeypatch.setattr(logging.Logger, "root", logging.root)
    assert main(["train", str(tmp_path / ESCAPE)]) == 2
    told = capsys.readouterr()
    assert harmless(told.err) and r"a\x1b[2J" in told.err and told.err.count("\n") == 1


def test_names_on_the_display(capsys):
    display = Display(ESCAPE)
    display.start(3)
    display.update(1, ESCAPE)
    display.log(f"skipped {ESCAPE}")
    display.table(ESCAPE, ["source", "[b]share"], [(ESCAPE, "[red]1"), ("cc3m:train:/data", "[/]")])
    display.close()
    told = capsys.readouterr().err
    assert harmless(told)
    for text in (escape_control_characters(ESCAPE), "cc3m:train:/data", "[red]1", "[b]share", "[/]"):
        assert text in told


# -- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_mode_of_weights(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o666 & ~mask
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


# -- the doors -----------------------------------------------------------------------------------------------------

DOORS = {
    "json.load": {"evaluation/java_metrics.py"},  # what its own parent writes
    "json.loads": {"io.py", "data/tables.py"},  # the latter what it has written itself
    "yaml.load": set(), "yaml.safe_load": set(), "yaml.unsafe_load": set(), "yaml.full_load": set(),
    "torch.load": {"backbones/pretrained.py"},
    "load_file": {"backbones/pretrained.py"},
    "safe_open": {"interop/weights.py"},
    "Image.open": {"data/images.py"},
    # Of our own making, or the user's.
    ".read_bytes": {"data/assets.py", "data/scenes.py", "demo/data.py", "evaluation/run.py"},
    ".from_pretrained": {"backbones/pretrained.py", "backbones/vision_loaders.py"},  # nn.Embedding's
    ".from_config": {"backbones/pretrained.py", "backbones/language.py"},  # of a class of transformers
    "import_module": {"__init__.py"}, "eval": set(), "exec": set(), "__import__": set(),
}  # fmt: skip


def test_there_are_no_other_doors():
    found = {door: set() for door in DOORS}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                for door in DOORS:
                    if called.endswith(door) if door.startswith(".") else called == door:
                        found[door].add(path.relative_to(SOURCE).as_posix())
    assert {door: places - DOORS[door] for door, places in found.items() if places - DOORS[door]} == {}
