"""The one exception a user is meant to read, how it is made fit to be read, and which of several processes says so."""

from __future__ import annotations

import os
import re
import socket

UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that steer a terminal: control characters (C0, DEL, C1), other ends of lines, changes of the direction of
writing, and halves of surrogate pairs, which no terminal can be sent."""


def visible(text: object, keep: str = "") -> str:
    """A text as one line that shows what is in it: control characters become escapes such as ``\\x1b`` and ``\\n``.

    Names of files and keys, captions and what other libraries say may hold any character, and escape sequences can
    rewrite what stands on a terminal. All of it goes through here before it is printed.

    Args:
        keep: characters that stay as they are, such as a newline.
    """
    return UNSEEN.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], str(text))


class InputError(ValueError):
    """Something a user gave cannot be used.

    The message is one line that says what was found, what was expected and what to do. The command line prints
    it without a traceback and exits with status 2; everything else that is raised is a bug of ours. What a file says
    may be part of it: :func:`visible` keeps it one line and harmless.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(visible(message))


def process_name() -> str:
    """``process 3 of 8 on HOST``, even before the processes know each other; nothing where there is only one."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    return f"process {os.environ.get('RANK', 0)} of {processes} on {socket.gethostname()}" if processes > 1 else ""
