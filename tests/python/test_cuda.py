"""On one GPU: what only a GPU can show. Skipped elsewhere; the tests of kernels (tests/backend) are parametrised over devices."""

import gc

import pytest
import torch
import unets
from unets import make_call, reference, relative_error

import comfytp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def denoiser_of(weights, family, **options):
    return comfytp.Denoiser(weights, **{"devices": "cuda:0", **unets.FAMILIES[family].heads, **options})


def moved(call):
    added = call.added and {name: tensor.cuda() for name, tensor in call.added.items()}
    tensors = {name: tensor if tensor is None else tensor.cuda() for name, tensor in vars(call).items() if name != "added"}
    return unets.Call(**tensors, added=added)


@pytest.mark.parametrize("height, width", [(72, 40), (17, 23)])
@pytest.mark.parametrize("batch, tokens", [(1, 77), (2, 154), (3, 231), (4, 77)])
def test_fp32_gives_diffusers_output(unet_of, family, batch, tokens, height, width):
    unet = unet_of(family)
    call = make_call(unet, batch, height, width, tokens)
    assert relative_error(denoiser_of(unet.state_dict(), family)(**call.inputs()), reference(unet, call)) <= 1e-4


@pytest.mark.parametrize("compute", list(DTYPES))
@pytest.mark.parametrize("height, width", [(72, 40), (17, 23), (64, 64)])
def test_half_precision_is_as_exact_as_pytorchs(unet_of, family, compute, height, width):
    dtype = DTYPES[compute]
    unet = unets.make_unet(family).to(dtype)
    call = make_call(unet, 2, height, width).to(dtype)
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    theirs = reference(unet.cuda(), moved(call))
    exact = reference(unet.float(), moved(call.to(torch.float32))).cpu()
    ours = denoiser_of(weights, family, compute=compute)(**moved(call).inputs())
    assert ours.is_cuda and ours.dtype == dtype
    assert relative_error(ours.cpu(), exact) <= 1.1 * relative_error(theirs.cpu(), exact)


def test_bits_repeat_and_the_current_device_stays(unet_of):
    unet = unet_of("sdxl")
    denoiser = denoiser_of(unet.state_dict(), "sdxl", compute="f16")
    inputs = moved(make_call(unet).to(torch.float16)).inputs()
    before = torch.cuda.current_device()
    first = denoiser(**inputs)
    assert all(torch.equal(first, denoiser(**inputs)) for _ in range(3))
    assert torch.cuda.current_device() == before


def test_500_calls_with_changing_shapes_and_prompts_leak_nothing(unet_of):
    unet = unet_of("sd1")
    denoiser = denoiser_of(unet.state_dict(), "sd1", compute="f16")
    calls = [moved(make_call(unet, batch, height, 40).to(torch.float16)).inputs() for batch in (1, 2) for height in (40, 56, 64)]

    def free_after(count):
        for i in range(count):
            inputs = dict(calls[i % len(calls)])
            inputs["context"] = inputs["context"] + i
            denoiser(**inputs)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    first = free_after(50)
    assert first - free_after(450) <= 4 << 20


def test_unloading_gives_the_memory_back_and_the_next_call_works(unet_of):
    unet = unet_of("sdxl")
    denoiser = denoiser_of(unet.state_dict(), "sdxl")
    inputs = make_call(unet).inputs()
    first = denoiser(**inputs)
    held = torch.cuda.mem_get_info()[0]
    denoiser.unload()
    assert torch.cuda.mem_get_info()[0] > held
    assert denoiser.stats()["allocated_weight_bytes"] == [0]
    assert torch.equal(first, denoiser(**inputs))


def test_a_limit_is_kept_and_the_error_says_what_was_needed(unet_of):
    denoiser = denoiser_of(unet_of("sdxl").state_dict(), "sdxl", devices="cuda:0@1MiB")
    with pytest.raises(comfytp.Error, match=r"\[memory\] cuda:0 needs \d+ bytes more, has \d+ in use and a limit of 1048576"):
        denoiser.load()
    assert denoiser.stats()["allocated_weight_bytes"] == [0]


def test_a_gpu_that_is_not_there_is_named_with_those_that_are(unet_of):
    with pytest.raises(comfytp.Error, match=r"'cuda:63': there is no such device; devices here: .*cuda:0"):
        denoiser_of(unet_of("sd1").state_dict(), "sd1", devices="cuda:63")


def test_a_split_module_runs_where_its_inputs_lie():
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64), torch.nn.LayerNorm(64))
    x = torch.randn(3, 50, 64)
    expected = block(x)
    split = comfytp.split(block, devices="cuda:0")
    result = split(x.cuda())
    assert result.is_cuda
    assert relative_error(result.cpu(), expected) <= 1e-5
