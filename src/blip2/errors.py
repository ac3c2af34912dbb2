"""The exception whose message is meant for users, and safe printing of text from files and other libraries."""

from __future__ import annotations

import os
import re
import socket

CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that are escaped: control characters (C0, DEL, C1), line separators and changes of the writing direction,
because they control a terminal; and surrogates, because they cannot be encoded."""


def escape_control_characters(text: object, keep: str = "") -> str:
    """Return a text as one line, in which control characters are escaped (``\\x1b``, ``\\n``).

    Names of files and keys, captions, and messages of other libraries can contain any character, and escape sequences
    can rewrite a terminal's content. All such texts must pass through this function before they are printed.

    Args:
        text: an object; its ``str`` is escaped.
        keep: characters that are not escaped, such as a newline.
    """
    return CONTROL_CHARACTERS.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], str(text))


class InputError(ValueError):
    """An error in something that the user provided, or on the user's machine.

    The message is one line that says what was found, what was expected and what to do. It is safe to print, because
    :func:`escape_control_characters` is applied to it. The command line prints the message without a traceback and
    exits with status 2.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(escape_control_characters(message))


def process_name() -> str:
    """Return the name of this process, such as ``process 3 of 8 on HOST``; an empty string if it is the only process.

    The name comes from the environment, so that it is known before ``torch.distributed`` is initialized.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size <= 1:
        return ""
    return f"process {os.environ.get('RANK', 0)} of {world_size} on {socket.gethostname()}"
