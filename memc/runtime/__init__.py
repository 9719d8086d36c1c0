"""The runtime: an artifact, loaded, as a session that gives logits and generates text. Imports no torch."""

from memc.runtime.generate import GenerateOptions, Generation, Timing
from memc.runtime.session import Session, load
from memc.runtime.state import SessionState

__all__ = ["GenerateOptions", "Generation", "Session", "SessionState", "Timing", "load"]
