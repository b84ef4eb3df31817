"""Tasks: each owns its data, its loss and its metric, and knows a model only as a callable.

A batch is a function of (seed, step) alone, so that a run can be resumed exactly and workers do not matter.
"""

from minrnn.tasks.answers import AnswerTask, Questions
from minrnn.tasks.copying import SelectiveCopying
from minrnn.tasks.formal import FormalLanguage
from minrnn.tasks.listops import ListOps
from minrnn.tasks.task import Task
from minrnn.tasks.text import TextConfig, TextTask

__all__ = [
    "AnswerTask",
    "FormalLanguage",
    "ListOps",
    "Questions",
    "SelectiveCopying",
    "Task",
    "TextConfig",
    "TextTask",
]
