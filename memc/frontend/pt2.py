"""Programs that ``torch.export.save`` wrote: the JSON graph and the raw tensors; nothing is unpickled or evaluated."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from memc.artifact import sha256
from memc.errors import MemcError
from memc.frontend.graph import attach, unlift
from memc.frontend.huggingface import POSITIONS
from memc.frontend.module import is_causal
from memc.frontend.source import Captured
from memc.frontend.trace import Port, add_input, finish
from memc.program import ModelInfo

_MAX_JSON = 1 << 30
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
_OPERATORS = "add and_ eq floordiv ge getitem gt le lt mod mul ne neg not_ or_ pos pow sub truediv"
_TARGETS = re.compile(
    r"torch\.ops\.(aten\.\w+\.\w+|higher_order\.wrap_with_(set_grad_enabled|autocast))"
    rf"|_operator\.({_OPERATORS.replace(' ', '|')})|math\.(ceil|floor|trunc|sqrt)"
    r"|torch\.sym_(max|min|not|ite|float|int)"
)
_WORDS = re.compile(r"[A-Za-z_]\w*")
_EXPRESSION = re.compile(r"[\w\s+*/(),<>='-]*")
_NAMES = (
    *("Symbol", "Integer", "Add", "Mul", "Pow", "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CeilDiv", "CleanDiv"),
    *("IntTrueDiv", "Abs", "positive", "nonnegative", "integer", "True", "False"),
)
"""The only names in the text of a symbolic size, which sympy would evaluate."""
_SYMBOL = re.compile(r"[suz]\d+")


def capture_pt2(path: Path, source: str) -> Captured:
    """Capture a ``.pt2`` file with the values that it holds.

    Its first int64 input ``[B, T]`` is ``tokens``, the second ``positions``. Both axes have to be dynamic.

    Raises ``MemcError`` E302 for a corrupt archive, E304 for pickled tensors or operations that are not plain ATen, and
    E305 for an input whose batch or length is fixed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            graph, weights, constants = _read(archive, path)
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise MemcError("E302", f".pt2 file cannot be read: {error}", source, "export it again") from error
    _check_safe(graph, source)
    program, signature = _deserialize(graph, weights, constants, source)
    root = nn.Module()
    for name, value in weights.items():
        attach(root, name, value)
    for spec in signature.input_specs:
        if spec.kind is InputKind.BUFFER and spec.target in constants:
            attach(root, spec.target, constants[spec.target])
    user = [spec.arg.name for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]
    values = {node.name: node.meta["val"] for node in program.graph.find_nodes(op="placeholder")}
    ports = _ports([(name, values[name]) for name in user], source)
    module = unlift(program, signature, constants, root, source)
    examples = tuple(port.example() for port in ports)
    decoder = ports[0].role == "tokens" and is_causal(module, examples)
    if decoder and not any(port.role == "positions" for port in ports):
        ports.insert(1, POSITIONS)
        add_input(module, "positions")
    info = ModelInfo(source, sha256(path), "pt2", decoder=decoder)
    return Captured(finish(module, ports, root, info, None), None, {})


def _read(archive: zipfile.ZipFile, path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    names = {name.partition("/")[2]: name for name in archive.namelist()}
    graph = _json(archive, names["models/model.json"], path)
    made: dict[str, Tensor] = {}
    groups = []
    for folder, kind in (("data/weights", "weights"), ("data/constants", "constants")):
        listing = names.get(f"{folder}/model_{kind}_config.json")
        entries = _json(archive, listing, path)["config"] if listing else {}
        groups.append({n: _tensor(archive, names, folder, n, entry, path, made) for n, entry in entries.items()})
    return graph, groups[0], groups[1]


def _json(archive: zipfile.ZipFile, name: str, path: Path) -> Any:
    if archive.getinfo(name).file_size > min(_MAX_JSON, 100 * path.stat().st_size):
        raise ValueError(f"{name} unpacks to {archive.getinfo(name).file_size} bytes")
    return json.loads(archive.read(name))


def _tensor(
    archive: zipfile.ZipFile,
    names: dict[str, str],
    folder: str,
    name: str,
    entry: dict[str, Any],
    path: Path,
    made: dict[str, Tensor],
) -> Tensor:
    if entry.get("use_pickle") or entry.get("tensor_meta") is None:
        hint = "export a model of plain tensors again with the torch that memc uses"
        raise MemcError("E304", f"tensor {name!r} is pickled in the file, which can run code", str(path), hint)
    meta, file = entry["tensor_meta"], names[f"{folder}/{entry['path_name']}"]
    if file in made:
        return made[file]
    shape = [size["as_int"] for size in meta["sizes"]]
    strides, offset = [s["as_int"] for s in meta["strides"]], meta["storage_offset"]["as_int"]
    dtype = _DTYPES[meta["dtype"]]
    stored = archive.getinfo(file).file_size
    if any(type(n) is not int or n < 0 for n in (*shape, *strides, offset)) or stored > path.stat().st_size:
        raise ValueError(f"tensor {name!r} does not add up")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1 if math.prod(shape) else 0
    if last * dtype.itemsize > stored:
        raise ValueError(f"tensor {name!r} has {stored} bytes for {shape}")
    flat = torch.frombuffer(bytearray(archive.read(file)), dtype=dtype) if stored else torch.empty(0, dtype=dtype)
    value = flat.as_strided(shape, strides, offset)
    made[file] = nn.Parameter(value, value.is_floating_point()) if entry.get("is_param") else value
    return made[file]


def _check_safe(graph: Any, source: str) -> None:
    """Refuse every operation but plain ATen and arithmetic, and every symbolic size that is more than arithmetic."""
    for key, value in _strings(graph):
        if key == "target" and "." in value and value.startswith(("torch", "_operator", "math", "builtins")):
            safe = _TARGETS.fullmatch(value) is not None
        elif key == "expr_str":
            words = set(_WORDS.findall(value))
            known = all(word in _NAMES or _SYMBOL.fullmatch(word) for word in words)
            safe = known and _EXPRESSION.fullmatch(value) is not None
        else:
            continue
        if not safe:
            raise MemcError("E304", f"file asks for {value[:80]!r}, which is not plain ATen", source)


def _strings(value: Any) -> Iterator[tuple[str, str]]:
    """Yield every text value of a JSON document with the key it stands under."""
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, str):
                yield key, item
            else:
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _deserialize(graph: dict[str, Any], weights: dict[str, Tensor], constants: dict[str, Tensor], source: str) -> Any:
    from torch._export.serde import schema, serialize
    from torch.utils._sympy.value_ranges import ValueRanges

    body = graph["graph_module"]
    for node in _nodes(body["graph"]):
        if not _TARGETS.fullmatch(str(node.get("target"))):
            raise MemcError("E304", f"file asks for {str(node.get('target'))[:80]!r}, which is not plain ATen", source)
        kept = ("stack_trace", "nn_module_stack")
        node["metadata"] = {k: v for k, v in node.get("metadata", {}).items() if k in kept}
    body["module_call_graph"] = []
    ranges = {
        name: ValueRanges(
            serialize._int_to_sympy_int(r["min_val"], -1), serialize._int_to_sympy_int(r["max_val"], 1 << 40)
        )
        for name, r in graph["range_constraints"].items()
    }
    try:
        parsed = serialize._dict_to_dataclass(schema.GraphModule, body)
        result = serialize.GraphModuleDeserializer().deserialize(parsed, weights, constants, None, ranges)
    except Exception as error:
        raise MemcError("E302", f".pt2 graph does not parse: {error}", source, "export it again") from error
    return result.graph_module, result.signature


def _nodes(graph: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for node in graph["nodes"]:
        yield node
        for item in node["inputs"]:
            inner = item["arg"].get("as_graph")
            if inner:
                yield from _nodes(inner["graph"])


def _ports(inputs: list[tuple[str, Tensor]], source: str) -> list[Port]:
    ports: list[Port] = []
    symbols: dict[str, str] = {}
    for name, value in inputs:
        shape: list[int | str] = []
        for axis, size in enumerate(value.shape):
            if isinstance(size, int) and axis < 2 and value.dtype == torch.int64 and value.ndim == 2:
                which = ("batch", "length")[axis]
                hint = 'export it with dynamic_shapes {0: Dim("B", min=1), 1: Dim("T", min=1)}'
                raise MemcError(
                    "E305", f"input {name!r} {list(value.shape)} has a static {which} T={size}", source, hint
                )
            if not isinstance(size, int):
                free = [s for s in ("B", "T", "U") if s not in symbols.values()]
                shape.append(symbols.setdefault(str(size), free[0] if free else str(size)))
            else:
                shape.append(size)
        roles = {port.role for port in ports}
        if value.dtype == torch.int64 and shape == ["B", "T"] and "positions" not in roles:
            role = "positions" if "tokens" in roles else "tokens"
            ports.append(Port(role, role, value.dtype, ("B", "T")))  # type: ignore[arg-type]
        else:
            ports.append(Port(name, "other", value.dtype, tuple(shape)))
    return ports
