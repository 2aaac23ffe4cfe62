"""Tests against a real ComfyUI on the CPU: COMFYUI_PATH names its checkout. Without it they are skipped.

Twenty checks, with fixed seeds and the plain model as the reference; the modules' docstrings name theirs:
1 SD1.5; 2 SDXL base and refiner; 3 SD3.5; 4 Flux, prompts of unequal lengths; 5 Wan, a timestep a frame; 6 a LoRA before and after
the node; 7 a strength moves only the keys it touches; 8 hook LoRAs with keyframes; 9 ControlNet and T2I in a chain, Control-LoRA;
10 IPAdapter and FreeU; 11 EasyCache skips the same steps; 12 HyperTile, ToMe, DeepShrink; 13 PAG, SAG, SLG; 14 inpainting, areas,
GLIGEN; 15 no device holds the whole; 16 unloading frees every device, the next run works; 17 plain and split branches take turns;
18 cancelling in mid-step; 19 a saved checkpoint is unchanged; 20 ids, previews, fifty runs without a leak."""

import os
import pathlib
import sys
import tempfile

import pytest

_path = os.environ.get("COMFYUI_PATH")
collect_ignore_glob = [] if _path else ["test_*.py"]

if _path:
    sys.path.insert(0, _path)
    os.environ.setdefault("COMFYTP_CACHE", tempfile.mkdtemp(prefix="comfytp-cache-"))

    import comfy.cli_args

    comfy.cli_args.args.cpu = True

    import torch

    torch.set_num_threads(2)
    import comfy.model_management  # noqa: F401  reads the arguments

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def node():
    """The node's root module, as ComfyUI loads a clone."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("custom_nodes_comfytp", ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def nothing_loaded():
    """Every test begins and ends with an empty model manager."""
    yield
    import comfy.model_management

    comfy.model_management.unload_all_models()
    comfy.model_management.interrupt_current_processing(False)


@pytest.fixture
def on_engine():
    """Every call of the test runs on the engine."""
    from comfytp.comfyui import engine_stats

    before = engine_stats()
    yield
    after = engine_stats()
    assert after["engine_calls"] > before["engine_calls"]
    assert after["torch_fallbacks"] == before["torch_fallbacks"]
