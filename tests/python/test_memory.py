"""What the devices hold: about one model in all, and what the report said before anything was loaded."""

import json
import subprocess
import sys

import pytest
import unets

MEBI = 1 << 20

# A process of its own, without torch: it says how much anonymous memory a call's devices added.
MEASURE = """
import json, sys
import numpy as np
import comfytp

path, options, head_dim, measure = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

before = anonymous()
denoiser = comfytp.Denoiser(path, head_dim=head_dim or None, **options)
if measure == "report":
    print(json.dumps(denoiser.report(batch=2, height=16, width=16)["devices"]))
    sys.exit()
info = denoiser.info
x = np.random.default_rng(0).standard_normal((2, 4, 16, 16), np.float32)
y = info["label_dim"] and np.ones((2, info["label_dim"]), np.float32)
output = denoiser(x, 7.0, np.zeros((2, 77, info["context_dim"]), np.float32), y)
assert np.isfinite(output).all()
print(json.dumps({"grown": anonymous() - before, **denoiser.stats()}))
"""


def measured(path, options, what="run", head_dim=0):
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path), json.dumps(options), str(head_dim), what], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """About 300 MB in fp16."""
    import torch

    unet = unets.make_unet("sd1", block_out_channels=(128, 256, 512, 512))
    path = unets.save_ldm(unet, tmp_path_factory.mktemp("model") / "model.safetensors", dtype=torch.float16)
    return path, sum(p.numel() for p in unet.parameters()) * 2


@pytest.mark.parametrize(
    "options",
    [
        {"devices": "cpu:0"},
        {"devices": "cpu:0,cpu:1", "mesh": "tensor=2"},
        {"devices": "cpu:0,cpu:1,cpu:2,cpu:3", "mesh": "tensor=4"},
        {"devices": "cpu:0,cpu:1", "mesh": "batch=2", "placement": "gathered"},
        {"devices": "cpu:0,cpu:1,cpu:2,cpu:3", "mesh": "batch=2,patch=2", "placement": "gathered"},
    ],
    ids=lambda options: " ".join(options.values()),
)
def test_all_devices_together_hold_about_one_model(checkpoint, options):
    path, model_bytes = checkpoint
    stats = measured(path, options)
    activations = sum(stats["allocated_activation_bytes"])
    assert sum(stats["allocated_weight_bytes"]) >= model_bytes
    # Besides: oneDNN's own, and for each device a thread, its launches and its kernels' code.
    devices = len(options["devices"].split(","))
    assert stats["grown"] <= 1.05 * model_bytes + activations + (24 + 28 * devices) * MEBI


@pytest.mark.parametrize("family", unets.FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"devices": "cpu:0"},
        {"devices": "cpu:0,cpu:1", "mesh": "tensor=2"},
        {"devices": "cpu:0,cpu:1,cpu:2", "mesh": "patch=3", "placement": "gathered"},
    ],
    ids=lambda options: " ".join(options.values()),
)
def test_a_call_allocates_what_another_process_reported(unet_of, family, options, tmp_path):
    path = unets.save_ldm(unet_of(family), tmp_path / "model.safetensors")
    head_dim = unets.FAMILIES[family].heads.get("head_dim", 0)
    report = measured(path, options, "report", head_dim)
    stats = measured(path, options, "run", head_dim)
    assert [device["weight_bytes"] for device in report] == stats["allocated_weight_bytes"]
    for device, allocated in zip(report, stats["allocated_activation_bytes"], strict=True):
        assert allocated == pytest.approx(device["activation_bytes"], rel=0.01)
