"""The ComfyUI node: any diffusion model that ComfyUI has loaded, split over several devices. Needs ComfyUI in the process."""

from typing import Any

from .. import _core
from . import counters, devices, modes
from .node import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "check_devices", "engine_stats", "split_model"]


def check_devices(gpu_ids: str) -> list[str]:
    """The engine's names of the devices. Raises ValueError or Error, naming those that exist."""
    names = devices.parse(gpu_ids, devices.here())
    _core.check_devices(",".join(names))
    return names


def split_model(model: Any, gpu_ids: str, *, memory_mode: str = "balanced", compute: str = "default", verbose: bool = False) -> Any:
    """A patcher over the same model whose calls run on all devices; `model` stays as it is."""
    from . import patcher, split, wrappers

    names = check_devices(gpu_ids)
    modes.check(memory_mode, compute)
    shared = split.split_of(model.model, names, memory_mode, compute)
    patched = patcher.SplitPatcher.of(model, shared)
    patched.verbose = verbose
    patched.set_additional_models("comfytp", shared.satellites)
    wrappers.install(patched, shared)
    return patched


def engine_stats() -> dict[str, int]:
    """Counters of all split models since the start of the process."""
    return counters.totals()
