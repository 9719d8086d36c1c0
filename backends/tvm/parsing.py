"""TVM's parser of scripts, which finds itself on the stack without a description of every frame that is on it.

The description looks the source of each frame up, for each call of an inlined function: half of a compile's time.
"""

from __future__ import annotations

import inspect
from typing import Any

from tvm.script.parser.core.parser import ScriptMacro


def _nearest_parser(macro: ScriptMacro) -> Any:
    frame = inspect.currentframe()
    while frame is not None:
        if (parser := frame.f_globals.get(macro.parser_object_name)) is not None:
            return parser
        frame = frame.f_back
    raise RuntimeError(f"{macro.parser_object_name} not available")


ScriptMacro._find_parser_def = _nearest_parser
