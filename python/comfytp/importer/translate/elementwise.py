"""Elementwise ops, casts and comparisons. Promotion of dtypes is made explicit here."""

import math
from typing import Any

import torch

from ..unsupported import Unsupported
from ..writer import rounds
from .translator import Translator, Value, translates

_UNARY = {
    "silu": "silu",
    "sin": "sin",
    "cos": "cos",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "relu": "relu",
    "exp": "exp",
    "log": "log",
    "sqrt": "sqrt",
    "rsqrt": "rsqrt",
    "abs": "abs",
    "neg": "neg",
}
_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1, "pow": 1}
_COMPARISONS = {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}


def _unary(op: str):
    def run(t: Translator, node: torch.fx.Node, x: Value) -> int:
        return t.writer.op(op, t.writer.cast(x, t.dtype(node)))

    return run


for _aten, _op in _UNARY.items():
    translates(_aten)(_unary(_op))


def arithmetic(t: Translator, node: torch.fx.Node, op: str, a: Any, b: Any) -> int:
    """a op b in the result's dtype. Where torch keeps an operand in more precision than the other has (a number, a tensor of
    rank 0), it is computed in f32."""
    w, dtype = t.writer, t.dtype(node)
    if isinstance(a, Value) and not isinstance(b, Value) and b == _NEUTRAL.get(op):
        return w.cast(a, dtype)
    if dtype in ("bf16", "f16") and any(_finer(t, node.args[i], x, dtype) for i, x in enumerate((a, b))):
        return w.cast(w.op(op, t.operand(a, "f32"), t.operand(b, "f32")), dtype)
    return w.op(op, t.operand(a, dtype), t.operand(b, dtype))


def _finer(t: Translator, argument: Any, x: Any, dtype: str) -> bool:
    if isinstance(x, Value):
        return isinstance(argument, torch.fx.Node) and argument.meta["val"].dim() == 0 and t.writer.dtype(x) == "f32"
    return rounds(x, dtype)


@translates("add")
def _add(t: Translator, node: torch.fx.Node, a: Any, b: Any, alpha: float = 1) -> int:
    return arithmetic(t, node, "add", a, _scaled(t, node, b, alpha))


@translates("sub")
def _sub(t: Translator, node: torch.fx.Node, a: Any, b: Any, alpha: float = 1) -> int:
    return arithmetic(t, node, "sub", a, _scaled(t, node, b, alpha))


@translates("rsub")
def _rsub(t: Translator, node: torch.fx.Node, a: Any, b: Any, alpha: float = 1) -> int:
    w, dtype = t.writer, t.dtype(node)
    return w.op("sub", t.operand(b, dtype), t.operand(_scaled(t, node, a, alpha), dtype))


def _scaled(t: Translator, node: torch.fx.Node, x: Any, alpha: float) -> Any:
    if alpha == 1:
        return x
    if not isinstance(x, Value):
        return x * alpha
    return Value(t.writer.scalar("mul", t.writer.cast(x, t.dtype(node)), float(alpha)))


@translates("mul")
def _mul(t: Translator, node: torch.fx.Node, a: Any, b: Any) -> int:
    return arithmetic(t, node, "mul", a, b)


@translates("div")
def _div(t: Translator, node: torch.fx.Node, a: Any, b: Any, rounding_mode: str | None = None) -> int:
    if rounding_mode is not None:
        raise Unsupported(f"a division with rounding_mode {rounding_mode!r} is not supported")
    return arithmetic(t, node, "div", a, b)


@translates("reciprocal")
def _reciprocal(t: Translator, node: torch.fx.Node, x: Value) -> int:
    dtype = t.dtype(node)
    return t.writer.op("div", t.writer.fill(1.0, dtype), t.writer.cast(x, dtype))


@translates("addcmul")
def _addcmul(t: Translator, node: torch.fx.Node, x: Value, a: Value, b: Value, value: float = 1) -> int:
    w, dtype = t.writer, t.dtype(node)
    product = w.op("mul", w.cast(a, dtype), w.cast(b, dtype))
    return w.op("add", w.cast(x, dtype), product if value == 1 else w.scalar("mul", product, float(value)))


@translates("addcdiv")
def _addcdiv(t: Translator, node: torch.fx.Node, x: Value, a: Value, b: Value, value: float = 1) -> int:
    w, dtype = t.writer, t.dtype(node)
    quotient = w.op("div", w.cast(a, dtype), w.cast(b, dtype))
    return w.op("add", w.cast(x, dtype), quotient if value == 1 else w.scalar("mul", quotient, float(value)))


@translates("lerp.Scalar", "lerp.Tensor")
def _lerp(t: Translator, node: torch.fx.Node, a: Value, b: Value, weight: Any) -> int:
    w, dtype = t.writer, t.dtype(node)
    return w.op("add", a, w.op("mul", w.op("sub", b, a), t.operand(weight, dtype)))


@translates("pow.Tensor_Scalar")
def _pow(t: Translator, node: torch.fx.Node, x: Value, exponent: float) -> int:
    w = t.writer
    x = w.cast(x, t.dtype(node))
    if exponent == 2:
        return w.op("mul", x, x)
    if exponent in (0.5, -0.5):
        return w.op("sqrt" if exponent > 0 else "rsqrt", x)
    return w.scalar("pow", x, float(exponent))


@translates("pow.Scalar", "pow.Tensor_Tensor")
def _pow_of(t: Translator, node: torch.fx.Node, x: Any, exponent: Any) -> int:
    return arithmetic(t, node, "pow", x, exponent)


@translates("maximum", "minimum")
def _extreme(t: Translator, node: torch.fx.Node, a: Value, b: Value) -> int:
    return arithmetic(t, node, "maximum" if "maximum" in str(node.target) else "minimum", a, b)


@translates("clamp", "hardtanh")
def _clamp(t: Translator, node: torch.fx.Node, x: Value, low: Any = None, high: Any = None) -> int:
    w, dtype = t.writer, t.dtype(node)
    y = w.cast(x, dtype)
    if low is not None:
        y = w.op("maximum", y, t.operand(low, dtype))
    if high is not None:
        y = w.op("minimum", y, t.operand(high, dtype))
    return y


@translates("clamp_min")
def _clamp_min(t: Translator, node: torch.fx.Node, x: Value, low: Any) -> int:
    return _clamp(t, node, x, low)


@translates("clamp_max")
def _clamp_max(t: Translator, node: torch.fx.Node, x: Value, high: Any) -> int:
    return _clamp(t, node, x, None, high)


@translates("leaky_relu")
def _leaky_relu(t: Translator, node: torch.fx.Node, x: Value, slope: float = 0.01) -> int:
    w = t.writer
    return w.op("where", w.op("greater", x, w.fill(0.0, w.dtype(x))), x, w.scalar("mul", x, float(slope)))


@translates("elu")
def _elu(t: Translator, node: torch.fx.Node, x: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> int:
    w = t.writer
    if (alpha, scale, input_scale) != (1, 1, 1):
        raise Unsupported("elu with factors is not supported")
    below = w.scalar("sub", w.op("exp", w.op("minimum", x, w.fill(0.0, w.dtype(x)))), 1.0)
    return w.op("where", w.op("greater", x, w.fill(0.0, w.dtype(x))), x, below)


@translates("softplus")
def _softplus(t: Translator, node: torch.fx.Node, x: Value, beta: float = 1, threshold: float = 20) -> int:
    w = t.writer
    scaled = w.scalar("mul", x, float(beta))
    soft = w.scalar("div", w.op("log", w.scalar("add", w.op("exp", w.scalar("minimum", scaled, float(threshold))), 1.0)), float(beta))
    return w.op("where", w.op("greater", scaled, w.fill(float(threshold), w.dtype(x))), x, soft)


@translates("gelu")
def _gelu(t: Translator, node: torch.fx.Node, x: Value, approximate: str = "none") -> int:
    return t.writer.op("gelu_tanh" if approximate == "tanh" else "gelu", x)


@translates("log1p")
def _log1p(t: Translator, node: torch.fx.Node, x: Value) -> int:
    return t.writer.op("log", t.writer.scalar("add", t.writer.cast(x, t.dtype(node)), 1.0))


@translates("square")
def _square(t: Translator, node: torch.fx.Node, x: Value) -> int:
    return t.writer.op("mul", x, x)


@translates("exp2")
def _exp2(t: Translator, node: torch.fx.Node, x: Value) -> int:
    return t.writer.op("exp", t.writer.scalar("mul", t.writer.cast(x, t.dtype(node)), math.log(2)))


def _comparison(op: str):
    def run(t: Translator, node: torch.fx.Node, a: Value, b: Any) -> int:
        operands = [x.meta["val"] if isinstance(x, torch.fx.Node) else x for x in node.args[:2]]
        dtype = t.writer.computed(torch.result_type(*operands))
        return t.writer.op(op, t.operand(a, dtype), t.operand(b, dtype))

    return run


for _aten, _op in _COMPARISONS.items():
    translates(_aten)(_comparison(_op))


def truth(t: Translator, x: Value) -> int:
    """x as bool."""
    w = t.writer
    return x if w.dtype(x) == "bool" else w.op("not_equal", x, w.fill(0.0, w.dtype(x)))


@translates("logical_not", "bitwise_not")
def _not(t: Translator, node: torch.fx.Node, x: Value) -> int:
    if "bitwise" in str(node.target) and t.writer.dtype(x) != "bool":
        raise Unsupported("a bitwise op on integers is not supported")
    return t.writer.op("logical_not", truth(t, x))


@translates("logical_and", "bitwise_and", "logical_or", "bitwise_or")
def _logical(t: Translator, node: torch.fx.Node, a: Any, b: Any) -> int:
    if "bitwise" in str(node.target) and t.dtype(node) != "bool":
        raise Unsupported("a bitwise op on integers is not supported")
    operands = [truth(t, x) if isinstance(x, Value) else t.writer.fill(float(bool(x)), "bool") for x in (a, b)]
    return t.writer.op("minimum" if "and" in str(node.target) else "maximum", *operands)


@translates("where")
def _where(t: Translator, node: torch.fx.Node, condition: Value, a: Any, b: Any) -> int:
    dtype = t.dtype(node)
    return t.writer.op("where", truth(t, condition), t.operand(a, dtype), t.operand(b, dtype))


@translates("masked_fill")
def _masked_fill(t: Translator, node: torch.fx.Node, x: Value, mask: Value, number: Any) -> int:
    return _where(t, node, mask, number, x)


@translates("nan_to_num")
def _nan_to_num(t: Translator, node: torch.fx.Node, x: Value, nan: float | None = None, posinf: float | None = None, neginf: float | None = None) -> int:
    w, dtype = t.writer, t.dtype(node)
    limit = torch.finfo(node.meta["val"].dtype).max
    high, low = (limit if posinf is None else posinf), (-limit if neginf is None else neginf)
    y = w.op("where", w.op("equal", x, x), x, w.fill(nan or 0.0, dtype))
    return w.op("maximum", w.op("minimum", y, w.fill(high, dtype)), w.fill(low, dtype))


@translates("isnan")
def _isnan(t: Translator, node: torch.fx.Node, x: Value) -> int:
    return t.writer.op("not_equal", x, x)


@translates("isinf")
def _isinf(t: Translator, node: torch.fx.Node, x: Value) -> int:
    return t.writer.op("equal", t.writer.op("abs", x), t.writer.fill(math.inf, t.writer.dtype(x)))


@translates("_to_copy", "to.dtype", "type_as")
def _to(t: Translator, node: torch.fx.Node, x: Value, *_: Any, **__: Any) -> int:
    w, dtype = t.writer, t.dtype(node)
    if dtype == "bool":
        return truth(t, x)
    return w.cast(x, dtype)


@translates("clone", "alias", "detach", "contiguous", "lift_fresh_copy", "dropout", "native_dropout")
def _same(t: Translator, node: torch.fx.Node, x: Value, *_: Any, **__: Any) -> int:
    return x


@translates("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range_for_size")
def _nothing(t: Translator, node: torch.fx.Node, *_: Any, **__: Any) -> None:
    return None


@translates("full_like", "new_full")
def _full_like(t: Translator, node: torch.fx.Node, x: Value, *args: Any, **_: Any) -> int:
    return t.writer.fill(float(args[-1]), t.dtype(node), t.shape(node) or (1,))


@translates("zeros_like", "empty_like", "new_zeros", "new_empty", "empty_permuted", "new_empty_strided")
def _zeros_like(t: Translator, node: torch.fx.Node, *_: Any, **__: Any) -> int:
    return t.writer.fill(0.0, t.dtype(node), t.shape(node) or (1,))


@translates("ones_like", "new_ones")
def _ones_like(t: Translator, node: torch.fx.Node, *_: Any, **__: Any) -> int:
    return t.writer.fill(1.0, t.dtype(node), t.shape(node) or (1,))
