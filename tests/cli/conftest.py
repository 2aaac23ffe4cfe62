"""Drives the program as a user does. COMFYTP names it; otherwise it is build/comfytp."""

import json
import os
import pathlib
import subprocess

import numpy as np
import pytest
from safetensors.numpy import save_file

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("COMFYTP", str(REPOSITORY / "build" / "comfytp"))

# Sizes of a call small enough for a test: latents of 16x8 (width x height).
SMALL = ("--size", "128x64", "--tokens", "7")


class Result:
    def __init__(self, process):
        self.status, self.out, self.err = process.returncode, process.stdout, process.stderr

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture(scope="session")
def comfytp():
    """comfytp("plan", path, "--json"): runs it and expects success; comfytp.fails(...): expects one line on stderr."""

    def run(*arguments, **options):
        command = [PROGRAM, *map(str, arguments)]
        return Result(subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL, **options))

    def succeeds(*arguments, **options):
        result = run(*arguments, **options)
        assert result.status == 0, result.err
        assert result.err == "", "expected no output on stderr where it is no terminal"
        return result

    def fails(*arguments, status=1, naming=(), **options):
        result = run(*arguments, **options)
        assert result.status == status, (result.status, result.out, result.err)
        assert result.err.startswith("comfytp: ") and result.err.count("\n") == 1 and result.err.endswith("\n"), result.err
        for word in [naming] if isinstance(naming, str) else naming:
            assert word in result.err, f"expected {word!r} in {result.err!r}"
        return result

    succeeds.any, succeeds.fails = run, fails
    return succeeds


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, comfytp):
    """checkpoints("sdxl"): a narrow checkpoint of the family with seeded weights, made once."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def make(family):
        if family not in made:
            made[family] = folder / f"{family}.safetensors"
            width = 64 if family == "sd2" else 32  # its heads are 64 wide from the first level on
            comfytp("synth", "--family", family, "--width", width, made[family])
        return made[family]

    return make


@pytest.fixture(scope="session")
def checkpoint(checkpoints):
    return checkpoints("sd1")


def call_inputs(dtype=np.float32, batch=2, height=8, width=16, tokens=7, context=768, seed=0):
    random = np.random.default_rng(seed)
    return {
        "x": random.standard_normal((batch, 4, height, width)).astype(dtype),
        "timesteps": np.full(batch, 400, np.float32),
        "context": random.standard_normal((batch, tokens, context)).astype(dtype),
    }


@pytest.fixture
def inputs(tmp_path):
    """inputs(x=array, y=None): a file with the inputs of a call; what is None is left out."""

    def write(name="inputs.safetensors", **changes):
        tensors = {key: value for key, value in (call_inputs() | changes).items() if value is not None}
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    return write
