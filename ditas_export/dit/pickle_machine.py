"""A stack machine for pickles, of which nothing can be called.

A pickle is a program. This reader follows its instructions by itself: containers, numbers, text and
tensors come out, and every other object becomes an `Inert`, which says what would have been called
with what, and is never called.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "UntypedStorage": torch.uint8,
}
"""Element types by the name of the storage's class."""

_CONTAINERS = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict")
_SEQUENCES = {"torch.Size": tuple, "builtins.set": set, "builtins.frozenset": frozenset}
_WRAPPED_TENSORS = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor",
    "torch.nn.parameter.Parameter",
)
"""Makers whose first argument is the tensor."""


@dataclass(slots=True, eq=False)
class Inert:
    """An object of a pickle that was not made: what would have been called, and with what."""

    name: str  # of the class or function, with its module
    args: tuple[Any, ...] = ()
    state: Any = None
    entries: dict[Any, Any] = field(default_factory=dict)
    items: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes that tensors lie in."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class PendingTensor:
    """A tensor that has no bytes yet, and where in its storage they are, in elements."""

    tensor: Tensor
    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


_MARK = object()

_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
    "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
"""Instructions that give a number, text or bytes."""


class PickleReader:
    """The stack machine of pickles, of which nothing can be called."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self.pending: list[PendingTensor] = []
        self.not_made: dict[str, None] = {}  # in the order of the pickle, each once
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, source: Any) -> Any:
        """Follow a pickle from where `source`, bytes or a file, stands, and return what it makes.

        Raises:
            ValueError: an instruction that no checkpoint needs; others for damaged bytes.
        """
        for opcode, arg, _ in pickletools.genops(source):
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, arg)
        raise EOFError("a pickle without an end")

    def _step(self, name: str, arg: Any) -> None:
        """Follow one instruction."""
        stack = self._stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_DICT" | "EMPTY_SET":
                stack.append({"L": list, "T": tuple, "D": dict, "S": set}[name[6]]())
            case "MARK":
                stack.append(_MARK)
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._to_mark()
            case "DUP":
                stack.append(stack[-1])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE" | "LIST" | "FROZENSET":
                made = {"TUPLE": tuple, "LIST": list, "FROZENSET": frozenset}[name]
                stack.append(made(self._to_mark()))
            case "DICT":
                stack.append(_paired(self._to_mark()))
            case "APPEND":
                self._extend([stack.pop()])
            case "APPENDS" | "ADDITEMS":
                self._extend(self._to_mark())
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._update({key: value})
            case "SETITEMS":
                self._update(_paired(self._to_mark()))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[int(arg)] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[int(arg)])
            case "GLOBAL":
                stack.append(_named(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_named(str(module), str(attribute)))
            case "INST":
                stack.append(self._make(_named(*arg.split(" ", 1)), tuple(self._to_mark())))
            case "OBJ":
                kind, *args = self._to_mark()
                stack.append(self._make(kind, tuple(args)))
            case "REDUCE" | "NEWOBJ":
                args, kind = stack.pop(), stack.pop()
                stack.append(self._make(kind, tuple(args)))
            case "NEWOBJ_EX":
                keywords, args, kind = stack.pop(), stack.pop(), stack.pop()
                stack.append(self._make(kind, (*args, keywords) if keywords else tuple(args)))
            case "BUILD":
                self._build(stack.pop())
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case _ if name in _VALUES:
                stack.append(arg)
            case _:
                raise ValueError(f"a pickle with the instruction {name}")

    def _to_mark(self) -> list[Any]:
        """Take what lies above the last mark, and the mark."""
        place = len(self._stack) - 1
        while self._stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("a pickle with a mark missing")
        taken = self._stack[place + 1 :]
        del self._stack[place:]
        return taken

    def _extend(self, items: list[Any]) -> None:
        """Add items to the list, set or object on top."""
        top = self._stack[-1]
        if isinstance(top, set):
            top.update(items)
        else:
            (top.items if isinstance(top, Inert) else top).extend(items)

    def _update(self, entries: Mapping[Any, Any]) -> None:
        """Add entries to the dict or object on top."""
        top = self._stack[-1]
        (top.entries if isinstance(top, Inert) else top).update(entries)

    def _build(self, state: Any) -> None:
        """Keep the state of an object; what it does to a tensor or a container is left out."""
        if isinstance(top := self._stack[-1], Inert):
            top.state = state

    def _storage(self, told: Any) -> Storage:
        """Return the storage that a persistent id names."""
        what, kind, key, _location, numel, *view = told
        if what != "storage" or (view and view[0] is not None):
            raise ValueError(f"a pickle that refers to {str(what)[:40]}")
        name = kind.name.rpartition(".")[2] if isinstance(kind, Inert) else str(kind)
        if not isinstance(key, str) or not _is_count(numel):
            raise ValueError("a storage without key or size")
        storage = Storage(key, _DTYPES[name], numel)
        return self.storages.setdefault(key, storage)

    def _make(self, kind: Any, args: tuple[Any, ...]) -> Any:
        """Return what a call stands for: a tensor, a container, or an object that is not made."""
        name = kind.name if isinstance(kind, Inert) else type(kind).__name__
        if name == "torch._tensor._rebuild_from_type_v2" and len(args) == 4:
            return self._make(args[0], tuple(args[2]))
        if (made := self._tensor(name, args)) is not None:
            return made
        if name in _WRAPPED_TENSORS and args and isinstance(args[0], Tensor):
            return args[0]
        if name in _CONTAINERS:
            return dict(args[0]) if args and not isinstance(args[0], Inert) else {}
        if name in _SEQUENCES and args and isinstance(args[0], list | tuple):
            return _SEQUENCES[name](args[0])
        if name == "_codecs.encode" and args[1:] == ("latin1",):
            return str(args[0]).encode("latin1")  # bytes in pickles of protocol 2
        self.not_made.setdefault(name)
        return Inert(name, args)

    def _tensor(self, name: str, args: tuple[Any, ...]) -> Tensor | None:
        """Return the tensor of a call that rebuilds a plain one, None for any other."""
        version = name.removeprefix("torch._utils._rebuild_tensor")
        if version not in ("", "_v2", "_v3") or not args or not isinstance(args[0], Storage):
            return None
        storage, offset, size, stride = args[:4]
        extra = args[7 if version == "_v3" else 6 :]  # conjugate or negative views
        if any(extra):
            return None
        dtype = storage.dtype
        if version == "_v3":
            dtype = args[6]
            if not isinstance(dtype, torch.dtype):
                raise ValueError("a tensor without an element type")
        pending = PendingTensor(
            torch.empty(0, dtype=dtype), storage, offset, tuple(size), tuple(stride)
        )
        _require_room(pending)
        self.pending.append(pending)
        return pending.tensor


def _named(module: str, attribute: str) -> Any:
    """Return what a name in a pickle stands for: an element type, or an object that is not made."""
    if module == "torch" and isinstance(found := getattr(torch, attribute, None), torch.dtype):
        return found
    modules = {"__builtin__": "builtins", "torch.tensor": "torch._tensor"}
    return Inert(f"{modules.get(module, module)}.{attribute}")


def _paired(items: list[Any]) -> dict[Any, Any]:
    """Return a dict of keys and values in turn."""
    return dict(zip(items[::2], items[1::2], strict=True))


def _is_count(value: object) -> bool:
    """Return whether a value is a whole number of 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require_room(pending: PendingTensor) -> None:
    """Refuse a tensor that reaches beyond its storage, or has more elements than that."""
    counts = (pending.offset, *pending.size, *pending.stride)
    if not all(map(_is_count, counts)) or len(pending.size) != len(pending.stride):
        raise ValueError("a tensor of no shape")
    elements = math.prod(pending.size)
    available = pending.storage.nbytes // pending.tensor.dtype.itemsize
    reach = pending.offset + sum(
        (size - 1) * stride for size, stride in zip(pending.size, pending.stride, strict=True)
    )
    if elements and (reach >= available or elements > available):
        raise ValueError("a tensor of more elements than are stored")
