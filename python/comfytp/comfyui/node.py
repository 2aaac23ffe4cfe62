"""The node as ComfyUI sees it. This file is loaded on its own, so that the node appears even where the package cannot be
imported: everything else is imported when it is needed."""

import pathlib
import sys
from typing import Any

NODE_ID = "MultiGPUDiffusionModel"


class MultiGPUDiffusionModel:
    DESCRIPTION = (
        "Splits the diffusion model over several GPUs: each holds a part of the weights and does a part of every step. "
        "Put it between the model loader (or the LoRA nodes) and the sampler; nothing else in the workflow changes."
    )
    CATEGORY = "advanced/model"
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The same model; what samples with it runs on all devices.",)
    FUNCTION = "split"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "Any diffusion model. LoRAs may be applied before or after this node."}),
                "gpu_ids": (
                    "STRING",
                    {
                        "default": "0,1",
                        "tooltip": "The devices, separated by commas: '0,1', 'cuda:0,cuda:1' or, on the CPU, 'cpu:0,cpu:1'. "
                        "A limit of a device's memory stands behind an @: '0,1@10GiB'.",
                    },
                ),
                "verbose": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Prints what each device holds and computes, what loading and every step cost, and why a "
                        "call was run by PyTorch instead.",
                    },
                ),
            },
            "optional": {
                "memory_mode": (
                    ["balanced", "fast", "aggressive"],
                    {
                        "default": "balanced",
                        "tooltip": "fast: whole weights on each device where they fit, the batch is split first. balanced: "
                        "the arithmetic is split and the weights are stored once over all devices. aggressive: least memory "
                        "on each device, weights are fetched from the others just ahead of use.",
                    },
                ),
                "compute": (
                    ["default", "fp8"],
                    {
                        "default": "default",
                        "tooltip": "default: in the model's own dtype; weights stored in fp8 are decoded at use. fp8: linear layers whose "
                        "weights are stored in fp8 also multiply in fp8, which is faster on GPUs that can (RTX 40, H100 and later) and "
                        "changes the picture a little. Where nothing can be multiplied in fp8, the console says why.",
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, gpu_ids: str | None = None) -> bool | str:
        if gpu_ids is None:  # comes over a link
            return True
        try:
            _package().check_devices(gpu_ids)
        except (ValueError, RuntimeError) as error:
            return str(error).removeprefix("gpu_ids: ")  # ComfyUI names the input
        return True

    def split(self, model: Any, gpu_ids: str, verbose: bool = False, memory_mode: str = "balanced", compute: str = "default") -> tuple[Any]:
        return (_package().split_model(model, gpu_ids, memory_mode=memory_mode, compute=compute, verbose=verbose),)


NODE_CLASS_MAPPINGS = {NODE_ID: MultiGPUDiffusionModel}
NODE_DISPLAY_NAME_MAPPINGS = {NODE_ID: "Multi-GPU Diffusion Model"}


def engine_stats() -> dict[str, int]:
    """Counters of all split models since the start: "uploaded_bytes" of weights, "captures" of forwards, "engine_calls" and
    "torch_fallbacks" (calls that PyTorch ran)."""
    return _package().engine_stats()


def _package() -> Any:
    try:
        import comfytp.comfyui
    except (ImportError, OSError) as error:
        root = pathlib.Path(__file__).resolve().parents[3]
        target = f'"{root}"' if (root / "pyproject.toml").is_file() else "--force-reinstall comfytp"
        raise RuntimeError(f'comfytp is missing or built for something else ({error}); run: "{sys.executable}" -m pip install {target}') from error
    return comfytp.comfyui
