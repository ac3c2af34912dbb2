"""The one exception a user is meant to read, and which of several processes says so."""

from __future__ import annotations

import os
import socket


class InputError(ValueError):
    """Something a user gave cannot be used.

    The message is one line that says what was found, what was expected and what to do. The command line prints
    it without a traceback and exits with status 2; everything else that is raised is a bug of ours.
    """


def process_name() -> str:
    """``process 3 of 8 on HOST``, even before the processes know each other; nothing where there is only one."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    return f"process {os.environ.get('RANK', 0)} of {processes} on {socket.gethostname()}" if processes > 1 else ""
