"""The entry point of ``blip2`` and ``python -m blip2``."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def main() -> int:
    """Run :func:`blip2.cli.main`. Ctrl-C prints one line even while the modules are still being imported."""
    before = signal.signal(signal.SIGINT, _leave)
    from blip2.cli import main as run

    signal.signal(signal.SIGINT, before)
    return run()


def _leave(number: int, frame: object) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
