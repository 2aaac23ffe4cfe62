"""From a module and a call's arguments to a graph and what a call needs besides it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .capture import Captured, capture
from .patterns import find_norms
from .translate import Translator
from .unsupported import Unsupported


@dataclass
class Program:
    """graph: its text. tables: weights beside the module's own, by key. inputs: the names of the tensors among the leaves, in
    order, None for those that the graph does not read. outputs: for each leaf of the result the output's name and rank-0-ness,
    or a value that is no tensor. out_spec: torch's tree of the result."""

    graph: str
    tables: dict[str, torch.Tensor]
    inputs: list[str | None]
    outputs: list[Any]
    out_spec: Any


@dataclass(frozen=True)
class Output:
    """A tensor of the result: the graph's output of that name, of `shape` and `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def import_call(
    module: torch.nn.Module,
    leaves: list[Any],
    spec: Any,
    names: Sequence[str],
    varies: Sequence[str],
    contents: Mapping[int, torch.Tensor] | None,
    halves: bool,
) -> Program:
    """names and varies ("call" or "prompt"): of each tensor among the leaves. contents: of those, by their number, that are
    part of what the program is made for. halves: devices compute in f16, otherwise what is f16 is widened. Raises Unsupported."""
    captured = capture(module, leaves, spec, contents)
    find_norms(captured.module.graph)
    known = {name: tensor.detach().to("cpu") for name, tensor in {**_known(module, captured), **(contents or {})}.items()}
    writer = Translator(captured, known, varies, names, halves).run()
    outputs: list[Any] = []
    for i, value in enumerate(captured.outputs):
        if isinstance(value, torch.fx.Node):
            tensor = value.meta["val"]
            value = Output(f"output.{i}", tuple(tensor.shape), tensor.dtype)
        elif isinstance(value, torch.Tensor):
            raise Unsupported("a result that is a fixed tensor is not supported")
        outputs.append(value)
    graph, read = writer.finish()
    tables = {key: table for key, table in writer.tables.items() if f'key="{key}"' in graph}
    return Program(graph, tables, [name if name in read else None for name in names], outputs, captured.out_spec)


def _known(module: torch.nn.Module, captured: Captured) -> dict[Any, torch.Tensor]:
    buffers = dict(module.named_buffers(remove_duplicate=False))
    known: dict[Any, torch.Tensor] = dict(captured.constants)
    for kind, name in captured.sources.values():
        if kind == "buffer":
            known[name] = buffers[name]
    return known
