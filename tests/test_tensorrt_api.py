"""Every name that we use of TensorRT exists in 10.3 to 11.4 and in TensorRT for RTX.

The sources are parsed, types are followed from their annotations and from recorded signatures, and
what they use is looked up in the recorded APIs (scripts/record_tensorrt_api.py).
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RECORDED: dict[str, Any] = json.loads((ROOT / "tests/data/tensorrt_api.json").read_text())
VERSIONS = {"10.3.0", "10.13.3.9", "10.16.1.11", "11.0.0.114", "11.4.0.106"}


def script() -> ModuleType:
    path = ROOT / "scripts/record_tensorrt_api.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECORDER = script()


@dataclass(frozen=True)
class Use:
    """One use of the API: `member` of class `owner`, or `owner` itself of the module."""

    owner: str
    member: str
    arguments: int | None = None  # positional, of a call
    keywords: tuple[str, ...] = ()
    overrides: tuple[str, ...] | None = None  # parameters of a method that the builder calls
    guard: str | None = None  # used only where the module has this


@dataclass
class Follower:
    """Follows the types of one function's variables through its body."""

    types: dict[str, str]
    guard: str | None = None
    uses: set[Use] = field(default_factory=set)

    def use(self, owner: str, member: str, **call: Any) -> None:
        self.uses.add(Use(owner, member, guard=self.guard, **call))

    def type_of(self, node: ast.AST) -> str | None:
        """Return a class, "type C", "method C.m", "members C", or None for what is not TensorRT."""
        if isinstance(node, ast.Name):
            return self.types.get(node.id)
        if isinstance(node, ast.Attribute):
            return self.attribute(self.type_of(node.value), node.attr)
        if isinstance(node, ast.Call):
            return self.call(node)
        if isinstance(node, ast.Subscript):
            owner = self.type_of(node.value) or ""
            self.visit(node.slice)
            return owner.removeprefix("members ") if owner.startswith("members ") else None
        self.visit(node)
        return None

    def attribute(self, owner: str | None, name: str) -> str | None:
        if owner is None:
            return None
        if owner == "Module":
            self.use("Module", name)
            return f"type {name}"
        if owner.startswith("type "):
            enum = owner.removeprefix("type ")
            if name == "__members__":
                return f"members {enum}"
            self.use(enum, name)
            return enum
        if owner.startswith(("members ", "method ")):
            return None
        self.use(owner, name)
        return f"method {owner}.{name}"

    def call(self, node: ast.Call) -> str | None:
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.visit(argument)
        called = self.type_of(node.func) or ""
        if called.startswith("type "):
            return called.removeprefix("type ")
        if not called.startswith("method "):
            return None
        owner, _, member = called.removeprefix("method ").partition(".")
        keywords = tuple(str(keyword.arg) for keyword in node.keywords)
        self.use(owner, member, arguments=len(node.args), keywords=keywords)
        results = {RECORDER.returned(signature) for signature in signatures(owner, member)}
        return next((name for name in results if is_class(name)), None)

    def visit(self, node: ast.AST) -> None:
        """Follow every expression below a node; assignments name new variables."""
        for child in ast.iter_child_nodes(node) if not isinstance(node, ast.expr) else [node]:
            if isinstance(child, ast.Assign) and isinstance(child.targets[0], ast.Name):
                if found := self.type_of(child.value):
                    self.types[child.targets[0].id] = found
            elif isinstance(child, ast.Attribute | ast.Call | ast.Name | ast.Subscript):
                self.type_of(child)
            elif isinstance(child, ast.ClassDef):
                self.subclass(child)
            elif isinstance(child, ast.expr):
                for part in ast.iter_child_nodes(child):
                    self.visit(part)
            else:
                self.visit(child)

    def subclass(self, node: ast.ClassDef) -> None:
        """Note the methods that a class of ours gives the builder to call."""
        base = (self.type_of(node.bases[0]) or "").removeprefix("type ")
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                names = tuple(argument.arg for argument in method.args.args[1:])
                self.use(base, method.name, overrides=names)


def signatures(owner: str, member: str) -> Iterator[str]:
    for api in RECORDED.values():
        signature = api.get(owner, {}).get("class", {}).get(member)
        if signature is not None:
            yield signature


def is_class(name: str) -> bool:
    return any(name in api for api in RECORDED.values())


def guard_of(function: ast.FunctionDef) -> str | None:
    """Return NAME where a function starts with `if not hasattr(trt, NAME): raise …` or return."""
    first = function.body[1] if len(function.body) > 1 else function.body[0]
    match first:
        case ast.If(
            test=ast.UnaryOp(
                op=ast.Not(),
                operand=ast.Call(
                    func=ast.Name(id="hasattr"),
                    args=[ast.Name(id="trt"), ast.Constant(value=str(name))],
                ),
            ),
            body=[ast.Raise() | ast.Return()],
        ):
            return name
    return None


def rare_class(types: dict[str, str]) -> str | None:
    """Return a class that some versions lack: what takes one is called under the others only."""
    lacking = (
        name
        for name in types.values()
        if is_class(name) and not all(name in api for api in RECORDED.values())
    )
    return next(lacking, None)


def functions() -> list[ast.FunctionDef]:
    """Return the functions of our sources."""
    sources = (path.read_text(encoding="utf-8") for path in RECORDER.SOURCES)
    nodes = (node for source in sources for node in ast.parse(source).body)
    return [node for node in nodes if isinstance(node, ast.FunctionDef)]


def uses() -> set[Use]:
    """Return all that our sources use of the API."""
    found: set[Use] = set()
    for function in functions():
        types = {
            argument.arg: argument.annotation.id
            for argument in function.args.args
            if isinstance(argument.annotation, ast.Name)
        }
        guard = guard_of(function) or rare_class(types)
        follower = Follower(types={"trt": "Module"} | types, guard=guard)
        follower.visit(function)
        found |= follower.uses
    return {use for use in found if is_class(use.owner) or use.owner == "Module"}


USES = sorted(uses(), key=repr)


def matches(overrides: tuple[str, ...], names: list[str]) -> bool:
    """Return whether parameters are those that a method is called with; arg0, arg1 are no names."""
    if all(re.fullmatch(r"arg\d", name) for name in names):
        return len(overrides) == len(names)
    return list(overrides) == names


def problem(use: Use, api: Any) -> str | None:
    """Return what is wrong with a use under one version, None if nothing is."""
    if use.guard is not None and use.guard not in api:
        return None
    if use.owner == "Module":
        return None if use.member in api or use.member == "__version__" else "no such class"
    (members,) = api.get(use.owner, {"class": {}}).values()
    if use.member not in members:
        return "no such member"
    signature = str(members[use.member])
    if "(*args" in signature or signature == "property" or signature.isdigit():
        return None
    names = RECORDER.parameters(signature)
    if use.overrides is not None and not matches(use.overrides, names):
        return f"overridden with {use.overrides}, called with {names}"
    if use.arguments is not None and use.arguments + len(use.keywords) > len(names):
        return f"{use.arguments} arguments for {names}"
    unknown = set(use.keywords) - set(names)
    return f"unknown keywords {unknown}" if unknown else None


def test_the_source_is_followed() -> None:
    found = {(use.owner, use.member) for use in USES}
    assert found >= {
        ("Module", "Builder"),
        ("Builder", "build_serialized_network"),
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
        ("OnnxParser", "get_error"),
        ("OnnxParser", "num_errors"),
        ("IBuilderConfig", "progress_monitor"),
        ("IBuilderConfig", "set_compute_capability"),
        ("IBuilderConfig", "builder_optimization_level"),
        ("IOptimizationProfile", "set_shape"),
        ("ITimingCache", "serialize"),
        ("IProgressMonitor", "step_complete"),
        ("ILogger", "log"),
        ("BuilderFlag", "VERSION_COMPATIBLE"),
        ("Runtime", "deserialize_cuda_engine"),
        ("ICudaEngine", "get_tensor_profile_shape"),
        ("ICudaEngine", "create_execution_context"),
        ("IExecutionContext", "execute_async_v3"),
        ("IExecutionContext", "set_tensor_address"),
        ("IErrorRecorder", "report_error"),
        ("IRuntimeConfig", "set_runtime_cache"),
        ("IRuntimeCache", "serialize"),
        ("CudaGraphStrategy", "WHOLE_GRAPH_CAPTURE"),
        ("DynamicShapesKernelSpecializationStrategy", "EAGER"),
        ("EngineInspector", "get_engine_information"),
    }
    assert {use.guard for use in USES} == {None, "ComputeCapability", "IRuntimeCache"}


@pytest.mark.parametrize("version", sorted(RECORDED))
@pytest.mark.parametrize("use", USES, ids=lambda use: f"{use.owner}.{use.member}")
def test_every_version_has_it(use: Use, version: str) -> None:
    assert problem(use, RECORDED[version]) is None


def test_all_versions_are_recorded() -> None:
    assert {f"tensorrt-{version}" for version in VERSIONS} <= set(RECORDED)
    assert sum(name.startswith("tensorrt_rtx-") for name in RECORDED) == 1


def test_the_installed_product_has_it() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="extra [rtx]")
    for use in USES:
        assert hasattr(rtx if use.owner == "Module" else getattr(rtx, use.owner), use.member), use


@pytest.mark.parametrize(
    "use",
    [
        Use("IBuilderConfig", "max_workspace_size"),  # of TensorRT 8
        Use("BuilderFlag", "INT8"),  # of TensorRT 10
        Use("IBuilderConfig", "num_compute_capabilities"),  # of TensorRT for RTX
        Use("IBuilderConfig", "set_flag", arguments=2),
        Use("IBuilderConfig", "set_timing_cache", arguments=1, keywords=("strict",)),
        Use("IProgressMonitor", "step_complete", overrides=("phase", "step")),
        Use("IErrorRecorder", "report_error", overrides=("code",)),
        Use("Module", "EngineInspector2"),
    ],
)
def test_what_is_missing_is_found(use: Use) -> None:
    assert problem(use, RECORDED["tensorrt-11.4.0.106"]) is not None


def test_the_stub_is_that_of_the_recording() -> None:
    stub = ROOT / "ditas_export/engine/tensorrt_api.pyi"
    assert stub.read_text(encoding="utf-8") == RECORDER.stub(RECORDED)


def test_the_stub_is_not_needed_to_run() -> None:
    assert importlib.util.find_spec("ditas_export.engine.tensorrt_api") is None
