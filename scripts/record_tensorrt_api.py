"""Write what we use of TensorRT's Python API, as a test fixture and a stub.

python scripts/record_tensorrt_api.py FOLDER

FOLDER holds one tensorrt-VERSION.json per version: class → {"class": {member: signature}} or
{"enum": {member: number}}, as introspected from the real bindings. The installed tensorrt_rtx is
introspected here. Only names that occur in our sources are kept.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SOURCES = (
    ROOT / "ditas_export/engine/builder_process.py",
    ROOT / "ditas_export/runtime/tensorrt_plan.py",
)
FIXTURE = ROOT / "tests/data/tensorrt_api.json"
STUB = ROOT / "ditas_export/engine/tensorrt_api.pyi"

Api = dict[str, dict[str, dict[str, Any]]]
"""Class or enum → kind → member → signature or number."""

MAY_BE_NONE = {
    "build_serialized_network",
    "create_execution_context",
    "deserialize_cuda_engine",
}
BUFFERS = {"IHostMemory"}
"""What the bindings' signatures do not say."""

HEADER = '''"""What `builder_process.py` and `tensorrt_plan.py` use of TensorRT, also for RTX.

Written by scripts/record_tensorrt_api.py; do not edit. `Module` is either product's module.
"""

from collections.abc import Mapping
from typing import Any
'''


def main() -> None:
    """Write fixture and stub."""
    names = set[str]().union(*(names_in(path.read_text(encoding="utf-8")) for path in SOURCES))
    recorded = {
        path.stem: kept(json.loads(path.read_text(encoding="utf-8")), names)
        for path in sorted(Path(sys.argv[1]).glob("tensorrt-*.json"))
    }
    rtx = importlib.import_module("tensorrt_rtx")
    recorded[f"tensorrt_rtx-{rtx.__version__}"] = kept(introspected(rtx, names), names)
    FIXTURE.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    STUB.write_text(stub(recorded), encoding="utf-8")


def names_in(source: str) -> set[str]:
    """Return every name and attribute in a source."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return names | {alias.name for node in nodes if isinstance(node, ast.ImportFrom)
                    for alias in node.names}  # fmt: skip


def kept(api: Api, names: set[str]) -> Api:
    """Return the classes that a source names, and those that their members return, cut down."""
    classes = set(api) - set(dir(builtins))
    wanted, found = names & classes, set[str]()
    while wanted != found:
        found = set(wanted)
        used = (signature for name in found for signature in _members(api[name], names).values())
        wanted |= set(map(returned, used)) & classes
    return {name: {kind: _members(api[name], names) for kind in api[name]} for name in wanted}


def _members(entry: dict[str, dict[str, Any]], names: set[str]) -> dict[str, Any]:
    """Return the members of a class or enum that a source names."""
    (members,) = entry.values()
    return {name: value for name, value in members.items() if name in names}


def returned(signature: object) -> str:
    """Return the class that a signature says is returned."""
    return str(signature).rpartition(" -> ")[2]


def introspected(module: Any, names: set[str]) -> Api:
    """Return a module's API in the form of the recordings."""
    api: Api = {}
    for name, value in vars(module).items():
        if not isinstance(value, type):
            continue
        if hasattr(value, "__members__"):
            api[name] = {"enum": {key: int(member) for key, member in value.__members__.items()}}
        else:
            api[name] = {"class": {key: _signature(value, key) for key in dir(value)}}
    return api


def _signature(owner: type, name: str) -> str:
    """Return the first line of a method's documentation, or "property"."""
    member = getattr(owner, name)
    if not callable(member):
        return "property"
    first = (member.__doc__ or "").strip().partition("\n")[0]
    return re.sub(r"\w+_bindings\.\w+\.|nvinfer1::", "", first)


def stub(recorded: dict[str, Api]) -> str:
    """Return the stub of what all recorded versions have, or, where none but one has, that one."""
    merged: Api = {}
    for api in recorded.values():
        for name, entry in api.items():
            for kind, members in entry.items():
                known = merged.setdefault(name, {kind: {}})[kind]
                for member, value in members.items():
                    if "(*args" in str(known.get(member, "(*args")):
                        known[member] = value
    lines = [HEADER]
    for name in sorted(merged):
        lines += ["", *_class_lines(name, merged[name], set(merged)), ""]
    lines += [f"_{name} = {name}" for name in sorted(merged)]
    lines += ["", "class Module:", "    __version__: str"]
    lines += [f"    {name}: type[_{name}]" for name in sorted(merged)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _class_lines(name: str, entry: dict[str, dict[str, Any]], known: set[str]) -> Iterator[str]:
    """Yield the stub of one class or enum."""
    yield f"class {name}:"
    if "enum" in entry:
        yield f"    __members__: Mapping[str, {name}]"
        yield "    def __int__(self) -> int: ..."
        yield from (f"    {member}: {name}" for member in sorted(entry["enum"]))
        return
    if name in BUFFERS:
        yield "    def __buffer__(self, flags: int, /) -> memoryview: ..."
    yield "    def __init__(self, *args: Any) -> None: ..."
    for member, signature in sorted(entry["class"].items()):
        if member == "__init__":
            continue  # above, for every class
        if signature == "property":
            yield f"    {member}: Any"
            continue
        result = returned(signature)
        types = known | {"bool", "int", "str", "None"}
        result = result if result in types else "Any"
        if member in MAY_BE_NONE:
            result += " | None"
        overloaded = ("*args: Any",) if "(*args" in signature else ()
        names = ", ".join(("self", *overloaded, *map(_stubbed, _parts(signature))))
        yield f"    def {member}({names}) -> {result}: ..."


def parameters(signature: str) -> list[str]:
    """Return the names of a method's parameters, self left out."""
    return [_name(part) for part in _parts(signature)]


def _parts(signature: str) -> list[str]:
    """Return the parameters of a method as they are written, self left out."""
    return signature.partition("(")[2].rpartition(") ->")[0].split(", ")[1:]


def _name(part: str) -> str:
    """Return the name of one parameter."""
    return part.partition(":")[0].strip()


def _stubbed(part: str) -> str:
    """Return one parameter for the stub."""
    return f"{_name(part)}: Any" + (" = ..." if " = " in part else "")


if __name__ == "__main__":
    main()
