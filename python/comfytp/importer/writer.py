"""Writes a comfytp.Graph: short forms of its ops, views in terms of split and merge of dimensions, and the simplifications
that can be seen from one op to the one before it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import Graph
from .dtypes import NAMES, TORCH, computed
from .reshape import reshape_steps

# Larger tables are weights: a constant stands in the graph's text.
_MOST_CONSTANT_ELEMENTS = 256
_MOST_CONCAT_OPERANDS = 64


def rounds(number: float, dtype: str) -> bool:
    """Whether a dtype of 16 bits would round a number that torch holds in more."""
    return dtype in ("bf16", "f16") and float(torch.tensor(float(number), dtype=TORCH[dtype])) != number


@dataclass
class _Made:
    op: str
    inputs: tuple[int, ...]
    attrs: dict[str, Any] = field(default_factory=dict)


class GraphWriter:
    """Values are ints. A value of rank 0 is held as [1], since views have no rank 0; constants of rank 0 exist. halves: see
    computed()."""

    def __init__(self, halves: bool) -> None:
        self.graph = Graph()
        self._halves = halves
        self.tables: dict[str, torch.Tensor] = {}  # constants that are weights, by key
        self.name = ""  # of the nodes that are written now
        self._made: dict[int, _Made] = {}
        self._known: dict[Any, int] = {}
        self._outputs: list[int] = []

    # ---- what is known of a value

    def computed(self, dtype: torch.dtype) -> str:
        return computed(dtype, self._halves)

    def shape(self, value: int) -> tuple[int, ...]:
        return self.graph.shape(value)

    def dtype(self, value: int) -> str:
        return self.graph.dtype(value)

    def made(self, value: int, op: str) -> _Made | None:
        """How the value was made, if by that op."""
        made = self._made[value]
        return made if made.op == op else None

    def output(self, name: str, value: int) -> None:
        self.graph.output(name, value)
        self._outputs.append(value)

    def finish(self) -> tuple[str, set[str]]:
        """The graph's text without what no output needs, and the names of the inputs that are left."""
        needed, rest = set(), list(self._outputs)
        while rest:
            value = rest.pop()
            if value not in needed:
                needed.add(value)
                rest += self._made[value].inputs
        lines = str(self.graph).splitlines()
        kept = [line for line in lines if not line.startswith("%") or int(line[1 : line.index(" ")]) in needed]
        inputs = {self._made[value].attrs["name"] for value in needed if self._made[value].op == "input"}
        return "\n".join([*kept, ""]), inputs

    # ---- leaves

    def input(self, name: str, shape: Sequence[int], dtype: torch.dtype, varies: str) -> int:
        return self._note(self.graph.input(name, list(shape), self.computed(dtype), varies), "input", (), {"name": name})

    def weight(self, key: str, shape: Sequence[int], dtype: str) -> int:
        found = ("weight", key, tuple(shape), dtype)
        if found not in self._known:
            value = self.graph.weight(key, list(shape), dtype)
            self._known[found] = self._note(value, "weight", (), {"key": key})
        return self._known[found]

    def fill(self, number: float, dtype: str, shape: Sequence[int] = ()) -> int:
        """A constant of one number."""
        return self._constant([float(number)], dtype, shape)

    def table(self, tensor: torch.Tensor) -> int:
        """A tensor known at capture: a constant, or a weight of its own where it is large."""
        dtype = self.computed(tensor.dtype)
        tensor = tensor.detach().to("cpu", TORCH[dtype]).contiguous()
        shape = tuple(tensor.shape) or (1,)
        flat = tensor.reshape(-1)
        if flat.numel() and bool((flat == flat[0]).all()):
            return self._constant([float(flat[0])], dtype, shape)
        if flat.numel() <= _MOST_CONSTANT_ELEMENTS:
            return self._constant(flat.double().tolist(), dtype, shape)
        for key, known in self.tables.items():
            if known.dtype == tensor.dtype and torch.equal(known, tensor):
                return self.weight(key, shape, dtype)
        key = f"table.{len(self.tables)}"
        self.tables[key] = tensor
        return self.weight(key, shape, dtype)

    def _constant(self, values: list[float], dtype: str, shape: Sequence[int]) -> int:
        found = ("constant", tuple(map(repr, values)), dtype, tuple(shape))
        if found not in self._known:
            attrs = {"shape": list(shape), "dtype": dtype, "values": values}
            self._known[found] = self._note(self.graph.add("constant", [], attrs), "constant", (), attrs)
        return self._known[found]

    # ---- ops

    def op(self, op: str, *inputs: int, **attrs: Any) -> int:
        return self._note(self.graph.add(op, list(inputs), attrs, self.name), op, inputs, attrs)

    def cast(self, x: int, dtype: str) -> int:
        if self.dtype(x) == dtype:
            return x
        made = self._made[x]
        if made.op == "weight":
            return self.weight(made.attrs["key"], self.shape(x), dtype)
        if made.op == "constant" and len(made.attrs["values"]) == 1 and not dtype.startswith("i"):
            return self._constant(made.attrs["values"], dtype, self.shape(x))
        return self.op("cast", x, dtype=dtype)

    def transpose(self, x: int, order: Sequence[int]) -> int:
        made = self.made(x, "transpose")
        if made:
            x, order = made.inputs[0], [made.attrs["order"][d] for d in order]
        if list(order) == sorted(order):
            return x
        return self.op("transpose", x, order=list(order))

    def split_dim(self, x: int, dim: int, sizes: Sequence[int]) -> int:
        if len(sizes) == 1:
            return x
        made = self.made(x, "merge_dims")
        if made and made.attrs["dim"] == dim:
            before = self.shape(made.inputs[0])
            if list(before[dim : dim + made.attrs["count"]]) == list(sizes):
                return made.inputs[0]
        return self.op("split_dim", x, dim=dim, sizes=list(sizes))

    def merge_dims(self, x: int, dim: int, count: int) -> int:
        if count == 1:
            return x
        made = self.made(x, "split_dim")
        if made and made.attrs["dim"] == dim and len(made.attrs["sizes"]) == count:
            return made.inputs[0]
        return self.op("merge_dims", x, dim=dim, count=count)

    def reshape(self, x: int, shape: Sequence[int]) -> int:
        """The same elements in the same order, by splits and merges of dimensions alone."""
        steps = reshape_steps(self.shape(x), tuple(shape) or (1,))
        made = self._made[x]
        if steps and made.op in ("weight", "constant") and all(step.of_ones for step in steps):
            # Dimensions of size 1 come and go freely there.
            shape = tuple(shape) or (1,)
            if made.op == "weight":
                return self.weight(made.attrs["key"], shape, self.dtype(x))
            return self._constant(made.attrs["values"], self.dtype(x), shape)
        for step in steps:
            x = self.merge_dims(x, step.dim, step.count) if step.count else self.split_dim(x, step.dim, step.sizes)
        return x

    def slice(self, x: int, dim: int, start: int, stop: int, step: int = 1) -> int:
        size = self.shape(x)[dim]
        start, stop = max(0, min(start, size)), max(0, min(stop, size))
        if (start, stop, step) == (0, size, 1):
            return x
        made = self.made(x, "concat")
        if made and made.attrs["dim"] == dim and step == 1:
            at = 0
            for part in made.inputs:
                length = self.shape(part)[dim]
                if at <= start and stop <= at + length:
                    return self.slice(part, dim, start - at, stop - at)
                at += length
        attrs = {"dim": dim, "start": start, "stop": max(start, stop)}
        return self.op("slice", x, **attrs, **({"step": step} if step != 1 else {}))

    def concat(self, parts: Sequence[int], dim: int) -> int:
        parts = list(parts)
        while len(parts) > _MOST_CONCAT_OPERANDS:
            parts = [self.op("concat", *parts[:_MOST_CONCAT_OPERANDS], dim=dim), *parts[_MOST_CONCAT_OPERANDS:]]
        return parts[0] if len(parts) == 1 else self.op("concat", *parts, dim=dim)

    def expand(self, x: int, shape: Sequence[int]) -> int:
        """Broadcasts to `shape`; leading dimensions are added."""
        shape = tuple(shape) or (1,)
        x = self.reshape(x, (1,) * (len(shape) - len(self.shape(x))) + self.shape(x))
        if self.shape(x) == shape:
            return x
        made = self.made(x, "constant")
        if made and len(made.attrs["values"]) == 1:
            return self._constant(made.attrs["values"], self.dtype(x), shape)
        return self.op("expand", x, shape=list(shape))

    def scalar(self, op: str, x: int, number: float) -> int:
        """A number as the second operand, which must not be rounded to a dtype of 16 bits."""
        dtype = self.dtype(x)
        if rounds(number, dtype):
            return self.cast(self.op(op, self.cast(x, "f32"), self.fill(number, "f32")), dtype)
        return self.op(op, x, self.fill(number, dtype))

    def ungrouped(self, x: int, dim: int, groups: int) -> int | None:
        """For x whose dimension `dim` repeats each of `groups` rows next to itself: x without the repeats, else None."""
        if self.shape(x)[dim] == groups:
            return x
        if made := self.made(x, "transpose"):
            order = made.attrs["order"]
            inner = self.ungrouped(made.inputs[0], order[dim], groups)
            return None if inner is None else self.transpose(inner, order)
        made = self.made(x, "merge_dims")
        if not made or made.attrs["dim"] != dim or made.attrs["count"] != 2:
            return None
        made = self.made(made.inputs[0], "expand")
        if not made:
            return None
        before = self.shape(made.inputs[0])
        if before[dim] != groups or before[dim + 1] != 1 or math.prod(before) * (self.shape(x)[dim] // groups) != math.prod(self.shape(x)):
            return None
        return self.reshape(made.inputs[0], before[: dim + 1] + before[dim + 2 :])

    def _note(self, value: int, op: str, inputs: tuple[int, ...], attrs: dict[str, Any] | None = None) -> int:
        self._made[value] = _Made(op, tuple(inputs), attrs or {})
        return value


__all__ = ["NAMES", "GraphWriter"]
