"""Normalisations, upsampling and softmax."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from ..dtypes import TORCH
from ..unsupported import Unsupported
from .translator import Translator, Value, translates


@functools.cache
def _default_epsilon(dtype: torch.dtype) -> float:
    """What rms_norm adds where nobody says: f32's in this torch, or the dtype's own, as its documentation has it."""
    small = torch.full((1, 4), 1e-3, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    return torch.finfo(torch.float32 if float(torch.rms_norm(small, (4,))[0, 0]) > 0.5 else dtype).eps


def _parameter(t: Translator, value: Value | None, otherwise: float, size: int, dtype: str) -> int:
    """A norm's weight or bias as [c]."""
    w = t.writer
    return w.fill(otherwise, dtype, (size,)) if value is None else w.cast(w.reshape(value, (size,)), dtype)


def _rows(t: Translator, x: Value, shape: Sequence[int]) -> tuple[int, int]:
    """x with the normalised dimensions as one, and its size."""
    w = t.writer
    size = math.prod(shape)
    return w.reshape(x, (*w.shape(x)[: len(w.shape(x)) - len(shape)], size)), size


@translates("layer_norm", "native_layer_norm")
def _layer_norm(
    t: Translator, node: torch.fx.Node, x: Value, shape: Sequence[int], weight: Value | None = None, bias: Value | None = None, eps: float = 1e-5, *_: Any
) -> Any:
    w = t.writer
    rows, size = _rows(t, x, shape)
    dtype = w.dtype(x)
    y = w.op("layer_norm", rows, _parameter(t, weight, 1.0, size, dtype), _parameter(t, bias, 0.0, size, dtype), epsilon=float(eps))
    y = w.reshape(y, w.shape(x))
    return [y, y, y] if "native" in str(node.target) else y


@translates("rms_norm")
def _rms_norm(t: Translator, node: torch.fx.Node, x: Value, shape: Sequence[int], weight: Value | None = None, eps: float | None = None) -> int:
    w = t.writer
    x = Value(w.cast(x, t.dtype(node)))
    rows, size = _rows(t, x, shape)
    dtype = w.dtype(x)
    epsilon = _default_epsilon(TORCH[dtype]) if eps is None else float(eps)
    return w.reshape(w.op("rms_norm", rows, _parameter(t, weight, 1.0, size, dtype), epsilon=epsilon), w.shape(x))


@translates("group_norm")
def _group_norm(
    t: Translator, node: torch.fx.Node, x: Value, groups: int, weight: Value | None = None, bias: Value | None = None, eps: float = 1e-5, *_: Any
) -> int:
    w = t.writer
    channels, dtype = w.shape(x)[1], w.dtype(x)
    return w.op(
        "group_norm", x, _parameter(t, weight, 1.0, channels, dtype), _parameter(t, bias, 0.0, channels, dtype), groups=groups, epsilon=float(eps)
    )


@translates("instance_norm")
def _instance_norm(t: Translator, node: torch.fx.Node, x: Value, weight: Any, bias: Any, mean: Any, var: Any, use_input: bool, _: float, eps: float, *__: Any) -> int:
    if not use_input:
        raise Unsupported("an instance norm over running statistics is not supported")
    return _group_norm(t, node, x, t.writer.shape(x)[1], weight, bias, eps)


@translates("upsample_nearest2d")
def _upsample_nearest(t: Translator, node: torch.fx.Node, x: Value, *_: Any) -> int:
    return _upsampled(t, x, t.shape(node)[-2:])


@translates("upsample_nearest3d")
def _upsample_nearest3d(t: Translator, node: torch.fx.Node, x: Value, *_: Any) -> int:
    """Frames first, by their numbers, then the images of all frames."""
    w = t.writer
    n, c, frames, height, width = w.shape(x)
    to = t.shape(node)[2:]
    if to[0] != frames:
        x = Value(w.op("gather", x, w.table(torch.arange(to[0]) * frames // to[0]), dim=2))
    if to[1:] == (height, width):
        return x
    image = Value(w.reshape(x, (n, c * to[0], height, width)))
    return w.reshape(_upsampled(t, image, to[1:]), t.shape(node))


def _upsampled(t: Translator, x: Value, to: Sequence[int]) -> int:
    size = list(t.writer.shape(x)[2:])
    to = list(to)
    if to == size:
        return x
    attrs = {"from": size, "to": to, "size": to, "from_offset": [0, 0], "to_offset": [0, 0]}
    return t.writer.op("upsample_nearest", x, **attrs)
