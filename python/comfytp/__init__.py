"""ComfyTP runs one diffusion model over several devices: each holds a part of the weights and does a part of every step.

Denoiser runs the denoiser of a checkpoint; Engine runs any Graph. Arrays are whatever speaks DLPack: torch, numpy, ….
"""

from ._library import load_core

load_core()

from ._core import Cancelled, Error, Graph, Timeout, ops  # noqa: E402
from .denoiser import Denoiser  # noqa: E402
from .engine import Engine  # noqa: E402

__all__ = ["Cancelled", "Denoiser", "Engine", "Error", "Graph", "Timeout", "ops"]
