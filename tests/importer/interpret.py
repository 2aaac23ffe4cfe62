"""Runs a comfytp graph's text with torch's functions: what the importer wrote can be tried without the engine."""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

DTYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}
_LINE = re.compile(r'%(\d+) = (\w+)\(([^)]*)\)(?: \{(.*)\})? : \w+\[[\d,]*\](?: ".*")?$')
_ATTR = re.compile(r'([\w.-]+)=("(?:[^"\\]|\\.)*"|\[[^\]]*\]|[^,\s]+)')


def _number(text: str) -> Any:
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


def _attrs(text: str | None) -> dict[str, Any]:
    attrs: dict[str, Any] = {}
    for name, value in _ATTR.findall(text or ""):
        if value[0] == '"':
            attrs[name] = value[1:-1]
        elif value[0] == "[":
            attrs[name] = [] if value in ("[]", "[.]") else [_number(v) for v in value[1:-1].split(",")]
        else:
            attrs[name] = _number(value)
    return attrs


def run(text: str, inputs: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs by name. Inputs and weights are cast to the dtypes that the graph states."""
    values: dict[int, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    for line in text.splitlines():
        if line.startswith("output "):
            name, value = line.removeprefix("output ").split(" = ")
            outputs[name] = values[int(value[1:])]
            continue
        match = _LINE.match(line)
        assert match, line
        number, op, operands, attrs_text = match.groups()
        attrs = _attrs(attrs_text)
        given = [values[int(o.strip()[1:])] for o in operands.split(",") if o.strip()]
        if op == "input":
            result = inputs[attrs["name"]].reshape(attrs["shape"]).to(DTYPES[attrs["dtype"]])
        elif op == "weight":
            result = weights[attrs["key"]].detach().reshape(attrs["full"]).to(DTYPES[attrs["dtype"]])
            for d, (start, size) in enumerate(zip(attrs["offset"], attrs["shape"], strict=True)):
                result = result.narrow(d, start, size)
        else:
            result = _run_op(op, given, attrs)
        values[int(number)] = result
    return outputs


def _run_op(op: str, x: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
    if op in _SIMPLE:
        return _SIMPLE[op](*x)
    return _WITH_ATTRS[op](x, a)


_SIMPLE = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "pow": torch.pow,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "less": torch.lt,
    "less_equal": torch.le,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "where": torch.where,
    "matmul": torch.matmul,
    "linear": F.linear,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    **{name: getattr(torch, name) for name in "sin cos tanh sigmoid relu exp log sqrt rsqrt abs neg logical_not".split()},
}


def _constant(_: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
    values = torch.tensor(a["values"], dtype=torch.float64)
    values = values[0].expand(a["shape"]) if len(a["values"]) == 1 else values.reshape(a["shape"])
    return values.to(DTYPES[a["dtype"]]).contiguous()


def _conv(spatial: int):
    function = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]

    def run_conv(x: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
        padding = [p for d in reversed(range(spatial)) for p in (a["padding"][d], a["padding"][spatial + d])]
        return function(F.pad(x[0], padding), x[1], stride=a["stride"], groups=a.get("groups", 1))

    return run_conv


def _attention(x: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
    mask = x[3] if len(x) == 4 else None
    return F.scaled_dot_product_attention(*x[:3], attn_mask=mask, scale=a["scale"], enable_gqa=x[0].shape[1] != x[1].shape[1])


def _gather(x: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
    dim, index = a["dim"], x[1]
    return x[0].index_select(dim, index.reshape(-1)).reshape(*x[0].shape[:dim], *index.shape, *x[0].shape[dim + 1 :])


def _pad(x: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
    y = x[0]
    for d, (before, after) in enumerate(zip(a["before"], a["after"], strict=True)):
        rows = torch.arange(-before, x[0].shape[d] + after)
        if a["mode"] == "circular":
            y = y.index_select(d, rows % x[0].shape[d])
        else:
            inside = (rows >= 0) & (rows < x[0].shape[d])
            y = y.index_select(d, rows.clamp(0, x[0].shape[d] - 1))
            if a["mode"] == "constant":
                y = torch.where(inside.reshape(-1, *[1] * (y.dim() - d - 1)), y, torch.tensor(a["value"], dtype=y.dtype))
    return y


def _slice(x: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
    return x[0][(slice(None),) * a["dim"] + (slice(a["start"], a["stop"], a.get("step", 1)),)]


def _upsample(x: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
    assert a["size"] == a["to"]
    return F.interpolate(x[0], size=a["to"], mode="nearest")


_WITH_ATTRS = {
    "constant": _constant,
    "cast": lambda x, a: x[0].to(DTYPES[a["dtype"]]),
    "conv1d": _conv(1),
    "conv2d": _conv(2),
    "conv3d": _conv(3),
    "attention": _attention,
    "group_norm": lambda x, a: F.group_norm(x[0], a["groups"], x[1], x[2], a["epsilon"]),
    "layer_norm": lambda x, a: F.layer_norm(x[0], x[0].shape[-1:], x[1], x[2], a["epsilon"]),
    "rms_norm": lambda x, a: F.rms_norm(x[0], x[0].shape[-1:], x[1], a["epsilon"]),
    "transpose": lambda x, a: x[0].permute(a["order"]),
    "split_dim": lambda x, a: x[0].unflatten(a["dim"], a["sizes"]),
    "merge_dims": lambda x, a: x[0].flatten(a["dim"], a["dim"] + a["count"] - 1),
    "slice": _slice,
    "concat": lambda x, a: torch.cat(x, a["dim"]),
    "expand": lambda x, a: x[0].expand(a["shape"]),
    "pad": _pad,
    "gather": _gather,
    "sum": lambda x, a: x[0].sum(a["dims"], keepdim=True),
    "amax": lambda x, a: x[0].amax(a["dims"], keepdim=True),
    "softmax": lambda x, a: x[0].softmax(a["dim"]),
    "upsample_nearest": _upsample,
}
