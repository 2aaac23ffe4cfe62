"""The node in ComfyUI on one GPU: what the sampler's loop adds to the engine's own time, and who gets the engine's memory when.

    COMFYUI_PATH=ComfyUI PYTHONPATH=build/python python bench/gpu_comfyui.py [--models sdxl,flux] [--steps 20] [--runs 3] [--layers 4] [--json FILE]

Models of ComfyUI's own classes with seeded weights: SDXL (f16, 1024x1024, CFG, so that a call has two samples) and Flux-dev (bf16,
1024x1024, full width, the first N double and 2 N single blocks). Sampled with euler as KSampler does.

Times, in milliseconds a step: plain: ComfyUI without the node. node: with it. loop: of that what a further step takes, without what a
sampling begins and ends with. engine: its last call again and again, the prompt known. step: as the engine's profile has it. The
overheads are node's and loop's over engine. Of the host's time in a step: core is the engine, the wait for a prompt's digest included; wrapper
the node's Python around it; sampler the rest, the wait for the GPU at the end included.

Memory: what is free before the engine was ever loaded, what ComfyUI is shown of it when it is, and what is missing when everything is
unloaded again, behind each of the ways to ask for its memory. Every one happens twice: what is missing from the start are libraries and
kernels, which stay; what is missing more each time is lost.

--tiny --device cpu:0 tries all of it without a GPU (there a model that is loaded evicts none: ComfyUI asks no room of the host).
"""

import argparse
import contextlib
import dataclasses
import datetime
import gc
import json
import os
import statistics
import sys
import time

import torch

arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
arguments.add_argument("--models", default="sdxl,flux")
arguments.add_argument("--device", default="cuda:0", help="gpu_ids of the node")
arguments.add_argument("--steps", type=int, default=20)
arguments.add_argument("--runs", type=int, default=3, help="samplings of which the median is taken")
arguments.add_argument("--layers", type=int, default=4, help="double blocks of Flux; 19 are all")
arguments.add_argument("--tiny", action="store_true", help="narrow models and small pictures, to try this script without a GPU")
arguments.add_argument("--json", help="also write the result to this file")
options = arguments.parse_args()

sys.path.insert(0, os.environ["COMFYUI_PATH"])
import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = options.device.startswith("cpu")  # is looked at when the others are imported
import comfy.ldm.flux.model  # noqa: E402
import comfy.model_management as management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402
import comfyui_version  # noqa: E402
import psutil  # noqa: E402

import comfytp.comfyui  # noqa: E402
from comfytp.comfyui.engine import Engine  # noqa: E402
from comfytp.comfyui.node import MultiGPUDiffusionModel  # noqa: E402
from comfytp.comfyui.split import SplitModel  # noqa: E402

DEVICE = management.get_torch_device()
MIB = 1 << 20


# ---- models


@dataclasses.dataclass
class Shape:
    """A model's family and construction, and what is sampled with it."""

    family: type
    config: dict
    dtype: torch.dtype
    latent: tuple[int, ...]
    tokens: int
    widths: tuple[int, int]  # of a token, and of the pooled prompt
    cfg: float


def sdxl(tiny):
    config = dict(image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2], channel_mult=[1, 2, 4])
    config |= dict(transformer_depth=[0, 0, 2, 2, 10, 10], transformer_depth_middle=10, transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10])
    config |= dict(context_dim=2048, num_head_channels=64, adm_in_channels=2816, num_classes="sequential", use_linear_in_transformer=True)
    config |= dict(use_spatial_transformer=True, use_temporal_attention=False, use_temporal_resblock=False, use_checkpoint=False, legacy=False)
    if tiny:
        config |= dict(model_channels=32, context_dim=64, num_head_channels=16)
    side, dtype = (16, torch.float32) if tiny else (128, torch.float16)
    return Shape(comfy.supported_models.SDXL, config, dtype, (1, 4, side, side), 77, (config["context_dim"], 1280), 7.0)


def flux(tiny):
    config = dict(image_model="flux", in_channels=16, out_channels=16, patch_size=2, vec_in_dim=768, context_in_dim=4096, hidden_size=3072)
    config |= dict(mlp_ratio=4.0, num_heads=24, depth=options.layers, depth_single_blocks=2 * options.layers, axes_dim=[16, 56, 56], theta=10000)
    config |= dict(qkv_bias=True, guidance_embed=True)
    if "txt_ids_dims" in {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}:
        config |= dict(txt_ids_dims=[])
    if tiny:
        config |= dict(vec_in_dim=32, context_in_dim=64, hidden_size=64, num_heads=4, axes_dim=[4, 6, 6])
    side, tokens, dtype = (16, 32, torch.float32) if tiny else (128, 512, torch.bfloat16)
    widths = config["context_in_dim"], config["vec_in_dim"]
    return Shape(comfy.supported_models.Flux, config, dtype, (1, 16, side, side), tokens, widths, 1.0)


MODELS = {"sdxl": sdxl, "flux": flux}


def patcher_of(shape):
    """As ComfyUI's loader makes it, with weights that keep activations near one."""
    config = shape.family({**shape.config})
    extra = {key: value for key, value in shape.family.unet_extra_config.items() if key not in shape.config}
    config.unet_config = {**shape.config, **extra, "dtype": shape.dtype}
    if "num_head_channels" in shape.config:
        config.unet_config.pop("num_heads", None)
    config.set_inference_dtype(shape.dtype, None)
    model = config.get_model({}, "", device=management.unet_offload_device())
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.diffusion_model.named_parameters():
            if weight.dim() > 1:
                values = torch.randn(weight.shape, generator=generator, device=DEVICE, dtype=weight.dtype)
                weight.copy_(values * (0.6 / weight[0].numel() ** 0.5))
            else:
                weight.fill_(float("bias" not in name))
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher(model.eval(), load_device=DEVICE, offload_device=management.unet_offload_device())


def prompt(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    width, pooled = shape.widths
    return [[torch.randn(1, shape.tokens, width, generator=generator), dict(pooled_output=torch.randn(1, pooled, generator=generator), guidance=3.5)]]


def sample(patcher, shape, steps):
    """As nodes.common_ksampler does it."""
    latent, bar = torch.zeros(shape.latent), comfy.utils.ProgressBar(steps)
    noise = comfy.sample.prepare_noise(latent, 0)
    report = lambda step, x0, x, total: bar.update_absolute(step + 1, total)  # noqa: E731
    order = dict(denoise=1.0, latent_image=latent, callback=report, disable_pbar=True, seed=0)
    return comfy.sample.sample(patcher, noise, steps, shape.cfg, "euler", "normal", prompt(shape, 1), prompt(shape, 2), **order)


# ---- times


def seconds(call):
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def watched(owner, name, note):
    """note(seconds, arguments) behind every call of a method."""
    original = getattr(owner, name)

    def method(self, *args, **kwargs):
        start = time.perf_counter()
        result = original(self, *args, **kwargs)
        note(time.perf_counter() - start, (args, kwargs))
        return result

    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, original)


class LastCall:
    """The engine's last call in a sampling, to be made again."""

    def __init__(self, split, shape):
        self._engine, noted = split.split._engine, []
        with watched(Engine, "run", lambda _, call: noted.append(call)):
            sample(split, shape, 1)
        self._arguments, self._order = noted[-1]
        if "contents" in self._order:  # numbers that nobody else gives, so that the prompt is taken for known
            self._order = {**self._order, "contents": {name: (1 << 40) + i for i, name in enumerate(self._order["contents"])}}

    def run(self, times):
        for _ in range(times):
            self._engine.run(*self._arguments, **self._order)

    def profile(self):
        return self._engine.programs.profile(self._arguments[0])[0]


def times_of_plain(patcher, shape):
    sample(patcher, shape, 2)
    results = []
    taken = statistics.median(seconds(lambda: results.append(sample(patcher, shape, options.steps))) for _ in range(options.runs))
    return dict(plain_ms=1e3 * taken / options.steps), results[-1]


def times_of_node(split, shape):
    first = seconds(lambda: sample(split, shape, 2))
    call = LastCall(split, shape)
    steps, half = options.steps, max(1, options.steps // 2)
    whole, shorter, engine, core, node, results = [], [], [], [], [], []
    for _ in range(options.runs):
        with watched(Engine, "run", lambda s, _: core.append(s)), watched(SplitModel, "call", lambda s, _: node.append(s)):
            whole.append(seconds(lambda: results.append(sample(split, shape, steps))))
        shorter.append(seconds(lambda: sample(split, shape, steps - half)))
        call.run(1)
        engine.append(seconds(lambda: call.run(steps)))
    row = dict(first_seconds=first, node_ms=1e3 * statistics.median(whole) / steps, engine_ms=1e3 * statistics.median(engine) / steps)
    row["loop_ms"] = 1e3 * (statistics.median(whole) - statistics.median(shorter)) / half
    row["step_ms"] = 1e3 * call.profile()["seconds"]
    for what in ("node", "loop"):
        row[f"{what}_overhead_percent"] = 100 * (row[f"{what}_ms"] / row["engine_ms"] - 1)
    # Of medians, since a call now and then waits for something else.
    core, node = 1e3 * statistics.median(core), 1e3 * statistics.median(node)
    row["host_ms"] = dict(core=core, wrapper=node - core, sampler=row["node_ms"] - node)
    return row, results[-1]


def difference(result, expected):
    return float((result.double() - expected.double()).norm() / expected.double().norm())


# ---- memory


def free_bytes():
    if DEVICE.type == "cuda":
        return torch.cuda.mem_get_info(DEVICE)[0]
    return psutil.virtual_memory().total - psutil.Process().memory_info().rss  # nobody else's


def empty():
    gc.collect()
    management.unload_all_models()
    management.soft_empty_cache()


def held(split):
    return sum(split.split.loaded_bytes(satellite.load_device) for satellite in split.split.satellites)


def shown():
    return {type(m.model.model).__name__: m.model_loaded_memory() for m in management.current_loaded_models if m.model is not None}


def memory(split, shape, before):
    """What is free and what ComfyUI is shown, behind each event; every event begins with the engine loaded. before: what was free when it
    had never been."""
    other = patcher_of(MODELS["sdxl"](tiny=True))

    def request():
        management.free_memory(management.get_free_memory(DEVICE) + held(split) // 2, DEVICE)

    def load_another():
        management.load_models_gpu([other], memory_required=management.get_free_memory(DEVICE) + held(split) // 2)

    events = {"free_memory": request, "load_models_gpu": load_another, "unload_all_models": management.unload_all_models}
    rows = []
    for _ in range(2):
        for name, event in events.items():
            empty()
            row = dict(event=name, free_before=before, free_unloaded=free_bytes())
            loading = split.split.stats()["load_seconds"]
            sample(split, shape, 1)
            management.soft_empty_cache()
            row["load_seconds"] = split.split.stats()["load_seconds"] - loading
            row |= dict(free_loaded=free_bytes(), comfyui_free_loaded=management.get_free_memory(DEVICE), held=held(split), shown=shown())
            event()
            row |= dict(comfyui_free_behind=management.get_free_memory(DEVICE), held_behind=held(split), shown_behind=shown())
            empty()
            row["free_behind"] = free_bytes()
            row["torch_behind"] = torch.cuda.memory_reserved(DEVICE) if DEVICE.type == "cuda" else 0
            rows.append(row)
    return rows


def print_memory(name, rows):
    mib = {key: value / MIB for key, value in rows[0].items() if isinstance(value, int)}
    print(f"{name}, MiB: {mib['free_before']:.0f} free before the engine was loaded, {mib['free_unloaded']:.0f} when it was unloaded again")
    for row in rows:
        mib = {key: value / MIB for key, value in row.items() if isinstance(value, int)}
        listed = ", ".join(f"{model} {size / MIB:.0f}" for model, size in row["shown"].items())
        print(
            f"  loaded in {row['load_seconds']:.1f} s: {mib['free_unloaded'] - mib['free_loaded']:.0f} taken, engine holds {mib['held']:.0f}, "
            f"ComfyUI is shown {listed} and sees {mib['comfyui_free_loaded']:.0f} free\n"
            f"    behind {row['event']}: engine holds {mib['held_behind']:.0f}, ComfyUI sees {mib['comfyui_free_behind']:.0f} free; all unloaded: "
            f"{mib['free_behind']:.0f} free, {mib['free_before'] - mib['free_behind']:.0f} missing, torch keeps {mib['torch_behind']:.0f}",
            flush=True,
        )


# ---- all of it


def measure(name):
    shape = MODELS[name](options.tiny)
    plain = patcher_of(shape)
    row = dict(model=name, weights_mib=plain.model_size() / MIB, steps=options.steps)
    if name == "flux":
        row["layers"] = options.layers
    times, expected = times_of_plain(plain, shape)
    empty()
    before = free_bytes()
    split = MultiGPUDiffusionModel().split(plain, options.device)[0]
    row |= times
    times, result = times_of_node(split, shape)
    row |= times
    row["difference"] = difference(result, expected)
    row["memory"] = memory(split, shape, before)
    if comfytp.comfyui.engine_stats()["torch_fallbacks"]:
        raise RuntimeError("the model ran in PyTorch")
    return row


def print_times(row):
    times = "  ".join(f"{what} {row[what + '_ms']:.2f}" for what in ("plain", "node", "loop", "engine", "step"))
    over = ", ".join(f"{what} {row[what + '_overhead_percent']:+.1f} %" for what in ("node", "loop"))
    print(f"{row['model']}, ms a step: {times}; over the engine: {over}")
    host = ", ".join(f"{what} {ms:.2f}" for what, ms in row["host_ms"].items())
    print(f"  host, ms a step: {host}; first sampling {row['first_seconds']:.1f} s; difference to plain {row['difference']:.4f}", flush=True)


@torch.inference_mode()
def main():
    about = dict(command=" ".join(["python", *sys.argv]), date=datetime.date.today().isoformat(), comfyui=comfyui_version.__version__)
    about |= dict(torch=torch.__version__, device=options.device, rows=[])
    if DEVICE.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    print(about, flush=True)
    for name in options.models.split(","):
        row = measure(name)
        print_times(row)
        print_memory(name, row["memory"])
        about["rows"].append(row)
        if options.json:
            with open(options.json, "w") as file:
                json.dump(about, file, indent=1)
        empty()


if __name__ == "__main__":
    main()
