"""Progress bars, lines and tables on the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from blip2.errors import escape_control_characters


def plain_text(text: str) -> Text:
    """Return a rich text in which markup is not interpreted and control characters are escaped.

    Names of files can contain both.
    """
    return Text(escape_control_characters(text))


def plain_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, right: bool = False
) -> Table:
    """Return a rich table in whose cells markup is not interpreted; see :func:`plain_text`.

    Args:
        columns: the heads of the columns.
        rows: the cells of each row.
        title: text above the table. None: no title.
        right: whether all columns except the first are right-aligned.
    """
    table = Table(title=None if title is None else plain_text(title), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(plain_text(column), justify="right" if right and number else "left")
    for row in rows:
        table.add_row(*map(plain_text, row))
    return table


class Display:
    """A progress bar on stderr, or about one line of progress every 10 seconds if stderr is not a terminal.

    Args:
        label: text before the progress bar.
        enabled: if False, nothing is shown.
    """

    def __init__(self, label: str, enabled: bool = True) -> None:
        self.console = Console(stderr=True, quiet=not enabled, soft_wrap=True)
        self._label = escape_control_characters(label)
        self._bar: Progress | None = None
        self._total: int | None = 0
        self._first = 0
        self._started = self._shown = time.monotonic()

    def start(self, total: int | None, done: int = 0) -> None:
        """Show the progress bar, with `done` of `total` steps completed. None: the number of steps is unknown."""
        self._total, self._first = total, done
        self._started = self._shown = time.monotonic()
        if self.console.is_terminal and not self.console.quiet:
            self._bar = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self.console,
            )
            self._bar.add_task(self._label, total=total, completed=done, note="")
            self._bar.start()

    def update(self, done: int, note: str = "") -> None:
        """Set the number of steps that are completed, and the text after the progress bar."""
        if self._bar is not None:
            with self._terminal():
                self._bar.update(self._bar.task_ids[0], completed=done, note=note)
            return
        now = time.monotonic()
        if done in (self._first + 1, self._total) or now - self._shown >= 10:
            self._shown = now
            if self._total is None:
                self.log(f"{self._label} {done}  {note}")
                return
            left = (now - self._started) / max(done - self._first, 1) * (self._total - done)
            self.log(f"{self._label} {done}/{self._total}  {note}  {left:.0f} s left")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hide the progress bar, for example while another progress bar is shown."""
        if self._bar is not None:
            with self._terminal():
                self._bar.stop()
        yield
        if self._bar is not None:
            with self._terminal():
                self._bar.start()

    def log(self, text: str) -> None:
        """Print a line above the progress bar."""
        with self._terminal():
            self.console.print(plain_text(text))

    def table(self, title: str, columns: list[str], rows: list[tuple[str, ...]]) -> None:
        """Print a table above the progress bar."""
        with self._terminal():
            self.console.print(plain_table(columns, rows, title))

    def close(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            with self._terminal():
                self._bar.stop()
            self._bar = None

    @contextmanager
    def _terminal(self) -> Iterator[None]:
        """Continue silently after the terminal was closed."""
        try:
            yield
        except OSError:
            self.console.quiet = True
