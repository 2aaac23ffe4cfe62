"""A module that was split, and the process, are left as they were."""

import contextlib
import copy
import functools
import pickle
import warnings

import comfytp
import pytest
import torch
from small_module import Small, module, own_cache, same, x_of  # noqa: F401  fixtures among them


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@functools.lru_cache(maxsize=None)
def angles(count):
    return torch.arange(count).float() * 0.1


class Caching(Small):
    @functools.lru_cache(maxsize=None)  # noqa: B019
    def shift(self, count):
        return angles(count).sin()

    def forward(self, x):
        return super().forward(x) + self.shift(x.shape[-1]) + angles(x.shape[-1])


@pytest.mark.parametrize("ran_before", [False, True])
def test_caches_hold_no_tensor_of_a_capture(ran_before):
    angles.cache_clear()
    module = Caching()
    expected = module(x_of()) if ran_before else None
    split = comfytp.split(module)
    result = split(x_of())
    same(result, module(x_of()))
    if ran_before:
        same(result, expected)
    assert type(angles(8)) is torch.Tensor and type(module.shift(8)) is torch.Tensor


def test_capture_leaves_module_and_process_as_they_were(module):
    before = {name: (id(p), p._version, p.clone()) for name, p in module.named_parameters()}
    attributes = {part: dict(vars(part)) for part in module.modules()}
    torch.manual_seed(5)
    random = torch.random.get_rng_state()
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    threads = torch.get_num_threads()
    grad = torch.is_grad_enabled()
    comfytp.split(module)(x_of())
    for name, p in module.named_parameters():
        assert (id(p), p._version) == before[name][:2] and torch.equal(p, before[name][2])
    assert attributes == {part: dict(vars(part)) for part in module.modules()}
    assert torch.equal(random, torch.random.get_rng_state())
    assert (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()) == (dtype, device, threads)
    assert torch.is_grad_enabled() == grad


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), default_dtype, torch.inference_mode, torch.enable_grad], ids=["device", "dtype", "inference", "grad"])
def test_what_the_host_has_set_stays_and_does_not_matter(mode):
    class Making(Small):
        def forward(self, x):
            return super().forward(x) + torch.ones(x.shape[-1], device=x.device).to(x.dtype) * torch.tensor(1.0, device=x.device).dtype.itemsize

    module = Making()
    split = comfytp.split(module)
    same(split(x_of()), module(x_of()))
    x = x_of()
    with mode():
        before = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        result, expected = split(x), module(x)
        after = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    assert before == after
    assert result.device == expected.device and result.dtype == expected.dtype
    same(result, expected)
    assert split.engine_stats()["torch_fallbacks"] == 0


def test_everything_but_forward_is_the_modules(module):
    split = comfytp.split(module)
    assert split.config is module.config and split.epsilon == module.epsilon
    assert list(split.state_dict()) == list(module.state_dict())
    assert [id(p) for p in split.parameters()] == [id(p) for p in module.parameters()]
    assert [name for name, _ in split.named_modules()] == [name for name, _ in module.named_modules()]
    assert not split.eval().training and not module.training
    with pytest.raises(AttributeError, match="nonsense"):
        split.nonsense  # noqa: B018
    split.epsilon = 0.5
    assert module.epsilon == 0.5
    same(split(x_of()), module(x_of()))
    split.extra = 1
    del split.extra
    assert not hasattr(module, "extra")


def test_forward_that_a_caller_wraps_stays_around_the_split_one(module):
    split = comfytp.split(module)
    inner = split.forward
    split.forward = lambda x: inner(x) + 1
    same(split(x_of()), module(x_of()) + 1)
    assert split.engine_stats()["engine_calls"] == 1


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda split: pickle.loads(pickle.dumps(split))], ids=["copy", "deepcopy", "pickle"])
def test_copy_is_split_in_the_same_way(module, again):
    split = comfytp.split(module, "cpu:0,cpu:1", mesh="batch=2")
    split(x_of())
    other = again(split)
    same(other(x_of()), module(x_of()))
    assert other.plan.mesh == "batch=2"
    assert other.module is module or again is not copy.copy


@torch.no_grad()
def test_wrong_call_says_what_torch_says(module, capfd):
    split = comfytp.split(module)
    for args in ((), (x_of(2, 3, 7),), ("x",)):
        with pytest.raises(Exception) as theirs:
            module(*args)
        with warnings.catch_warnings(), pytest.raises(Exception) as ours:
            warnings.simplefilter("error")  # none is right: nothing ran in PyTorch
            split(*args)
        assert type(ours.value) is type(theirs.value) and str(ours.value) == str(theirs.value)
        assert ours.value.__context__ is None and len(ours.traceback) <= len(theirs.traceback) + 4
    assert "Traceback" not in capfd.readouterr().err
    same(split(x_of()), module(x_of()))
