"""One device against PyTorch, and two devices against one: the SD1.5 UNet at 256x256 pixels, batch 2, f32, on this machine's CPU.

    PYTHONPATH=build/python python bench/cpu_unet.py [--threads 2] [--runs 5] [--json FILE]

Weights are seeded noise. Needs torch and diffusers. Every contender has the same cores, one at a time; they take turns, run by
run, so that a machine that slows down slows all of them. The times are of a call after warm-up.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time

import torch
from diffusers import UNet2DConditionModel

import comfytp


def cpu_name():
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def sd15():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8, sample_size=64
        )
    unet = unet.to_empty(device="cpu").eval().requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=random)
        else:
            parameter.fill_("norm" in name and name.endswith("weight"))
    return unet


def main():
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores to use (default: all)")
    arguments.add_argument("--runs", type=int, default=5, help="timed calls of each")
    arguments.add_argument("--size", type=int, default=256, help="of the image in pixels")
    arguments.add_argument("--batch", type=int, default=2)
    arguments.add_argument("--compute", default="f32", choices=["f32", "bf16"])
    arguments.add_argument("--json", help="also write the result to this file")
    options = arguments.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)

    unet = sd15()
    random = torch.Generator().manual_seed(1)
    x = torch.randn(options.batch, 4, options.size // 8, options.size // 8, generator=random)
    timesteps, context = torch.full((options.batch,), 500.0), torch.randn(options.batch, 77, 768, generator=random)
    weights = unet.state_dict()
    dtype = torch.bfloat16 if options.compute == "bf16" else torch.float32
    torch_unet = unet.to(dtype)
    one = comfytp.Denoiser(weights, "cpu:0", compute=options.compute)
    two = comfytp.Denoiser(weights, "cpu:0,cpu:1", "tensor=2", compute=options.compute)

    def torch_call():
        with torch.inference_mode():
            return torch_unet(x.to(dtype), timesteps, context.to(dtype)).sample.float()

    contenders = {
        "torch": torch_call,
        "one device": lambda: one(x, timesteps, context),
        "two devices, tensor=2": lambda: two(x, timesteps, context),
    }
    outputs = {name: call() for name, call in contenders.items()}
    errors = {name: ((y - outputs["torch"]).norm() / outputs["torch"].norm()).item() for name, y in outputs.items()}
    seconds = {name: [] for name in contenders}
    for run in range(options.runs):
        print(f"\rrun {run + 1} of {options.runs}", end="", file=sys.stderr, flush=True)
        for name, call in contenders.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    print(file=sys.stderr)

    median = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": options.threads,
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "diffusers", "onednn-cpu-gomp")},
        "python": platform.python_version(),
        "model": "SD1.5 UNet",
        "size": options.size,
        "batch": options.batch,
        "compute": options.compute,
        "seconds": seconds,
        "median_seconds": median,
        "relative_difference_from_torch": errors,
        "one_device_over_torch": median["one device"] / median["torch"],
        "two_devices_over_one": median["two devices, tensor=2"] / median["one device"],
        "collective_seconds": two.stats()["collective_seconds"],
    }
    print(f"SD1.5 UNet, {options.size}x{options.size}, batch {options.batch}, {options.compute}, {options.threads} threads of {result['cpu']}")
    print(f"{'':24}{'median s':>10}{'min s':>10}{'max s':>10}{'of torch':>10}{'of one':>10}{'rel. diff.':>12}")
    for name, times in seconds.items():
        print(f"{name:24}{median[name]:10.3f}{min(times):10.3f}{max(times):10.3f}{median[name] / median['torch']:10.2f}"
              f"{median[name] / median['one device']:10.2f}{errors[name]:12.1e}")
    print(json.dumps(result))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
