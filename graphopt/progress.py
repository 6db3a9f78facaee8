"""How long-running work tells a user where it is, without knowing whether anybody watches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[float], None]


class Progress(Protocol):
    """Implemented by the command line with bars, and by `SILENT` with nothing."""

    def task(self, label: str, total: float) -> AbstractContextManager[Advance]:
        """Start a task of `total` steps; call what it yields with the number of steps just done."""
        ...

    def note(self, text: str) -> None:
        """A line of information for people who watch."""
        ...


class _Silent:
    @contextmanager
    def task(self, label: str, total: float):
        yield lambda steps: None

    def note(self, text: str) -> None:
        return None


SILENT: Progress = _Silent()
