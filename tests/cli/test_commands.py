"""What the subcommands promise when all is well."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
from program import PROGRAM, SMALL, call_inputs
from safetensors.numpy import load_file, save_file

TWO = ("--devices", "cpu:0,cpu:1")


def relative_error(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def run(comfytp, checkpoint, inputs, output, *options):
    comfytp("run", checkpoint, "--inputs", inputs, "--output", output, *options)
    return load_file(output)["output"]


@pytest.mark.parametrize("command", ["", "inspect", "plan", "run", "verify", "bench", "collectives", "synth"])
def test_every_command_has_a_help(comfytp, command):
    arguments = [command, "--help"] if command else ["--help"]
    assert "Usage" in comfytp(*arguments).out


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_inspect_recognises_what_synth_wrote(comfytp, checkpoints, family):
    path = checkpoints(family)
    report = comfytp("inspect", path, "--json").json
    assert (report["family"], report["layout"], report["in_channels"]) == (family, "ldm", 4)
    stored = load_file(path)
    denoiser = next(c for c in report["components"] if c["name"] == "denoiser")
    assert denoiser["tensors"] == len(stored)
    assert denoiser["parameters"] == sum(t.size for t in stored.values())
    assert denoiser["bytes"] == sum(t.nbytes for t in stored.values())
    assert denoiser["parameters_of_dtype"] == {"f16": denoiser["parameters"]}
    assert family in comfytp("inspect", path).out


def test_synth_depends_on_the_seed_alone(comfytp, tmp_path):
    def bytes_of(name, *options):
        comfytp("synth", "--family", "sd1", "--width", 32, *options, tmp_path / name)
        return (tmp_path / name).read_bytes()

    assert bytes_of("a") == bytes_of("b", "--seed", 1)
    assert bytes_of("a") != bytes_of("c", "--seed", 2)


@pytest.mark.parametrize("placement", ["resident", "gathered"])
@pytest.mark.parametrize("mesh", ["tensor=2", "batch=2", "patch=2", "tensor=2:1"])
def test_run_gives_on_two_devices_what_it_gives_on_one(comfytp, checkpoint, inputs, tmp_path, mesh, placement):
    one = run(comfytp, checkpoint, inputs(), tmp_path / "one.safetensors")
    two = run(comfytp, checkpoint, inputs(), tmp_path / "two.safetensors", *TWO, "--mesh", mesh, "--weights", placement)
    assert one.shape == (2, 4, 8, 16) and np.linalg.norm(one) > 0
    assert relative_error(two, one) <= 1e-5


def test_run_takes_a_plan(comfytp, checkpoint, inputs, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(comfytp("plan", checkpoint, *TWO, "--mesh", "batch=2", "--weights", "gathered", *SMALL, "--json").out)
    options = (*TWO, "--mesh", "batch=2", "--weights", "gathered")
    planned = run(comfytp, checkpoint, inputs(), tmp_path / "a.safetensors", "--plan", plan)
    assert np.array_equal(planned, run(comfytp, checkpoint, inputs(), tmp_path / "b.safetensors", *options))


def test_run_cuts_what_the_plan_says(comfytp, checkpoint, inputs, tmp_path):
    plan = comfytp("plan", checkpoint, *TWO, *SMALL, "--json").json
    file = tmp_path / "plan.json"

    def weights_of(cuts):
        file.write_text(json.dumps(plan | {"cuts": {"tensor": cuts}}))
        return [d["weight_bytes"] for d in comfytp("plan", checkpoint, "--plan", file, *SMALL, "--json").json["report"]["devices"]]

    chosen, total = plan["cuts"]["tensor"], plan["report"]["weight_bytes_total"]
    assert weights_of(chosen) == [d["weight_bytes"] for d in plan["report"]["devices"]]
    feed_forward = next(name for name in chosen["groups"] if ".ff.net." in name)
    assert weights_of({"groups": [], "alone": []}) == [total, total]
    assert total > max(weights_of({"groups": [feed_forward], "alone": []})) > max(weights_of(chosen))
    a = run(comfytp, checkpoint, inputs(), tmp_path / "a.safetensors", "--plan", file)
    assert relative_error(a, run(comfytp, checkpoint, inputs(), tmp_path / "b.safetensors")) <= 1e-5


def scaled_fp8(path, changed, shape=(1,)):
    """The checkpoint with its linears in fp8 (E4M3) and a scale for each, and the same decoded."""
    tensors, decoded, prefix = {}, {}, "model.diffusion_model."
    bits = np.arange(127, dtype=np.uint8)  # of the numbers that are not negative, rising
    exponent, mantissa = bits >> 3, bits & 7
    values = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent.astype(int) - 10), mantissa * 2.0**-9).astype(np.float32)
    for key, t in load_file(path).items():
        tensors[key] = decoded[key] = t
        if t.ndim != 2 or not key.endswith(".weight"):
            continue
        scale = np.float32(np.abs(t).max() / 448)
        nearest = np.searchsorted((values[1:] + values[:-1]) / 2, np.abs(t.astype(np.float32)) / scale).astype(np.uint8)
        tensors[key] = ("F8_E4M3", nearest | (t < 0).astype(np.uint8) << 7)
        decoded[key] = np.sign(t).astype(np.float32) * values[nearest] * scale
        tensors[key.removesuffix("weight") + "scale_weight"] = np.full(shape, scale)
    tensors[prefix + "scaled_fp8"] = ("F8_E4M3", np.zeros(2, np.uint8))
    write_safetensors(changed, tensors)
    return decoded


def write_safetensors(path, tensors):
    """As save_file, with ("F8_E4M3", bytes) for what numpy has no dtype."""
    header, data = {}, b""
    for key, t in tensors.items():
        name, t = t if isinstance(t, tuple) else ({"f2": "F16", "f4": "F32"}[t.dtype.str[1:]], t)
        header[key] = {"dtype": name, "shape": list(t.shape), "data_offsets": [len(data), len(data) + t.nbytes]}
        data += t.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_scaled_fp8_is_read_and_run_as_what_it_decodes_to(comfytp, checkpoint, inputs, tmp_path):
    scaled, decoded = tmp_path / "scaled.safetensors", tmp_path / "decoded.safetensors"
    save_file(scaled_fp8(checkpoint, scaled), decoded)
    expected = run(comfytp, decoded, inputs(), tmp_path / "expected.safetensors")
    for options in ((), TWO):
        assert relative_error(run(comfytp, scaled, inputs(), tmp_path / "output.safetensors", *options), expected) < 1e-5
    report = comfytp("inspect", scaled, "--json").json
    assert report["family"] == "sd1" and report["components"][0]["parameters_of_dtype"]["f8_e4m3"] > 0
    bench = ("bench", "--compute", "fp8", *SMALL, "--runs", 1, "--warmup", 0)
    assert "note: fp8: nothing is multiplied in it, for cpu:0 cannot (GPUs can from sm_89 on)\n" in comfytp(*bench, scaled).err
    assert "note: fp8: nothing is multiplied in it, for no linear's weight is stored in it\n" in comfytp(*bench, checkpoint).err
    scaled_fp8(checkpoint, scaled, (2,))
    comfytp.fails("inspect", scaled, naming=["expected a quantised", "with one scale", "scale_weight' of f32[2]", "ComfyUI node"])


def test_a_plan_brings_its_compute_dtype(comfytp, checkpoint, inputs, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(comfytp("plan", checkpoint, *SMALL, "--compute", "bf16", "--json").out)
    planned = run(comfytp, checkpoint, inputs(), tmp_path / "a.safetensors", "--plan", plan)
    assert np.array_equal(planned, run(comfytp, checkpoint, inputs(), tmp_path / "b.safetensors", "--compute", "bf16"))
    assert not np.array_equal(planned, run(comfytp, checkpoint, inputs(), tmp_path / "c.safetensors"))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_output_has_the_dtype_of_x(comfytp, checkpoint, inputs, tmp_path, dtype):
    reference = run(comfytp, checkpoint, inputs(), tmp_path / "f32.safetensors")
    output = run(comfytp, checkpoint, inputs(**call_inputs(dtype)), tmp_path / "out.safetensors")
    assert output.dtype == dtype
    assert relative_error(output, reference) < 1e-2


def test_timesteps_may_be_whole_numbers(comfytp, checkpoint, inputs, tmp_path):
    reals = run(comfytp, checkpoint, inputs(), tmp_path / "a.safetensors")
    whole = run(comfytp, checkpoint, inputs(timesteps=np.full(2, 400, np.int64)), tmp_path / "b.safetensors")
    assert np.array_equal(reals, whole)


def test_one_timestep_stands_for_all_rows(comfytp, checkpoint, inputs, tmp_path):
    rows = run(comfytp, checkpoint, inputs(), tmp_path / "a.safetensors")
    one = run(comfytp, checkpoint, inputs(timesteps=np.full(1, 400, np.float32)), tmp_path / "b.safetensors")
    assert np.array_equal(rows, one)


def test_lists_may_have_spaces(comfytp, checkpoint):
    report = comfytp("plan", checkpoint, "--devices", "cpu:0, cpu:1@2GiB", "--mesh", " batch=1, tensor=2", *SMALL, "--json").json
    assert [d["name"] for d in report["devices"]] == ["cpu:0", "cpu:1"] and report["mesh"] == "batch=1,tensor=2"


def residuals(names):
    # The skips of a narrow SD1 in the order of its input blocks: (channels, halvings).
    sizes = [(32, 0)] * 3 + [(32, 1)] + [(64, 1)] * 2 + [(64, 2)] + [(128, 2)] * 2 + [(128, 3)] * 3 + [(128, 3)]
    random = np.random.default_rng(1)
    return {name: random.standard_normal((2, c, 8 >> h, 16 >> h)).astype(np.float32) for name, (c, h) in zip(names, sizes)}


def test_control_residuals_may_have_the_names_of_diffusers(comfytp, checkpoint, inputs, tmp_path):
    own = residuals([f"control.{i}" for i in range(12)] + ["control.middle"])
    theirs = residuals([f"down_block_additional_residuals.{i}" for i in range(12)] + ["mid_block_additional_residual"])
    a = run(comfytp, checkpoint, inputs(**own), tmp_path / "a.safetensors")
    b = run(comfytp, checkpoint, inputs(**theirs), tmp_path / "b.safetensors")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, run(comfytp, checkpoint, inputs(), tmp_path / "c.safetensors"))


def test_plan_says_what_the_devices_share(comfytp, checkpoint):
    report = comfytp("plan", checkpoint, *TWO, *SMALL, "--json").json["report"]
    assert [d["name"] for d in report["devices"]] == ["cpu:0", "cpu:1"]
    for device in report["devices"]:
        assert device["weight_share"] <= 0.55
        assert device["flops_share"] <= 0.6
        assert device["collectives"]["all_reduce"]["count"] > 0
    assert sum(d["weight_bytes"] for d in report["devices"]) >= report["weight_bytes_total"]


def test_one_device_needs_no_collectives(comfytp, checkpoint):
    (device,) = comfytp("plan", checkpoint, *SMALL, "--json").json["report"]["devices"]
    assert device["weight_share"] == 1 and device["collectives"] == {}


@pytest.mark.parametrize("options", [("tensor=2", "resident"), ("batch=2", "gathered"), ("patch=2", "resident"), ("tensor=3:1", "resident")])
def test_what_plan_promises_is_what_is_allocated(comfytp, checkpoint, options):
    mesh, placement = options
    options = (*TWO, "--mesh", mesh, "--weights", placement, *SMALL)
    planned = comfytp("plan", checkpoint, *options, "--json").json["report"]["devices"]
    used = comfytp("bench", checkpoint, *options, "--runs", 1, "--warmup", 0, "--json").json["devices"]
    for promise, device in zip(planned, used, strict=True):
        assert promise["weight_bytes"] == device["weight_bytes"]
        assert promise["activation_bytes"] == pytest.approx(device["activation_bytes"], rel=0.01)
    verified = comfytp("verify", checkpoint, *options, "--json").json
    assert verified["weight_bytes_per_device"] == [d["weight_bytes"] for d in planned]


@pytest.mark.parametrize(
    "mesh, size, batch, words",
    [("batch=2", "128x64", 1, ["batch=2", "use batch=1, or tensor=2"]), ("patch=2", "8x8", 1, ["patch=2", "use patch=1, or tensor=2"]),
     ("patch=4", "16x16", 1, ["patch=4", "2 rows", "use patch=2 at most, or tensor=4"])],
)  # fmt: skip
def test_a_plan_that_is_no_use_says_so(comfytp, checkpoint, mesh, size, batch, words):
    devices = ",".join(f"cpu:{i}" for i in range(int(mesh[-1])))
    out = comfytp("plan", checkpoint, "--devices", devices, "--mesh", mesh, "--size", size, "--batch", batch).out
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert any(all(word in note for word in words) for note in notes), out


@pytest.mark.parametrize("size", ["64x8", "8x64"])
def test_an_image_of_one_row_is_divided_by_its_columns(comfytp, checkpoint, size):
    options = ("--size", size, "--batch", 1)
    plan = ("--devices", "cpu:0,cpu:1", "--mesh", "patch=2")
    flops = [device["flops"] for device in comfytp("plan", checkpoint, *plan, *options, "--json").json["report"]["devices"]]
    assert max(flops) < 0.65 * comfytp("plan", checkpoint, "--devices", "cpu:0", *options, "--json").json["report"]["devices"][0]["flops"]
    assert comfytp("verify", checkpoint, *plan, *options, "--json").json["passed"]


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="a GPU is here")
def test_plan_needs_no_gpu(comfytp, checkpoint, tmp_path):
    devices = ("--devices", "cuda:0,cuda:1@10GiB")
    text = comfytp("plan", checkpoint, *devices, *SMALL).out
    assert "(assumed)" in text and "--profile" in text
    profile = tmp_path / "profile.json"
    cards = [{"name": f"cuda:{i}", "model": "RTX 4090", "memory_bytes": bytes} for i, bytes in ((0, 1 << 20), (1, 1 << 34))]
    profile.write_text(json.dumps({"version": 1, "devices": cards, "link_bytes_per_second": 1e9}))
    report = comfytp("plan", checkpoint, *devices, *SMALL, "--profile", profile, "--json").json["report"]
    for device, card in zip(report["devices"], cards, strict=True):
        assert device["profile"]["memory_bytes"] == card["memory_bytes"] and not device["profile"]["assumed"]
        assert device["profile"]["link_seconds"] == pytest.approx(sum(c["bytes"] for c in device["collectives"].values()) / 1e9)
        assert device["profile"]["compute_seconds"] == pytest.approx(device["flops"] / 82.6e12)
    assert any("cuda:0 needs" in note for note in report["notes"]) and not any("cuda:1 needs" in note for note in report["notes"])


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="a GPU is here")
def test_ranks_of_one_device_have_names_of_their_own(comfytp, checkpoint, tmp_path):
    plan = comfytp("plan", checkpoint, "--devices", "cuda:0,cuda:0", *SMALL, "--json")
    assert [d["name"] for d in plan.json["report"]["devices"]] == ["cuda:0#0", "cuda:0#1"]
    file = tmp_path / "plan.json"
    file.write_text(plan.out)
    again = comfytp("plan", checkpoint, "--plan", file, *SMALL, "--json").json["report"]
    told = plan.json["report"]
    told["notes"] = [note for note in told["notes"] if "not divided" not in note]  # what the strategy chose is the plan's now
    assert again == told


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="a GPU is here")
def test_ranks_of_one_device_share_its_memory(comfytp, checkpoint, tmp_path):
    def notes(bytes):
        file = tmp_path / "profile.json"
        file.write_text(json.dumps({"version": 1, "devices": [{"name": "cuda:0", "model": "a card", "memory_bytes": bytes}]}))
        report = comfytp("plan", checkpoint, "--devices", "cuda:0,cuda:0", *SMALL, "--profile", file, "--json").json["report"]
        needed.extend(d["weight_bytes"] + d["activation_bytes"] for d in report["devices"])
        return [note for note in report["notes"] if note.startswith("cuda:0 needs")]

    needed = []
    assert not notes(1 << 40)
    assert not notes(sum(needed[:2])) and notes(sum(needed[:2]) - 1)


@pytest.mark.parametrize("compute", ["f16", "bf16", "f32"])
def test_plan_for_gpus_that_are_not_here_is_of_the_dtype_that_is_asked_for(comfytp, checkpoint, compute):
    def plan(name, *more):
        devices = ("--devices", "cuda:6,cuda:7", "--compute", name, "--link", "10GB/s,5us", *more)
        return comfytp("plan", checkpoint, *devices, *SMALL, "--json").json

    found, wide = plan(compute), plan("f32")
    assert found["call"]["compute"] == compute
    halves = 1 if compute == "f32" else 2
    for device, other in zip(found["report"]["devices"], wide["report"]["devices"], strict=True):
        assert device["activation_bytes"] <= 1.1 * other["activation_bytes"] / halves
        assert device["profile"]["compute_seconds"] <= other["profile"]["compute_seconds"]
        exchanged = sum(kind["bytes"] / 10e9 + kind["count"] * 5e-6 for kind in device["collectives"].values())
        assert device["profile"]["link_seconds"] == pytest.approx(exchanged)


def test_plan_names_sizes_as_a_table(comfytp, checkpoint):
    text = comfytp("plan", checkpoint, *TWO, *SMALL).out
    assert "cpu:0" in text and "cpu:1" in text and "all_reduce" in text


def test_more_devices_than_heads_work_and_are_noted(comfytp, checkpoints):
    path = checkpoints("sdxl")  # heads: 1 and 2
    devices = ("--devices", "cpu:0,cpu:1,cpu:2")
    notes = comfytp("plan", path, *devices, *SMALL, "--json").json["report"]["notes"]
    assert notes
    verified = comfytp("verify", path, *devices, *SMALL, "--json")
    assert verified.json["passed"]
    told = [f"note: {note}" for note in notes]
    assert verified.err.splitlines() == comfytp("bench", path, *devices, *SMALL, "--runs", 1).err.splitlines() == told


def test_dump_shows_shardings_and_reasons(comfytp, checkpoint):
    text = comfytp("plan", checkpoint, *TWO, *SMALL, "--dump").out
    assert "all_reduce" in text and "reason=" in text
    assert "partial(tensor)" in text
    assert "the graph of cpu:1" in text
    assert "''" not in text and " ()" not in text


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="reads another process's environment")
@pytest.mark.parametrize("own, spins", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)])
def test_waiting_threads_spin_briefly_unless_the_user_says_otherwise(checkpoint, own, spins):
    ours = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [PROGRAM, "bench", str(checkpoint), *SMALL, "--runs", "100000"]
    process = subprocess.Popen(command, env=ours | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not catches(process, signal.SIGINT):  # it has begun
            assert process.poll() is None
            time.sleep(0.01)
        with open(f"/proc/{process.pid}/environ") as file:
            environment = dict(line.split("=", 1) for line in file.read().split("\0") if line)
        with open(f"/proc/{process.pid}/comm") as file:
            assert file.read().strip() == os.path.basename(os.path.realpath(PROGRAM))
    finally:
        process.kill()
        process.wait()
    assert environment.get("GOMP_SPINCOUNT") == spins


def test_verify_says_how_far_the_split_is_off(comfytp, checkpoint):
    report = comfytp("verify", checkpoint, *TWO, *SMALL, "--steps", 2, "--json").json
    assert report["passed"] and 0 < report["relative_error"] <= 1e-5
    assert report["max_abs_error"] > 0 and report["psnr_db"] > 90
    assert len(report["weight_bytes_per_device"]) == 2
    assert max(report["weight_bytes_per_device"]) <= 0.55 * report["weight_bytes_total"]
    for steps, what in ((1, "of the first call alone"), (2, "median of 2")):
        assert what in comfytp("verify", checkpoint, *TWO, *SMALL, "--steps", steps).out


def test_verify_judges_bf16_by_its_distance_to_f32(comfytp, checkpoint):
    size = ("--size", "256x128", "--tokens", "7")
    report = comfytp("verify", checkpoint, *TWO, *size, "--compute", "bf16", "--json").json
    assert report["steps"] == 4 and "tolerance" not in report
    split, whole = report["error_against_f32"], report["one_device_error_against_f32"]
    assert report["passed"] and 1e-4 < whole < 0.1 and split <= report["tolerated_ratio"] * whole
    text = comfytp("verify", checkpoint, *TWO, *size, "--compute", "bf16").out
    assert "against f32" in text and "on one device" in text


def test_verify_in_bf16_may_be_given_a_tolerance(comfytp, checkpoint):
    result = comfytp.any("verify", checkpoint, *TWO, *SMALL, "--compute", "bf16", "--tolerance", "1e-6", "--json")
    assert result.status == 1 and result.json["tolerance"] == 1e-6


def test_verify_beyond_tolerance_ends_with_1(comfytp, checkpoint):
    result = comfytp.any("verify", checkpoint, *TWO, *SMALL, "--tolerance", "1e-12", "--json")
    assert result.status == 1 and result.err == ""
    assert not result.json["passed"]


def test_verify_fails_where_the_result_is_no_number(comfytp, checkpoint, tmp_path):
    tensors = load_file(checkpoint)
    tensors["model.diffusion_model.out.2.bias"][0] = np.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    comfytp.fails("verify", tmp_path / "nan.safetensors", *TWO, *SMALL, naming=["[verify] expected finite numbers from one device", "beyond what f32 holds"])


@pytest.mark.parametrize("batch", [1, 3])
def test_verify_takes_odd_batches(comfytp, checkpoint, batch):
    assert comfytp("verify", checkpoint, *TWO, *SMALL, "--batch", batch, "--json").json["passed"]


def test_bench_says_times_and_memory(comfytp, checkpoint):
    report = comfytp("bench", checkpoint, *TWO, *SMALL, "--runs", 3, "--json").json
    assert 0 < report["min_seconds"] <= report["median_seconds"] <= report["max_seconds"]
    assert report["runs"] == 3 and report["load_seconds"] > 0
    for device in report["devices"]:
        assert device["peak_bytes"] == device["weight_bytes"] + device["activation_bytes"] > 0
        assert device["collective_seconds"] > 0


def test_bench_says_what_each_device_does_for_how_much_of_a_step(comfytp, checkpoint):
    report = comfytp("bench", checkpoint, *TWO, *SMALL, "--runs", 1, "--profile", "--json").json["profile"]
    for device in report.values():
        shares = {part["what"]: part["share"] for part in device["timeline"]}
        assert shares.keys() == {"exchanges on the host", "computes"}
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0
    assert "of the step" in comfytp("bench", checkpoint, *TWO, *SMALL, "--runs", 1, "--profile").out


@pytest.mark.parametrize("mesh, placement", [("tensor=2", "resident"), ("patch=2", "resident"), ("batch=2", "gathered")])
def test_bench_runs_one_rank_alone(comfytp, checkpoint, mesh, placement):
    alone = ("--mesh", mesh, "--weights", placement, *SMALL, "--runs", 3, "--link", "1GB/s,1ms", "--json")
    plan = comfytp("plan", checkpoint, *TWO, "--mesh", mesh, "--weights", placement, *SMALL, "--json").json["report"]["devices"]
    for rank in (0, 1):
        report = comfytp("bench", checkpoint, "--devices", "cpu:0", "--rank-only", f"{rank}/2", *alone).json
        (device,) = report["devices"]
        assert device["name"] == f"cpu:0, rank {rank} of 2 alone"
        assert device["weight_bytes"] == plan[rank]["weight_bytes"] and device["collective_seconds"] == 0
        exchanged = {kind: c["count"] * 1e-3 + c["bytes"] / 1e9 for kind, c in plan[rank]["collectives"].items()}
        fetching = exchanged.pop("fetch_weight", 0)
        expected = max(report["median_seconds"], fetching) + sum(exchanged.values())
        assert report["predicted_seconds"] == pytest.approx(expected)
    assert comfytp("bench", checkpoint, *TWO, "--rank-only", "1/2", *alone).json["devices"][0]["name"].startswith("cpu:1, ")
    text = comfytp("bench", checkpoint, "--devices", "cpu:0", "--rank-only", "0/2", *alone[:-1]).out
    assert "one rank alone" in text and "predicted and not measured" in text


def test_plan_predicts_a_step_over_a_link(comfytp, checkpoint, tmp_path):
    def report(link, **rates):
        file = tmp_path / "profile.json"
        cards = [{"name": f"cpu:{i}", "model": "a card", **rates} for i in range(2)]
        file.write_text(json.dumps({"version": 1, "devices": cards}))
        return comfytp("plan", checkpoint, *TWO, *SMALL, "--profile", file, "--link", link, "--json").json["report"]

    def predicted(link):
        return report(link, flops_f32=1e12, bytes_per_second=1e11)["predicted_seconds"]

    devices = report("1GB/s", flops_f32=1e12, bytes_per_second=1e11)["devices"]
    counts = [sum(c["count"] for c in d["collectives"].values()) for d in devices]
    assert predicted("1GB/s") == max(d["predicted_seconds"] for d in devices) > 0
    assert predicted("1GB/s,1ms") - predicted("1GB/s") == pytest.approx(counts[0] * 1e-3)
    assert predicted("1MB/s") > predicted("1GB/s")
    unknown = report("1GB/s")
    assert "predicted_seconds" not in unknown and any("no time is predicted" in note for note in unknown["notes"])
    assert "predicted" not in comfytp("plan", checkpoint, *TWO, *SMALL).out


def test_collectives_are_timed_and_checked(comfytp):
    devices = "cpu:0,cpu:1,cpu:2"
    sizes = ("--sizes", "100003, 1MB")
    report = comfytp("collectives", "--devices", devices, *sizes, "--json").json
    assert report["devices"] == devices.split(",")
    assert len(report["results"]) == 4 * 3 * 2 and all(r["right"] for r in report["results"])
    assert all(0 < r["seconds"] <= r["most_seconds"] for r in report["results"])
    link = report["links"]["best"]["option"]
    text = comfytp("collectives", "--devices", devices, "--ops", "all_reduce", "--dtype", "bf16", *sizes).out
    assert "100,002" in text and "f32" not in text and "--link" in text
    assert "B/s," in link and link.endswith("us")


def test_the_link_of_collectives_is_one_that_plan_takes(comfytp, checkpoint):
    report = comfytp("collectives", "--devices", "cpu:0,cpu:1", "--dtype", "f32", "--ops", "all_reduce", "--sizes", "1KB,1MB", "--json").json
    comfytp("plan", checkpoint, *TWO, *SMALL, "--link", report["links"]["best"]["option"])


def test_an_interrupt_ends_a_call(checkpoint):
    command = [PROGRAM, "bench", str(checkpoint), *TWO, *SMALL, "--runs", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not catches(process, signal.SIGINT):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "comfytp: interrupted\n")


def catches(process, number):
    with open(f"/proc/{process.pid}/status") as status:
        mask = next(line.split()[1] for line in status if line.startswith("SigCgt"))
    return int(mask, 16) >> (number - 1) & 1


def test_json_is_json_alone(comfytp, checkpoint):
    for command in (["inspect", checkpoint], ["plan", checkpoint, *SMALL]):
        json.loads(comfytp(*command, "--json").out)
