"""Two ranks on GPUs: two of them, or both on one. Skipped where they are not there."""

import gc
import threading
import time

import pytest
import torch
import unets
from unets import make_call, relative_error

import comfytp

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = pytest.mark.skipif(GPUS == 0, reason="no CUDA device here")


@pytest.fixture(
    params=["cuda:0,cuda:0", pytest.param("cuda:0,cuda:1", marks=pytest.mark.skipif(GPUS < 2, reason="no second CUDA device here"))]
)
def devices(request):
    return request.param


@pytest.fixture(params=["peer", "staged"])
def communicator(request):
    return request.param


def denoiser_of(unet, devices, **options):
    return comfytp.Denoiser(unet.state_dict(), devices, **{**unets.FAMILIES["sdxl"].heads, **options})


def free_memory():
    gc.collect()
    free = []
    for gpu in range(GPUS):
        torch.cuda.synchronize(gpu)
        with torch.cuda.device(gpu):
            torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info(gpu)[0])
    return free


@pytest.mark.parametrize("placement", ["resident", "gathered"])
@pytest.mark.parametrize("mesh", ["tensor=2", "batch=2", "patch=2", "tensor=2:1"])
def test_two_ranks_give_what_one_gives(unet_of, devices, communicator, mesh, placement):
    unet = unet_of("sdxl")
    inputs = make_call(unet, 2, 32, 40).inputs()
    one = denoiser_of(unet, "cuda:0")(**inputs)
    denoiser = denoiser_of(unet, devices, mesh=mesh, placement=placement, communicator=communicator)
    two = denoiser(**inputs)
    assert relative_error(two, one) <= 1e-5
    assert all(torch.equal(two, denoiser(**inputs)) for _ in range(3)), "bits repeat"


def test_500_calls_take_no_more_memory_on_either_gpu(unet_of, devices, communicator):
    unet = unet_of("sdxl")
    denoiser = denoiser_of(unet, devices, mesh="tensor=2", compute="f16", communicator=communicator)
    calls = [make_call(unet, batch, 32, 40).inputs() for batch in (1, 2)]

    def free_after(count):
        for i in range(count):
            inputs = dict(calls[i % 2])
            inputs["context"] = inputs["context"] + i
            denoiser(**inputs)
        return free_memory()

    before = free_after(20)
    assert all(b - a <= 4 << 20 for b, a in zip(before, free_after(500), strict=True))


def test_a_dead_engine_leaves_nothing_on_either_gpu(unet_of, devices, communicator):
    unet = unet_of("sdxl")
    inputs = make_call(unet).inputs()

    def once():
        denoiser_of(unet, devices, mesh="tensor=2", communicator=communicator)(**inputs)
        return free_memory()

    before = once()  # the libraries keep what they take at first
    assert all(b - a <= 4 << 20 for b, a in zip(before, [once() for _ in range(5)][-1], strict=True))


def test_a_cancelled_call_ends_and_the_next_one_works(unet_of, devices, communicator):
    unet = unet_of("sdxl")
    denoiser = denoiser_of(unet, devices, mesh="tensor=2", communicator=communicator)
    inputs = make_call(unet, 2, 64, 64).inputs()
    expected = denoiser(**inputs)
    stop, cancelled = threading.Event(), 0

    def keep_cancelling():
        while not stop.is_set():
            denoiser.cancel()
            time.sleep(0.0007)

    thread = threading.Thread(target=keep_cancelling)
    thread.start()
    try:
        for _ in range(50):
            try:
                denoiser(**inputs)
            except comfytp.Cancelled:
                cancelled += 1
    finally:
        stop.set()
        thread.join()
    assert cancelled > 0
    assert torch.equal(denoiser(**inputs), expected)
