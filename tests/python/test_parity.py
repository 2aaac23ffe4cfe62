"""The engine computes what diffusers computes: an implementation that nobody here wrote."""

import functools
import json

import numpy as np
import pytest
import torch
import unets
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file
from unets import make_call, reference, relative_error

import comfytp

ONE_DEVICE = 1e-4
SPLIT = 1e-5


def denoiser_of(weights, family, **options):
    return comfytp.Denoiser(weights, **{**unets.FAMILIES[family].heads, **options})


def test_the_ldm_names_of_these_tests_are_the_fields(unet_of, family):
    unet = unet_of(family)
    names = unets.ldm_names(unet)
    ldm = {"model.diffusion_model." + names[name]: t for name, t in unet.state_dict().items()}
    back = convert_ldm_unet_checkpoint(ldm, dict(unet.config))
    assert {name: t.data_ptr() for name, t in back.items()} == {name: t.data_ptr() for name, t in unet.state_dict().items()}


@pytest.mark.parametrize("layout", list(unets.LAYOUTS))
def test_every_layout_gives_diffusers_output(unet_of, family, layout, tmp_path):
    unet = unet_of(family)
    call = make_call(unet)
    denoiser = denoiser_of(unets.LAYOUTS[layout](unet, tmp_path), family)
    assert relative_error(denoiser(**call.inputs()), reference(unet, call)) <= ONE_DEVICE


# Latents: a usual one, one whose rows are odd at the third level, one that is odd at every level, one without a whole tile.
@pytest.mark.parametrize("height, width", [(72, 40), (36, 20), (17, 23), (8, 8)])
def test_every_size_batch_and_prompt_gives_diffusers_output(unet_of, family, height, width):
    unet = unet_of(family)
    denoiser = denoiser_of(unet.state_dict(), family)
    for batch, tokens in [(1, 77), (2, 154), (3, 77)]:
        call = make_call(unet, batch, height, width, tokens)
        error = relative_error(denoiser(**call.inputs()), reference(unet, call))
        assert error <= ONE_DEVICE, (batch, tokens)


@pytest.mark.parametrize("channels", [8, 9])
def test_inpainting_and_instruct_models_give_diffusers_output(unet_of, channels):
    unet = unet_of("sd1", in_channels=channels)
    call = make_call(unet)
    output = denoiser_of(unet.state_dict(), "sd1", devices="cpu:0,cpu:1")(**call.inputs())
    assert output.shape[1] == 4
    assert relative_error(output, reference(unet, call)) <= ONE_DEVICE


def residuals_of(unet, call):
    """Of the shapes that the skips and the middle have."""
    shapes = []
    hooks = [unet.conv_in.register_forward_hook(lambda m, i, o: shapes.append(o.shape))]
    for block in unet.down_blocks:
        hooks.append(block.register_forward_hook(lambda m, i, o: shapes.extend(t.shape for t in o[1])))
    hooks.append(unet.mid_block.register_forward_hook(lambda m, i, o: shapes.append(o.shape)))
    reference(unet, call)
    for hook in hooks:
        hook.remove()
    random = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=random) for shape in shapes]


@pytest.mark.parametrize("options", [{}, {"devices": "cpu:0,cpu:1", "mesh": "tensor=2"}, {"devices": "cpu:0,cpu:1", "mesh": "patch=2"}])
def test_control_residuals_are_added_where_diffusers_adds_them(unet_of, family, options):
    unet = unet_of(family)
    call = make_call(unet)
    *down, middle = residuals_of(unet, call)
    named = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}
    expected = reference(unet, call, **named)
    denoiser = denoiser_of(unet.state_dict(), family, **options)
    assert relative_error(denoiser(**call.inputs(), control=named), expected) <= ONE_DEVICE
    assert relative_error(denoiser(**call.inputs(), control={"down": down, "middle": middle}), expected) <= ONE_DEVICE
    assert relative_error(denoiser(**call.inputs()), reference(unet, call)) <= ONE_DEVICE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
@pytest.mark.parametrize("devices", ["cpu:0", "cpu:0,cpu:1"])
def test_weights_are_kept_in_the_dtype_they_are_stored_in(unet_of, dtype, devices, tmp_path):
    stored = {name: t.to(dtype) for name, t in unet_of("sd1").state_dict().items()}
    unet = unets.make_unet("sd1")
    unet.load_state_dict({name: t.float() for name, t in stored.items()})
    call = make_call(unet)
    expected = reference(unet, call)
    path = unets.save_ldm(unet, tmp_path / "model.safetensors", dtype=dtype)
    bytes_of_model = sum(t.numel() * t.element_size() for t in stored.values())
    for weights in (stored, path):
        denoiser = denoiser_of(weights, "sd1", devices=devices)
        assert relative_error(denoiser(**call.inputs()), expected) <= ONE_DEVICE
        held = sum(denoiser.stats()["allocated_weight_bytes"])
        if devices == "cpu:0":
            assert held == bytes_of_model
        else:
            assert bytes_of_model <= held <= 1.5 * bytes_of_model


def test_a_mapping_of_numpy_arrays_is_a_checkpoint(unet_of):
    unet = unet_of("sd1")
    call = make_call(unet)
    weights = {name: t.numpy() for name, t in unet.state_dict().items()}
    inputs = {name: t.numpy() for name, t in call.inputs().items()}
    output = comfytp.Denoiser(weights)(**inputs)
    assert isinstance(output, np.ndarray) and output.dtype == np.float32
    assert relative_error(output, reference(unet, call)) <= ONE_DEVICE


def test_a_report_is_of_the_last_call(unet_of):
    unet = unet_of("sd1")
    denoiser = denoiser_of(unet.state_dict(), "sd1")
    assert denoiser.report()["call"] == {"batch": 2, "height": 64, "width": 64, "tokens": 77, "control": False}
    call = make_call(unet, batch=3, height=20, width=12)
    inputs = call.inputs()
    denoiser(**inputs)
    report, sizes = denoiser.report(), {"batch": 3, "height": 20, "width": 12, "tokens": inputs["context"].shape[1], "control": False}
    assert report == denoiser.report(**sizes) and report["call"] == sizes
    smaller = denoiser.report(batch=1)
    assert smaller["call"] == {**sizes, "batch": 1} and smaller["devices"][0]["flops"] < report["devices"][0]["flops"]


MESHES = ["tensor=2", "tensor=3", "tensor=4", "batch=2", "batch=3", "batch=4", "patch=2", "patch=3", "patch=4", "batch=2,tensor=2",
          "patch=2,tensor=2", "batch=2,patch=2", "tensor=2:1", "patch=1:2"]


@pytest.fixture(scope="module")
def one_device(unet_of):
    """one_device("sd1"): the family's UNet, a call, and one device's output."""

    @functools.cache
    def run(family):
        unet = unet_of(family)
        call = make_call(unet, batch=3, height=20, width=12)
        return unet, call, denoiser_of(unet.state_dict(), family)(**call.inputs())

    return run


@pytest.mark.parametrize("placement", ["resident", "gathered"])
@pytest.mark.parametrize("mesh", MESHES)
def test_split_equals_one_device(one_device, family, mesh, placement):
    unet, call, expected = one_device(family)
    uneven = ":" in mesh
    count = 2 if uneven else int(np.prod([int(axis.partition("=")[2]) for axis in mesh.split(",")]))
    largest_share = 2 / 3 if uneven else 1 / count
    devices = [f"cpu:{i}" for i in range(count)]
    split = denoiser_of(unet.state_dict(), family, devices=devices, mesh=mesh, placement=placement)
    output = split(**call.inputs())
    assert relative_error(output, expected) <= SPLIT
    assert torch.equal(split(**call.inputs()), output), "the same plan gives the same bits"
    held = split.stats()["allocated_weight_bytes"]
    whole = sum(t.numel() * t.element_size() for t in unet.state_dict().values())
    if placement == "gathered":
        # What tensor divides goes by its shares, whoever stores it.
        largest = 2 / 3 if mesh == "tensor=2:1" else 1 / count
        assert sum(held) <= 1.1 * whole and max(held) <= 1.2 * whole * largest
    elif mesh in ("tensor=2", "tensor=4"):
        assert max(held) <= 1.3 * whole * largest_share


@pytest.mark.parametrize("count", [5, 7, 8])
def test_any_number_of_devices_equals_one(one_device, count):
    unet, call, expected = one_device("refiner")
    split = denoiser_of(unet.state_dict(), "refiner", devices=[f"cpu:{i}" for i in range(count)], mesh=f"tensor={count}")
    assert relative_error(split(**call.inputs()), expected) <= SPLIT


# Against the f32 model with the same, rounded, weights: what is left is the arithmetic's error alone.
@pytest.mark.parametrize("options", [{}, {"devices": "cpu:0,cpu:1", "mesh": "tensor=2"}])
def test_bf16_errs_no_more_than_torch(unet_of, family, options):
    rounded = unets.make_unet(family).bfloat16()
    exact = unets.make_unet(family)
    exact.load_state_dict(rounded.state_dict())
    denoiser = denoiser_of(rounded.state_dict(), family, compute="bf16", **options)
    ours, torchs = [], []
    for seed in range(3):
        call = make_call(exact, height=32, width=32, seed=seed).to(torch.bfloat16)
        expected = reference(exact, call.to(torch.float32))
        ours.append(relative_error(denoiser(**call.inputs()), expected) ** 2)
        torchs.append(relative_error(reference(rounded, call), expected) ** 2)
    assert sum(ours) ** 0.5 <= 1.1 * sum(torchs) ** 0.5


def scaled_fp8(unet, dtype, form):
    """The tensors of a scaled fp8 checkpoint as ComfyUI writes them, and the UNet that they decode to."""
    decoded = unets.make_unet("sd1")
    tensors, whole = {}, {}
    names = unets.ldm_names(unet)
    for name, t in unet.state_dict().items():
        key, owner = names[name], names[name].rpartition(".")[0]
        if t.dim() != 2:  # convolutions and vectors are stored as they are
            tensors[key] = whole[name] = t.half().float()
            continue
        scale = t.abs().max() / torch.finfo(dtype).max
        tensors[key] = (t / scale).to(dtype)
        whole[name] = tensors[key].float() * scale
        if form == "scaled_fp8":
            tensors |= {"scaled_fp8": torch.zeros(2, dtype=dtype), owner + ".scale_weight": scale.reshape(1), owner + ".scale_input": torch.ones(1)}
        else:
            quant = json.dumps({"format": "float8_e4m3fn" if dtype is torch.float8_e4m3fn else "float8_e5m2"})
            tensors |= {owner + ".weight_scale": scale, owner + ".comfy_quant": torch.tensor(list(quant.encode()), dtype=torch.uint8)}
    decoded.load_state_dict(whole)
    return tensors, decoded


@pytest.mark.parametrize("options", [{}, {"devices": "cpu:0,cpu:1", "mesh": "tensor=2"}, {"devices": "cpu:0,cpu:1", "placement": "gathered", "mesh": "batch=2"}])
@pytest.mark.parametrize("form", ["scaled_fp8", "comfy_quant"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scaled_fp8_gives_what_it_decodes_to_and_stays_fp8(unet_of, dtype, form, options, tmp_path):
    tensors, decoded = scaled_fp8(unet_of("sd1"), dtype, form)
    call = make_call(decoded)
    expected = reference(decoded, call)
    for prefix in ("model.diffusion_model.", ""):
        path = tmp_path / "model.safetensors"
        save_file({prefix + key: t.contiguous() for key, t in tensors.items()}, path)
        denoiser = denoiser_of(path, "sd1", **options)
        assert relative_error(denoiser(**call.inputs()), expected) <= ONE_DEVICE
        held, stored = denoiser.stats()["allocated_weight_bytes"], sum(t.nbytes for key, t in tensors.items() if key.endswith((".weight", ".bias")))
        assert sum(held) <= 1.5 * stored if options else stored <= held[0] <= 1.01 * stored
