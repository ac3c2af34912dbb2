import ast
import inspect
import io
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from blip2 import config
from blip2.cli import main
from blip2.decoding.search import Decoding
from blip2.errors import escape_control_characters
from blip2.pipelines import load
from blip2.recipe import dump_config, load_recipe
from blip2.training.metrics import read_metrics
from conftest import draw

COMMANDS = ("demo", "scenes", "train", "features", "caption", "ask", "match", "embed")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    names = []
    for color in ("red", "green", "blue"):
        draw("disc", color, 0).save(folder / f"{color}.png")
        names.append(str(folder / f"{color}.png"))
    return names


def usage_error(capsys, *arguments):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    return capsys.readouterr().err


def error(capsys, *arguments):
    """The one line that is printed for input that cannot be used."""
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# -- help ----------------------------------------------------------------------------------------------------------


def help_of(capsys, *arguments):
    try:
        status = main([*arguments, "--help"])
    except SystemExit as ended:
        status = ended.code
    captured = capsys.readouterr()
    assert (status, captured.err) == (0, "")
    return captured.out


def test_help_names_every_command(capsys):
    text = help_of(capsys)
    for command in COMMANDS:
        assert re.search(rf"^    {command} +\w+", text, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example(capsys, command):
    text = help_of(capsys, command)
    assert re.search(rf"example: blip2 {command}", text)


def normalized(text):
    """Without white space: lines are broken anywhere."""
    return "".join(text.split())


def test_help_of_training_has_every_field_s_docstring(capsys):
    shown = normalized(help_of(capsys, "train"))
    count = 0
    for node in ast.parse(inspect.getsource(config)).body:
        # The fields of a model's config alone are not keys of a recipe.
        if not isinstance(node, ast.ClassDef) or node.name in ("ModelConfig", "CalibrationConfig"):
            continue
        for field, after in pairwise(node.body):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                assert normalized(ast.literal_eval(after.value)).rstrip(".") in shown, ast.unparse(field)
                count += 1
    assert count > 50


def test_help_has_the_defaults_of_the_command(capsys):
    lengths = {"ask": "in tokens (default: 10).", "caption": "in tokens (default: 30)."}
    penalties = {"ask": "favor short texts (default: -1).", "caption": "favor short texts (default: 1)."}
    for command in lengths:
        text = " ".join(help_of(capsys, command).split())
        assert lengths[command] in text and penalties[command] in text
    for command in ("match", "embed"):
        text = help_of(capsys, command)
        assert "LLM" not in text and "language" not in text


def test_help_does_not_wait_for_torch():
    code = """
import sys
from blip2.cli import main
try:
    main(["--help"])
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_closed_output_is_no_error(monkeypatch):
    monkeypatch.setattr("blip2.cli._run", lambda _: None)
    monkeypatch.setattr("sys.stdout", None)
    assert main([]) == 0


def test_no_command(capsys):
    assert "COMMAND" in usage_error(capsys)


def test_unknown_command_and_option(capsys, runs, images):
    assert "invalid choice: 'paint'" in usage_error(capsys, "paint")
    caption = ("caption", str(runs["llama"]), images[0])
    assert "unrecognized arguments: --color" in usage_error(capsys, *caption, "--color")
    misplaced = ("--vision.name", "x", "train", "demo-stage1")  # which would otherwise train with another encoder
    assert "unrecognized arguments: --vision.name" in usage_error(capsys, *misplaced)
    assert "unrecognized arguments: --data.batch_size" in usage_error(capsys, *caption, "--data.batch_size", "3")
    assert "invalid int value: 'many'" in usage_error(capsys, *caption, "--num-beams", "many")
    assert "invalid choice: 'fp8'" in usage_error(capsys, *caption, "--dtype", "fp8")


# -- train ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(parts, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(parts.recipe(tmp_path / "run", training={"max_steps": 2, "save_steps": 1})))
    return str(path)


def test_train(capsys, recipe_file, tmp_path):
    assert main(["train", recipe_file, "--data.batch_size", "3", "--training.seed=5"]) == 0
    last = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert capsys.readouterr().out.strip() == str(last)
    recipe = load_recipe(last / "recipe.yaml")
    assert (recipe.data.batch_size, recipe.training.seed) == (3, 5)
    assert recipe == load_recipe(tmp_path / "run" / "recipe.yaml")


def test_train_again_and_on(capsys, recipe_file, tmp_path):
    assert main(["train", recipe_file]) == 0
    capsys.readouterr()
    assert "already holds a run" in error(capsys, "train", recipe_file)
    assert main(["train", recipe_file, "--resume", "--training.max_steps", "3"]) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]


def test_train_without_a_recipe(capsys):
    assert main(["train"]) == 2
    assert re.match("error: no recipe was given, expected .*: run blip2 train RECIPE", capsys.readouterr().err)


def test_train_with_an_unknown_key(capsys, recipe_file):
    assert "--data.batchsize" in error(capsys, "train", recipe_file, "--data.batchsize", "3")


def test_both_stages_one_after_the_other(capsys, parts, recipe_file, tmp_path, images):
    assert main(["train", recipe_file]) == 0
    second = parts.recipe(
        tmp_path / "second", stage="generation", language={"name": parts.llama}, training={"max_steps": 1}
    )
    path = tmp_path / "second.yaml"
    path.write_text(dump_config(second))
    assert main(["train", str(path), "--start_from", str(tmp_path / "run")]) == 0
    assert "starting from" in capsys.readouterr().err
    assert main(["caption", str(tmp_path / "second"), images[0]]) == 0


# -- features ------------------------------------------------------------------------------------------------------


def test_features(capsys, parts, recipe_file, tmp_path, images):
    """Made beforehand, found by training."""
    (tmp_path / "broken.png").write_text("no image")
    held_out = tmp_path / "held_out.jsonl"
    names = [*images, str(tmp_path / "broken.png")]
    held_out.write_text("".join(json.dumps({"image": name, "caption": "a disc"}) + "\n" for name in names))
    keys = ["--data.validation", str(held_out), "--data.cached_views", "2", "--data.cached_dtype=int8"]
    keys += ["--data.features", str(tmp_path / "kept")]
    said = r"(\d+) images in (\d) views?, (\d+) encoded now and (\d+) found; (\d) records?"
    for new in (True, False):
        assert main(["features", recipe_file, *keys]) == 0
        train, validation, broken = capsys.readouterr().out.splitlines()
        assert train.startswith("data.train: ") and validation.startswith("data.validation: ")
        found = [re.search(said, line).groups() for line in (train, validation)]
        assert found == [
            ("24", "2", *(("24", "0") if new else ("0", "24")), "0"),
            ("3", "1", *(("3", "0") if new else ("0", "3")), "1"),
        ]
        assert re.search(r"a usable image; [\d.]+ MB in int8, relative error 0\.\d+ %; in .*kept/int8-2-", train)
        assert "broken.png): it is not an image" in broken
    stores = sorted((tmp_path / "kept").iterdir())
    assert len(stores) == 2
    files = sorted((tmp_path / "kept").rglob("*"))
    assert main(["train", recipe_file, *keys]) == 0
    assert "24 images in 2 views, 0 encoded now and 24 found" in capsys.readouterr().err
    assert sorted((tmp_path / "kept").rglob("*")) == files
    assert "validation_itc" in read_metrics(tmp_path / "run")[-1]


def test_features_beside_the_run_in_one_view(capsys, recipe_file, tmp_path):
    """As a recipe without data.cached_views and data.features has it."""
    assert main(["features", recipe_file]) == 0
    assert "24 images in 1 view," in capsys.readouterr().out
    assert [folder.name[:7] for folder in (tmp_path / "features").iterdir()] == ["bf16-1-"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data.cached_views", "-1"], "data.cached_views is -1, expected at least 0"),
        (["--data.cached_dtype", "int4"], "cached_dtype"),
        (["--data.cache", "1"], "data.cache"),
        (["--optimizer.learning_rate", '{"*": 0.1}'], "data.cached_views needs a frozen image encoder"),
        (["--data.streaming", "true"], "data.cached_views needs a table or a folder, but the data is read as a stream"),
        (["--data.features", "FILE"], "(Not a directory): set data.features to another folder"),
    ],
)
def test_features_that_cannot_be_made(capsys, recipe_file, arguments, expected):
    filled = [recipe_file if argument == "FILE" else argument for argument in arguments]
    assert expected in error(capsys, "features", recipe_file, *filled)


def test_no_room_for_features(capsys, recipe_file, small_disk, monkeypatch):
    """The disk was filled by somebody else after it was looked at."""
    disk = small_disk(16)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    line = error(capsys, "features", recipe_file, "--data.cached_views", "8", "--data.features", str(disk))
    assert "no space left on the disk while writing features to" in line
    assert line.endswith("free disk space and rerun; the features that are finished are kept")


# -- using what was trained ----------------------------------------------------------------------------------------


def output(capsys, *arguments):
    assert main([*arguments, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_caption(capsys, runs, images):
    model = load(runs["llama"], device="cpu")
    options = ("--num-beams", "1", "--max-new-tokens", "4", "--prompt", "a photo of")
    expected = model.caption(images, "a photo of", Decoding(num_beams=1, max_new_tokens=4))
    one = output(capsys, "caption", str(runs["llama"]), images[0], *options)
    assert one == f"{escape_control_characters(expected[0])}\n"
    several = output(capsys, "caption", str(runs["llama"]), *images, *options)
    assert several == "".join(
        f"{name}\t{escape_control_characters(text)}\n" for name, text in zip(images, expected, strict=True)
    )


def test_chat(capsys, monkeypatch, runs, images):
    options = ("--max-new-tokens", "4", "--stop-strings", "q", "z")
    chat = load(runs["llama"], device="cpu").chat(
        images[:2], decoding=Decoding(num_beams=1, max_new_tokens=4, stop_strings=["q", "z"])
    )
    questions = ["what is it?", "and its color?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(questions)))
    said = output(capsys, "chat", str(runs["llama"]), *images[:2], *options)
    assert said == "".join(f"{escape_control_characters(chat.ask(question))}\n" for question in questions)
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\n/image nowhere.png\nwhy?\n"))
    assert main(["chat", str(runs["llama"]), images[0], *options]) == 2
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1 and len(shown.err.splitlines()) == 1 and "nowhere.png" in shown.err


def test_caption_of_a_sample_follows_the_seed(capsys, runs, images):
    command = ("caption", str(runs["t5"]), *images, "--top-p", "0.95", "--temperature", "1.5", "--seed")
    first = output(capsys, *command, "3")
    assert output(capsys, *command, "3") == first
    assert output(capsys, *command, "4") != first


def test_ask(capsys, runs, images):
    questions = ["what is it?", "which color does it have?"]
    expected = load(runs["t5"], device="cpu").answer(images[0], questions)
    assert (
        output(capsys, "ask", str(runs["t5"]), images[0], questions[0]) == f"{escape_control_characters(expected[0])}\n"
    )
    both = output(capsys, "ask", str(runs["t5"]), images[0], *questions)
    assert both == "".join(
        f"{question}\t{escape_control_characters(text)}\n" for question, text in zip(questions, expected, strict=True)
    )


def test_match(capsys, runs, images):
    texts = ["a red disc", "a blue square", "the stripe"]
    head, *rows = output(capsys, "match", str(runs["stage1"]), images[0], *texts).splitlines()
    assert head == "match\tsimilarity\ttext"
    model = load(runs["stage1"], device="cpu")
    match, similarity = model.match(images[0], texts)[0], model.similarity(images[0], texts)[0]
    order = match.argsort(descending=True)
    assert rows == [f"{match[i]:.3f}\t{similarity[i]:.3f}\t{texts[i]}" for i in order]


def test_embed(capsys, runs, images, tmp_path):
    path = tmp_path / "vectors.safetensors"
    command = ("embed", str(runs["stage1"]), *images, "--text", "a red disc", "--text", "it", "--output", str(path))
    assert output(capsys, *command) == f"images [3, 4, 16], texts [2, 16] -> {path}\n"
    found = load_file(path)
    model = load(runs["stage1"], device="cpu")
    assert torch.equal(found["images"], model.embed_images(images))
    assert torch.equal(found["texts"], model.embed_texts(["a red disc", "it"]))
    with safe_open(path, "pt") as file:
        names = json.loads(file.metadata()["records"])
    assert names["keys"] == images
    assert names["texts"] == ["a red disc", "it"]


def test_embed_one_kind(capsys, runs, images, tmp_path):
    path = str(tmp_path / "vectors.safetensors")
    output(capsys, "embed", str(runs["stage1"]), images[0], "--output", path)
    assert set(load_file(path)) == {"images"}
    output(capsys, "embed", str(runs["stage1"]), "--text", "it", "--output", path)
    assert set(load_file(path)) == {"texts"}


def test_dtype(capsys, runs, images):
    assert output(capsys, "caption", str(runs["llama"]), images[0], "--dtype", "bf16", "--num-beams", "1")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["embed", "STAGE1", "--output", "x.safetensors"],
            "there is nothing to embed: give image files, --text or both",
        ),
        (["caption", "STAGE1", "IMAGE"], "contains only stage representation: load a model of stage generation"),
        (["ask", "STAGE1", "IMAGE", "what?"], "contains only stage representation: load a model of stage generation"),
        (
            ["match", "LLAMA", "IMAGE", "a disc"],
            "contains only stage generation: load a model of stage representation",
        ),
        (["embed", "LLAMA", "IMAGE", "--output", "x"], "contains only stage generation: load a model of stage repr"),
        (
            ["embed", "STAGE1", "IMAGE", "--output", "NOWHERE/x"],
            "does not exist: create that folder, or give another --output",
        ),
        (["embed", "STAGE1", "IMAGE", "--output", "FOLDER"], "cannot be written"),
        (["caption", "NOWHERE", "IMAGE"], "give the folder of a run"),
        (["caption", "LLAMA", "IMAGE", "--device", "gpu"], "choose cpu, cuda or mps"),
        (["caption", "LLAMA", "IMAGE", "--top-p", "2"], "--top-p is 2.0, expected 1e-06 to 1"),
        (
            ["caption", "LLAMA", "IMAGE", "--top-p", "0.5", "--temperature", "0"],
            "--temperature is 0.0, expected at least 1e-06",
        ),
        (["caption", "LLAMA", "IMAGE", "--max-new-tokens", "0"], "--max-new-tokens is 0, expected at least 1"),
        (["caption", "LLAMA", "IMAGE", "--num-beams", "0"], "--num-beams is 0, expected at least 1"),
        (["caption", "LLAMA", "IMAGE", "--num-beams", "3", "--top-p", "0.9"], "num_beams is 3 and top_p is 0.9"),
        (["ask", "LLAMA", "IMAGE", "what?", "--temperature", "0.5"], "temperature is 0.5, but nothing is sampled"),
        (["chat", "LLAMA", "IMAGE", "--num-beams", "3"], "num_beams is 3, but beam search cannot stream tokens"),
        (["chat", "LLAMA", "IMAGE", "--template", "chat"], "has no chat template: leave out template"),
        (["chat", "STAGE1", "IMAGE"], "contains only stage representation: load a model of stage generation"),
        (
            ["capfilt", "LLAMA", "STAGE1", "--data", "x", "--output", "y", "--num-beams", "10", "--top-p", "0.5"],
            "num_beams is 10 and top_p is 0.5, but sampling has no beams: leave out one of them",
        ),
        (["caption", "LLAMA", "IMAGE", "--top-p", "0.5", "--seed", "-1"], "--seed is -1, expected at least 0"),
    ],
)
def test_what_cannot_be_done(capsys, runs, images, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    names = {
        "STAGE1": runs["stage1"],
        "LLAMA": runs["llama"],
        "IMAGE": images[0],
        "NOWHERE": tmp_path / "nowhere",
        "FOLDER": tmp_path,
    }
    filled = [re.sub("|".join(names), lambda found: str(names[found[0]]), argument) for argument in arguments]
    assert expected in error(capsys, *filled)


def raising(error):
    def broken(*arguments):
        raise error

    return broken


def test_a_fault_of_ours_is_one_line_with_its_traceback_in_a_file(monkeypatch, capsys, recipe_file, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("blip2.recipe.load_recipe", raising(ValueError("a\nfault")))
    assert main(["train", recipe_file]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    said = re.fullmatch(r"error: ValueError \(a\\nfault\), which is a bug in blip2: .* traceback in (\S+)", line)
    assert "in broken\n" in Path(said[1]).read_text() and Path(said[1]).parent == tmp_path
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert main(["train", recipe_file]) == 1
    assert capsys.readouterr().err.startswith("Traceback")  # rather than that it is lost
    monkeypatch.setenv("BLIP2_TRACEBACK", "1")
    assert main(["train", recipe_file]) == 1
    assert capsys.readouterr().err.startswith("blip2 failed\nTraceback")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device", "x"), "error: [Errno 28] No space left on device: 'x': check that"),
        (MemoryError(), "error: there is not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "error: there is not enough memory (CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "error: there is not enough memory"),
    ],
)
def test_what_the_machine_cannot_do_is_one_line(monkeypatch, capsys, recipe_file, error, expected):
    monkeypatch.setattr("blip2.recipe.load_recipe", raising(error))
    assert main(["train", recipe_file]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(expected)


def test_ctrl_c_outside_of_training(monkeypatch, capsys, recipe_file):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("blip2.recipe.load_recipe", interrupted)
    assert main(["train", recipe_file]) == 130
    assert capsys.readouterr().err == "interrupted\n"
