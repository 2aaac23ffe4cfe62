"""What an op means is what torch's function of that name computes: its reference in the graph, and the CPU's kernel."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import comfytp

NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64", torch.int64: "i64", torch.bool: "bool"}


@dataclasses.dataclass
class Case:
    """op(operands, attrs) is expected(*operands). Operands from `weights` on are weights, the others inputs."""

    op: str
    operands: list
    expected: Callable
    attrs: dict = dataclasses.field(default_factory=dict)
    weights: int = 99


def r(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


def upsample(height, width, to):
    return {"from": [height, width], "to": to, "size": to, "from_offset": [0, 0], "to_offset": [0, 0]}


def conv(stride, before, after=None, **more):
    return {"stride": stride, "padding": [*before, *(after or before)], **more}


CASES = {
    "linear": Case("linear", [r(2, 9, 24), r(40, 24)], F.linear, weights=1),
    "linear with an epilogue": Case(
        "linear", [r(2, 9, 24), r(40, 24), r(40), r(2, 9, 40)], lambda x, w, b, s: F.silu(F.linear(x, w, b)) + s,
        {"epilogue": "bias,silu,add"}, weights=1),
    "conv2d": Case("conv2d", [r(2, 8, 9, 7), r(16, 8, 3, 3)], lambda x, k: F.conv2d(x, k, padding=1), conv([1, 1], [1, 1]), weights=1),
    "conv2d with stride": Case(
        "conv2d", [r(2, 8, 10, 7), r(16, 8, 3, 3)], lambda x, k: F.conv2d(x, k, stride=2, padding=1), conv([2, 2], [1, 1]), weights=1),
    "conv2d with uneven padding": Case(
        "conv2d", [r(1, 8, 6, 7), r(16, 8, 3, 2)], lambda x, k: F.conv2d(F.pad(x, (2, 0, 0, 1)), k), conv([1, 1], [0, 2], [1, 0]), weights=1),
    "conv2d with an epilogue": Case(
        "conv2d", [r(2, 8, 9, 7), r(16, 8, 1, 1), r(16), r(2, 16, 9, 7)], lambda x, k, b, s: F.gelu(F.conv2d(x, k, b) + s),
        conv([1, 1], [0, 0], epilogue="bias,add,gelu"), weights=1),
    "attention": Case(
        "attention", [r(2, 3, 5, 16), r(2, 3, 7, 16), r(2, 3, 7, 16)], F.scaled_dot_product_attention, {"scale": 0.25}),
    "group_norm": Case("group_norm", [r(2, 12, 5, 3), r(12), r(12)], lambda x, w, b: F.group_norm(x, 4, w, b, 1e-5),
                       {"groups": 4, "epsilon": 1e-5}, weights=1),
    "group_norm with silu": Case("group_norm", [r(2, 12, 5, 3), r(12), r(12)], lambda x, w, b: F.silu(F.group_norm(x, 4, w, b, 1e-5)),
                                 {"groups": 4, "epsilon": 1e-5, "activation": "silu"}, weights=1),
    "layer_norm": Case("layer_norm", [r(2, 5, 24), r(24), r(24)], lambda x, w, b: F.layer_norm(x, [24], w, b, 1e-5), {"epsilon": 1e-5}, weights=1),
    "upsample_nearest": Case("upsample_nearest", [r(2, 4, 5, 3)], lambda x: F.interpolate(x, (10, 6)), upsample(5, 3, [10, 6])),
    "upsample_nearest to odd sizes": Case("upsample_nearest", [r(2, 4, 5, 3)], lambda x: F.interpolate(x, (9, 5)), upsample(5, 3, [9, 5])),
    "add": Case("add", [r(2, 5, 8), r(2, 5, 8)], torch.add),
    "add, broadcast": Case("add", [r(2, 8, 5, 3), r(8, 1, 1)], torch.add),
    "sub, broadcast": Case("sub", [r(5, 1), r(2, 1, 8)], torch.sub),
    "mul, broadcast": Case("mul", [r(2, 5, 8), r(2, 1, 8)], torch.mul),
    "div": Case("div", [r(2, 5, 8), r(2, 5, 8).abs() + 1], torch.div),
    **{op: Case(op, [2 * r(3, 70)], f) for op, f in {"silu": F.silu, "gelu": F.gelu, "sin": torch.sin, "cos": torch.cos}.items()},
    "transpose": Case("transpose", [r(2, 3, 4, 5)], lambda x: x.permute(0, 3, 1, 2), {"order": [0, 3, 1, 2]}),
    "split_dim": Case("split_dim", [r(2, 24, 5)], lambda x: x.unflatten(1, (4, 6)), {"dim": 1, "sizes": [4, 6]}),
    "merge_dims": Case("merge_dims", [r(2, 4, 6, 5)], lambda x: x.flatten(1, 2), {"dim": 1, "count": 2}),
    "slice": Case("slice", [r(2, 9, 5)], lambda x: x[:, 2:7], {"dim": 1, "start": 2, "stop": 7}),
    "slice with a step": Case("slice", [r(2, 9, 5)], lambda x: x[:, 1:8:3], {"dim": 1, "start": 1, "stop": 8, "step": 3}),
    "pointwise": Case(
        "pointwise", [r(2, 8, 5, 3), r(8), r(2, 8, 1, 1), r(2, 8, 5, 3)], lambda x, b, e, s: F.silu(x + b[:, None, None]) * (1 + e) + s,
        {"steps": "bias,silu,add_one_mul,add", "channel": 1}),
    "pointwise that turns": Case(
        "pointwise", [r(2, 5, 8), r(1, 5, 4), r(1, 5, 4)],
        lambda x, c, s: torch.stack([x[..., ::2] * c - x[..., 1::2] * s, x[..., 1::2] * c + x[..., ::2] * s], -1).flatten(-2),
        {"steps": "rope"}),
    "fused_norm": Case(
        "fused_norm", [r(2, 5, 24), r(24), r(24), r(2, 1, 24), r(2, 1, 24)], lambda x, w, b, s, t: F.layer_norm(x, [24], w, b, 1e-5) * (1 + s) + t,
        {"pre": "", "norm": "layer_norm", "epsilon": 1e-5, "affine": "weight,bias", "post": "add_one_mul,add"}),
    "fused_norm of squares": Case(
        "fused_norm", [r(2, 5, 24), r(24)], lambda x, w: F.rms_norm(x, [24], w, 1e-6),
        {"pre": "", "norm": "rms_norm", "epsilon": 1e-6, "affine": "weight", "post": ""}),
    "glu": Case("glu", [r(2, 5, 24), r(2, 5, 24), r(24), r(24)], lambda v, g, bv, bg: (v + bv) * F.gelu(g + bg),
                {"activation": "gelu", "biases": "value,gate"}),
    "gated_linear": Case("gated_linear", [r(2, 5, 24), r(16, 24), r(16, 24), r(16), r(16)], lambda x, v, g, bv, bg: F.linear(x, v, bv) * F.gelu(F.linear(x, g, bg)),
                         {"activation": "gelu", "biases": "value,gate"}),
    "linears": Case("linears", [r(2, 9, 24), r(40, 24), r(40)], F.linear, {"biased": [1]}, weights=1),
    "concat": Case("concat", [r(2, 3, 5), r(2, 4, 5), r(2, 1, 5)], lambda *x: torch.cat(x, 1), {"dim": 1}),
    "conv1d": Case("conv1d", [r(2, 8, 11), r(6, 4, 3)], lambda x, k: F.conv1d(x, k, stride=2, padding=1, groups=2), conv([2], [1], groups=2), weights=1),
    "conv2d with groups": Case("conv2d", [r(2, 8, 9, 7), r(8, 1, 3, 3)], lambda x, k: F.conv2d(x, k, padding=1, groups=8),
                               conv([1, 1], [1, 1], groups=8), weights=1),
    "conv3d": Case("conv3d", [r(1, 4, 5, 6, 7), r(6, 4, 3, 3, 1)], lambda x, k: F.conv3d(x, k, padding=(1, 1, 0)), conv([1, 1, 1], [1, 1, 0]), weights=1),
    "attention with grouped queries": Case(
        "attention", [r(2, 6, 5, 16), r(2, 2, 7, 16), r(2, 2, 7, 16)], lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        {"scale": 0.25}),
    "attention with a mask": Case(
        "attention", [r(2, 3, 5, 16), r(2, 3, 7, 16), r(2, 3, 7, 16), r(1, 1, 5, 7).abs() < 1],
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), {"scale": 0.25}),
    "attention with added scores": Case(
        "attention", [r(2, 3, 5, 16), r(2, 3, 7, 16), r(2, 3, 7, 16), r(2, 1, 1, 7)],
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), {"scale": 0.25}),
    "rms_norm": Case("rms_norm", [r(2, 5, 24), r(24)], lambda x, w: F.rms_norm(x, [24], w, 1e-6), {"epsilon": 1e-6}, weights=1),
    "matmul": Case("matmul", [r(2, 3, 5, 8), r(2, 3, 8, 6)], torch.matmul),
    "pow": Case("pow", [r(2, 5).abs(), r(5)], torch.pow),
    "maximum": Case("maximum", [r(2, 5), r(5)], torch.maximum),
    "minimum": Case("minimum", [r(2, 5), r(5)], torch.minimum),
    "where": Case("where", [r(2, 5) > 0, r(2, 5), r(5)], torch.where),
    "pad with zeros": Case("pad", [r(2, 5, 4)], lambda x: F.pad(x, (1, 2, 0, 3)), {"before": [0, 0, 1], "after": [0, 3, 2], "mode": "constant", "value": 0.0}),
    "pad with the edge": Case("pad", [r(2, 3, 5, 4)], lambda x: F.pad(x, (1, 2, 0, 3), "replicate"), {"before": [0, 0, 0, 1], "after": [0, 0, 3, 2], "mode": "replicate"}),
    "pad around": Case("pad", [r(2, 3, 5, 4)], lambda x: F.pad(x, (1, 2, 0, 3), "circular"), {"before": [0, 0, 0, 1], "after": [0, 0, 3, 2], "mode": "circular"}),
    "expand": Case("expand", [r(2, 1, 4)], lambda x: x.expand(2, 6, 4), {"shape": [2, 6, 4]}),
    "sum": Case("sum", [r(2, 5, 4, 3)], lambda x: x.sum((1, 3), keepdim=True), {"dims": [1, 3]}),
    "amax": Case("amax", [r(2, 5, 4)], lambda x: x.amax(1, keepdim=True), {"dims": [1]}),
    "softmax": Case("softmax", [r(2, 5, 4)], lambda x: x.softmax(1), {"dim": 1}),
    "gather": Case("gather", [r(6, 5), torch.tensor([[3, 0], [-1, 5]])], lambda x, i: x[i], {"dim": 0}),
    "gelu_tanh": Case("gelu_tanh", [2 * r(3, 70)], lambda x: F.gelu(x, approximate="tanh")),
    **{op: Case(op, [2 * r(3, 70)], getattr(torch, op)) for op in ("tanh", "sigmoid", "relu", "exp", "abs", "neg")},
    **{op: Case(op, [r(3, 70).abs() + 0.1], getattr(torch, op)) for op in ("log", "sqrt", "rsqrt")},
    "logical_not": Case("logical_not", [r(3, 70) > 0], torch.logical_not),
    **{op: Case(op, [r(3, 70).round(), r(70).round()], getattr(torch, op)) for op in ("not_equal", "less_equal", "less", "greater", "greater_equal")},
    "equal": Case("equal", [r(3, 70).round(), r(70).round()], torch.eq),
}


# Leaves, and what only a partitioned graph has: tests/graph and tests/sharding hold them.
NO_FUNCTION = {"input", "weight", "constant", "cast", "row_moments", "group_moments", "all_gather", "all_reduce", "fetch_weight",
               "halo_exchange", "reduce_scatter"}


def test_every_op_has_a_case():
    assert {case.op for case in CASES.values()} == set(comfytp.ops()) - NO_FUNCTION


def graph_of(case, dtype):
    graph, inputs, weights, values = comfytp.Graph(), {}, {}, []
    for i, operand in enumerate(case.operands):
        operand = operand.to(dtype) if operand.is_floating_point() else operand
        if i < case.weights:
            inputs[f"x{i}"] = operand
            values.append(graph.input(f"x{i}", operand.shape, NAMES[operand.dtype]))
        else:
            weights[f"w{i}"] = operand
            values.append(graph.weight(f"w{i}", operand.shape, NAMES[operand.dtype]))
    graph.output("y", graph.add(case.op, values, case.attrs, "the op"))
    return graph, inputs, weights


def error_of(got, expected):
    got, expected = torch.from_dlpack(got).double(), expected.double()
    assert got.shape == expected.shape
    return ((got - expected).norm() / expected.norm()).item()


def in_double(case):
    return case.expected(*[t.double() if t.is_floating_point() else t for t in case.operands])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_reference_is_torchs_function(case):
    graph, inputs, weights = graph_of(case, torch.float64)
    assert error_of(graph.evaluate(inputs, weights)["y"], in_double(case)) <= 1e-12


@pytest.mark.parametrize("devices", ["cpu:0", "cpu:0,cpu:1,cpu:2"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_engine_computes_torchs_function(case, devices):
    graph, inputs, weights = graph_of(case, torch.float32)
    assert error_of(comfytp.Engine(graph, weights, devices)(**inputs)["y"], in_double(case)) <= 2e-6


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_engine_in_bf16_errs_no_more_than_torch(case):
    graph, inputs, weights = graph_of(case, torch.bfloat16)
    rounded = [t.bfloat16().double() if t.is_floating_point() else t for t in case.operands]
    expected = case.expected(*rounded).double()
    rounding = ((expected.bfloat16().double() - expected).norm() / expected.norm()).item()
    torchs = error_of(case.expected(*[t.bfloat16() if t.is_floating_point() else t for t in case.operands]), expected)
    assert error_of(comfytp.Engine(graph, weights)(**inputs)["y"], expected) <= 1.1 * max(torchs, rounding)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
@pytest.mark.parametrize("name", ["linear", "conv2d", "group_norm", "layer_norm"])
def test_weights_of_any_dtype_are_decoded_at_use(name, stored):
    case = CASES[name]
    graph, inputs, weights = graph_of(case, torch.float32)
    weights = {key: tensor.to(stored) for key, tensor in weights.items()}
    expected = case.expected(*[t.double() for t in (*inputs.values(), *weights.values())])
    engine = comfytp.Engine(graph, weights)
    assert error_of(engine(**inputs)["y"], expected) <= 2e-6
    assert engine.stats()["allocated_weight_bytes"] == [sum(t.nbytes for t in weights.values())]


def test_a_device_without_products_in_fp8_decodes_weights_all_the_same():
    case = CASES["linear"]
    graph, inputs, weights = graph_of(case, torch.float32)
    weights = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in weights.items()}
    expected = comfytp.Engine(graph, weights)(**inputs)["y"]
    assert torch.equal(comfytp.Engine(graph, weights, compute="fp8")(**inputs)["y"], expected)
    with pytest.raises(comfytp.Error, match="expected compute 'fp8' or None but got 'int4'"):
        comfytp.Engine(graph, weights, compute="int4")
    with pytest.raises(comfytp.Error, match=r"\[devices\] expected names such as 'cpu:0' but got 2"):
        comfytp.Engine(graph, weights, 2)


@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16, torch.float32])
def test_cast_rounds_as_torch_does(to):
    graph = comfytp.Graph()
    x = graph.add("cast", [graph.input("x", [300])], {"dtype": NAMES[to]})
    graph.output("y", graph.add("cast", [x], {"dtype": "f32"}))
    x = 100 * r(300)
    assert torch.equal(comfytp.Engine(graph, {})(x=x)["y"], x.to(to).float())


def test_ops_compose_to_a_transformers_attention():
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(48, 4, batch_first=True)
    state = {name: t.detach() for name, t in module.state_dict().items()}
    graph = comfytp.Graph()
    x = graph.input("x", [2, 10, 48])
    qkv = graph.add("linear", [x, graph.weight("in_proj_weight", [144, 48])], name="in_proj")
    qkv = graph.add("add", [qkv, graph.weight("in_proj_bias", [144])])
    heads = []
    for i in range(3):
        part = graph.add("slice", [qkv], {"dim": 2, "start": 48 * i, "stop": 48 * (i + 1)})
        part = graph.add("split_dim", [part], {"dim": 2, "sizes": [4, 12]})
        heads.append(graph.add("transpose", [part], {"order": [0, 2, 1, 3]}))
    y = graph.add("attention", heads, {"scale": 1 / math.sqrt(12)})
    y = graph.add("merge_dims", [graph.add("transpose", [y], {"order": [0, 2, 1, 3]})], {"dim": 2, "count": 2})
    y = graph.add("linear", [y, graph.weight("out_proj.weight", [48, 48])], name="out_proj")
    graph.output("y", graph.add("add", [y, graph.weight("out_proj.bias", [48])]))
    x = r(2, 10, 48)
    expected = module(x, x, x)[0].detach()
    for devices in ("cpu:0", "cpu:0,cpu:1", "cpu:0,cpu:1,cpu:2"):
        engine = comfytp.Engine(graph, state, devices)
        assert error_of(engine(x=x)["y"], expected) <= 1e-5
    assert np.isclose(sum(d["weight_bytes"] for d in comfytp.Engine(graph, state, "cpu:0,cpu:1", "tensor=2").report()["devices"]),
                      sum(t.nbytes for t in state.values()), rtol=0.05)
