"""One model over several devices in every way, beside one of them and PyTorch there.

    PYTHONPATH=build/python python bench/gpu_split.py [--devices cuda:0,cuda:1] [--models sdxl-b2,flux] [--staged] [--json FILE]

Modules of diffusers at full width with random weights (gpu_models.py; of the transformers some layers) through comfytp.split, tensors on
the first GPU, every call waited for. For each mesh and placement: milliseconds a call, their share of one device's, the bytes of weights on
each device, and how far the result is from one device's. PyTorch: eager and as a CUDA graph; with --compile torch.compile too, which takes
minutes.
"""

import argparse
import datetime
import gc
import json
import sys

import diffusers
import floor
import gpu_models
import torch

import comfytp

MODELS = ("sdxl-b2", "sdxl-b1", *gpu_models.MODELS)


def module_of(name, layers):
    """The module, a call of it, its number of samples, and how many layers of how many it has."""
    if name.startswith("sdxl"):
        batch = int(name.removeprefix("sdxl-b"))
        return *gpu_models.sdxl_of(batch), batch, None
    build, whole, some = gpu_models.MODELS[name]
    return *gpu_models.module_of(build, layers or some), 1, [layers or some, whole]


def ways(count, batch, staged):
    """Mesh, placement, communicator."""
    meshes = [f"{axis}={count}" for axis in ("batch", "patch", "tensor") if axis != "batch" or batch >= count]
    for mesh in meshes:
        yield mesh, "resident", None
        if not mesh.startswith("tensor"):
            yield mesh, "gathered", None
    if staged:
        yield from ((mesh, "resident", "staged") for mesh in meshes)


def pytorch(module, call, runs, compiled):
    row = dict(torch_eager_ms=gpu_models.milliseconds(lambda: module(**call), min(runs, 5)))
    if gpu_models.DEVICE != "cuda":
        return row
    try:
        graph = floor.graph_of(lambda: module(**call))
        row["torch_graph_ms"] = floor.milliseconds(graph.replay, runs)
        del graph
    except RuntimeError as error:  # a forward that synchronises
        row["torch_graph_error"] = str(error).partition("\n")[0]
    if compiled:
        fast = torch.compile(module)
        row["torch_compile_ms"] = floor.milliseconds(lambda: fast(**call), runs)
    return row


def measure(module, call, devices, runs, mesh=None, placement=None, communicator=None):
    """The row, and the result."""
    split = comfytp.split(module, devices, mesh, placement, communicator=communicator)
    try:
        result = split(**call)
        split.synchronize()
        if split.engine_stats()["torch_fallbacks"]:
            raise RuntimeError("the module ran in PyTorch")
        plan = split.plan
        row = dict(ms=gpu_models.milliseconds(lambda: split(**call), runs), weight_bytes=plan.weight_bytes_per_device, notes=plan.notes)
        row["collectives"] = plan.collectives[0]
        return row, result
    finally:
        split.unload()


def rows_of(name, options):
    module, call, batch, layers = module_of(name, options.layers)
    row = dict(model=name, batch=batch, layers_of=layers, **pytorch(module, call, options.runs, options.compile), ways=[])
    devices = options.devices.split(",")
    one, expected = measure(module, call, devices[0], options.runs)
    row["one"] = one
    print(f"{name}: PyTorch " + ", ".join(f"{key[6:-3]} {row[key]:.2f}" for key in row if key.startswith("torch") and key.endswith("ms")))
    print(f"  {'one device':28}{one['ms']:9.2f} ms {'':6}{sum(one['weight_bytes']) / 2**30:7.2f} GiB")
    for mesh, placement, communicator in ways(len(devices), batch, options.staged):
        title = f"{mesh} {placement}" + (f" {communicator}" if communicator else "")
        try:
            way, result = measure(module, call, options.devices, options.runs, mesh, placement, communicator)
            way["share"] = way["ms"] / one["ms"] if one["ms"] else None
            way["difference"] = gpu_models.difference(result, expected)
            held = " + ".join(f"{size / 2**30:.2f}" for size in way["weight_bytes"])
            print(f"  {title:28}{way['ms']:9.2f} ms {way['share'] or 0:6.2f}{'':1}{held} GiB, {way['difference']:.1e} from one", flush=True)
        except comfytp.Error as error:  # the others are measured all the same
            way = dict(error=str(error))
            print(f"  {title:28}{error}", flush=True)
        row["ways"].append(dict(mesh=mesh, placement=placement, communicator=communicator or "best", **way))
        gc.collect()
    return row


@torch.no_grad()
def main():
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--devices", default="cuda:0,cuda:1")
    arguments.add_argument("--models", default=",".join(MODELS), help="of " + ", ".join(MODELS))
    arguments.add_argument("--layers", type=int, help="blocks of a transformer")
    arguments.add_argument("--runs", type=int, default=20)
    arguments.add_argument("--staged", action="store_true", help="also every mesh through the host's memory")
    arguments.add_argument("--compile", action="store_true", help="also torch.compile")
    arguments.add_argument("--tiny", action="store_true", help="narrow models, to try this script without a GPU")
    arguments.add_argument("--json", help="also write the result to this file")
    options = arguments.parse_args()
    gpu_models.DEVICE, gpu_models.TINY = options.devices.partition(":")[0], options.tiny
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    about = dict(command=" ".join(["python", *sys.argv]), date=datetime.date.today().isoformat(), torch=torch.__version__)
    about["diffusers"] = diffusers.__version__
    if gpu_models.DEVICE == "cuda":
        gpus = [torch.cuda.get_device_name(int(device.partition(":")[2])) for device in options.devices.split(",")]
        about |= dict(gpus=gpus, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    print(about, flush=True)
    about["rows"] = []
    for name in options.models.split(","):
        about["rows"].append(rows_of(name, options))
        if options.json:
            with open(options.json, "w") as file:
                json.dump(about, file, indent=1)
        gc.collect()
        if gpu_models.DEVICE == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
