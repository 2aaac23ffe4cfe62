"""Sums, means, extremes and softmax."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..unsupported import Unsupported
from .translator import Translator, Value, translates


def _dims(t: Translator, x: Value, dims: Any) -> list[int]:
    rank = len(t.writer.shape(x))
    if dims is None or dims == []:
        return list(range(rank))
    return sorted(d % rank for d in ([dims] if isinstance(dims, int) else dims))


def _reduce(t: Translator, node: torch.fx.Node, op: str, x: Value, dims: Any) -> int:
    return t.writer.op(op, t.writer.cast(x, t.dtype(node)), dims=_dims(t, x, dims))


@translates("sum")
def _sum(t: Translator, node: torch.fx.Node, x: Value, dims: Sequence[int] | None = None, *_: Any, **__: Any) -> int:
    return t.writer.reshape(_reduce(t, node, "sum", x, dims), t.shape(node))


@translates("mean")
def _mean(t: Translator, node: torch.fx.Node, x: Value, dims: Sequence[int] | None = None, *_: Any, **__: Any) -> int:
    return t.writer.reshape(mean(t, Value(t.writer.cast(x, t.dtype(node))), _dims(t, x, dims)), t.shape(node))


def mean(t: Translator, x: int, dims: list[int]) -> int:
    """Keeps the dimensions. Summed in f32."""
    w = t.writer
    count = math.prod(w.shape(x)[d] for d in dims)
    total = w.op("sum", w.cast(x, "f32"), dims=dims)
    return w.cast(w.op("mul", total, w.fill(1 / count, "f32")), w.dtype(x))


@translates("amax", "max.default")
def _amax(t: Translator, node: torch.fx.Node, x: Value, dims: Any = None, *_: Any) -> int:
    return t.writer.reshape(t.writer.op("amax", x, dims=_dims(t, x, dims)), t.shape(node))


@translates("amin", "min.default")
def _amin(t: Translator, node: torch.fx.Node, x: Value, dims: Any = None, *_: Any) -> int:
    w = t.writer
    return w.reshape(w.op("neg", w.op("amax", w.op("neg", x), dims=_dims(t, x, dims))), t.shape(node))


@translates("var", "var_mean")
def _var(t: Translator, node: torch.fx.Node, x: Value, dims: Any = None, *, correction: float | None = 1, keepdim: bool = False, **__: Any) -> Any:
    w = t.writer
    dims = _dims(t, x, dims)
    count = math.prod(w.shape(x)[d] for d in dims)
    wide = w.cast(x, "f32")
    average = mean(t, wide, dims)
    off = w.op("sub", wide, average)
    squares = w.op("sum", w.op("mul", off, off), dims=dims)
    variance = w.op("mul", squares, w.fill(1 / (count - (1 if correction is None else correction)), "f32"))
    values = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else (node.meta["val"],)
    results = [w.reshape(w.cast(y, w.dtype(x)), tuple(v.shape)) for y, v in zip((variance, average), values)]
    return results if "mean" in str(node.target) else results[0]


@translates("linalg_vector_norm", "norm")
def _norm(t: Translator, node: torch.fx.Node, x: Value, order: float = 2, dims: Any = None, *_: Any, **__: Any) -> int:
    w = t.writer
    if order != 2:
        raise Unsupported(f"a norm of order {order} is not supported")
    wide = w.cast(x, "f32")
    y = w.op("sqrt", w.op("sum", w.op("mul", wide, wide), dims=_dims(t, x, dims)))
    return w.reshape(w.cast(y, t.dtype(node)), t.shape(node))


@translates("softmax.int", "_softmax", "_safe_softmax")
def _softmax(t: Translator, node: torch.fx.Node, x: Value, dim: int, *_: Any) -> int:
    w = t.writer
    return w.op("softmax", w.cast(x, t.dtype(node)), dim=dim % len(w.shape(x)))


@translates("_log_softmax", "log_softmax.int")
def _log_softmax(t: Translator, node: torch.fx.Node, x: Value, dim: int, *_: Any) -> int:
    """By the largest score, so that no exponential overflows."""
    w = t.writer
    dims = _dims(t, x, dim)
    x = Value(w.cast(x, t.dtype(node)))
    low = w.op("sub", x, w.op("amax", x, dims=dims))
    return w.op("sub", low, w.op("log", w.op("sum", w.op("exp", low), dims=dims)))


@translates("cumsum")
def _cumsum(t: Translator, node: torch.fx.Node, x: Value, dim: int, *_: Any, **__: Any) -> int:
    """A product with a triangle of ones."""
    w = t.writer
    rank = len(w.shape(x))
    dim %= rank
    dtype = t.dtype(node)
    order = [*(d for d in range(rank) if d != dim), dim]
    triangle = w.table(torch.ones(w.shape(x)[dim], w.shape(x)[dim]).triu())
    flat = w.transpose(w.cast(x, "f32"), order)
    rows = w.reshape(flat, (math.prod(w.shape(flat)[:-1]), w.shape(flat)[-1]))
    y = w.reshape(w.op("matmul", rows, triangle), w.shape(flat))
    return w.cast(w.transpose(y, [order.index(d) for d in range(rank)]), dtype)
