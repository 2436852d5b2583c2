"""A CUDA graph acted out on the CPU: what is recorded is not computed, and is repeated as it was.

Replaying knows tensors by where they lie and numbers by what they were, as a GPU does: a step that
reads a new tensor, or a number that Python would have changed, comes out wrong here too. What only
a GPU can show stays open: `make test-gpu`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(*nested: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, torch.Tensor)]


def place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """Notes every operation, what it was given and what it made, and how all that was before."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.before = [], {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        for memory in (t.untyped_storage() for t in tensors(args, kwargs)):
            if memory.data_ptr() not in self.before:
                self.before[memory.data_ptr()] = memory, memory.clone()
        made = operation(*args, **kwargs)
        self.operations.append((operation, args, kwargs, made))
        return made


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    made: list[Graph] = []

    def __init__(self) -> None:
        self.replays = 0
        Graph.made.append(self)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for operation, args, kwargs, made in self.tape.operations:
            read = {place(t) for t in tensors(args, kwargs)}
            for old, new in zip(tensors(made), tensors(operation(*args, **kwargs)), strict=True):
                if place(old) not in read:  # neither a view nor written in place
                    old.copy_(new)


@contextlib.contextmanager
def record(graph: Graph, stream: Stream | None = None) -> Iterator[None]:
    """Stands in for `torch.cuda.graph`, whose own stream belongs to the GPU that first used it."""
    graph.stream = stream
    with Tape() as graph.tape:
        yield
    for memory, before in graph.tape.before.values():
        memory.copy_(before)


class Stream:
    """Stands in for a stream and for the block that computes on it."""

    taken = 0

    def wait_stream(self, other: Stream) -> None:
        pass

    def __enter__(self) -> None:
        Stream.taken += 1

    def __exit__(self, *_: object) -> None:
        pass


def install(put: Callable[[Any, str, Any], None]) -> None:
    """Put the stand-ins in place with `monkeypatch.setattr`."""
    Graph.made, Stream.taken = [], 0
    put(torch.cuda, "CUDAGraph", Graph)
    put(torch.cuda, "graph", record)
    put(torch.cuda, "Stream", Stream)
    put(torch.cuda, "current_stream", Stream)
    put(torch.cuda, "stream", lambda stream: stream)
    put(torch.cuda, "device", lambda device: contextlib.nullcontext())
