"""What the commands show."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def say(console: "Console", line: str) -> None:
    """Show a line as it is: whatever it holds, no markup, no colours, no breaks."""
    console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
