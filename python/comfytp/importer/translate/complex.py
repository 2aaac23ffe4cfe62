"""Complex numbers, which rotary embeddings are written in, as pairs of real values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..unsupported import Unsupported
from ..writer import GraphWriter

if TYPE_CHECKING:
    from .translator import Translator

COMPLEX: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class Pair:
    real: int
    imag: int


def pair_of_table(writer: GraphWriter, tensor: torch.Tensor) -> Pair:
    real, imag = (writer.table(part.contiguous()) for part in (tensor.real, tensor.imag))
    return Pair(_value(real), _value(imag))


def _value(x: int) -> int:
    from .translator import Value

    return Value(x)


def _enter(*ops: str):
    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        for op in ops:
            COMPLEX[op] = function
        return function

    return enter


@_enter("view_as_complex")
def _view_as_complex(t: "Translator", node: torch.fx.Node, x: int) -> Pair:
    w, last = t.writer, len(t.writer.shape(x)) - 1
    shape = w.shape(x)[:last]
    return Pair(*(_value(w.reshape(w.slice(x, last, i, i + 1), shape)) for i in (0, 1)))


@_enter("view_as_real")
def _view_as_real(t: "Translator", node: torch.fx.Node, x: Pair) -> int:
    w = t.writer
    shape = (*w.shape(x.real), 1)
    return _value(w.concat([w.reshape(x.real, shape), w.reshape(x.imag, shape)], len(shape) - 1))


@_enter("mul.Tensor")
def _mul(t: "Translator", node: torch.fx.Node, a: Any, b: Any) -> Pair:
    w = t.writer
    if not isinstance(a, Pair):
        a, b = b, a
    if not isinstance(b, Pair):
        factor = t.operand(b, w.dtype(a.real))
        return Pair(_value(w.op("mul", a.real, factor)), _value(w.op("mul", a.imag, factor)))
    real = w.op("sub", w.op("mul", a.real, b.real), w.op("mul", a.imag, b.imag))
    imag = w.op("add", w.op("mul", a.real, b.imag), w.op("mul", a.imag, b.real))
    return Pair(_value(real), _value(imag))


@_enter("add.Tensor", "sub.Tensor")
def _sum(t: "Translator", node: torch.fx.Node, a: Any, b: Any) -> Pair:
    op = "add" if "add" in str(node.target) else "sub"
    if not (isinstance(a, Pair) and isinstance(b, Pair)):
        raise Unsupported("a sum of a complex and a real number is not supported")
    return Pair(_value(t.writer.op(op, a.real, b.real)), _value(t.writer.op(op, a.imag, b.imag)))


@_enter("polar")
def _polar(t: "Translator", node: torch.fx.Node, length: int, angle: int) -> Pair:
    w = t.writer
    return Pair(*(_value(w.op("mul", length, w.op(op, angle))) for op in ("cos", "sin")))


@_enter("complex")
def _complex(t: "Translator", node: torch.fx.Node, real: int, imag: int) -> Pair:
    return Pair(real, imag)


@_enter("real", "imag", "view_as_real_copy")
def _part(t: "Translator", node: torch.fx.Node, x: Pair) -> int:
    return x.real if "real" in str(node.target) else x.imag


@_enter("_conj", "conj", "_conj_physical")
def _conj(t: "Translator", node: torch.fx.Node, x: Pair) -> Pair:
    return Pair(x.real, _value(t.writer.op("neg", x.imag)))


@_enter("_to_copy")
def _to_copy(t: "Translator", node: torch.fx.Node, x: Any, dtype: Any = None, **_: Any) -> Pair:
    w = t.writer
    if isinstance(x, Pair):
        return Pair(_value(w.cast(x.real, "f32")), _value(w.cast(x.imag, "f32")))
    return Pair(_value(w.cast(x, "f32")), _value(w.fill(0.0, "f32", w.shape(x))))


def _each(name: str) -> Callable[..., Any]:
    """What only moves elements does the same to both parts."""

    def run(t: "Translator", node: torch.fx.Node, *args: Any, **kwargs: Any) -> Any:
        from .translator import TABLE

        halves = [TABLE[name](t, node, *_half(args, part), **_half(kwargs, part)) for part in ("real", "imag")]
        if isinstance(halves[0], (list, tuple)):
            return [Pair(_value(a), _value(b)) for a, b in zip(*halves, strict=True)]
        return Pair(_value(halves[0]), _value(halves[1]))

    return run


def _half(value: Any, part: str) -> Any:
    if isinstance(value, Pair):
        return getattr(value, part)
    if isinstance(value, (list, tuple)):
        return [_half(v, part) for v in value]
    if isinstance(value, dict):
        return {key: _half(v, part) for key, v in value.items()}
    return value


for _op in (
    "view", "reshape", "_unsafe_view", "permute", "transpose", "unsqueeze", "squeeze", "expand", "repeat", "slice", "select", "cat", "stack",
    "clone", "alias", "detach", "split", "split_with_sizes", "unbind", "index", "index_select", "flatten", "neg",
):  # fmt: skip
    COMPLEX[_op] = _each(_op)
