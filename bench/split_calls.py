"""What a call of comfytp.split costs beside the engine's step: modules of diffusers, as bench/gpu_models.py has them.

    PYTHONPATH=build/python python bench/split_calls.py [flux zimage …] [--device cuda:0] [--layers N] [--runs 20]

queued: milliseconds a call that nobody waits for, the same tensors in every call; waited: one that is waited for behind it, as
gpu_models.py times them, so that the GPU stands idle while the host comes to its first launch. Of the latter `engine` is the host's time until
it calls the engine, `core` what the engine takes then, `host` all until the call returns; step: as SplitModule.profile() has it.

--device cpu: narrow modules whose tensors are taken for a GPU's and an engine that does nothing, for the host's times alone: in a loop
of calls, and behind 28 ms of something else, as when a step was waited for. Then the caches have lost the call, which takes several times
as long.
"""

import argparse
import statistics
import time

import gpu_models
import torch
from comfytp.importer import module as importer

import comfytp


class Timed:
    """Stands before the engine and notes when it is called; without one it does nothing."""

    def __init__(self, engine=None):
        self.engine, self.begin, self.end = engine, 0.0, 0.0

    def run(self, *arguments, **order):
        self.begin = time.perf_counter()
        result = self.engine.run(*arguments, **order) if self.engine else False
        self.end = time.perf_counter()
        return result


def host_times(split, call, runs, between):
    """Medians in milliseconds: until the engine is called, in it, and until the call returns; and of all with what is between them."""
    timed, real = Timed(split._calls._engine if gpu_models.DEVICE == "cuda" else None), split._calls._engine
    split._calls._engine = timed
    rows = []
    try:
        for _ in range(runs):
            start = time.perf_counter()
            split(**call)
            back = time.perf_counter()
            between()
            rows.append((timed.begin - start, timed.end - timed.begin, back - start, time.perf_counter() - start))
    finally:
        split._calls._engine = real
    return [1e3 * statistics.median(column) for column in zip(*rows, strict=True)]


def pause():
    end = time.perf_counter() + 0.028
    while time.perf_counter() < end:
        pass


@torch.no_grad()
def measure(name, options):
    build, whole, layers = gpu_models.MODELS[name]
    on_gpu = gpu_models.DEVICE == "cuda"
    module, call = gpu_models.module_of(build, options.layers or (layers if on_gpu else whole))
    split = comfytp.split(module, options.device if on_gpu else "cpu:0")
    for _ in range(3):
        split(**call)
    about = f"{name}, {sum(1 for _ in module.parameters())} parameters"
    if on_gpu:
        split.synchronize()
        start = time.perf_counter()
        for _ in range(options.runs):
            split(**call)
        torch.cuda.synchronize()
        queued = 1e3 * (time.perf_counter() - start) / options.runs
        until, core, host, waited = host_times(split, call, options.runs, torch.cuda.synchronize)
        step = 1e3 * split.profile()[0]["seconds"]
        of_host = f"engine {until:.3f}  core {core:.3f}  host {host:.3f}"
        print(f"{about}: step {step:.3f}  queued {queued:.3f}  waited {waited:.3f}; {of_host} ms", flush=True)
    else:
        for where, between in (("in a loop", lambda: None), ("behind 28 ms", pause)):
            until, _, host, _ = host_times(split, call, options.runs, between)
            print(f"{about}, {where}: engine {until:.3f}  host {host:.3f} ms", flush=True)
    split.unload()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["flux", "zimage", "qwen"])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    gpu_models.DEVICE = options.device.partition(":")[0]
    if gpu_models.DEVICE == "cpu":
        gpu_models.TINY = True
        importer.gpus_of = lambda devices: {torch.device("cpu")}
        torch.set_num_threads(1)
    for name in options.models:
        measure(name, options)


if __name__ == "__main__":
    main()
