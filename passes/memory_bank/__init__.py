"""The ``memory_bank`` pass: parameters that are fetched for each sequence, added to the feed-forward blocks."""

from memc.passes.memory_bank.site import MemoryBank

__all__ = ["MemoryBank"]
