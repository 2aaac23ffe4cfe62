"""comfytp.split on every family of denoisers: equal to PyTorch, and split."""

import re

import comfytp
import denoisers
import pytest
import torch
from comfytp.importer.program import import_call
from test_translation import relative_error
from torch.utils._pytree import tree_flatten

FAMILIES = list(denoisers.FAMILIES)


def all_ran_on_the_engine(split):
    """No call fell back to PyTorch, and no part of one ran as foreign code."""
    stats = split.engine_stats()
    assert stats["torch_fallbacks"] == 0 and stats["engine_calls"] > 0
    return "callout" not in split._calls.last.program.graph


def calls_of(name):
    """Changed shapes, batch sizes and optional inputs in between, and the first again."""
    for i, sizes in enumerate(({}, *denoisers.FAMILIES[name].variants, {})):
        yield denoisers.call_arguments(name, seed=11 + i, **sizes)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_split_module_gives_what_the_module_gives(make, name):
    module = make(name)
    one, two, three = (comfytp.split(module, devices) for devices in ("cpu:0", "cpu:0,cpu:1", "cpu:0,cpu:1,cpu:2"))
    count = 0
    for call in calls_of(name):
        whole = one(**call)
        expected = module(**call)
        assert type(whole) is type(expected)
        assert relative_error(whole, expected) <= 1e-4
        assert relative_error(two(**call), whole) <= 1e-5
        assert relative_error(three(**call), whole) <= 1e-5
        count += 1
    for split in (one, two, three):
        assert all_ran_on_the_engine(split) and split.engine_stats()["engine_calls"] == count


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_two_devices_share_weights_and_arithmetic(make, name):
    split = comfytp.split(make(name), "cpu:0,cpu:1")
    split(**denoisers.call_arguments(name))
    plan = split.plan
    assert max(plan.weight_bytes_per_device) <= 0.60 * plan.weight_bytes_total
    assert max(plan.flops_per_device) <= 0.65 * sum(plan.flops_per_device)
    # By the engine's own counters too.
    assert split.engine_stats()["allocated_weight_bytes"] == plan.weight_bytes_per_device
    assert all_ran_on_the_engine(split)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_three_devices_gather_weights(make, name):
    module = make(name)
    split = comfytp.split(module, "cpu:0,cpu:1,cpu:2", placement="gathered")
    call = denoisers.call_arguments(name, seed=5)
    assert relative_error(split(**call), module(**call)) <= 1e-4
    plan = split.plan
    assert max(plan.weight_bytes_per_device) <= 0.45 * plan.weight_bytes_total
    assert split.engine_stats()["allocated_weight_bytes"] == plan.weight_bytes_per_device
    assert all_ran_on_the_engine(split)


@pytest.mark.parametrize("name", ["flux", "sdxl", "lumina2"])
@torch.no_grad()
def test_samples_are_split_over_an_axis_of_the_batch(make, name):
    module = make(name)
    split = comfytp.split(module, "cpu:0,cpu:1", mesh="batch=2")
    call = denoisers.call_arguments(name, seed=6)
    assert relative_error(split(**call), module(**call)) <= 1e-4
    plan = split.plan
    assert max(plan.flops_per_device) <= 0.65 * sum(plan.flops_per_device)
    assert all_ran_on_the_engine(split)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_rows_frames_and_tokens_are_split_over_an_axis_of_patches(make, name):
    module = make(name)
    one, split = comfytp.split(module, "cpu:0"), comfytp.split(module, "cpu:0,cpu:1", mesh="patch=2", placement="gathered")
    call = denoisers.call_arguments(name, seed=7)
    assert relative_error(split(**call), one(**call)) <= 1e-5
    whole, plan = one.plan, split.plan
    assert max(plan.weight_bytes_per_device) <= 0.60 * plan.weight_bytes_total
    # Of chroma's half is spent on the timestep, at this width; rows are few and do not divide evenly.
    assert max(plan.flops_per_device) <= (0.80 if name == "chroma" else 0.67) * whole.flops_per_device[0]
    assert "all_reduce" not in plan.collectives[0] or name == "sana"  # whose attention sums over tokens
    assert all_ran_on_the_engine(split)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_bf16_module_is_as_exact_as_in_torch(name):
    module, exact = denoisers.make(name).to(torch.bfloat16), denoisers.make(name)
    for parameter, other in zip(exact.parameters(), module.parameters(), strict=True):
        parameter.copy_(other)
    split = comfytp.split(module, "cpu:0,cpu:1")
    ours = theirs = 0.0
    for seed in range(3):
        call = as_dtype(denoisers.call_arguments(name, seed=seed), torch.bfloat16)
        expected = exact(**as_dtype(call, torch.float32))[0]
        result = split(**call)[0]
        assert result.dtype == torch.bfloat16
        ours += float((result.float() - expected).norm() / expected.norm())
        theirs += float((module(**call)[0].float() - expected).norm() / expected.norm())
    assert all_ran_on_the_engine(split)
    assert theirs > 1e-4  # the comparison says something
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl"])
@torch.no_grad()
def test_f16_modules_multiply_in_f16_where_devices_do(name, halves):
    module = denoisers.make(name).half()
    leaves, spec = tree_flatten(((), as_dtype(denoisers.call_arguments(name, seed=2), torch.float16)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    graph = import_call(module, leaves, spec, [f"x{i}" for i in range(len(tensors))], ["call"] * len(tensors), None, halves).graph
    products = re.findall(r"= (?:linear|conv\dd|attention)\(.* : (\w+)\[", graph)
    assert len(products) > 5
    wide = sum(dtype == "f32" for dtype in products)  # some models keep an embedding in fp32
    assert set(products) <= ({"f16", "f32"} if halves else {"f32"})
    assert not halves or wide < len(products) / 4


def as_dtype(call, dtype):
    """Positions stay f32, as pipelines give them."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    return {
        key: tuple(v.to(dtype) for v in value)
        if isinstance(value, tuple)
        else value.to(dtype)
        if isinstance(value, torch.Tensor) and value.dtype in floats and not key.endswith("_ids")
        else value
        for key, value in call.items()
    }
