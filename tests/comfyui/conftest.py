"""Tests against a real ComfyUI on the CPU: COMFYUI_PATH names its checkout. Without it they are skipped."""

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
