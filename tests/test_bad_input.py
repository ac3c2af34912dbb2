"""Whatever a user gets wrong, the command line says in one line what was found and what to do."""

import json
import shutil
import struct
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip2 import checkpoint
from blip2.cli import main
from blip2.recipe import dump_config
from blip2.training.metrics import read_metrics
from blip2.training.trainer import train
from conftest import byte_tokenizer, draw, save_bert


def bomb(path):
    """A PNG of a hundred kilobytes that unpacks to 30000 x 30000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    side = 30_000
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


BROKEN = {
    "empty.jpg": (lambda path: path.write_bytes(b""), "is empty (0 bytes)"),
    "text.jpg": (lambda path: path.write_text("no image"), "is not an image"),
    "bomb.png": (bomb, "pixels allowed: make it smaller"),
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A folder with one image of each kind that cannot be used."""
    folder = tmp_path_factory.mktemp("broken")
    for name, (make, _) in BROKEN.items():
        make(folder / name)
    return folder


@pytest.fixture
def table(tmp_path, broken):
    """Writes a JSONL file of rows; an image of None is a good one."""

    def write(*rows):
        lines = []
        for number, (image, caption) in enumerate(rows):
            if image is None:
                image = tmp_path / f"{number}.png"
                draw("disc", "red", number).save(image)
            lines.append(json.dumps({"image": str(image), "caption": caption}) + "\n")
        path = tmp_path / "table.jsonl"
        path.write_text("".join(lines))
        return str(path)

    return write


@pytest.fixture
def run(parts, tmp_path, capsys):
    """``blip2 train`` of a recipe with changes; gives back what it printed."""

    def run(*options, status=2, **changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(dump_config(parts.recipe(tmp_path / "run", **changes)))
        assert main(["train", str(path), *options]) == status
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        return printed.splitlines()

    return run


def only_error(capsys, *arguments):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def last_error(lines):
    """The error at the end of what training printed, and no other."""
    assert [line.startswith("error: ") for line in lines].count(True) == 1
    assert lines[-1].startswith("error: ")
    return lines[-1]


# -- recipes -------------------------------------------------------------------------------------------------------


def test_no_such_recipe(capsys):
    line = only_error(capsys, "train", "demo-stage7")
    assert line.startswith("error: there is no recipe 'demo-stage7': give a YAML file, or the name of a recipe that ")


def test_unknown_keys(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stage: representation\noutput: x\nvision: {name: y}\ndata: {train: z}\nlearning_rate: 3\n")
    line = only_error(capsys, "train", str(recipe))
    assert line.startswith("error: recipe ")
    assert "learning_rate" in line and line.endswith("blip2 train --help lists all keys")


def test_a_gpu_where_there_is_none(run):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert last_error(run("--training.device", "cuda")).endswith("finds no such device: use cpu")


def test_an_output_that_cannot_be(run, tmp_path):
    (tmp_path / "file").write_text("")
    line = last_error(run("--output", str(tmp_path / "file" / "run")))
    assert line.endswith(
        f"cannot create the folder of the run, {tmp_path / 'file' / 'run'} (Not a directory): give another output"
    )


# -- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            '{"image": "x.png", "title": "a disc"}\n',
            "has no caption column: its columns are image, title; name one of them with",
        ),
        ('{"photo": "x.png", "caption": "a disc"}\n', "has no image column: its columns are photo, caption"),
        ("", "is empty: it has no rows"),
        ('{"image": "x.png", "caption"', "cannot be read"),
        (None, "no file"),
    ],
)
def test_tables_that_cannot_be_used(run, tmp_path, rows, expected):
    path = tmp_path / "table.jsonl"
    if rows is not None:
        path.write_text(rows)
    line = last_error(run(data={"train": str(path)}))
    assert expected in line
    assert str(path) in line


def test_a_data_source_of_no_known_kind(run, tmp_path):
    line = last_error(run(data={"train": str(tmp_path / "table.xlsx")}))
    assert "is neither a folder nor a file ending in" in line and "hub:NAME" in line


@pytest.mark.parametrize("changes", [{}, {"cached_views": 2}, {"num_workers": 2}])
def test_every_image_is_broken(run, table, broken, tmp_path, changes):
    lines = run(data={"train": table(*((broken / name, "a disc") for name in BROKEN)), "batch_size": 2, **changes})
    assert "the last 10 batches had no usable image" in last_error(lines)
    assert checkpoint.latest_checkpoint(tmp_path / "run") is None
    assert len(lines) < 40


@pytest.mark.parametrize("changes", [{}, {"cached_views": 2}, {"num_workers": 2}])
def test_some_images_are_broken(run, table, broken, tmp_path, changes):
    good = [(None, f"a disc {letter}") for letter in "abcde"]
    source = table(*good, *((broken / name, "a disc") for name in BROKEN))
    lines = run(status=0, data={"train": source, "batch_size": 8, **changes}, training={"max_steps": 2})
    for number, (name, (_, why)) in enumerate(BROKEN.items(), 5):
        said = [line for line in lines if line.startswith(f"skipped {source} row {number} ")]
        assert len(said) == 2  # once an epoch
        assert all(name in line and why in line for line in said)
    assert [row["skipped"] for row in read_metrics(tmp_path / "run")] == [3, 6]
    assert lines[-1] == "6 records skipped, 0 captions truncated"


@pytest.mark.parametrize("caption", ["", "  \n ", None])
def test_an_image_without_caption(run, table, tmp_path, caption):
    source = table((None, "a disc"), (None, caption), (None, "the disc"), (None, "it is red"))
    lines = run(status=0, data={"train": source}, training={"max_steps": 1})
    (said,) = (line for line in lines if line.startswith("skipped"))
    assert said.startswith(f"skipped {source} row 1 ")
    assert said.endswith("it has no caption or answer, expected a text that is not blank")
    assert read_metrics(tmp_path / "run")[0]["skipped"] == 1


@pytest.mark.parametrize("stage", ["representation", "llama", "t5"])
def test_a_caption_of_ten_thousand_words(run, parts, table, tmp_path, stage):
    words = "word " * 10_000
    source = table((None, words), (None, "a disc"), (None, "the disc"), (None, "it is red"))
    changes = {}
    if stage != "representation":
        changes = {"stage": "generation", "language": {"name": getattr(parts, stage), "prompt": "a photo of"}}
    lines = run(status=0, data={"train": source}, training={"max_steps": 3}, **changes)
    assert (
        sum(
            "longer than data.max_length (32 tokens) and was truncated; further truncated captions are only counted"
            in line
            for line in lines
        )
        == 1
    )
    assert [row["truncated"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]
    assert lines[-1] == "0 records skipped, 3 captions truncated"


# -- models --------------------------------------------------------------------------------------------------------


def test_an_llm_without_an_end(run, parts, tmp_path):
    shutil.copytree(parts.llama, tmp_path / "llm")
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "llm")
    line = last_error(run(stage="generation", language={"name": str(tmp_path / "llm")}))
    assert "has no end-of-text token, so texts would never end: set language.stop_string" in line


def test_a_bert_that_does_not_fit(run, tmp_path):
    wide = save_bert(tmp_path / "wide", hidden_size=64)
    assert last_error(run(qformer={"bert": str(wide)})).endswith("(hidden_size 32): set qformer {hidden_size: 64}")


@pytest.mark.parametrize("part", ["vision", "language", "qformer", "data"])
def test_a_hub_name_without_a_network(run, parts, part):
    name = "blip2-tests/there-is-no-such-thing"
    changes = {
        "vision": {"vision": {"name": name}},
        "language": {"stage": "generation", "language": {"name": name}},
        "qformer": {"qformer": {"bert": name}},
        "data": {"data": {"train": f"hub:{name}"}},
    }[part]
    assert name in last_error(run(**changes))


def test_a_checkpoint_of_other_shapes(run, runs, tmp_path):
    lines = run(start_from=str(runs["stage1"]), qformer={"num_query_tokens": 5})
    assert "other shapes: qformer.queries is (1, 4, 32), expected (1, 5, 32)" in last_error(lines)


def test_going_on_with_another_recipe(run):
    run(status=0, training={"max_steps": 1})
    lines = run("--resume", training={"max_steps": 2}, qformer={"image_text_hidden_size": 8})
    line = last_error(lines)
    assert "was trained with 16: leave out qformer.image_text_hidden_size" in line


def test_a_checkpoint_cut_short(run, tmp_path):
    run(status=0, training={"max_steps": 1})
    weights = checkpoint.latest_checkpoint(tmp_path / "run") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert "cannot be read" in last_error(run("--resume", training={"max_steps": 2}))


def test_no_checkpoint_to_start_from(run, tmp_path):
    lines = run(start_from=str(tmp_path))
    assert "contains no checkpoint: give the folder of a run, a folder checkpoints/step-... inside" in last_error(lines)


def test_no_space_left_while_saving(parts, small_disk, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    run = small_disk(1000)
    recipe.write_text(dump_config(parts.recipe(run, training={"max_steps": 6, "save_steps": 1, "save_total_limit": 9})))
    assert main(["train", str(recipe)]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    line = last_error(printed.splitlines())
    last = checkpoint.latest_checkpoint(run)
    assert "no space left on the disk while saving the checkpoint" in line
    assert line.endswith(f"free disk space, then rerun with --resume, which continues from {last.name}")
    # Room is made, and it goes on.
    for folder in sorted((run / "checkpoints").iterdir())[:-1]:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
    assert main(["train", str(recipe), "--resume", "--training.save_total_limit", "1"]) == 0
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_weights_that_are_not_finite(run, parts, tmp_path):
    folder = train(parts.recipe(tmp_path / "run", training={"max_steps": 1}))
    weights = load_file(folder / "model.safetensors")
    weights["image_norm.weight"][:] = float("inf")
    save_file(weights, folder / "model.safetensors")
    line = last_error(run("--resume", training={"max_steps": 2}))
    assert "image_norm.weight in" in line and "contains infinite numbers" in line


# -- using what was trained ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["caption", "ask", "match", "embed"])
@pytest.mark.parametrize("name", [*BROKEN, "missing.jpg", "."])
def test_images_that_cannot_be_used(capsys, runs, broken, tmp_path, command, name):
    why = {
        **{key: why for key, (_, why) in BROKEN.items()},
        "missing.jpg": "No such file",
        ".": "is a folder, expected a regular file",
    }[name]
    model = str(runs["llama"] if command in ("caption", "ask") else runs["stage1"])
    text = {"caption": [], "ask": ["what?"], "match": ["a disc"], "embed": ["--output", str(tmp_path / "out")]}[command]
    line = only_error(capsys, command, model, str(broken / name), *text)
    assert line.startswith(f"error: image {broken / name} ")
    assert why in line
    assert not (tmp_path / "out").exists()


def test_a_question_longer_than_the_llm_can_read(capsys, runs, tmp_path):
    draw("disc", "red", 0).save(tmp_path / "image.png")
    line = only_error(capsys, "ask", str(runs["llama"]), str(tmp_path / "image.png"), "word " * 10_000)
    assert line.startswith("error: a prompt has 500")
    assert line.endswith("4 tokens of the image and 10 to generate: shorten the prompt")


@pytest.mark.parametrize("text", ["", "   "])
def test_blank_texts(capsys, runs, tmp_path, text):
    image = tmp_path / "image.png"
    draw("disc", "red", 0).save(image)
    line = only_error(capsys, "ask", str(runs["llama"]), str(image), "what?", text)
    assert line == f"error: question 2 of 2 is {text!r}, expected words: correct or remove it"
    line = only_error(capsys, "match", str(runs["stage1"]), str(image), text)
    assert line == f"error: text 1 of 1 is {text!r}, expected words: correct or remove it"
    line = only_error(capsys, "embed", str(runs["stage1"]), "--text", text, "--output", str(tmp_path / "out"))
    assert line == f"error: text 1 of 1 is {text!r}, expected words: correct or remove it"
