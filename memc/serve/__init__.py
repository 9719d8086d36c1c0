"""An artifact behind OpenAI's HTTP interface: completions and chat, streamed or whole. Needs the extra ``serve``."""

from memc.serve.app import make_app
from memc.serve.engine import Limits
from memc.serve.server import listen, run

__all__ = ["Limits", "listen", "make_app", "run"]
