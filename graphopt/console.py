"""The terminal: results on stdout, progress bars and notes on stderr."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

STDOUT = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
STDERR = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 150)
PLAIN_EVERY_S = 5.0


class ConsoleProgress:
    """Bars where stderr is a terminal, a plain line every few seconds where it is a log."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self._bars: Progress | None = None

    @contextmanager
    def task(self, label: str, total: float):
        if self.quiet:
            yield lambda steps: None
        elif STDERR.is_terminal:
            yield from self._bar(label, total)
        else:
            yield from self._lines(label, total)

    def note(self, text: str) -> None:
        if not self.quiet:
            STDERR.print(text, markup=False)

    def _bar(self, label: str, total: float):
        outermost = self._bars is None
        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                console=STDERR,
                transient=True,
            )
            self._bars.start()
        bars = self._bars
        task = bars.add_task(label, total=total)
        try:
            yield lambda steps: bars.advance(task, steps)
        finally:
            bars.remove_task(task)
            if outermost:
                bars.stop()
                self._bars = None

    def _lines(self, label: str, total: float):
        state = {"done": 0.0, "told": time.monotonic()}

        def advance(steps: float) -> None:
            state["done"] += steps
            if time.monotonic() - state["told"] >= PLAIN_EVERY_S:
                state["told"] = time.monotonic()
                STDERR.print(f"{label}: {100 * state['done'] / max(total, 1e-9):.0f} %", markup=False)

        yield advance


def complain(text: str) -> None:
    """One line of error on stderr."""
    print(f"graphopt: {text}", file=sys.stderr)  # noqa: T201 - not through rich, which would wrap the line
