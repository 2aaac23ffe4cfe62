"""ComfyTP runs one diffusion model over several devices: each holds a part of the weights and does a part of every step.

Denoiser runs the denoiser of a checkpoint; Engine runs any Graph. Arrays are whatever speaks DLPack: torch, numpy, ….
split() does the same for any torch module; it alone needs torch.
"""

from typing import Any

from ._library import load_core

load_core()

from ._core import Cancelled, DeviceFailure, Error, Graph, OutOfMemory, Timeout, ops  # noqa: E402
from .denoiser import Denoiser  # noqa: E402
from .engine import Engine  # noqa: E402

__all__ = ["Cancelled", "Denoiser", "DeviceFailure", "Engine", "Error", "Graph", "OutOfMemory", "Timeout", "ops", "split"]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name == "split":  # the one that needs torch
        from .importer.module import split

        return split
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
