"""What a call on GPUs costs beside the GPU's own work: milliseconds a call, measured in four ways.

    PYTHONPATH=build/python python bench/gpu_calls.py CHECKPOINT [--devices cuda:0] [--batch 2] [--pixels 1024] [--runs 50]

same: the host does not wait, and the prompt's tensors are the same objects; equal: a copy of the prompt in every call, which is
compared on the GPU; waiting: torch.cuda.synchronize() behind every call. `host` is the time until a call returns to which the GPU was
idle, `core` that of it which the core takes; a GPU that has more than some thousand launches before it makes the host wait. Compare
`same` with the step that `comfytp bench --profile` prints.
"""

import argparse
import statistics
import time

import torch

import comfytp


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--devices", default="cuda:0")
    parser.add_argument("--mesh")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=50)
    arguments = parser.parse_args()
    denoiser = comfytp.Denoiser(arguments.checkpoint, devices=arguments.devices, mesh=arguments.mesh, compute="f16")
    info, batch, side = denoiser.info, arguments.batch, arguments.pixels // 8

    def noise(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.half)

    x, context = noise(batch, info["in_channels"], side, side), noise(batch, 77, info["context_dim"])
    steps = torch.full((batch,), 500.0, device="cuda")
    y = noise(batch, info["label_dim"]) if info["label_dim"] else None
    core_seconds = []

    class Timed:
        def __init__(self, engine):
            self.engine = engine

        def run(self, *arguments, **order):
            start = time.perf_counter()
            result = self.engine.run(*arguments, **order)
            core_seconds.append(time.perf_counter() - start)
            return result

    def measure(call, wait=False):
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        core_seconds.clear()
        start, returned = time.perf_counter(), []
        for _ in range(arguments.runs):
            begin = time.perf_counter()
            call()
            returned.append(time.perf_counter() - begin)
            if wait:
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / arguments.runs, 1e3 * statistics.median(returned)

    denoiser(x, steps, context, y)
    denoiser.synchronize()
    denoiser._core = Timed(denoiser._core)
    same, _ = measure(lambda: denoiser(x, steps, context, y))
    number, _ = measure(lambda: denoiser(x, 500.0, context, y))
    equal, _ = measure(lambda: denoiser(x, steps, context.clone(), y))
    waiting, host = measure(lambda: denoiser(x, steps, context, y), wait=True)
    core = 1e3 * statistics.median(core_seconds)
    print(f"same {same:.3f}  number as timestep {number:.3f}  equal {equal:.3f}  waiting {waiting:.3f}  host {host:.3f}  core {core:.3f} ms")


if __name__ == "__main__":
    main()
