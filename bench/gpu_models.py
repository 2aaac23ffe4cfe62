"""Captured transformers on one GPU: comfytp.split of diffusers' modules at full width, beside PyTorch and the library floor of the same run.

    PYTHONPATH=build/python python bench/gpu_models.py [--models flux,zimage,qwen,wan] [--layers N] [--runs 10] [--profile] [--json FILE]

bf16, batch 1, random weights. For every model: milliseconds a call of PyTorch (eager) and of the engine, how far the results are from
each other and from PyTorch's in fp32, and the library floor both ways (floor.py). --layers: the first N blocks (of flux N double and 2 N
single ones), for time's sake; embeddings and the last layer count once, so that the ratio is that of a whole model within their share.
sdxl: its UNet (f16, batch 2), captured and by the builder.
"""

import argparse
import datetime
import gc
import json
import sys

import diffusers
import floor
import gpu_unet
import torch
from configs import SDXL
from torch.utils._pytree import tree_map

import comfytp

TINY = False  # --tiny: narrow models and small pictures, to try the script itself


def noise(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def time_of(value):
    return torch.full((1,), value, device=DEVICE, dtype=torch.bfloat16)


def flux(layers):
    narrow = dict(num_attention_heads=2, joint_attention_dim=64, pooled_projection_dim=32) if TINY else {}
    module = diffusers.FluxTransformer2DModel(guidance_embeds=True, num_layers=layers, num_single_layers=2 * layers, **narrow)
    side, tokens = (4, 8) if TINY else (64, 512)
    rows, columns = torch.arange(side, device=DEVICE).repeat_interleave(side), torch.arange(side, device=DEVICE).repeat(side)
    call = dict(
        hidden_states=lambda: noise(1, side * side, 64),
        encoder_hidden_states=lambda: noise(1, tokens, module.config.joint_attention_dim),
        pooled_projections=lambda: noise(1, module.config.pooled_projection_dim),
        timestep=lambda: time_of(0.5),
        guidance=lambda: time_of(3.5),
        img_ids=lambda: torch.stack([torch.zeros(side * side, device=DEVICE), rows, columns], -1),
        txt_ids=lambda: torch.zeros(tokens, 3, device=DEVICE),
    )
    return module, call


def zimage(layers):
    narrow = dict(dim=256, n_heads=2, n_kv_heads=2, cap_feat_dim=64) if TINY else {}
    module = diffusers.ZImageTransformer2DModel(n_layers=layers, **narrow)
    side, tokens = (16, 32) if TINY else (128, 128)
    call = dict(
        x=lambda: [noise(16, 1, side, side)],
        cap_feats=lambda: [noise(tokens, module.config.cap_feat_dim)],
        t=lambda: time_of(0.5),
    )
    return module, call


def qwen(layers):
    narrow = dict(num_attention_heads=2, joint_attention_dim=64) if TINY else {}
    module = diffusers.QwenImageTransformer2DModel(num_layers=layers, **narrow)
    side, tokens = (4, 8) if TINY else (83, 256)
    call = dict(
        hidden_states=lambda: noise(1, side * side, 64),
        encoder_hidden_states=lambda: noise(1, tokens, module.config.joint_attention_dim),
        encoder_hidden_states_mask=lambda: torch.ones(1, tokens, dtype=torch.bool, device=DEVICE),
        timestep=lambda: time_of(0.5),
        img_shapes=lambda: [(1, side, side)],
    )
    return module, call


def wan(layers):
    narrow = dict(num_attention_heads=2, ffn_dim=256, text_dim=64) if TINY else {}
    module = diffusers.WanTransformer3DModel(num_layers=layers, **narrow)
    size = (2, 8, 8) if TINY else (21, 60, 104)  # 81 frames of 832x480
    call = dict(
        hidden_states=lambda: noise(1, 16, *size),
        encoder_hidden_states=lambda: noise(1, 512, module.config.text_dim),
        timestep=lambda: torch.full((1,), 500.0, device=DEVICE),
    )
    return module, call


# How to build each, the layers of the whole, and those taken unless --layers says otherwise.
MODELS = {"flux": (flux, 19, 4), "zimage": (zimage, 30, 6), "qwen": (qwen, 60, 4), "wan": (wan, 40, 2)}


def module_of(build, layers):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        module, call = build(layers)
    torch.set_default_dtype(torch.float32)
    randomise(module)
    return module.to(torch.bfloat16).eval().requires_grad_(False), {name: make() for name, make in call.items()} | {"return_dict": False}


def randomise(module):
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.6 / parameter[0].numel() ** 0.5)
        else:
            parameter.data.fill_(float(name.endswith("weight")))


def milliseconds(call, runs):
    if DEVICE == "cuda":
        return floor.milliseconds(call, runs)
    call()
    return 0.0


# ---- the engine


def by_op(launches):
    """Of each kind of op and of the longest launches: how often, milliseconds, TFLOP/s, GB/s."""
    groups = {}
    for launch in launches:
        for key in (launch["op"], f"{launch['op']} {launch['shapes']}"):
            group = groups.setdefault(key, dict(count=0, ms=0.0, flops=0.0, bytes=0))
            group["count"] += 1
            group["ms"] += 1e3 * launch["seconds"]
            group["flops"] += launch["flops"]
            group["bytes"] += launch["bytes"]
    rows = []
    for key, g in sorted(groups.items(), key=lambda item: -item[1]["ms"]):
        seconds = max(g["ms"] / 1e3, 1e-12)
        rates = dict(tflops=round(g["flops"] / seconds / 1e12, 1), gbytes=round(g["bytes"] / seconds / 1e9))
        rows.append(dict(what=key, count=g["count"], ms=round(g["ms"], 4), **rates))
    return rows


def print_profile(rows, most=14):
    kinds = [row for row in rows if " " not in row["what"]]
    shapes = [row for row in rows if " " in row["what"]]
    for row in (*kinds, *shapes[: 2 * most]):
        print(f"  {row['count']:5d} {row['ms']:9.3f} ms {row['tflops']:7.1f} TFLOP/s {row['gbytes']:6d} GB/s  {row['what'][:170]}", flush=True)


def difference(result, expected):
    result, expected = (x[0] if isinstance(x, (tuple, list)) else x for x in (result, expected))
    result, expected = (x[0] if isinstance(x, (tuple, list)) else x for x in (result, expected))
    return float((result.double() - expected.double()).norm() / expected.double().norm())


def exactly(module, call, dtype):
    """What the module gives in fp32 for the same weights and inputs."""
    cast = lambda to: lambda x: x.to(to) if isinstance(x, torch.Tensor) and x.dtype == dtype else x  # noqa: E731
    result = module.float()(**tree_map(cast(torch.float32), call))
    module.to(dtype)
    return result


def measure(module, call, dtype, options):
    row = {}
    exact, theirs = exactly(module, call, dtype), module(**call)
    row["torch_ms"] = milliseconds(lambda: module(**call), min(options.runs, 5))
    limit = floor.Floor(floor.heavy_ops(module, call), dtype, DEVICE)
    row["floor_by_kind_ms"] = limit.by_kind_ms()
    row["floor_ms"], row["floor_in_sequence_ms"] = sum(row["floor_by_kind_ms"].values()), limit.in_sequence_ms(options.runs)
    del limit
    torch.cuda.empty_cache() if DEVICE == "cuda" else None
    split = comfytp.split(module, options.device)
    ours = split(**call)
    split.synchronize()
    if split.engine_stats()["torch_fallbacks"]:
        raise RuntimeError("the module ran in PyTorch")
    row["difference"] = difference(ours, theirs)
    row["torch_error"], row["engine_error"] = difference(theirs, exact), difference(ours, exact)
    del ours, theirs, exact
    row["engine_ms"] = milliseconds(lambda: split(**call), options.runs)
    if options.profile:
        profile = split.profile()[0]
        row["step_ms"], row["launches"] = 1e3 * profile["seconds"], len(profile["launches"])
        row["launches_ms"] = 1e3 * sum(launch["seconds"] for launch in profile["launches"])
        row["profile"] = by_op(profile["launches"])
    split.unload()
    return row


def transformer(name, options):
    build, whole, layers = MODELS[name]
    layers = options.layers or layers
    module, call = module_of(build, layers)
    row = dict(model=name, layers=layers, whole_layers=whole, **measure(module, call, torch.bfloat16, options))
    return row


def sdxl_of(batch):
    torch.manual_seed(0)
    with torch.device(DEVICE):
        module = diffusers.UNet2DConditionModel(**({**SDXL, "block_out_channels": (64, 128, 128), "attention_head_dim": (1, 2, 2)} if TINY else SDXL))
    randomise(module)
    module = module.half().eval().requires_grad_(False)
    side, half = (16 if TINY else 128), torch.float16
    call = dict(
        sample=noise(batch, 4, side, side, dtype=half),
        timestep=torch.full((batch,), 500.0, device=DEVICE),
        encoder_hidden_states=noise(batch, 77, 2048, dtype=half),
        added_cond_kwargs=dict(text_embeds=noise(batch, 1280, dtype=half), time_ids=torch.full((batch, 6), 1024.0, device=DEVICE, dtype=half)),
        return_dict=False,
    )
    return module, call


def sdxl(options):
    module, call = sdxl_of(2)
    row = dict(model="sdxl", **measure(module, call, torch.float16, options))
    weights = {key: tensor.cpu() for key, tensor in module.state_dict().items()}
    built = comfytp.Denoiser(weights, options.device, compute="f16", head_dim=64)
    arguments = (call["sample"], call["timestep"], call["encoder_hidden_states"], gpu_unet.label_of(module, call))
    row["built_difference"] = difference(built(*arguments), module(**call))
    row["built_ms"] = milliseconds(lambda: built(*arguments), options.runs)
    built.unload()
    return row


@torch.no_grad()
def main():
    global DEVICE, TINY
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--models", default=",".join(MODELS))
    arguments.add_argument("--device", default="cuda:0")
    arguments.add_argument("--layers", type=int)
    arguments.add_argument("--runs", type=int, default=10)
    arguments.add_argument("--profile", action="store_true", help="also time every launch of a step alone, and print them by op")
    arguments.add_argument("--tiny", action="store_true", help="narrow models, to try this script without a GPU")
    arguments.add_argument("--json", help="also write the result to this file")
    options = arguments.parse_args()
    DEVICE, TINY = options.device.partition(":")[0], options.tiny
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    about = dict(command=" ".join(["python", *sys.argv]), date=datetime.date.today().isoformat(), torch=torch.__version__)
    about |= dict(diffusers=diffusers.__version__, rows=[])
    if DEVICE == "cuda":
        about |= dict(gpu=torch.cuda.get_device_name(), cudnn=torch.backends.cudnn.version())
    print(about, flush=True)
    for name in options.models.split(","):
        try:
            row = sdxl(options) if name == "sdxl" else transformer(name, options)
            profile = row.get("profile", [])
            print(json.dumps({key: value for key, value in row.items() if key != "profile"}), flush=True)
            if DEVICE == "cuda":
                floors = [row["floor_ms"], row["floor_in_sequence_ms"]]
                ratios = ", ".join(f"{ms:.2f} ({row['engine_ms'] / ms:.3f})" for ms in floors)
                print(f"{name}: torch {row['torch_ms']:.2f}  engine {row['engine_ms']:.2f}  floor alone, in sequence (engine / it): {ratios}")
            print_profile(profile)
        except Exception as error:  # the others are measured all the same
            row = dict(model=name, error=f"{type(error).__name__}: {error}"[:2000])
            print(row, flush=True)
        about["rows"].append(row)
        if options.json:
            with open(options.json, "w") as file:
                json.dump(about, file, indent=1)
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
