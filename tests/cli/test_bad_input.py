"""Whatever is wrong is said in one line that names it; nothing half-written is left behind."""

import json
import os
import resource
import signal
import struct

import numpy as np
import pytest
from program import SMALL, call_inputs
from safetensors import safe_open
from safetensors.numpy import load_file, save_file


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin, end, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


BROKEN_FILES = {
    "empty": (b"", []),
    "shorter than the length of a header": (b"\1\0", []),
    "header longer than the file": (raw(b"{}", length=1000), ["1000"]),
    "header larger than 100 MB": (raw(b"{}", length=100_000_001), ["100000001"]),
    "header is no JSON": (raw(b"hello"), []),
    "offsets overlap": (raw({"a": tensor(0, 4), "b": tensor(2, 6)}, b"\0" * 6), ["b"]),
    "offsets out of range": (raw({"a": tensor(0, 4), "far": tensor(4, 8)}, b"\0" * 6), ["far"]),
    "unknown dtype": (raw({"odd": tensor(0, 4, "F31")}, b"\0" * 4), ["odd", "F31"]),
    "shape does not fit the bytes": (raw({"odd": tensor(0, 4, shape=(3,))}, b"\0" * 4), ["odd"]),
    "shape overflows": (raw({"odd": tensor(0, 4, shape=(2**62, 2**62))}, b"\0" * 4), ["odd"]),
    "not a diffusion model": (raw({"lm_head.weight": tensor(0, 4)}, b"\0" * 4), ["not a diffusion model"]),
}


@pytest.mark.parametrize("what", BROKEN_FILES)
def test_a_broken_checkpoint_is_named(comfytp, inputs, tmp_path, what):
    data, names = BROKEN_FILES[what]
    broken, output = tmp_path / "broken.safetensors", tmp_path / "out.safetensors"
    broken.write_bytes(data)
    comfytp.fails("inspect", broken, naming=["broken.safetensors", *names])
    comfytp.fails("run", broken, "--inputs", inputs(), "--output", output, naming=["broken.safetensors", *names])
    assert not output.exists()


def test_a_truncated_checkpoint_is_named(comfytp, checkpoint, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint.read_bytes()[:-100])
    for command in ("inspect", "plan", "verify", "bench"):
        comfytp.fails(command, cut, naming="cut.safetensors")


@pytest.mark.parametrize("path", ["none.safetensors", "", "."])
def test_a_checkpoint_that_is_not_there_is_named(comfytp, tmp_path, path):
    comfytp.fails("inspect", tmp_path / path, naming=str(tmp_path))


def changed(checkpoint, path, change):
    tensors = load_file(checkpoint)
    change(tensors)
    save_file(tensors, path)
    return path


PREFIX = "model.diffusion_model."


@pytest.mark.parametrize("part", ["attn", ""])
def test_missing_tensors_are_named_and_counted(comfytp, checkpoint, tmp_path, part):
    def remove(tensors):
        for key in [key for key in tensors if f".input_blocks.4.1.transformer_blocks.0.{part}" in key]:
            del tensors[key]
            gone.append(key.removeprefix(PREFIX))

    gone = []
    path = changed(checkpoint, tmp_path / "gaps.safetensors", remove)
    message = comfytp.fails("inspect", path, naming=["gaps.safetensors", str(len(gone))]).err
    assert any(key in message for key in gone), message


def test_a_missing_tensor_is_named(comfytp, checkpoint, tmp_path):
    key = "out.2.bias"
    path = changed(checkpoint, tmp_path / "gap.safetensors", lambda tensors: tensors.pop(PREFIX + key))
    comfytp.fails("inspect", path, naming=["gap.safetensors", key])


def test_a_tensor_of_the_wrong_shape_is_named(comfytp, checkpoint, tmp_path):
    key = "middle_block.0.out_layers.3.weight"

    def cut(tensors):
        tensors[PREFIX + key] = np.ascontiguousarray(tensors[PREFIX + key][:, :-1])

    comfytp.fails("inspect", changed(checkpoint, tmp_path / "odd.safetensors", cut), naming=["odd.safetensors", key])


def test_a_tensor_of_the_wrong_dtype_is_named(comfytp, checkpoint, tmp_path):
    key = "middle_block.0.out_layers.3.weight"

    def make_integers(tensors):
        tensors[PREFIX + key] = tensors[PREFIX + key].astype(np.int32)

    comfytp.fails("inspect", changed(checkpoint, tmp_path / "ints.safetensors", make_integers), naming=["ints.safetensors", key])


@pytest.mark.parametrize(
    "devices, names",
    [("", []), ("cpu:0,,x", ["cpu:0,,x"]), ("cpu:-1", ["cpu:-1"]), ("cpu:0,cpu:0", ["cpu:0"]), ("cpu:999", ["cpu:999"]),
     ("cpu", ["cpu"]), ("cpu:0@2", ["cpu:0@2"])],
)  # fmt: skip
@pytest.mark.parametrize("command", ["plan", "verify"])
def test_devices_that_are_none_are_named(comfytp, checkpoint, command, devices, names):
    comfytp.fails(command, checkpoint, "--devices", devices, *SMALL, naming=["devices", *names])


@pytest.mark.parametrize(
    "options, names",
    [
        (["--mesh", "tensor=3"], ["tensor=3"]),
        (["--mesh", "pipe=2"], ["pipe"]),
        (["--mesh", "tensor=0"], ["tensor=0"]),
        (["--mesh", ""], ["mesh"]),
        (["--weights", "mirrored"], ["mirrored"]),
        (["--compute", "f8"], ["f8"]),
        (["--size", "512"], ["512"]),
        (["--size", "500x512"], ["500x512"]),
        (["--size", "-8x8"], ["-8x8"]),
        (["--size", "99999999999999999999x8"], ["99999999999999999999x8"]),
        (["--heads", "7"], ["7"]),
        (["--link", "386"], ["[link]", "'386'"]),
        (["--link", "386GB/s,3"], ["[link]", "'386GB/s,3'"]),
        (["--communicator", "pigeon"], ["peer", "staged", "'pigeon'"]),
    ],
)
def test_options_that_do_not_fit_are_named(comfytp, checkpoint, options, names):
    comfytp.fails("plan", checkpoint, "--devices", "cpu:0,cpu:1", *options, naming=names)


@pytest.mark.parametrize("rank", ["2/2", "0", "-1/2", "0/2/3", "a/b", ""])
def test_a_rank_that_is_none_is_named(comfytp, checkpoint, rank):
    comfytp.fails("bench", checkpoint, *SMALL, "--mesh", "tensor=2", "--rank-only", rank, naming=["[rank-only]", f"'{rank}'"])


def test_ranks_that_the_mesh_has_not_are_named(comfytp, checkpoint):
    comfytp.fails("bench", checkpoint, *SMALL, "--mesh", "tensor=3", "--rank-only", "0/2", naming="tensor=3")
    comfytp.fails("bench", checkpoint, *SMALL, "--devices", "cpu:0,cpu:1,cpu:2", "--rank-only", "0/2", naming="tensor=3")


@pytest.mark.parametrize(
    "options, names",
    [(["--ops", "broadcast"], ["'broadcast'"]), (["--dtype", "i32"], ["'i32'"]), (["--sizes", "1KB,,2"], ["''"]), (["--sizes", "2TB"], ["'2TB'"]),
     (["--communicator", "pigeon"], ["'pigeon'"])],
)  # fmt: skip
def test_collectives_that_are_none_are_named(comfytp, options, names):
    comfytp.fails("collectives", "--devices", "cpu:0,cpu:1", *options, naming=names)


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["inspect"], ["plan", "a", "--batch", "0"], ["plan", "a", "--batch", "two"], ["run", "a", "--inputs", "b"], ["plan", "a", "--fast"],
     ["plan", "a", "--plan", "b", "--devices", "cpu:0"], ["plan", "a", "--json", "--dump"], ["verify", "a", "--steps", "0"],
     ["plan", "a", "--heads", "8", "--head-dim", "4"], ["collectives"], ["bench", "a", "--link", "1GB/s"]],
)  # fmt: skip
def test_a_command_line_that_makes_no_sense_ends_with_2(comfytp, arguments):
    comfytp.fails(*arguments, status=2)


@pytest.mark.parametrize("arguments, words", [
    (["foo"], ["'foo'", "plan", "verify"]),
    (["plan", "a", "--batch", "0"], ["--batch", "at least 1", "'0'"]),
    (["plan", "a", "--tokens", "-3"], ["--tokens", "at least 1", "'-3'"]),
    (["plan", "a", "--heads", "0"], ["--heads", "at least 1", "'0'"]),
])  # fmt: skip
def test_a_command_line_that_makes_no_sense_is_told_what_would(comfytp, arguments, words):
    comfytp.fails(*arguments, status=2, naming=words)


def test_heads_that_do_not_divide_are_not_answered_with_the_same_option(comfytp, checkpoint):
    message = comfytp.fails("plan", checkpoint, "--heads", "5", naming=["32 channels", "by 5", "family's rule"]).err
    assert "needs heads" not in message


def test_a_dump_is_no_plan(comfytp, checkpoint, tmp_path):
    dump = tmp_path / "dump.txt"
    dump.write_text(comfytp("plan", checkpoint, *SMALL, "--dump").out)
    message = comfytp.fails("run", checkpoint, "--plan", dump, "--inputs", "a", "--output", "b", naming=["dump.txt", "plan --json"]).err
    assert "parse_error" not in message and "exception" not in message


def test_cuts_that_the_model_lacks_are_named(comfytp, checkpoint, inputs, tmp_path):
    plan = tmp_path / "plan.json"
    report = comfytp("plan", checkpoint, "--devices", "cpu:0,cpu:1", *SMALL, "--json").json
    report["cuts"]["tensor"]["groups"].append("none.weight[1]")
    plan.write_text(json.dumps(report))
    comfytp.fails("run", checkpoint, "--plan", plan, "--inputs", inputs(), "--output", tmp_path / "out", naming="none.weight[1]")


@pytest.mark.parametrize("profile, names", [("{", ["JSON"]), ('{"version": 1, "devices": [{"name": "cuda:0"}]}', ["devices[0].model"])])
def test_a_profile_that_is_none_is_named(comfytp, checkpoint, tmp_path, profile, names):
    file = tmp_path / "profile.json"
    file.write_text(profile)
    comfytp.fails("plan", checkpoint, *SMALL, "--profile", file, naming=["profile.json", *names])


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="a GPU is here")
def test_devices_that_are_not_here_can_be_planned_but_not_run(comfytp, checkpoint):
    comfytp.fails("verify", checkpoint, "--devices", "cuda:7", *SMALL, naming=["devices", "cuda:7"])
    assert "cuda:7 is not here" in comfytp("plan", checkpoint, "--devices", "cuda:7", *SMALL).out


def test_a_plan_that_is_none_is_named(comfytp, checkpoint, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text('{"version": 1, "devices": [{"name": "cpu:0"}]}')
    comfytp.fails("plan", checkpoint, "--plan", plan, naming=["plan.json", "mesh"])
    comfytp.fails("plan", checkpoint, "--plan", tmp_path / "none.json", naming="none.json")


small = call_inputs()
BAD_INPUTS = {
    "no x": ({"x": None}, ["x"]),
    "no timesteps": ({"timesteps": None}, ["timesteps"]),
    "no context": ({"context": None}, ["context"]),
    "x without rows": ({"x": small["x"][:0].copy()}, ["x"]),
    "x of rank 3": ({"x": small["x"][0]}, ["x"]),
    "x of 5 channels": ({"x": np.zeros((2, 5, 8, 16), np.float32)}, ["x", "5"]),
    "x of integers": ({"x": small["x"].astype(np.int32)}, ["x"]),
    "3 timesteps": ({"timesteps": np.zeros(3, np.float32)}, ["timesteps", "3"]),
    "context of 1 row": ({"context": small["context"][:1]}, ["context"]),
    "context too narrow": ({"context": small["context"][:, :, :512].copy()}, ["context", "512"]),
    "y where the model has none": ({"y": np.zeros((2, 2816), np.float32)}, ["y"]),
    "an unknown name": ({"noise": np.zeros(1, np.float32)}, ["noise"]),
    "one residual of a ControlNet": ({"control.0": np.zeros((2, 32, 8, 16), np.float32)}, ["control"]),
}


@pytest.mark.parametrize("what", BAD_INPUTS)
def test_inputs_that_do_not_fit_are_named(comfytp, checkpoint, inputs, tmp_path, what):
    changes, names = BAD_INPUTS[what]
    comfytp.fails("run", checkpoint, "--inputs", inputs(**changes), "--output", tmp_path / "out.safetensors", naming=names)
    assert os.listdir(tmp_path) == ["inputs.safetensors"]


def test_sdxl_needs_y(comfytp, checkpoints, inputs, tmp_path):
    context = np.zeros((2, 7, 2048), np.float32)
    for y in (None, np.zeros((2, 2560), np.float32)):
        comfytp.fails("run", checkpoints("sdxl"), "--inputs", inputs(context=context, y=y), "--output", tmp_path / "out.safetensors", naming="y")


def test_a_full_disk_is_an_error(comfytp, checkpoint, inputs):
    comfytp.fails("run", checkpoint, "--inputs", inputs(), "--output", "/dev/full", naming="/dev/full")


def test_nothing_is_left_of_a_file_that_could_not_be_finished(comfytp, checkpoint, inputs, tmp_path):
    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    output = tmp_path / "out.safetensors"
    output.write_bytes(b"before")
    comfytp.fails("run", checkpoint, "--inputs", inputs(), "--output", output, naming="out.safetensors", preexec_fn=small_files)
    assert output.read_bytes() == b"before"
    comfytp.fails("synth", "--family", "sd1", "--width", 32, tmp_path / "new.safetensors", naming="new.safetensors", preexec_fn=small_files)
    assert sorted(os.listdir(tmp_path)) == ["inputs.safetensors", "out.safetensors"]


def test_a_folder_that_is_not_there_is_named(comfytp, checkpoint, inputs, tmp_path):
    comfytp.fails("run", checkpoint, "--inputs", inputs(), "--output", tmp_path / "none" / "out.safetensors", naming="none")


def test_a_device_too_small_is_named(comfytp, checkpoint, inputs, tmp_path):
    arguments = ("--devices", "cpu:0,cpu:1@1MiB", "--inputs", inputs(), "--output", tmp_path / "out.safetensors")
    comfytp.fails("run", checkpoint, *arguments, naming="cpu:1")
    assert not (tmp_path / "out.safetensors").exists()


def test_output_never_replaces_what_is_read(comfytp, checkpoint, inputs, tmp_path):
    model = tmp_path / "model.safetensors"
    model.symlink_to(checkpoint)
    read = inputs()
    for output in (model, read):
        before = output.read_bytes()
        comfytp.fails("run", model, "--inputs", read, "--output", output, naming=output.name)
        assert output.read_bytes() == before


def test_output_is_readable_by_others(comfytp, checkpoint, inputs, tmp_path):
    output = tmp_path / "out.safetensors"
    comfytp("run", checkpoint, "--inputs", inputs(), "--output", output)
    with safe_open(output, "numpy") as file:
        assert list(file.keys()) == ["output"]
