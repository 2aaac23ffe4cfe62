"""Every entry of the table: a small module that uses the op, captured and interpreted, against torch."""

import comfytp
import pytest
import torch
import torch.nn.functional as F
from comfytp.importer import Unsupported
from comfytp.importer.calls import Calls
from comfytp.importer.translate import TABLE
from interpreted import InterpretedEngine


class Function(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = torch.nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(3)), requires_grad=False)

    def forward(self, *tensors):
        return self.function(self, *tensors)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


X = (3, 4)
IMAGE = (2, 4, 6, 5)
CASES = {
    "arithmetic": (lambda m, x, y: (x + 2 * y - 1) / (3 - y.abs()) * x.neg() + torch.rsub(x, y, alpha=3), X, X),
    "alpha": (lambda m, x, y: torch.add(x, y, alpha=0.5) - torch.sub(x, y, alpha=2), X, X),
    "broadcast": (lambda m, x, y: x[:, None] * y[None] + y.mean(0), X, (5, 4)),
    "functions": (lambda m, x: x.sin() + x.cos() * x.tanh() + x.sigmoid() + x.exp() + x.abs().sqrt() + x.abs().add(1).rsqrt() + x.square().log1p(), X),
    "activations": (lambda m, x: F.silu(x) + F.gelu(x) + F.gelu(x, approximate="tanh") + F.relu(x) + F.leaky_relu(x, 0.2) + F.elu(x) + F.softplus(x) + F.mish(x), X),
    "hard_activations": (lambda m, x: F.hardswish(x) + F.hardsigmoid(x) + F.relu6(x) + F.hardtanh(x, -0.5, 0.5), X),
    "powers": (lambda m, x: x**2 + x.abs() ** 0.5 + x.abs().add(1) ** -0.5 + 10.0 ** x + x.abs() ** 1.7 + 1 / (x + 9) + torch.exp2(x), X),
    "clamp": (lambda m, x: x.clamp(-0.3, 0.7) + x.clamp(min=0.1) + x.clamp_max(0.2) + torch.maximum(x, m.weight[:3]), X),
    "fused_sums": (lambda m, x, y: torch.addcmul(x, x, y) + torch.addcmul(x, x, y, value=0.3) + torch.addcdiv(x, x, y.abs() + 1) + torch.lerp(x, y, 0.3), X, X),
    "comparisons": (lambda m, x, y: torch.where((x > y) & (x != 0) | ~(y <= 0.2), x, y.float()) + (x >= 0).float() + (x == y) + (x < y), X, X),
    "masks": (lambda m, x: x.masked_fill(x > 0, float("-inf")).softmax(-1) + torch.nan_to_num(x), X),
    "integers": (lambda m, x: (x > 0).long().sum(1, keepdim=True) * x + (x > 0).long().cumsum(1), X),
    "dtypes": (lambda m, x: x.to(torch.bfloat16).float() + x.double().float() + (x > 0), X),
    "views": (lambda m, x: x.view(2, 2, 2, 30).permute(0, 3, 1, 2).reshape(60, 4).t().unflatten(1, (5, 12)).flatten(0, 1).unsqueeze(1).squeeze(1), IMAGE),
    "selections": (lambda m, x: x[:, 1:3] + x[:, ::2] - x[:, :1, 0:1, 2:3].narrow(2, 0, 1) + x.select(1, -1)[:, None], IMAGE),
    "splits": (lambda m, x: sum(x.chunk(2, 1)) + x.split([1, 3], 1)[1][:, :2] + torch.stack(x.unbind(1), 1)[:, 2:], IMAGE),
    "joins": (lambda m, x, y: torch.cat([x, y, x.new_zeros(3, 1)], 1) + torch.stack([x, y], 2).reshape(3, 8)[:, :1], X, X),
    "repeats": (lambda m, x: x.repeat(2, 3) + x.repeat_interleave(3, 1).repeat(2, 1) + x.unsqueeze(0).expand(2, 3, 4).reshape(6, 4).repeat(1, 3), X),
    "writes": (lambda m, x: write(x), X),
    "interleaved_writes": (lambda m, x, y: interleave(x, y), X, X),
    "pixels": (lambda m, x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2) + F.pixel_shuffle(x, 2).mean(), (2, 4, 3, 5)),
    "flips": (lambda m, x: x.flip(1) + x.roll(2, 1) + torch.roll(x, (1, 3), (0, 1)), X),
    "padding": (lambda m, x: F.pad(x, (1, 2)) [..., :5] + F.pad(x, (1, 1, 2, 0), mode="replicate")[..., 2:, 2:] + F.pad(x, (2, 1, 0, 1), mode="reflect")[..., :-1, 3:] + F.pad(x, (-1, 1)), IMAGE),
    "circular": (lambda m, x: F.pad(x, (1, 1, 1, 1), mode="circular"), IMAGE),
    "linear": (lambda m, x: F.linear(x, m.weight, x[0, 0]) @ m.weight + x @ m.weight.t() @ m.weight, (3, 4))  ,
    "matrix_products": (lambda m, x, y: x @ y + torch.bmm(x, y) + torch.baddbmm(x[..., :3], x, y, beta=0.5, alpha=2) + torch.einsum("bij,bjk->bik", x, y) + x[0] @ y, (2, 3, 4), (2, 4, 3)),
    "vectors": (lambda m, x: m.weight @ x[0] + torch.addmm(x[0, 0], m.weight, m.weight.t())[0], X),
    "convolutions": (lambda m, x, k: F.conv2d(x, k, k[:, 0, 0, 0], stride=2, padding=1) + F.conv2d(x, k, padding="same")[..., ::2, ::2], IMAGE, (6, 4, 3, 3)),
    "grouped_convolution": (lambda m, x, k: F.conv2d(x, k, groups=4), IMAGE, (8, 1, 3, 3)),
    "convolution_1d": (lambda m, x, k: F.conv1d(x, k, padding=1), (2, 4, 7), (5, 4, 3)),
    "convolution_3d": (lambda m, x, k: F.conv3d(x, k, stride=(1, 2, 2)), (1, 4, 3, 6, 4), (5, 4, 1, 2, 2)),
    "unfolding_convolution": (lambda m, x, k: F.conv_transpose2d(x, k, k[0, :, 0, 0], stride=2), IMAGE, (4, 3, 2, 2)),
    "attention": (lambda m, q, k: F.scaled_dot_product_attention(q, k, k * 2) + F.scaled_dot_product_attention(q, k, k, scale=0.3), (2, 3, 5, 8), (2, 3, 7, 8)),
    "causal_attention": (lambda m, q: F.scaled_dot_product_attention(q, q, q, is_causal=True), (2, 3, 5, 8)),
    "masked_attention": (lambda m, q, k, s: F.scaled_dot_product_attention(q, k, k, s) + F.scaled_dot_product_attention(q, k, k, s[:1] > 0), (2, 3, 5, 8), (2, 3, 7, 8), (2, 1, 5, 7)),
    "grouped_attention": (lambda m, q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True), (2, 6, 5, 8), (2, 2, 7, 8)),
    "repeated_keys": (lambda m, q, k: F.scaled_dot_product_attention(q, k.repeat_interleave(3, 1), k.repeat_interleave(3, 1)), (2, 6, 5, 8), (2, 2, 7, 8)),
    "attention_of_rank_3": (lambda m, q, s: F.scaled_dot_product_attention(q, q, q, s), (3, 5, 8), (5, 5)),
    "norms": (lambda m, x: F.layer_norm(x, (4,)) + F.layer_norm(x, (4,), x[0], x[1]) + F.rms_norm(x, (4,), eps=1e-6) + F.rms_norm(x, (4,), x[2]), X),
    "norms_of_several_dimensions": (lambda m, x: F.layer_norm(x, x.shape[2:]) + F.rms_norm(x, x.shape[2:], eps=1e-5), IMAGE),
    "written_out_rms_norm": (lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.weight[0], X),
    "group_norm": (lambda m, x: F.group_norm(x, 2) + F.group_norm(x, 4, x[0, :, 0, 0], x[1, :, 0, 0]) + F.instance_norm(x), IMAGE),
    "reductions": (lambda m, x: x.sum() + x.sum((0, 2)).max() + x.mean((1, 3), keepdim=True) + x.amax(1, keepdim=True) - x.amin() + x.var(1, keepdim=True) + x.std(), IMAGE),
    "norm_of_a_vector": (lambda m, x: F.normalize(x, dim=1) + torch.linalg.vector_norm(x, dim=-1, keepdim=True), X),
    "softmax": (lambda m, x: x.softmax(1) + F.log_softmax(x, -1).exp(), X),
    "upsampling": (lambda m, x: F.interpolate(x, scale_factor=2.0, mode="nearest") [..., ::2, ::2]+ F.interpolate(x, size=(6, 7))[..., :5], IMAGE),
    "upsampling_3d": (lambda m, x: F.interpolate(x, scale_factor=(2, 2, 1), mode="nearest"), (1, 2, 3, 2, 2)),
    "embedding": (lambda m, x: F.embedding((x > 0).long(), m.weight) + m.weight[(x > 0).long()] + m.weight.index_select(0, torch.tensor([1, 0, 5]))[:, None], X),
    "complex": (lambda m, x: rotate(x), X),
    "scalars": (lambda m, x: x * x.sum() + x[0, 0] / 2 + torch.tensor(3.0) * x.mean(), X),
    "autocast": (lambda m, x: autocast(x), X),
    "no_input": (lambda m, x: m.weight * 2 + x[0], X),
}  # fmt: skip


def write(x):
    y = torch.empty_like(x)
    y[:, 1:3] = x[:, :2] * 2
    y[:, 0] = 1
    y[:, 3] = x[:, 0]
    y[1].add_(3)
    return y


def autocast(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x.bfloat16().float() @ torch.ones(4, 4)
        with torch.autocast("cpu", enabled=False), torch.enable_grad():
            z = x.float() * 2
    return y.float() + z.sin()


def interleave(x, y):
    z = torch.empty(3, 8)
    z[..., 0::2] = x
    z[..., 1::2] = y
    return z


def rotate(x):
    angles = torch.polar(torch.ones(2), torch.tensor([0.5, 2.0]))
    turned = torch.view_as_complex(x.reshape(3, 2, 2)) * torch.polar(x[:, :2].abs(), x[:, 2:]) * angles
    return torch.view_as_real(torch.cat([turned, turned.conj() * 2], 0)).flatten(1)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_op_gives_what_torch_gives(case):
    function, *shapes = CASES[case]
    module = Function(function)
    calls = Calls(module, InterpretedEngine(dict(module.named_parameters())))
    inputs = [randn(*shape) for shape in shapes]
    calls(*inputs)
    others = [x.flip(0) * 1.1 for x in inputs]  # not those of the capture
    result, expected = calls(*others), module(*others)
    assert result.shape == expected.shape and result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-6)


@torch.no_grad()
def test_repeated_keys_become_grouped_attention():
    function, *shapes = CASES["repeated_keys"]
    module = Function(function)
    calls = Calls(module, InterpretedEngine({}))
    calls(*(randn(*shape) for shape in shapes))
    assert "attention(%0, %1, %1)" in calls.last.program.graph
    assert "expand(" not in calls.last.program.graph


@torch.no_grad()
def test_written_out_rms_norm_becomes_one_op():
    function, *shapes = CASES["written_out_rms_norm"]
    calls = Calls(Function(function), InterpretedEngine({"weight": randn(6, 4)}))
    calls(*(randn(*shape) for shape in shapes))
    assert "rms_norm(" in calls.last.program.graph and "rsqrt(" not in calls.last.program.graph


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda m, x: torch.fft.fft(x).real, "fft"),
        (lambda m, x: x.sort(1)[0], "aten.sort"),
        (lambda m, x: x + x.median(), "aten.median"),
        (lambda m, x: F.conv2d(x[None, None], x[None, None, :2, :2], dilation=2), "dilation"),
        (lambda m, x: x + torch.rand(3, 4), "aten.rand"),
    ],
)
@torch.no_grad()
def test_unknown_op_is_named(function, op):
    module = Function(function)
    with pytest.raises(Unsupported, match=op):
        Calls(module, InterpretedEngine({}))(randn(*X))


def test_table_names_ops_that_torch_has():
    for name in TABLE:
        packet, _, overload = name.partition(".")
        op = getattr(torch.ops.aten, packet)
        assert not overload or hasattr(op, overload), name


def test_interpreter_knows_every_op_that_a_graph_may_have():
    import interpret

    leaves = {"input", "weight", "constant"}
    known = leaves | set(interpret._SIMPLE) | set(interpret._WITH_ATTRS)
    collectives = {"all_reduce", "all_gather", "reduce_scatter", "halo_exchange", "fetch_weight", "group_moments", "row_moments"}
    fused = {"pointwise", "fused_norm", "glu", "gated_linear", "linears"}  # made on a device's graph, behind what a capture gives
    assert set(comfytp.ops()) - collectives - fused - known == set()
