"""Memory banks: blocks of parameters by cluster of text, fetched per prompt. Reading one imports no torch."""

from memc.bank.bank import Bank, FetchCost
from memc.bank.layout import BankShape, Cluster
from memc.bank.tree import TreePath

__all__ = ["Bank", "BankShape", "Cluster", "FetchCost", "TreePath"]
