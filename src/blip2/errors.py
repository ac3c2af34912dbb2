"""The exception whose message is meant for users, and safe printing of text from files and other libraries."""

from __future__ import annotations

import os
import re
import socket

CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that control a terminal: control characters (C0, DEL, C1), line separators and changes of the writing
direction; and surrogates, which cannot be encoded."""


def escape_control_characters(text: object, keep: str = "") -> str:
    """Return a text as one line, in which control characters are escaped (``\\x1b``, ``\\n``).

    Names of files and keys, captions, and messages of other libraries can contain any character, and escape sequences
    can rewrite a terminal's content. All of them must pass through this function before they are printed.

    Args:
        keep: characters that are not escaped, such as a newline.
    """
    return CONTROL_CHARACTERS.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], str(text))


class InputError(ValueError):
    """An error in something that the user provided.

    The message is one line that says what was found, what was expected and what to do. The command line prints it
    without a traceback and exits with status 2; any other exception is a bug. The message can contain text from files:
    :func:`escape_control_characters` makes it safe to print.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(escape_control_characters(message))


def process_name() -> str:
    """Return ``process 3 of 8 on HOST`` in a distributed run, even before it is initialized; else an empty string."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size <= 1:
        return ""
    return f"process {os.environ.get('RANK', 0)} of {world_size} on {socket.gethostname()}"
