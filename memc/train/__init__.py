"""Training of what passes add: block-wise transfer, choice of layers, recovery through adapters; resumable."""

from memc.train.trainer import Trained, Trainer

__all__ = ["Trained", "Trainer"]
