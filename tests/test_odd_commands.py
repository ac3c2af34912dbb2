"""Commands with odd arguments end in one line and with a status that says what happened, and never in a traceback."""

import io
import os
import shutil
from random import Random

import pytest

from blip2.cli import main
from conftest import draw

FIRST, LAST = (int(number) for number in os.environ.get("BLIP2_ODD_COMMANDS", "0-30").split("-"))
"""BLIP2_ODD_COMMANDS=0-10000 tries so many."""

NUMBERS = (
    "-1", "0", "1", "2147483648", "9223372036854775808", "1" * 30, "1e308", "inf", "-inf", "nan", "", "null", "true",
    "[]", "{}", "1e-300", "0.5", "-0.5", "abc", "1_000", "\u0663", " 2 ", "0x10",
)  # fmt: skip
TEXTS = (
    "", " ", "-", "--", "-x", "a" * 300, "word " * 4000, "{}", "{} {}", "{0}", "{x}", "%s", "<image>",
    "[/red]", "[bold]",
    "\x1b[2J", "\u202e", "\udcff", "\ud800", "line\nbreak", "\u0130\u0131\u00df", "\U0001f408" * 50, "\ufeff",
    "\u200b", "\x00",
)  # fmt: skip
PATHS = (
    "", " ", ".", "..", "nowhere", "nowhere/else", "~", "~nobody-of-this-name/x", "empty.jpg", "text.txt", "text.txt/x",
    "/dev/null", "/dev/zero", "folder", "loop", "a" * 300, "a/" * 3000, "*.png", "[abc].png", "{0..3}.tar",
    "{9..1}.tar",
    "\udcff.png", "\x00", "file:///etc/passwd", "https://localhost:1/x.png", "s3:/", "hub:", "hub:no/such", "package:",
    "package:no-such", "package:../x", "zip://x", "a::b", "vqav2:val:nowhere", "coco", "image.png", "table.jsonl",
    "torn.jsonl", "bytes.csv", "RUN", "MODEL", "OTHER", "pipe",
)  # fmt: skip
DECODING = {
    "--num-beams": NUMBERS, "--top-p": NUMBERS, "--temperature": NUMBERS, "--length-penalty": NUMBERS,
    "--max-new-tokens": NUMBERS, "--seed": NUMBERS, "--top-k": NUMBERS, "--min-p": NUMBERS,
    "--repetition-penalty": NUMBERS, "--no-repeat-ngram-size": NUMBERS, "--stop-strings": TEXTS,
}  # fmt: skip
MODEL = {"--device": TEXTS, "--dtype": TEXTS, "--vision.name": PATHS, "--vision.image_size": NUMBERS,
         "--qformer.num_query_tokens": NUMBERS}  # fmt: skip
CORPUS = {"--data": PATHS, "--shard-size": NUMBERS, "--num-threads": NUMBERS, "--num-workers": NUMBERS}
RECIPE = {"--data.train": PATHS, "--output": PATHS, "--start_from": PATHS, "--training.max_steps": NUMBERS[:6],
          "--optimizer.warmup_steps": NUMBERS, "--vision.name": PATHS, "--qformer.bert": PATHS,
          "--no.such": TEXTS}  # fmt: skip
COMMANDS = {
    # What is right, without options; what may be put in each place; options and what they may be given.
    "train": (["recipe.yaml"], [PATHS], RECIPE),
    "features": (["recipe.yaml"], [PATHS], RECIPE),
    "caption": (["MODEL", "image.png"], [PATHS, PATHS], {**MODEL, **DECODING, "--prompt": TEXTS}),
    "ask": (["MODEL", "image.png", "what?"], [PATHS, PATHS, TEXTS], {**MODEL, **DECODING}),
    "match": (["OTHER", "image.png", "a cat"], [PATHS, PATHS, TEXTS], MODEL),
    "embed": (
        ["OTHER", "image.png", "--output", "out.safetensors"],
        [PATHS, PATHS, None, PATHS],
        {**MODEL, **CORPUS, "--text": TEXTS},
    ),
    "capfilt": (
        ["MODEL", "OTHER", "--data", "table.jsonl", "--output", "filtered", "--captions", "1", "--max-new-tokens", "3"],
        [PATHS, PATHS, None, PATHS, None, PATHS, None, NUMBERS[:3], None, NUMBERS],
        {
            **CORPUS, "--keep": NUMBERS, "--prompt": TEXTS, "--top-p": NUMBERS, "--temperature": NUMBERS,
            "--num-beams": NUMBERS, "--min-words": NUMBERS, "--max-words": NUMBERS, "--language": TEXTS,
            "--max-word-overlap": NUMBERS, "--seed": NUMBERS, "--batch-size": NUMBERS,
        },
    ),
    "evaluate": (
        ["MODEL", "--task", "captioning", "--data", "table.jsonl", "--output", "scores", "--max-new-tokens", "3"],
        [PATHS, None, ("vqa", "retrieval", "x"), None, PATHS, None, PATHS, None, NUMBERS],
        {**DECODING, "--limit": NUMBERS, "--rerank-k": NUMBERS, "--predictions": PATHS, "--prompt": TEXTS},
    ),
    "chat": (["MODEL", "image.png"], [PATHS, PATHS], {**MODEL, **DECODING, "--template": TEXTS}),
    "score": (
        ["table.jsonl", "--model", "OTHER", "--by", "itm", "--output", "scored"],
        [PATHS, None, PATHS, None, ("itc", "itg", "lm", "x"), None, PATHS],
        {"--prompt": TEXTS, "--shard-size": NUMBERS, "--num-threads": NUMBERS, "--num-workers": NUMBERS},
    ),
    "index": (
        ["OTHER", "table.jsonl", "--output", "library"],
        [PATHS, PATHS, None, PATHS],
        {"--vectors": NUMBERS, "--split": TEXTS, "--image-column": TEXTS, "--check": PATHS},
    ),
    "search": (
        ["library", "a disc"],
        [PATHS, TEXTS],
        {"--k": NUMBERS, "--where": TEXTS, "--rerank-k": NUMBERS, "--html": PATHS, "--model": PATHS},
    ),
    "calibrate": (
        ["OTHER", "table.jsonl"],
        [PATHS, PATHS],
        {"--by": ("itm", "lm", "x"), "--limit": NUMBERS, "--answer-list": PATHS, "--calibration.itm": NUMBERS},
    ),
    "convert": (
        ["MODEL", "converted", "--to", "blip2"],
        [PATHS, PATHS, None, ("transformers", "vllm", "lavis", "x")],
        {"--stage1": PATHS, "--vision.image_size": NUMBERS},
    ),
    "push": (["folder", "name/model"], [PATHS, TEXTS], {}),
    "scenes": (
        ["scenes", "--cutouts", "folder", "--train", "4", "--kinds", "cat", "dog"],  # or it downloads some
        [PATHS, None, PATHS, None, NUMBERS, None, TEXTS, TEXTS],
        {"--seed": NUMBERS, "--shards": NUMBERS},
    ),
    "demo": (["--data", "nowhere"], [None, PATHS], {"--scale": NUMBERS, "--output": PATHS}),
}  # fmt: skip


def odd_command(random):
    """A command with one or two arguments that are odd."""
    name = random.choice(list(COMMANDS))
    arguments, places, options = COMMANDS[name]
    given = list(arguments)
    for _ in range(random.choice((1, 1, 2))):
        place = random.randrange(len(places) + len(options))
        if place < len(places):
            if places[place] is not None:
                given[place] = random.choice(places[place])
        else:
            option = list(options)[place - len(places)]
            given += [option, random.choice(options[option])]
    if random.random() < 0.05:
        del given[random.randrange(len(given))]
    return [name, *given]


@pytest.fixture(scope="module")
def pristine(runs, parts, tmp_path_factory):
    """What the commands find in the current folder: each gets a copy, because it may write over anything."""
    from blip2.recipe import dump_config

    folder = tmp_path_factory.mktemp("odd") / "folder"
    folder.mkdir()
    for number in range(20):
        draw("disc", "red", number).save(folder / f"{number}.png")
    draw("square", "blue", 1).save(folder / "image.png")
    (folder / "table.jsonl").write_text("".join(f'{{"image": "{i}.png", "caption": "a disc"}}\n' for i in range(20)))
    (folder / "torn.jsonl").write_text('{"image": "0.png", "caption": "a')
    (folder / "bytes.csv").write_bytes(b"image,caption\n\xff\xfe\x00,\x80\n")
    (folder / "empty.jpg").touch()
    (folder / "text.txt").write_text("no image")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    for name, run in (("MODEL", "llama"), ("OTHER", "stage1"), ("RUN", "t5")):
        shutil.copytree(runs[run], folder / name)
    data = {"train": str(folder / "table.jsonl"), "batch_size": 2, "num_workers": 0}
    training = {"max_steps": 1, "device": "cpu", "precision": "fp32"}
    recipe = parts.recipe(folder / "run", data=data, training=training)
    (folder / "recipe.yaml").write_text(dump_config(recipe))
    model, table, library = (str(folder / name) for name in ("OTHER", "table.jsonl", "library"))
    assert main(["index", model, table, "--output", library]) == 0
    return folder.rename(folder.with_name("pristine"))


def test_odd_commands_end_in_one_line(pristine, monkeypatch, capsys):
    folder = pristine.with_name("folder")
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("BLIP2_CACHE", str(folder / "cache"))
    monkeypatch.setenv("PATH", str(folder / "bin"))  # without Java, because its metrics take seconds
    statuses = []
    for number in range(FIRST, LAST):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pristine, folder, symlinks=True)
        os.mkfifo(folder / "pipe")
        monkeypatch.chdir(folder)
        command = odd_command(Random(number))
        monkeypatch.setattr("sys.stdin", io.StringIO("what is it?\n"))  # the questions of blip2 chat
        try:
            status = main(command)
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr().err.splitlines()
        assert status in (0, 2), (number, command, said)
        errors = [
            line for line in said if line.startswith(("error: ", f"blip2 {command[0]}: error: ", "blip2: error: "))
        ]
        assert len(errors) == (status == 2), (number, command, said)
        assert status == 0 or said[-1] == errors[0], (number, command, said)
        statuses.append(status)
    assert {0, 2} == set(statuses)
