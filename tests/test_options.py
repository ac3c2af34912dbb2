"""The options of a command line, as they are made from functions and dataclasses."""

import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from blip2.cli import build_parser
from blip2.commands import COMMANDS
from blip2.config import bounded
from blip2.errors import InputError
from blip2.options import add_options, call, takes


@dataclass(frozen=True, kw_only=True)
class Base:
    size: int = bounded(3, 1, 10)
    """Size. 0 is 100 % in ``code``."""


@dataclass(frozen=True)
class Inner:
    share: float | None = bounded(None, 0, 1)
    """Share. null: all."""


INNER = Inner()


@dataclass(frozen=True)
class Group(Base):
    """A group of options."""

    name: Literal["a", "b"]
    kind: str = field(default="x", metadata={"option": "type"})
    """Its kind."""
    hidden: int = field(default=7, metadata={"option": None})
    inner: Inner = INNER


def run(
    first: str,
    files: list[str],
    *,
    group: Group,
    folder: Path | None = None,
    text: Sequence[str] = (),
    words: list[str] | None = None,
    is_quick: bool = False,
    overrides: dict[str, object],
):
    """Do it.

    Args:
        first: the first.
        files: the others,
            in order.
        folder: folder. None: here.
        text: a text.
    """
    return first, files, group, folder, text, words, is_quick, overrides


def parse(*arguments):
    parser = ArgumentParser(prog="x", exit_on_error=False)
    add_options(parser, run)
    return call(run, {**vars(parser.parse_args(arguments)), "overrides": {"a": 1}})


def test_defaults():
    group = Group("a", "x", 7, INNER, size=3)
    assert parse("1", "2", "3", "--name", "a") == ("1", ["2", "3"], group, None, [], None, False, {"a": 1})


def test_values(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = parse(
        *("1", "2", "--name", "b", "--type", "y", "--size", "4", "--share", "0.5", "--folder", "~/x"),
        *("--text", "a", "--text", "b", "--words", "c", "d", "--is-quick"),
    )
    group = Group("b", "y", 7, Inner(0.5), size=4)
    assert given == ("1", ["2"], group, Path("/home/me/x"), ["a", "b"], ["c", "d"], True, {"a": 1})


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--size", "0", "--size is 0, expected 1 to 10"),
        ("--share", "1.5", "--share is 1.5, expected 0 to 1"),
        ("--share", "nan", "--share is nan, expected 0 to 1"),
        ("--folder", "", "--folder is '', which would be the current folder: give a name, or . for that folder"),
    ],
)
def test_a_value_that_is_refused_names_the_option(option, value, message):
    with pytest.raises(InputError) as raised:
        parse("1", "2", "--name", "a", option, value)
    assert str(raised.value) == message


def test_help():
    parser = ArgumentParser(prog="x")
    add_options(parser, run)
    shown = " ".join(parser.format_help().split())
    for text in (
        "FIRST The first. FILE The others, in order.",
        "--share X Share (default: all).",
        "--type TYPE Its kind (default: x).",
        "--folder FOLDER Folder (default: here).",
        "--size N Size. 0 is 100 % in code (default: 3).",
    ):
        assert text in shown
    assert "hidden" not in shown and "overrides" not in shown


def test_defaults_of_an_instance():
    parser = ArgumentParser(prog="x")
    add_options(parser, Inner, Inner(0.25))
    assert call(Inner, vars(parser.parse_args([]))) == Inner(0.25)
    assert "(default: 0.25)" in parser.format_help()


def test_defaults_and_help_of_the_function_that_a_command_calls():
    parser = ArgumentParser(prog="x")
    add_options(parser, COMMANDS["scenes"])
    assert vars(parser.parse_args(["out"])) == {
        "output": "out", "seed": 0, "train": 4000, "shards": None, "kinds": None, "cutouts": None
    }  # fmt: skip
    assert "Number of training images (default: 4000)." in " ".join(parser.format_help().split())


def test_takes():
    assert takes(run, "overrides") and takes(run, "share") and not takes(run, "keys")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help(command):
    commands: Any = next(action for action in build_parser()._actions if action.dest == "command")
    actions = commands.choices[command]._actions
    assert len(actions) > 2
    assert [action.dest for action in actions if len(action.help or "") < 10] == []


def test_no_parser_waits_for_torch():
    code = "import sys, blip2.cli as cli; cli.build_parser(); print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
