"""How long a model's first call takes before anything is loaded: capture, translation, partitioning and lowering at full size,
and the same from the cache on disk, each in a process of its own. No weights are needed.

    PYTHONPATH=build/python python bench/capture.py [sdxl flux …]
"""

import os
import subprocess
import sys
import tempfile
import time

import torch
from configs import SDXL


class Shapes:
    """Weights of which only the shapes are known: enough to prepare a graph for devices."""

    def __init__(self, module):
        from comfytp.importer.dtypes import NAMES

        self._tensors = {name: (NAMES[p.dtype], tuple(p.shape)) for name, p in module.named_parameters()}

    def tensors(self):
        return self._tensors

    def read(self, key, starts, stops):
        raise RuntimeError("nothing is loaded here")


class NoRun:
    """An engine that prepares graphs and runs none."""

    def __init__(self, module, devices):
        from comfytp import _core

        self._programs = _core.Programs(Shapes(module), devices, "", "resident", 600.0)
        self.report = None

    def add_weights(self, mapping):
        self._programs.add_weights(mapping)

    def compile(self, graph):
        compiled = self._programs.compile(graph)
        self.report = self._programs.report(compiled)
        return compiled

    def run(self, compiled, inputs, outputs):
        pass


def sdxl():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**SDXL)


def sdxl_call():
    return {
        "sample": torch.zeros(2, 4, 128, 128),
        "timestep": torch.zeros(2),
        "encoder_hidden_states": torch.zeros(2, 77, 2048),
        "added_cond_kwargs": {"text_embeds": torch.zeros(2, 1280), "time_ids": torch.zeros(2, 6)},
    }


def flux():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def flux_call():
    return {
        "hidden_states": torch.zeros(1, 4096, 64),
        "encoder_hidden_states": torch.zeros(1, 512, 4096),
        "pooled_projections": torch.zeros(1, 768),
        "timestep": torch.zeros(1),
        "img_ids": torch.zeros(4096, 3),
        "txt_ids": torch.zeros(512, 3),
        "guidance": torch.zeros(1),
    }


def qwen_image():
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel()


def qwen_image_call():
    return {
        "hidden_states": torch.zeros(1, 4096, 64),
        "encoder_hidden_states": torch.zeros(1, 512, 3584),
        "encoder_hidden_states_mask": torch.ones(1, 512, dtype=torch.long),
        "timestep": torch.zeros(1),
        "img_shapes": [[(1, 64, 64)]],
    }


MODELS = {"sdxl": (sdxl, sdxl_call), "flux": (flux, flux_call), "qwen_image": (qwen_image, qwen_image_call)}


def once(name, what):
    """The first call of a process; COMFYTP_CACHE is set."""
    from comfytp.importer.calls import Calls

    torch.set_num_threads(2)
    build, arguments = MODELS[name]
    with torch.no_grad():
        with torch.device("meta"):
            module = build()
        call = arguments()
        engine = NoRun(module, "cpu:0,cpu:1")
        wall, cpu = time.perf_counter(), time.process_time()
        Calls(module, engine)(**call)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    weights = " and ".join(f"{device['weight_bytes'] / 2**30:.1f}" for device in engine.report["devices"])
    print(f"{name:12} {what:10} {wall:6.1f} s, {cpu:6.1f} s of a core; weights on each device {weights} GiB", flush=True)


def main(names):
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            for what in ("captured", "from disk"):
                subprocess.run([sys.executable, __file__, "--once", name, what], env={**os.environ, "COMFYTP_CACHE": folder}, check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        once(*sys.argv[2:])
    else:
        main(sys.argv[1:] or ["sdxl", "flux"])
