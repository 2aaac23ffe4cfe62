"""Arrays go in from where they lie and come back in the caller's kind."""

import sys

import numpy as np
import pytest
import torch
from unets import make_call, make_unet, relative_error

import comfytp
from comfytp._arrays import Contents

COUNT = 6 * 8


def affine(dtype="f32"):
    """y = w x + 1"""
    graph = comfytp.Graph()
    product = graph.add("linear", [graph.input("x", [6, 8], dtype), graph.weight("w", [8, 8], dtype)])
    graph.output("y", graph.add("add", [product, graph.constant(np.ones(1, np.float32), dtype)]))
    return graph


WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
VALUES = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


def torch_views():
    """The same values in every way that memory can hold them."""
    wide = torch.zeros(6, 2, 8, 3)
    wide[:, 1, :, 2] = VALUES
    offset = torch.zeros(100)
    offset[7 : 7 + COUNT] = VALUES.flatten()
    return {
        "contiguous": VALUES.clone(),
        "transposed": VALUES.T.contiguous().T,
        "strided": wide[:, 1, :, 2],
        "offset": offset[7 : 7 + COUNT].view(6, 8),
        "a parameter": torch.nn.Parameter(VALUES.clone()),
    }


def numpy_views():
    values = VALUES.numpy()
    read_only = values.copy()
    read_only.flags.writeable = False
    return {
        "contiguous": values.copy(),
        "Fortran": np.asfortranarray(values),
        "reversed": values[::-1, ::-1].copy()[::-1, ::-1],
        "strided": np.repeat(np.repeat(values, 3, 0), 2, 1)[::3, ::2],
        "read-only": read_only,
    }


@pytest.mark.parametrize("name", torch_views())
def test_torch_tensors_of_any_strides_go_in_and_torch_comes_out(name):
    x = torch_views()[name]
    y = comfytp.Engine(affine(), {"w": WEIGHT})(x=x)["y"]
    assert isinstance(y, torch.Tensor) and y.dtype == torch.float32
    assert relative_error(y, VALUES @ WEIGHT.T + 1) < 1e-6
    y += 1  # it is the caller's own


@pytest.mark.parametrize("name", numpy_views())
def test_numpy_arrays_of_any_strides_go_in_and_numpy_comes_out(name):
    x = numpy_views()[name]
    y = comfytp.Engine(affine(), {"w": WEIGHT.numpy()})(x=x)["y"]
    assert isinstance(y, np.ndarray) and y.dtype == np.float32
    assert relative_error(y, VALUES @ WEIGHT.T + 1) < 1e-6
    y += 1


def test_torch_counts_what_the_engine_writes():
    engine = comfytp.Engine(affine(), {"w": WEIGHT})
    y = torch.empty(6, 8)
    for _ in range(2):
        before = y._version
        engine.run({"x": VALUES}, out={"y": y})
        assert y._version > before
    with torch.inference_mode():
        assert relative_error(engine(x=VALUES)["y"], y) == 0
        engine.run({"x": VALUES}, out={"y": torch.empty(6, 8)})


@pytest.mark.parametrize("views", [torch_views, numpy_views])
def test_weights_of_any_strides(views):
    for name, values in views().items():
        graph = comfytp.Graph()
        graph.output("y", graph.add("linear", [graph.input("x", [4, 8]), graph.weight("w", [6, 8])]))
        for devices in ("cpu:0", "cpu:0,cpu:1"):
            y = comfytp.Engine(graph, {"w": values}, devices)(x=torch.eye(8)[:4])["y"]
            assert torch.allclose(y, VALUES.T[:4]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_inputs_of_any_floating_dtype(dtype):
    x = VALUES.to(dtype)
    y = comfytp.Engine(affine(), {"w": WEIGHT})(x=x)["y"]
    assert relative_error(y, x.float() @ WEIGHT.T + 1) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_outputs_are_written_where_the_caller_says(dtype):
    out = torch.zeros(8, 6, 2, dtype=dtype)[:, :, 1].T
    engine = comfytp.Engine(affine(), {"w": WEIGHT})
    results = engine.run({"x": VALUES}, out={"y": out})
    assert results["y"] is out
    assert torch.equal(out, engine(x=VALUES)["y"].to(dtype))


def test_numpy_gets_f32_where_it_lacks_the_dtype():
    y = comfytp.Engine(affine("bf16"), {"w": WEIGHT})(x=VALUES.numpy())["y"]
    assert y.dtype == np.float32
    y = comfytp.Engine(affine("bf16"), {"w": WEIGHT})(x=VALUES)["y"]
    assert y.dtype == torch.bfloat16


class Foreign:
    """An array of a library that the package has never heard of."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_any_library_that_speaks_dlpack_will_do():
    y = comfytp.Engine(affine(), {"w": Foreign(WEIGHT.numpy())})(x=Foreign(VALUES.numpy()))["y"]
    for take in (np.from_dlpack, torch.from_dlpack, np.asarray):
        assert relative_error(take(y), VALUES @ WEIGHT.T + 1) < 1e-6


def test_weights_live_as_long_as_the_engine():
    engine = comfytp.Engine(affine(), {"w": WEIGHT.clone()})
    rubbish = [torch.full((8, 8), 7.0) for _ in range(64)]
    y = engine(x=VALUES)["y"]
    engine.unload()
    assert torch.equal(engine(x=VALUES)["y"], y)
    del rubbish


def test_weights_are_let_go_with_the_engine():
    array = WEIGHT.numpy().copy()
    before = sys.getrefcount(array)
    engine = comfytp.Engine(affine(), {"w": array}, "cpu:0,cpu:1")
    engine(x=VALUES)
    assert sys.getrefcount(array) > before
    del engine
    assert sys.getrefcount(array) == before


def test_inputs_are_let_go_after_a_call():
    x = VALUES.numpy().copy()
    engine = comfytp.Engine(affine(), {"w": WEIGHT})
    engine(x=x)
    before = sys.getrefcount(x)
    y = engine(x=x)["y"]
    assert (sys.getrefcount(x), sys.getrefcount(y)) == (before, sys.getrefcount(object()) + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_denoiser_answers_in_the_dtype_of_x(unet_of, dtype):
    unet = unet_of("sd1")
    call = make_call(unet)
    denoiser = comfytp.Denoiser(unet.state_dict())
    exact = denoiser(call.x.to(dtype).float(), call.timesteps, call.context)
    output = denoiser(call.x.to(dtype), call.timesteps, call.context)
    assert output.dtype == dtype
    assert torch.equal(output, exact.to(dtype))


def test_timesteps_come_as_they_come(unet_of):
    unet = unet_of("sd1")
    call = make_call(unet)
    denoiser = comfytp.Denoiser(unet.state_dict())
    expected = denoiser(call.x, torch.tensor([500.0, 500.0]), call.context)
    for timesteps in (500, 500.0, torch.tensor(500), torch.tensor([500]), np.array([500, 500]), torch.tensor([500.0]).expand(2),
                      torch.tensor([500, 500], dtype=torch.int32), torch.tensor([500, 500], dtype=torch.float16)):
        assert torch.equal(denoiser(call.x, timesteps, call.context), expected), timesteps


X = torch.zeros(6, 8)


@pytest.mark.parametrize(
    "inputs, says",
    [
        ({}, ["x"]),
        ({"x": X, "z": X}, ["z"]),
        ({"x": torch.zeros(6, 9)}, ["x", "[6,8]", "[6,9]"]),
        ({"x": torch.zeros(6)}, ["x", "[6,8]", "[6]"]),
        ({"x": [[1.0]]}, ["input 'x'", "list"]),
        ({"x": None}, ["input 'x'", "NoneType"]),
        ({"x": torch.zeros(6, 8, dtype=torch.complex64)}, ["input 'x'", "dtype"]),
        ({"x": torch.zeros(6, 8, dtype=torch.int64)}, ["x", "i64"]),
        ({"x": torch.zeros(6, 8, device="meta")}, ["input 'x'"]),
    ],
)
def test_wrong_inputs_are_named(inputs, says):
    engine = comfytp.Engine(affine(), {"w": WEIGHT}, "cpu:0,cpu:1")
    with pytest.raises(comfytp.Error) as error:
        engine.run(inputs)
    assert all(part in str(error.value) for part in says) and "\n" not in str(error.value)
    assert engine(x=VALUES)["y"].shape == (6, 8)


@pytest.mark.parametrize(
    "out, says",
    [
        ({"y": torch.zeros(6, 9)}, ["y", "[6,8]", "[6,9]"]),
        ({"y": torch.zeros(6, 8, dtype=torch.int32)}, ["y", "i32"]),
        ({"y": torch.zeros(6, 8), "z": X}, ["z"]),
        ({"y": numpy_views()["read-only"]}, ["output 'y'", "written"]),
        ({"y": "y"}, ["output 'y'", "str"]),
    ],
)
def test_wrong_outputs_are_named(out, says):
    engine = comfytp.Engine(affine(), {"w": WEIGHT})
    with pytest.raises(comfytp.Error) as error:
        engine.run({"x": X}, out=out)
    assert all(part in str(error.value) for part in says)


@pytest.mark.parametrize(
    "weights, says",
    [
        ({}, ["'w'", "mapping"]),
        ({"w": torch.zeros(8, 9)}, ["w", "[8,8]", "[8,9]"]),
        ({"w": 3}, ["weight 'w'", "int"]),
        ({1: WEIGHT}, ["str", "int"]),
        (3, ["mapping", "int"]),
        ("no/such/file.safetensors", ["no/such/file.safetensors"]),
    ],
)
def test_wrong_weights_are_named(weights, says):
    with pytest.raises(comfytp.Error) as error:
        comfytp.Engine(affine(), weights)(x=X)
    assert all(part in str(error.value) for part in says)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"devices": ""}, ["device"]),
        ({"devices": "cpu:0,,cpu:1"}, ["cpu:0,,cpu:1"]),
        ({"devices": "cpu:-1"}, ["cpu:-1"]),
        ({"devices": ["cpu:0", "cuda:7"]}, ["cuda:7"]),
        ({"devices": "cpu:0,cpu:1", "mesh": "tensor=3"}, ["3", "2"]),
        ({"mesh": "width=1"}, ["width"]),
        ({"placement": "everywhere"}, ["everywhere"]),
        ({"timeout": -1}, ["-1"]),
    ],
)
def test_wrong_arguments_are_named(change, says):
    with pytest.raises(comfytp.Error) as error:
        comfytp.Engine(affine(), {"w": WEIGHT}, **change)
    assert all(part in str(error.value) for part in says)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"x": torch.zeros(2, 5, 16, 16)}, ["x", "5"]),
        ({"x": torch.zeros(4, 16, 16)}, ["x", "[4, 16, 16]"]),
        ({"x": None}, ["x", "None"]),
        ({"context": None}, ["context", "None"]),
        ({"timesteps": torch.zeros(3)}, ["timesteps", "[3]"]),
        ({"context": torch.zeros(2, 77, 47)}, ["context", "47"]),
        ({"context": torch.zeros(3, 77, 48)}, ["context", "3"]),
        ({"y": torch.zeros(2, 8)}, ["y"]),
        ({"control": {"down": []}}, ["control", "middle"]),
        ({"control": {"down": [], "middle": torch.zeros(2, 128, 2, 2)}}, ["control.0"]),
        ({"control": {"up": []}}, ["control", "up"]),
    ],
)
def test_wrong_inputs_of_the_denoiser_are_named(unet_of, change, says):
    inputs = {"x": torch.zeros(2, 4, 16, 16), "timesteps": torch.zeros(2), "context": torch.zeros(2, 77, 48)}
    with pytest.raises(comfytp.Error) as error:
        comfytp.Denoiser(unet_of("sd1").state_dict())(**{**inputs, **change})
    assert all(part in str(error.value) for part in says)


def test_what_is_no_diffusion_model_is_refused():
    with pytest.raises(comfytp.Error, match="not a diffusion model"):
        comfytp.Denoiser({"embedding.weight": torch.zeros(8, 8)})
    state = make_unet("sd1").state_dict()
    del state["mid_block.resnets.0.conv1.weight"]
    with pytest.raises(comfytp.Error, match="mid_block.resnets.0.conv1.weight|middle_block.0.in_layers.2.weight"):
        comfytp.Denoiser(state)


def test_a_second_openmp_in_the_process_does_no_harm():
    """torch brings its own; its results and its number of threads are its own before and after."""
    threads, x = torch.get_num_threads(), torch.randn(64, 64)
    before = x @ x
    comfytp.Engine(affine(), {"w": WEIGHT}, "cpu:0,cpu:1")(x=VALUES)
    assert torch.get_num_threads() == threads
    assert torch.equal(x @ x, before)


def test_a_tensors_number_changes_with_every_write_that_torch_counts():
    contents = Contents()
    x = torch.zeros(4, 4)
    first = contents.number(x)
    assert first == contents.number(x) != 0
    numbers = {first}
    for write in (lambda: x.add_(1), lambda: x[0].zero_(), lambda: x.copy_(torch.ones(4, 4)), lambda: setattr(x, "data", torch.ones(4, 4))):
        write()
        numbers.add(contents.number(x))
    assert len(numbers) == 5
    assert contents.number(x.clone()) not in numbers, "another tensor of equal content"
    with torch.inference_mode():
        assert contents.number(torch.zeros(2)) == 0


def test_numbers_of_tensors_that_are_gone_are_not_given_again():
    contents = Contents()
    numbers = [contents.number(torch.zeros(2)) for _ in range(50)]  # the next lies where the last did
    assert len(set(numbers)) == 50
    assert not contents._known
