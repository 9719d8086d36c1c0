"""Recall tasks that need no data set, by name. Numpy only; every sample is a function of the seed."""

from __future__ import annotations

from memc.errors import MemcError
from memc.evaluate.tasks.base import DEPTHS, Question, Sample, Task, Words
from memc.evaluate.tasks.needles import NeedleMultikey, NeedleMultiquery, NeedleMultivalue, NeedleSingle, Passkey
from memc.evaluate.tasks.tokens import AssociativeRecall, Copy, JointRecall
from memc.evaluate.tasks.tracing import CommonWords, FrequentWords, VariableTracking
from memc.options import split_options, split_spec
from memc.plugins import did_you_mean

__all__ = ["DEPTHS", "TASKS", "Question", "Sample", "Task", "Words", "parse_tasks"]

_ALL: tuple[type[Task], ...] = (
    AssociativeRecall,
    JointRecall,
    Copy,
    Passkey,
    NeedleSingle,
    NeedleMultikey,
    NeedleMultivalue,
    NeedleMultiquery,
    VariableTracking,
    CommonWords,
    FrequentWords,
)
TASKS = {task.name: task for task in _ALL}


def parse_tasks(text: str) -> list[Task]:
    """Build tasks from ``name[:option=value,...],name...``: what has no colon but an equals sign is one more option.

    Raises ``MemcError``: E202 for an unknown task or none, E203 for a bad option.
    """
    specs: list[str] = []
    for part in split_options(text):
        if specs and ":" in specs[-1] and "=" in part and ":" not in part:
            specs[-1] += f",{part}"
        else:
            specs.append(part.strip())
    if not specs:
        raise MemcError("E202", "no task is named", "--task", did_you_mean("", TASKS))
    made = []
    for spec in dict.fromkeys(specs):
        name, options = split_spec(spec)
        if name not in TASKS:
            raise MemcError("E202", f"unknown task {name!r}", "--task", did_you_mean(name, TASKS))
        made.append(TASKS[name].from_options(options))
    return made
