"""Ranks: the processes that share one job, as torchrun launches them.

A process on its own is a rank too, `SINGLE`: it reduces, gathers and broadcasts to itself, which
takes nothing and needs no torch.distributed. So the code that shares work has one path.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ditas_export.errors import DistributedError, DitasExportError

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long ranks wait for each other: rank 0 verifies alone. Of a dead one they hear at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process's place among those that share the job; every rank calls the same methods.

    All but `mine` raise DistributedError if another rank is gone.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and speaks to the user."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's share of `items`: every `world_size`-th."""
        return items[self.rank :: self.world_size]

    def maximum_(self, tensor: Tensor) -> Tensor:
        """Replace every element by its largest over all ranks, in place; return the tensor."""
        return self._reduce(tensor, distributed.ReduceOp.MAX)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace every element by its sum over all ranks, in place; return the tensor."""
        return self._reduce(tensor, distributed.ReduceOp.SUM)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order of rank; tensors in them on the CPU."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        with _clear_loss():
            distributed.all_gather_object(gathered, value)
        return gathered

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0; tensors in it on the CPU."""
        if self.world_size == 1:
            return value
        box = [value if self.is_first else None]
        with _clear_loss():
            distributed.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Return once every rank has come here."""
        self.gather(None)

    def first(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0 alone and return its result on every rank.

        Raises:
            DitasExportError: the one that `function` raised, on every rank; of another error, an
                interruption among them, the other ranks get a DistributedError that says so.
        """
        if self.world_size == 1:
            return function()
        if not self.is_first:
            box: tuple[Any, DitasExportError | None] = self.broadcast((None, None))
            if box[1] is not None:
                raise box[1]
            return box[0]  # type: ignore[no-any-return]
        try:
            value = function()
        except BaseException as error:
            with suppress(DistributedError):  # another rank is gone: this one's error says more
                self.broadcast((None, self._as_told(error)))
            raise
        return self.broadcast((value, None))[0]

    def together(self, function: Callable[[], T]) -> T:
        """Run `function` on every rank and return this rank's result.

        Raises:
            DitasExportError: the one that `function` raised on the lowest rank where it did, on
                every rank; of another error, the other ranks get a DistributedError that says so.
        """
        if self.world_size == 1:
            return function()
        result: T | None = None
        own: Exception | None = None
        try:
            result = function()
        except Exception as error:  # the others are told, then it is raised
            own = error
        for raised in self.gather(None if own is None else self._as_told(own)):
            if raised is not None:
                raise own if own is not None and not isinstance(own, DitasExportError) else raised
        return result  # type: ignore[return-value]

    def _as_told(self, error: BaseException) -> DitasExportError:
        """Return what the other ranks raise where this one stops."""
        if isinstance(error, DitasExportError):
            return error
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        return DistributedError(f"rank {self.rank} has stopped: {reason}")

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        """All-reduce in place."""
        if self.world_size > 1:
            with _clear_loss():
                distributed.all_reduce(tensor, op=operation)
        return tensor


SINGLE = Ranks()
"""A process on its own."""


@contextmanager
def launched_ranks(device: str = "auto") -> Iterator[Ranks]:
    """Yield this process's place among those that torchrun launched; `SINGLE` without torchrun.

    Ranks talk over gloo; tensors on GPUs over NCCL, and `cuda` then means the GPU of LOCAL_RANK.

    Args:
        device: where the job computes: auto, cpu or cuda.

    Raises:
        DistributedError: a rank without a GPU of its own, or ranks that do not find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SINGLE
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        _take_gpu(int(os.environ["LOCAL_RANK"]))
    importlib.import_module("torch.distributed.nn")  # imported later, its defaults keep the group
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"the ranks do not find each other: {error}; launch them with torchrun"
        ) from error
    try:
        yield Ranks(rank=distributed.get_rank(), world_size=distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def cores_of_rank() -> int | None:
    """Return how many of a machine's cores are for each rank that torchrun launched on it.

    None for a process that has the machine to itself: runtimes then choose by themselves.
    """
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks_here == 1:
        return None
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, cores // ranks_here)


def _take_gpu(local_rank: int) -> None:
    """Make the GPU of this rank the current one."""
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise DistributedError(
            f"local rank {local_rank} has no GPU of its own, this machine has {count}; "
            f"launch at most {count} processes here, or use --device cpu"
        )
    torch.cuda.set_device(local_rank)


@contextmanager
def _clear_loss() -> Iterator[None]:
    """Say in one line that another rank is gone; its own output says why."""
    try:
        yield
    except RuntimeError as error:
        raise DistributedError("another rank has stopped; its own message says why") from error
