"""Walks a captured graph and writes each node by its op's entry in the table."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..capture import Captured
from ..unsupported import Unsupported
from ..writer import GraphWriter
from .complex import COMPLEX, Pair, pair_of_table

TABLE: dict[str, Callable[..., Any]] = {}
# Ops whose result is random: nothing that hangs on them can be known ahead.
_RANDOM = ("rand", "normal", "bernoulli", "dropout", "multinomial", "exponential")


def translates(*ops: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function the entry of ATen ops, "add.Tensor" or all overloads "add".

    It gets the translator, the fx node and the op's arguments: values of the graph as Value, numbers, lists and None as they
    are; and returns the value, or a list of them.
    """

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        for op in ops:
            TABLE[op] = function
        return function

    return enter


class Value(int):
    """A value of the graph, told apart from a number."""


class Translator:
    """known: what placeholders hold that is known now and does not change between calls (buffers, constants, inputs whose
    contents belong to the key), by their name in the module, or number for an input. names, varies: of the inputs. halves: see
    computed()."""

    def __init__(self, captured: Captured, known: Mapping[Any, torch.Tensor], varies: Sequence[str], names: Sequence[str], halves: bool) -> None:
        self.writer = GraphWriter(halves)
        self._captured = captured
        self._known = known
        self._varies = varies
        self._names = names
        self._values: dict[torch.fx.Node, Any] = {}
        self._written: dict[torch.fx.Node, Any] = {}

    def run(self) -> GraphWriter:
        """Raises Unsupported naming the op and the place."""
        for node in self._captured.module.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = self._placeholder(node)
            elif node.op == "call_function":
                self.writer.name = _place(node)
                self._values[node] = self._call(node)
            elif node.op != "output":
                raise Unsupported(f"node {node.name} of kind {node.op} is not supported")
        for i, output in enumerate(self._captured.outputs):
            if isinstance(output, torch.fx.Node):
                value = self._argument(output)
                if isinstance(value, Pair):
                    raise Unsupported("an output of complex numbers is not supported")
                self.writer.output(f"output.{i}", value)
        return self.writer

    # ---- what entries ask

    def shape(self, node: torch.fx.Node) -> tuple[int, ...]:
        return tuple(node.meta["val"].shape)

    def dtype(self, node: torch.fx.Node) -> str:
        return self.writer.computed(node.meta["val"].dtype)

    def operand(self, value: Any, dtype: str) -> int:
        """A value or a number in a dtype."""
        return self.writer.cast(value, dtype) if isinstance(value, Value) else self.writer.fill(float(value), dtype)

    def call(self, op: str, node: torch.fx.Node, *args: Any, **kwargs: Any) -> Any:
        """Another entry of the table, for an op that is its special case."""
        return TABLE[op](self, node, *args, **kwargs)

    # ---- nodes

    def _placeholder(self, node: torch.fx.Node) -> Any:
        kind, name = self._captured.sources[node.name]
        if kind == "input" and name not in self._known:
            tensor = node.meta["val"]
            shape = tuple(tensor.shape) or (1,)
            if tensor.is_complex():
                raise Unsupported(f"input {self._names[name]} of complex numbers is not supported")
            return Value(self.writer.input(self._names[name], shape, tensor.dtype, self._varies[name]))
        if kind == "parameter":
            return _Parameter(name)
        return self._known[name]

    def _call(self, node: torch.fx.Node) -> Any:
        target = node.target
        if target is operator.getitem:
            values = self._values[node.args[0]]
            return values[node.args[1]]
        if not isinstance(target, torch._ops.OpOverload):
            raise Unsupported(f"op {target} at {_place(node) or node.name} is not supported")
        try:
            if self._is_known(node):
                return self._fold(node)
            name = str(target).removeprefix("aten.")
            args = torch.fx.map_arg(node.args, self._argument)
            kwargs = torch.fx.map_arg(node.kwargs, self._argument)
            if any(isinstance(a, Pair) for a in _flat(args)) or _is_complex(node.meta.get("val")):
                entry = COMPLEX.get(name) or COMPLEX.get(name.partition(".")[0])
                if entry is None:
                    raise Unsupported(f"op {target} on complex numbers is not supported")
                return entry(self, node, *args, **kwargs)
            entry = TABLE.get(name) or TABLE.get(name.partition(".")[0])
            if entry is None:
                raise Unsupported(f"op {target} is not supported")
            return self._checked(node, entry(self, node, *args, **kwargs))
        except Unsupported as error:
            raise Unsupported(f"{error} (in {_place(node) or node.name})") from None
        except Exception as error:  # arguments that the entry does not know, operands that the engine's op does not take
            raise Unsupported(f"op {target} is not supported as it is used in {_place(node) or node.name}: {type(error).__name__}: {error}") from error

    def _checked(self, node: torch.fx.Node, result: Any) -> Any:
        """The result has the captured shape and dtype, or the entry is wrong."""
        if isinstance(result, (list, tuple)):
            return [Value(v) for v in result]
        if result is None:
            return None
        tensor = node.meta["val"]
        shape, dtype = tuple(tensor.shape) or (1,), self.writer.computed(tensor.dtype)
        if not tensor.shape and self.writer.shape(result) == ():
            shape = ()
        got = (self.writer.dtype(result), self.writer.shape(result))
        if got != (dtype, shape):
            raise Unsupported(f"op {node.target} should give {dtype}{list(shape)} but its translation gives {got[0]}{list(got[1])}")
        return Value(result)

    def _argument(self, node: torch.fx.Node) -> Any:
        """A node's result as entries get it; leaves are written when something reads them."""
        if node not in self._written:
            self._written[node] = self._write(self._values[node], node)
        return self._written[node]

    def _write(self, value: Any, node: torch.fx.Node) -> Any:
        if isinstance(value, _Parameter):
            tensor = node.meta["val"]
            return Value(self.writer.weight(value.key, tuple(tensor.shape) or (1,), self.writer.computed(tensor.dtype)))
        if isinstance(value, torch.Tensor):
            return pair_of_table(self.writer, value) if value.is_complex() else Value(self.writer.table(value))
        return value

    def _is_known(self, node: torch.fx.Node) -> bool:
        if any(word in str(node.target) for word in _RANDOM):
            return False
        return all(_is_tensors(self._values[n]) for n in node.all_input_nodes)

    def _fold(self, node: torch.fx.Node) -> Any:
        args = torch.fx.map_arg(node.args, lambda n: self._values[n])
        kwargs = torch.fx.map_arg(node.kwargs, lambda n: self._values[n])
        if "empty" in str(node.target):
            fake = node.meta["val"]
            return torch.zeros(fake.shape, dtype=fake.dtype)  # whatever it holds is overwritten
        with torch.no_grad():
            return node.target(*args, **{**kwargs, **({"device": torch.device("cpu")} if "device" in kwargs else {})})


class _Parameter:
    """A parameter that nothing has read yet."""

    def __init__(self, key: str) -> None:
        self.key = key


def _is_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_tensors(v) for v in value)
    return isinstance(value, torch.Tensor) or value is None


def _is_complex(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_complex()


def _flat(args: Any) -> list[Any]:
    if isinstance(args, (list, tuple)):
        return [leaf for arg in args for leaf in _flat(arg)]
    return [args]


def _place(node: torch.fx.Node) -> str:
    """Where a node stands in the module: "transformer_blocks.0.attn.to_q"."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.removeprefix("L['self'].").removeprefix("module").removeprefix(".")
