"""What the user sees while data is made: a live bar on a terminal, a line now and then anywhere else."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from minrnn._console import say


class Bar:
    """Progress of one thing, used as a context.

    Args:
        console: where it is shown.
        title: of what.
        total: at which it is complete.
        every_seconds: between two lines where the console is no terminal.
    """

    def __init__(self, console: Console, title: str, total: float, every_seconds: float = 15.0) -> None:
        self.console, self.title, self.every_seconds = console, title, every_seconds
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        ]
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._line = self._bar.add_task(title, total=total, status="")
        self._told = time.monotonic()

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._bar.stop()

    def tell(self, completed: float, status: str) -> None:
        """Show how far it is."""
        self._bar.update(self._line, completed=completed, status=status)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._told >= self.every_seconds:
            self._told = now
            say(self.console, f"{self.title}: {status}")
