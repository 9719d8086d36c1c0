"""Programs on disk: the graph as JSON beside a safetensors file; byte-exact, and read without pickle."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from memc.dialect import op_spec
from memc.errors import MemcError
from memc.infer import infer
from memc.program import InputSpec, ModelInfo, OutputSpec, Program, Provenance, StateSpec, get_tensor, set_tensor
from memc.tensor_file import read_tensors, write_tensors

SCHEMA = "memc.program/1"
GRAPH = "program.json"
PARAMETERS = "params.safetensors"

# Python functions that a graph may call, on sizes; everything else is an op of a namespace below.
_PYTHON_NAMES = {
    operator: "getitem add sub mul floordiv truediv mod pow neg pos eq ne lt le gt ge and_ or_ not_",
    math: "ceil floor trunc sqrt",
    torch: "sym_float sym_int sym_ite sym_max sym_min sym_not sym_sum",
}
PYTHON_TARGETS: dict[str, Callable[..., Any]] = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in _PYTHON_NAMES.items()
    for name in names.split()
}
NAMESPACES = ("aten", "memc", "prims")

_DTYPES = {str(value)[6:]: value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_ENUMS: dict[str, dict[str, Any]] = {
    "layout": {str(value)[6:]: value for value in (torch.strided, torch.sparse_coo, torch.jagged)},
    "memory_format": {
        str(value)[6:]: value
        for value in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
    },
}


def save_program(program: Program, folder: Path, earlier: tuple[Program, Path] | None = None) -> None:
    """Write ``program`` to ``folder``: ``program.json`` and ``params.safetensors``.

    The same program gives the same bytes. Parameters are streamed one at a time; tied ones are written once. Of a
    program made from an ``earlier`` one, which was loaded from its folder, the tensors that are the same stay in that
    one's files: those are linked, and ``params-1.safetensors`` and so on hold what is new. Raises ``ValueError`` for
    fake parameters and ``MemcError`` E305 naming a node that has no place in the format.
    """
    if program.is_fake:
        raise ValueError("a program with fake parameters has nothing to save")
    folder.mkdir(parents=True, exist_ok=True)
    tensors, aliases = _referenced(program)
    kept = _kept(*earlier) if earlier is not None else {}
    files = sorted({str(entry.get("file", PARAMETERS)) for entry in kept.values()}, key=_number)
    own = f"params-{_number(files[-1]) + 1}.safetensors" if files else PARAMETERS
    new = {name: value for name, value in tensors.items() if aliases[name] == name and _identity(value) not in kept}
    data = {
        "schema": SCHEMA,
        "model": dataclasses.asdict(program.model),
        "raised": program.raised,
        "inputs": [_spec_to_json(spec) for spec in program.inputs],
        "outputs": [_spec_to_json(spec) for spec in program.outputs],
        "states": [_spec_to_json(spec) for spec in program.states],
        "tensors": [
            {
                "name": name,
                "parameter": isinstance(value, torch.nn.Parameter),
                **(kept.get(_identity(value)) or _place(aliases[name], own)),
            }
            for name, value in tensors.items()
        ],
        "provenance": {name: dataclasses.asdict(value) for name, value in sorted(program.provenance.items())},
        "nodes": [_node_to_json(node) for node in program.module.graph.nodes],
    }
    if earlier is not None:
        for file in files:
            link(earlier[1] / file, folder / file)
    if new or not files:
        write_tensors(folder / own, new)
    (folder / GRAPH).write_text(json.dumps(data, indent=None, separators=(",", ":"), allow_nan=False) + "\n")


def load_program(folder: Path) -> Program:
    """Read a program that :func:`save_program` wrote; parameters are mapped from the file, not copied.

    Every node's ``meta["val"]`` is inferred anew with symbolic sizes. Raises ``MemcError`` E309 when a file is missing,
    does not parse, has another schema or names an op that memc does not know.
    """
    path = folder / GRAPH
    if not path.is_file():
        raise MemcError("E309", "no program here", where=str(folder), next="convert the model again")
    try:
        data = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            raise MemcError("E309", f"program has schema {data.get('schema')!r}, this memc reads {SCHEMA!r}", str(path))
        files = {str(entry.get("file", PARAMETERS)) for entry in data["tensors"]} | {PARAMETERS}
        if any(Path(file).name != file for file in files):
            raise ValueError("parameter file outside the program's folder")
        program = _program_from_json(data, {file: read_tensors(folder / file) for file in files})
        infer(program)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError, AssertionError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'empty'}"
        raise MemcError("E309", f"program does not parse ({reason})", str(path), "convert the model again") from error
    return program


def _referenced(program: Program) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors that the graph reads, by name in order, and under which of the names each is stored."""
    names = sorted({str(node.target) for node in program.module.graph.find_nodes(op="get_attr")})
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors[name] = get_tensor(program.module, name)
        except AttributeError as error:
            raise MemcError("E305", f"graph reads {name}, which is not a tensor", where=name) from error
    stored: dict[object, str] = {}
    aliases = {name: stored.setdefault(_identity(value), name) for name, value in tensors.items()}
    return tensors, aliases


def _identity(value: Tensor) -> object:
    """Return a key that two tensors share when they are the same memory seen the same way."""
    if value.numel() == 0:
        return id(value)
    return (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())


def link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, or copy it where the disk has no hard links."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


def _kept(program: Program, folder: Path) -> dict[object, dict[str, str]]:
    """Tell for each tensor of a program that was loaded from ``folder`` where it is stored there."""
    entries = {entry["name"]: entry for entry in json.loads((folder / GRAPH).read_text())["tensors"]}
    return {
        _identity(value): {key: entries[name][key] for key in ("stored_as", "file") if key in entries[name]}
        for name, value in _referenced(program)[0].items()
    }


def _place(name: str, file: str) -> dict[str, str]:
    return {"stored_as": name} if file == PARAMETERS else {"stored_as": name, "file": file}


def _number(file: str) -> int:
    """Return n of ``params-n.safetensors``; 0 of the first file, which has none."""
    return 0 if file == PARAMETERS else int(file.removeprefix("params-").removesuffix(".safetensors"))


def _program_from_json(data: dict[str, Any], stored: dict[str, dict[str, Tensor]]) -> Program:
    root = torch.nn.Module()
    made: dict[tuple[str, str, bool], Tensor] = {}
    for entry in data["tensors"]:
        file = entry.get("file", PARAMETERS)
        value = stored[file][entry["stored_as"]]
        key = (file, entry["stored_as"], entry["parameter"])
        if key not in made:
            is_float = value.is_floating_point() or value.is_complex()
            made[key] = torch.nn.Parameter(value, requires_grad=is_float) if entry["parameter"] else value
        set_tensor(root, entry["name"], value, trainable=False)
        owner, _, leaf = entry["name"].rpartition(".")
        if entry["parameter"]:
            # The same Parameter object under every name, so that tied weights stay tied in training.
            module = root.get_submodule(owner)
            del module._buffers[leaf]
            module.register_parameter(leaf, made[key])  # type: ignore[arg-type]
    graph = Graph()
    nodes: dict[str, Node] = {}
    for entry in data["nodes"]:
        nodes[entry["name"]] = _node_from_json(graph, entry, nodes)
    graph.lint()
    return Program(
        module=GraphModule(root, graph),
        inputs=tuple(InputSpec(**_spec_from_json(entry)) for entry in data["inputs"]),
        outputs=tuple(OutputSpec(**_spec_from_json(entry)) for entry in data["outputs"]),
        states=tuple(StateSpec(**_spec_from_json(entry)) for entry in data["states"]),
        model=ModelInfo(**data["model"]),
        provenance={name: _provenance_from_json(entry) for name, entry in data["provenance"].items()},
        raised=data["raised"],
    )


def _provenance_from_json(entry: dict[str, Any]) -> Provenance:
    kept = tuple((axis, tuple((start, stop) for start, stop in ranges)) for axis, ranges in entry.get("kept", ()))
    return Provenance(**{**entry, "rows": tuple(entry["rows"]) if entry["rows"] else None, "kept": kept})


def _spec_to_json(spec: InputSpec | OutputSpec | StateSpec) -> dict[str, Any]:
    return {**dataclasses.asdict(spec), "dtype": str(spec.dtype)[6:], "shape": list(spec.shape)}


def _spec_from_json(entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "dtype": _DTYPES[entry["dtype"]], "shape": tuple(entry["shape"])}


def _node_to_json(node: Node) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": node.name, "op": node.op, "target": _target_to_json(node)}
    try:
        entry["args"] = [encode(value) for value in node.args]
        if node.kwargs:
            entry["kwargs"] = {key: encode(value) for key, value in node.kwargs.items()}
        if "memc" in node.meta:
            entry["memc"] = encode(node.meta["memc"])
        if node.meta.get("nn_module_stack"):
            entry["modules"] = [
                [key, path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"]
                for key, (path, kind) in node.meta["nn_module_stack"].items()
            ]
    except TypeError as error:
        raise MemcError("E305", f"node holds {error}", where=node.name) from error
    return entry


def _node_from_json(graph: Graph, entry: dict[str, Any], nodes: dict[str, Node]) -> Node:
    args = tuple(decode(value, nodes) for value in entry["args"])
    kwargs = {key: decode(value, nodes) for key, value in entry.get("kwargs", {}).items()}
    target = _target_from_json(entry)
    node = graph.create_node(entry["op"], target, args, kwargs, name=entry["name"])
    if node.name != entry["name"]:
        raise ValueError(f"two nodes are called {entry['name']!r}")
    if "memc" in entry:
        node.meta["memc"] = decode(entry["memc"], nodes)
    if "modules" in entry:
        node.meta["nn_module_stack"] = {key: (path, kind) for key, path, kind in entry["modules"]}
    return node


def _target_to_json(node: Node) -> str:
    if node.op in ("placeholder", "get_attr", "output"):
        return str(node.target)
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in NAMESPACES:
            return str(node.target)
        for name, function in PYTHON_TARGETS.items():
            if node.target is function:
                return name
    raise MemcError("E305", f"the program format has no place for {node.op} of {node.target}", where=node.name)


def _target_from_json(entry: dict[str, Any]) -> Any:
    name: str = entry["target"]
    if entry["op"] in ("placeholder", "get_attr", "output"):
        return name
    if entry["op"] == "call_function" and name in PYTHON_TARGETS:
        return PYTHON_TARGETS[name]
    unknown = MemcError("E309", f"program calls {name}, which this memc does not know", where=entry["name"])
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    if entry["op"] != "call_function" or namespace not in NAMESPACES:
        raise unknown
    try:
        op = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except AttributeError:
        raise unknown from None
    # A few ops of aten read or write files; a program never does.
    if not isinstance(op, torch._ops.OpOverload) or any(a.name == "filename" for a in op._schema.arguments):
        raise unknown
    if namespace == "memc" and op_spec(op) is None:
        raise unknown
    return op


def encode(value: Any) -> Any:
    """Turn an argument of a node into a JSON value; raises ``TypeError`` for what has no place in a program."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case Node():
            return {"node": value.name}
        case tuple():
            return {"tuple": [encode(item) for item in value]}
        case list():
            return [encode(item) for item in value]
        case dict():
            return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
        case slice():
            return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
        case torch.dtype():
            return {"dtype": str(value)[6:]}
        case torch.device():
            return {"device": str(value)}
        case torch.layout():
            return {"layout": str(value)[6:]}
        case torch.memory_format():
            return {"memory_format": str(value)[6:]}
        case complex():
            return {"complex": [value.real, value.imag]}
        case _ if value is Ellipsis:
            return {"ellipsis": True}
    raise TypeError(f"a value of type {type(value).__name__}")


def decode(value: Any, nodes: dict[str, Node]) -> Any:
    """Turn a JSON value back into an argument; raises ``KeyError`` for a node that was not defined before."""
    if isinstance(value, list):
        return [decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "node":
            return nodes[content]
        case "tuple":
            return tuple(decode(item, nodes) for item in content)
        case "dict":
            return {decode(key, nodes): decode(item, nodes) for key, item in content}
        case "slice":
            return slice(*(decode(item, nodes) for item in content))
        case "float":
            return float(content)
        case "dtype":
            return _DTYPES[content]
        case "device":
            return torch.device(content)
        case "layout" | "memory_format":
            return _ENUMS[kind][content]
        case "complex":
            return complex(*content)
        case "ellipsis":
            return Ellipsis
    raise ValueError(f"unknown value kind {kind!r}")
