"""comfytp.split on a GPU: every family of denoisers, as exact as PyTorch on the same GPU in the same dtype."""

import copy

import comfytp
import denoisers
import pytest
import torch
from test_split import FAMILIES, all_ran_on_the_engine, as_dtype, calls_of
from torch.utils._pytree import tree_map

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture(autouse=True)
def no_tf32():
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def on_gpu(call):
    return tree_map(lambda value: value.cuda() if isinstance(value, torch.Tensor) else value, call)


def error(result, expected):
    return float((result[0].float() - expected[0]).norm() / expected[0].norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_split_module_is_as_exact_as_in_torch(name, dtype):
    module, exact = denoisers.make(name).to("cuda", dtype), denoisers.make(name).cuda()
    for parameter, other in zip(exact.parameters(), module.parameters(), strict=True):
        parameter.copy_(other)
    split = comfytp.split(module, "cuda:0")
    ours = theirs = 0.0
    for call in calls_of(name):
        call = on_gpu(as_dtype(call, dtype))
        expected = exact(**as_dtype(call, torch.float32))
        result = split(**call)
        assert result[0].is_cuda and result[0].dtype == dtype
        ours += error(result, expected)
        theirs += error(module(**call), expected)
    split.synchronize()
    assert all_ran_on_the_engine(split)
    assert theirs > 1e-4  # the comparison says something
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_split_module_gives_in_fp32_what_the_module_gives(name):
    module = denoisers.make(name).cuda()
    split = comfytp.split(module, "cuda:0")
    for call in calls_of(name):
        assert error(split(**on_gpu(call)), module(**on_gpu(call))) <= 1e-4
    split.synchronize()
    assert all_ran_on_the_engine(split)


@pytest.mark.parametrize("place", ["cuda", "cpu"])
@torch.no_grad()
def test_queued_call_is_made_again_over_weights_that_were_written_before_it(place):
    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64)).requires_grad_(False).to(place)
    split = comfytp.split(module, "cuda:0")
    x = torch.randn(4, 64, device="cuda")

    def compare():
        torch.testing.assert_close(split(x), copy.deepcopy(module).cuda()(x), rtol=1e-4, atol=1e-4)

    for _ in range(3):
        compare()
    module[0].weight.mul_(2)
    compare()
    compare()
    split.synchronize()
    stats = split.engine_stats()
    assert stats["captures"] <= 1 and stats["torch_fallbacks"] == 0
    assert stats["engine_calls"] == 6  # one was thrown away
