"""Training of what passes add: block-wise transfer, choice of layers, recovery through adapters; resumable."""

from memc.train.trainer import Applied, Rewritten, Trainer

__all__ = ["Applied", "Rewritten", "Trainer"]
