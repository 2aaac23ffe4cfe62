"""Matrix products, convolutions and attention."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..unsupported import Unsupported
from .elementwise import arithmetic
from .translator import Translator, Value, translates


@translates("linear")
def _linear(t: Translator, node: torch.fx.Node, x: Value, weight: Value, bias: Value | None = None) -> int:
    y = t.writer.op("linear", x, weight)
    return y if bias is None else t.writer.op("add", y, bias)


@translates("addmm")
def _addmm(t: Translator, node: torch.fx.Node, bias: Value, a: Value, b: Value, beta: float = 1, alpha: float = 1) -> int:
    w = t.writer
    y = product(t, a, b)
    y = y if alpha == 1 else w.scalar("mul", y, float(alpha))
    return w.op("add", y, bias if beta == 1 else w.scalar("mul", bias, float(beta)))


@translates("mm", "bmm", "matmul")
def _matmul(t: Translator, node: torch.fx.Node, a: Value, b: Value) -> int:
    w = t.writer
    left, right = w.shape(a), w.shape(b)
    if len(left) == 1:
        a = Value(w.reshape(a, (1, *left)))
    if len(right) == 1:
        b = Value(w.reshape(b, (*right, 1)))
    return w.reshape(product(t, a, b), t.shape(node))


def product(t: Translator, a: int, b: int) -> int:
    """a [.., m, k] b [.., k, n] with broadcasting. Where b is a weight's transpose it is a linear."""
    w = t.writer
    turned = w.made(b, "transpose")
    if turned and len(w.shape(b)) == 2 and w.made(turned.inputs[0], "weight"):
        return w.op("linear", a, turned.inputs[0])
    batch = torch.broadcast_shapes(w.shape(a)[:-2], w.shape(b)[:-2])
    return w.op("matmul", w.expand(a, (*batch, *w.shape(a)[-2:])), w.expand(b, (*batch, *w.shape(b)[-2:])))


@translates("baddbmm")
def _baddbmm(t: Translator, node: torch.fx.Node, x: Value, a: Value, b: Value, beta: float = 1, alpha: float = 1) -> int:
    w = t.writer
    y = product(t, a, b)
    y = y if alpha == 1 else w.scalar("mul", y, float(alpha))
    return y if beta == 0 else w.op("add", y, x if beta == 1 else w.scalar("mul", x, float(beta)))


@translates("conv1d", "conv2d", "conv3d")
def _conv(
    t: Translator,
    node: torch.fx.Node,
    x: Value,
    kernel: Value,
    bias: Value | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] | str = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> int:
    w = t.writer
    spatial = len(w.shape(kernel)) - 2
    single = len(w.shape(x)) == spatial + 1
    if single:
        x = Value(w.reshape(x, (1, *w.shape(x))))
    stride, dilation = _each(stride, spatial), _each(dilation, spatial)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, w.shape(kernel)[2:], strict=True)]
        before = [p // 2 for p in total]
        after = [p - b for p, b in zip(total, before, strict=True)]
    else:
        before = after = _each(padding, spatial)
    if any(d != 1 for d in dilation):
        raise Unsupported("a convolution with dilation is not supported")
    extra = {"groups": groups} if groups != 1 else {}
    y = w.op(f"conv{spatial}d", x, kernel, stride=stride, padding=[*before, *after], **extra)
    if bias is not None:
        y = w.op("add", y, w.reshape(bias, (*w.shape(bias), *[1] * spatial)))
    return w.reshape(y, w.shape(y)[1:]) if single else y


@translates("convolution")
def _convolution(
    t: Translator,
    node: torch.fx.Node,
    x: Value,
    kernel: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> int:
    if not transposed:
        return _conv(t, node, x, kernel, bias, stride, padding, dilation, groups)
    return _upsampling_conv(t, node, x, kernel, bias, stride, padding, dilation, output_padding, groups)


def _upsampling_conv(
    t: Translator,
    node: torch.fx.Node,
    x: Value,
    kernel: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
) -> int:
    """A transposed convolution whose windows do not overlap: each pixel becomes a block, by a matrix product."""
    w = t.writer
    inputs, outputs, *window = w.shape(kernel)
    spatial = len(window)
    if _each(stride, spatial) != window or any(padding) or any(output_padding) or groups != 1:
        raise Unsupported("a transposed convolution whose windows overlap is not supported")
    size = w.shape(x)[2:]
    last = [0, *range(2, 2 + spatial), 1]
    matrix = w.reshape(kernel, (inputs, math.prod((outputs, *window))))
    y = product(t, w.reshape(w.transpose(x, last), (w.shape(x)[0] * math.prod(size), inputs)), matrix)
    y = w.reshape(y, (w.shape(x)[0], *size, outputs, *window))
    order = [0, 1 + spatial]
    for d in range(spatial):
        order += [1 + d, 2 + spatial + d]
    y = w.reshape(w.transpose(y, order), t.shape(node))
    return y if bias is None else w.op("add", y, w.reshape(bias, (outputs, *[1] * spatial)))


def _each(value: Any, count: int) -> list[int]:
    value = [value] if isinstance(value, int) else list(value)
    return value * count if len(value) == 1 else value


@translates("scaled_dot_product_attention")
def _attention(
    t: Translator,
    node: torch.fx.Node,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> int:
    w = t.writer
    rank = len(w.shape(q))
    depth = w.shape(q)[-1]
    if rank == 3:
        q, k, v = (Value(w.reshape(x, (w.shape(x)[0], 1, *w.shape(x)[1:]))) for x in (q, k, v))
    elif rank != 4:
        raise Unsupported(f"attention over tensors of rank {rank} is not supported")
    heads, queries, keys = w.shape(q)[1], w.shape(q)[2], w.shape(k)[2]
    q, k, v = _ungrouped(t, q, k, v)
    operands = [q, k, v]
    if is_causal:
        operands.append(w.table(torch.ones(1, 1, queries, keys, dtype=torch.bool).tril()))
    elif mask is not None:
        operands.append(_mask(t, mask, w.dtype(q), rank, keys))
    y = w.op("attention", *operands, scale=float(scale) if scale is not None else 1 / math.sqrt(depth))
    if w.shape(y)[1] != heads:
        raise Unsupported("attention whose heads do not match is not supported")
    return w.reshape(y, t.shape(node))


def _ungrouped(t: Translator, q: int, k: int, v: int) -> tuple[int, int, int]:
    """Keys and values that were repeated for the query heads that share them, without the repeats."""
    heads = t.writer.shape(k)[1]
    for groups in range(1, heads // 2 + 1):
        if heads % groups == 0:
            fewer = t.writer.ungrouped(k, 1, groups), t.writer.ungrouped(v, 1, groups)
            if fewer[0] is not None and fewer[1] is not None:
                return q, *fewer
    return q, k, v


def _mask(t: Translator, mask: int, dtype: str, rank: int, keys: int) -> int:
    w = t.writer
    shape = w.shape(mask)
    if rank == 3 and len(shape) == 3:
        shape = (shape[0], 1, *shape[1:])
    mask = w.reshape(mask, (1,) * (4 - len(shape)) + shape)
    if w.shape(mask)[3] != keys:
        mask = w.expand(mask, (*w.shape(mask)[:3], keys))
    return mask if w.dtype(mask) == "bool" else w.cast(mask, dtype)


__all__ = ["arithmetic", "product"]
