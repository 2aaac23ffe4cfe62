"""Ops that only move elements. Reshapes become splits and merges of dimensions, so that a part can follow them."""

from collections.abc import Sequence
from typing import Any

import torch

from ..unsupported import Unsupported
from .translator import Translator, Value, translates


def _dim(t: Translator, x: Value, dim: int) -> int:
    return dim % max(1, len(t.writer.shape(x)))


@translates("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten", "view_copy")
def _reshape(t: Translator, node: torch.fx.Node, x: Value, *_: Any) -> int:
    if str(node.target) == "aten.view.dtype":
        raise Unsupported("a view as another dtype is not supported")
    return t.writer.reshape(x, t.shape(node))


@translates("permute")
def _permute(t: Translator, node: torch.fx.Node, x: Value, order: Sequence[int]) -> int:
    rank = len(order)
    return t.writer.transpose(x, [d % rank for d in order]) if rank else x


@translates("transpose.int")
def _transpose(t: Translator, node: torch.fx.Node, x: Value, a: int, b: int) -> int:
    order = list(range(len(t.writer.shape(x))))
    a, b = _dim(t, x, a), _dim(t, x, b)
    order[a], order[b] = order[b], order[a]
    return t.writer.transpose(x, order)


@translates("t")
def _t(t: Translator, node: torch.fx.Node, x: Value) -> int:
    return t.writer.transpose(x, [1, 0]) if len(t.writer.shape(x)) == 2 else x


@translates("expand", "broadcast_to", "expand_as")
def _expand(t: Translator, node: torch.fx.Node, x: Value, *_: Any, **__: Any) -> int:
    return t.writer.expand(x, t.shape(node))


@translates("repeat")
def _repeat(t: Translator, node: torch.fx.Node, x: Value, repeats: Sequence[int]) -> int:
    w = t.writer
    shape = (1,) * (len(repeats) - len(w.shape(x))) + w.shape(x)
    split = [size for r, s in zip(repeats, shape, strict=True) for size in ((1, s) if r > 1 and s > 1 else (s,))]
    full = [size for r, s in zip(repeats, shape, strict=True) for size in ((r, s) if r > 1 and s > 1 else (r * s,))]
    return w.reshape(w.expand(w.reshape(x, split), full), t.shape(node))


@translates("repeat_interleave.self_int")
def _repeat_interleave(t: Translator, node: torch.fx.Node, x: Value, repeats: int, dim: int | None = None, output_size: Any = None) -> int:
    w = t.writer
    if dim is None:
        x, dim = w.reshape(x, (-1,) if len(w.shape(x)) == 1 else (torch.Size(w.shape(x)).numel(),)), 0
    dim %= len(w.shape(x))
    shape = w.shape(x)
    wide = w.reshape(x, (*shape[: dim + 1], 1, *shape[dim + 1 :]))
    return w.reshape(w.expand(wide, (*shape[: dim + 1], repeats, *shape[dim + 1 :])), t.shape(node))


@translates("slice")
def _slice(t: Translator, node: torch.fx.Node, x: Value, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> int:
    dim = _dim(t, x, dim)
    lo, hi, step = slice(start, stop, step).indices(t.writer.shape(x)[dim])
    return t.writer.slice(x, dim, lo, hi, step)


@translates("narrow")
def _narrow(t: Translator, node: torch.fx.Node, x: Value, dim: int, start: int, length: int) -> int:
    dim = _dim(t, x, dim)
    start %= t.writer.shape(x)[dim]
    return t.writer.slice(x, dim, start, start + length)


@translates("select.int")
def _select(t: Translator, node: torch.fx.Node, x: Value, dim: int, index: int) -> int:
    dim = _dim(t, x, dim)
    index %= t.writer.shape(x)[dim]
    return t.writer.reshape(t.writer.slice(x, dim, index, index + 1), t.shape(node))


@translates("split.Tensor", "split_with_sizes", "unbind.int", "chunk")
def _split(t: Translator, node: torch.fx.Node, x: Value, *args: Any, **kwargs: Any) -> list[int]:
    unbinds = "unbind" in str(node.target)
    dim = kwargs.get("dim", args[0] if unbinds and args else args[1] if not unbinds and len(args) > 1 else 0)
    dim = _dim(t, x, dim)
    parts, at = [], 0
    for part in node.meta["val"]:
        size = 1 if unbinds else part.shape[dim]
        y = t.writer.slice(x, dim, at, at + size)
        parts.append(t.writer.reshape(y, tuple(part.shape)) if unbinds else y)
        at += size
    return parts


@translates("cat")
def _cat(t: Translator, node: torch.fx.Node, parts: Sequence[Value], dim: int = 0) -> int:
    w, dtype, rank = t.writer, t.dtype(node), len(t.shape(node))
    # torch takes empty tensors of rank 1 among others and passes over them.
    kept = [w.cast(x, dtype) for x in parts if 0 not in w.shape(x)]
    if not kept:
        return w.fill(0.0, dtype, t.shape(node))
    return w.concat(kept, dim % rank)


@translates("stack")
def _stack(t: Translator, node: torch.fx.Node, parts: Sequence[Value], dim: int = 0) -> int:
    w, dtype, shape = t.writer, t.dtype(node), list(t.shape(node))
    dim %= len(shape)
    shape[dim] = 1
    return w.concat([w.reshape(w.cast(x, dtype), shape) for x in parts], dim)


@translates("pixel_shuffle")
def _pixel_shuffle(t: Translator, node: torch.fx.Node, x: Value, factor: int) -> int:
    w = t.writer
    *batch, c, height, width = w.shape(x)
    n = len(batch)
    y = w.reshape(x, (*batch, c // factor**2, factor, factor, height, width))
    y = w.transpose(y, [*range(n), n, n + 3, n + 1, n + 4, n + 2])
    return w.reshape(y, t.shape(node))


@translates("pixel_unshuffle")
def _pixel_unshuffle(t: Translator, node: torch.fx.Node, x: Value, factor: int) -> int:
    w = t.writer
    *batch, c, height, width = w.shape(x)
    n = len(batch)
    y = w.reshape(x, (*batch, c, height // factor, factor, width // factor, factor))
    y = w.transpose(y, [*range(n), n, n + 2, n + 4, n + 1, n + 3])
    return w.reshape(y, t.shape(node))


@translates("flip")
def _flip(t: Translator, node: torch.fx.Node, x: Value, dims: Sequence[int]) -> int:
    for d in dims:
        d = _dim(t, x, d)
        x = Value(t.writer.op("gather", x, t.writer.table(torch.arange(t.writer.shape(x)[d] - 1, -1, -1)), dim=d))
    return x


@translates("roll")
def _roll(t: Translator, node: torch.fx.Node, x: Value, shifts: Sequence[int], dims: Sequence[int] = ()) -> int:
    w = t.writer
    if not dims:
        raise Unsupported("a roll over all dimensions is not supported")
    y: int = x
    for shift, d in zip(shifts, dims, strict=True):
        d = _dim(t, x, d)
        size = w.shape(y)[d]
        cut = (size - shift) % size
        if cut:
            y = w.concat([w.slice(y, d, cut, size), w.slice(y, d, 0, cut)], d)
    return y


@translates("slice_scatter")
def _slice_scatter(
    t: Translator, node: torch.fx.Node, x: Value, part: Value, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> int:
    w = t.writer
    dim = _dim(t, x, dim)
    size = w.shape(x)[dim]
    part = Value(w.cast(part, w.dtype(x)))
    lo, hi, step = slice(start, stop, step).indices(size)
    if step == 1 or hi - lo <= 1:
        parts = [w.slice(x, dim, 0, lo), part, w.slice(x, dim, max(lo, hi), size)]
        return w.concat([p for p in parts if w.shape(p)[dim]], dim)
    if size % step or lo >= step or w.shape(part)[dim] != size // step:
        raise Unsupported(f"writing every {step}th row of {size} from {lo} is not supported")
    # Rows lo, lo + step, …: column lo of the rows in groups of `step`.
    shape = w.shape(x)
    wide = Value(w.split_dim(x, dim, (size // step, step)))
    column = w.split_dim(part, dim, (size // step, 1))
    return w.reshape(_slice_scatter(t, node, wide, Value(column), dim + 1, lo, lo + 1), shape)


@translates("select_scatter")
def _select_scatter(t: Translator, node: torch.fx.Node, x: Value, part: Value, dim: int, index: int) -> int:
    dim = _dim(t, x, dim)
    index %= t.writer.shape(x)[dim]
    shape = list(t.writer.shape(x))
    shape[dim] = 1
    return _slice_scatter(t, node, x, Value(t.writer.reshape(part, shape)), dim, index, index + 1)


@translates("copy")
def _copy(t: Translator, node: torch.fx.Node, x: Value, source: Value, *_: Any) -> int:
    return t.writer.expand(t.writer.cast(source, t.dtype(node)), t.shape(node))


@translates("embedding")
def _embedding(t: Translator, node: torch.fx.Node, table: Value, index: Value, *_: Any) -> int:
    return _shaped(t, node, t.writer.op("gather", table, index, dim=0))


@translates("index_select")
def _index_select(t: Translator, node: torch.fx.Node, x: Value, dim: int, index: Value) -> int:
    return t.writer.op("gather", x, index, dim=_dim(t, x, dim))


@translates("index.Tensor", "_unsafe_index.Tensor")
def _index(t: Translator, node: torch.fx.Node, x: Value, indices: Sequence[Value | None]) -> int:
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(given) != 1 or t.writer.dtype(given[0][1]) == "bool":
        raise Unsupported("indexing by a mask or in several dimensions at once is not supported")
    dim, index = given[0]
    return _shaped(t, node, t.writer.op("gather", x, index, dim=dim))


def _shaped(t: Translator, node: torch.fx.Node, x: int) -> int:
    """An index of rank 0, held as [1], leaves a dimension of size 1 behind."""
    return t.writer.reshape(x, t.shape(node))


@translates("constant_pad_nd")
def _constant_pad(t: Translator, node: torch.fx.Node, x: Value, padding: Sequence[int], value: float = 0) -> int:
    return _pad(t, node, x, padding, "constant", value)


@translates("replication_pad1d", "replication_pad2d", "replication_pad3d")
def _replication_pad(t: Translator, node: torch.fx.Node, x: Value, padding: Sequence[int]) -> int:
    return _pad(t, node, x, padding, "replicate")


@translates("reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
def _reflection_pad(t: Translator, node: torch.fx.Node, x: Value, padding: Sequence[int]) -> int:
    return _pad(t, node, x, padding, "reflect")


@translates("pad")
def _pad(t: Translator, node: torch.fx.Node, x: Value, padding: Sequence[int], mode: str = "constant", value: float | None = None) -> int:
    """torch names the paddings from the last dimension on, before and after each; negative ones cut."""
    w = t.writer
    rank = len(w.shape(x))
    before, after = [0] * rank, [0] * rank
    for i in range(len(padding) // 2):
        d = rank - 1 - i
        lo, hi = padding[2 * i], padding[2 * i + 1]
        x = Value(w.slice(x, d, max(0, -lo), w.shape(x)[d] - max(0, -hi)))
        before[d], after[d] = max(0, lo), max(0, hi)
    if not any(before) and not any(after):
        return x
    if mode == "reflect":
        for d in range(rank):
            if before[d] or after[d]:
                rows = torch.arange(-before[d], w.shape(x)[d] + after[d]).abs()
                last = w.shape(x)[d] - 1
                x = Value(w.op("gather", x, w.table(last - (last - rows).abs()), dim=d))
        return x
    extra = {"value": float(value or 0)} if mode == "constant" else {}
    return w.op("pad", x, before=before, after=after, mode=mode, **extra)
