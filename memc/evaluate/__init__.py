"""Evaluation: how well an artifact predicts text, and how far two of them are apart."""

from memc.evaluate.perplexity import Bucket, Comparison, PerplexityResult, compare, perplexity

__all__ = ["Bucket", "Comparison", "PerplexityResult", "compare", "perplexity"]
