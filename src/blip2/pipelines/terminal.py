"""A conversation with a model on the terminal, or between pipes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from io import TextIOBase
from typing import Any

from blip2.errors import InputError, escape_control_characters
from blip2.pipelines.chat import Chat

HELP = """\
/image PATH   add an image to the next question
/reset        forget the conversation, and keep the images that it began with
/help         show this help
/quit         leave (as does Ctrl-D)
Ctrl-C ends an answer. Everything else is a question."""


def talk(chat: Chat, source: TextIOBase | None = None) -> None:
    """Answer questions line by line until the input ends.

    On a terminal, answers are shown as they are written, and an error is shown in one line before the next question.
    Between pipes, each answer is one line, and an error ends the conversation.

    Args:
        chat: the conversation.
        source: where the lines come from. None: the standard input.

    Raises:
        InputError: an input between pipes cannot be answered.
    """
    lines: Any = sys.stdin if source is None else source
    is_terminal = lines.isatty()
    if is_terminal:
        print("Ask about the image. /help shows what else can be typed.")
    for line in _lines(lines, is_terminal):
        try:
            if line == "/quit":
                return
            _run(chat, line, is_terminal)
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print(" [interrupted]", flush=True)
        except InputError as error:
            if not is_terminal:
                raise
            print(f"error: {error}", file=sys.stderr)


def _run(chat: Chat, line: str, is_terminal: bool) -> None:
    """Run one line of input."""
    name, _, argument = line.partition(" ")
    if not line.startswith("/"):
        for piece in chat.stream(line):
            print(escape_control_characters(piece, keep="\n" if is_terminal else ""), end="", flush=True)
        print(flush=True)
    elif name == "/help":
        print(HELP)
    elif name == "/reset":
        chat.reset()
    elif name == "/image" and argument.strip():
        chat.add_images(argument.strip())
    else:
        raise InputError(
            f"{line} is not a command, expected /image PATH, /reset, /help or /quit: correct it, or begin a question"
            " without /"
        )


def _lines(source: Any, is_terminal: bool) -> Iterator[str]:
    """Yield the lines that are not blank, without white space around them."""
    if is_terminal:
        import readline  # noqa: F401  (lets `input` edit lines and repeat earlier ones)
    while True:
        try:
            line = input("> ") if is_terminal else source.readline()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print("\n/quit leaves the conversation.")
            continue
        except UnicodeDecodeError as error:
            raise InputError(f"the input is not UTF-8 ({error}): convert it to UTF-8") from error
        if not line and not is_terminal:
            return
        if line.strip():
            yield line.strip()
