"""The command line: make the parser from :data:`blip2.commands.COMMANDS`, run a command, and report its errors."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path

import shtab

from blip2 import __version__
from blip2.commands import COMMANDS
from blip2.errors import InputError, escape_control_characters, process_name
from blip2.memory import tune_malloc
from blip2.options import add_options, call, takes
from blip2.training.interruption import TrainingInterrupted

OVERRIDE = r"--((vision|language|qformer|calibration)\.[a-z_]+|text_normalization)"
"""Options that override a key of a model's config."""
NO_COMMAND = {"-h", "--help", "--version"}
"""Arguments with which no command is needed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after the program's name. None: ``sys.argv[1:]``.

    Returns:
        The exit status: 0 success; 1 internal error of blip2, or stdout was closed early (broken pipe); 2 unusable
        input, or not enough memory or disk; 130 interrupted. A failure prints one line on stderr, which names the
        process if there are several. Exceptions: a broken pipe prints nothing, and an internal error in one of several
        processes prints its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # the terminal may be ASCII only, and file names need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        _run(sys.argv[1:] if argv is None else argv)
        print(end="", flush=True)  # flushes; does nothing if there is no stdout, as in `blip2 caption ... >&-`
    except InputError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except TrainingInterrupted as error:
        with contextlib.suppress(OSError):  # the terminal may have been closed
            print(escape_control_characters(error), file=sys.stderr)
        return 130
    except BrokenPipeError:  # for example in `blip2 caption ... | head`
        with contextlib.suppress(OSError, ValueError):  # discard what is still buffered
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(
            f"{error}: check that the file exists, that its permissions allow access, and that the disk is not full", 2
        )
    except Exception as error:
        if _is_out_of_memory(error):
            return _fail(f"there is not enough memory ({error}): use smaller batches or a smaller model", 2)
        return _fail_unexpectedly(error)
    return 0


def _fail(message: object, status: int) -> int:
    """Print the error and return the exit status."""
    in_process = f" in {process_name()}" if process_name() else ""
    print(f"error{in_process}: {escape_control_characters(message)}", file=sys.stderr)
    return status


def _is_out_of_memory(error: Exception) -> bool:
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error)
    )


def _fail_unexpectedly(error: Exception) -> int:
    """Report an unexpected error in one line and write the traceback to a file.

    With several processes, or if ``BLIP2_TRACEBACK`` is set, the traceback is printed instead of written to a file,
    because the machine with the file may not be accessible after the run.
    """
    report = escape_control_characters(traceback.format_exc(), keep="\n")
    name = f"{type(error).__name__} ({error})" if str(error) else type(error).__name__
    if process_name() or os.environ.get("BLIP2_TRACEBACK"):
        print(f"{process_name() or 'blip2'} failed\n{report}", file=sys.stderr)  # one call: processes interleave
        return 1
    try:
        with tempfile.NamedTemporaryFile("w", prefix="blip2-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write(report)
    except OSError:
        print(report, file=sys.stderr)
        return _fail(f"{name}, which is a bug in blip2: please report it with the traceback above", 1)
    return _fail(f"{name}, which is a bug in blip2: please report it with the traceback in {file.name}", 1)


def _run(argv: Sequence[str]) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_EscapingFormatter())
    logging.basicConfig(handlers=[handler])
    logging.getLogger("blip2").setLevel(logging.INFO)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # it logs its exceptions, which become the error
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise InputError("the current folder no longer exists: change to another folder") from error
    if any("\0" in argument for argument in argv):  # possible only if another program calls main
        raise InputError("an argument contains the character NUL, expected a text or a path: leave it out")
    tune_malloc()
    arguments, overrides = split_overrides(argv)
    named = [argument for argument in arguments if argument in COMMANDS][:1]
    parser = build_parser(named if named or NO_COMMAND.issuperset(arguments) else COMMANDS)
    options, rest = parser.parse_known_args(arguments)
    unknown = [] if takes(options.run, "keys") else [*rest]
    if not takes(options.run, "overrides"):
        unknown += [f"--{key}" for key in overrides]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    call(options.run, {**vars(options), "keys": rest, "overrides": overrides})


class _EscapingFormatter(logging.Formatter):
    """Formats a record as its message alone, with control characters escaped."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return escape_control_characters(record.message)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, object]]:
    """Separate overrides of keys of the model's config (``--vision.name eva_vit_g.pth``) from all other arguments.

    A command that accepts all keys of a recipe parses its arguments itself; they are returned unchanged.

    Returns:
        The other arguments, and the values of the overrides by key (``vision.name``).
    """
    if argv and argv[0] in COMMANDS and takes(COMMANDS[argv[0]], "keys"):
        return list(argv), {}
    arguments: list[str] = []
    overrides: dict[str, object] = {}
    remaining = iter(argv)
    for argument in remaining:
        key, equals, value = argument.partition("=")
        if re.fullmatch(OVERRIDE, key):
            overrides[key.removeprefix("--")] = value if equals else next(remaining, None)
        else:
            arguments.append(argument)
    return arguments, overrides


def build_parser(detailed: Collection[str] = COMMANDS.keys()) -> argparse.ArgumentParser:
    """Return the parser of all commands.

    Args:
        detailed: names of the commands whose options are added; the other commands are only listed.
    """
    parser = argparse.ArgumentParser(
        prog="blip2",
        description="Connect a frozen image encoder to a frozen LLM by training only the Q-Former between them.",
        epilog="A first example: blip2 demo --quick",
    )
    parser.add_argument(
        "--version", action="version", version=f"blip2 {__version__}", help="Print the version, then exit."
    )
    shtab.add_argument_to(parser, "--print-completion", help="Print the completion script for a shell, then exit.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        added = commands.add_parser(name, help=(inspect.getdoc(function) or "").partition("\n\n")[0])
        added.set_defaults(run=function)
        if name in detailed:
            _add_details(added, name)
    return parser


def _add_details(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options, the description and the example of a command to its parser."""
    function, sections = COMMANDS[name], ("Args:", "Example:", "The arguments are those of")
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    parser.description = " ".join(each for each in paragraphs if not each.startswith(sections))
    parser.epilog = "example: " + paragraphs[-1].removeprefix("Example:").strip()
    add_options(parser, function)
    if takes(function, "keys"):
        parser.usage = f"{parser.format_usage().removeprefix('usage: ').rstrip()} [--KEY VALUE ...]"
    if takes(function, "overrides"):
        parser.epilog += (
            " --- Keys of the model's config can be set as options, to change them (--vision.image_size 364) or"
            " because a .pth file does not contain them (--vision.name eva_vit_g.pth)."
        )
    if name == "train":
        help_of_options = parser.format_help
        parser.format_help = lambda: f"{help_of_options()}\n{_help_of_keys()}\n"
    elif takes(function, "keys"):
        parser.epilog = f"blip2 train --help lists the keys --- {parser.epilog}"


def _help_of_keys() -> str:
    from blip2.recipe import recipe_help

    return recipe_help()


if __name__ == "__main__":
    sys.exit(main())
