"""Drives the program as a user does. COMFYTP names it; otherwise it is build/comfytp."""

import subprocess

import pytest
from program import PROGRAM, Result, call_inputs
from safetensors.numpy import save_file


@pytest.fixture(scope="session")
def comfytp():
    """comfytp("plan", path, "--json"): runs it and expects success; comfytp.fails(...): expects one line on stderr."""

    def run(*arguments, **options):
        command = [PROGRAM, *map(str, arguments)]
        return Result(subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL, **options))

    def succeeds(*arguments, **options):
        result = run(*arguments, **options)
        assert result.status == 0, result.err
        assert all(line.startswith("note: ") for line in result.err.splitlines()), "expected notes alone on stderr where it is no terminal"
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


@pytest.fixture
def inputs(tmp_path):
    """inputs(x=array, y=None): a file with the inputs of a call; what is None is left out."""

    def write(name="inputs.safetensors", **changes):
        tensors = {key: value for key, value in (call_inputs() | changes).items() if value is not None}
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    return write
