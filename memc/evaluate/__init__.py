"""Evaluation: how well an artifact predicts text and recalls what it was told, and how far two of them are apart."""

from memc.evaluate.free_running import FreeRunning, free_running
from memc.evaluate.perplexity import Bucket, Comparison, PerplexityResult, compare, perplexity
from memc.evaluate.score import Cell, run_tasks
from memc.evaluate.tasks import TASKS, Task, parse_tasks

__all__ = [
    "TASKS",
    "Bucket",
    "Cell",
    "Comparison",
    "FreeRunning",
    "PerplexityResult",
    "Task",
    "compare",
    "free_running",
    "parse_tasks",
    "perplexity",
    "run_tasks",
]
