"""What the commands show."""

import os
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


def say(console: "Console", line: str) -> None:
    """Show a line as it is: whatever it holds, no markup, no colours, no breaks."""
    console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def silence(file: TextIO) -> None:
    """Let go of the reader of a file that nobody reads: what is written from now on goes nowhere."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), file.fileno())
