"""A UNet that was captured is split as the UNet that the engine builds from the checkpoint."""

import comfytp
import denoisers
import pytest
import torch


@pytest.mark.parametrize(("name", "heads"), [("unet", {"heads": 4}), ("sdxl", {"head_dim": 16})])
@pytest.mark.parametrize(("devices", "mesh"), [("cpu:0,cpu:1", "tensor=2"), ("cpu:0,cpu:1,cpu:2", "tensor=3"), ("cpu:0,cpu:1", "batch=2")])
@torch.no_grad()
def test_captured_and_built_unet_have_one_plan(make, name, heads, devices, mesh):
    module = make(name)
    split = comfytp.split(module, devices, mesh=mesh)
    split(**denoisers.call_arguments(name))
    built = comfytp.Denoiser(module.state_dict(), devices, mesh=mesh, **heads).report(2, 8, 8, 7)["devices"]
    plan = split.plan
    assert plan.weight_bytes_per_device == [device["weight_bytes"] for device in built]
    assert plan.flops_per_device == [device["flops"] for device in built]
    assert plan.collectives == [device["collectives"] for device in built]
