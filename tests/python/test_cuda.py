"""On one GPU: what only a GPU can show. Skipped elsewhere; the tests of kernels (tests/backend) are parametrised over devices."""

import gc

import pytest
import torch
import unets
from unets import make_call, reference, relative_error

import comfytp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def denoiser_of(weights, family, **options):
    return comfytp.Denoiser(weights, **{"devices": "cuda:0", **unets.FAMILIES[family].heads, **options})


def moved(call):
    added = call.added and {name: tensor.cuda() for name, tensor in call.added.items()}
    tensors = {name: tensor if tensor is None else tensor.cuda() for name, tensor in vars(call).items() if name != "added"}
    return unets.Call(**tensors, added=added)


@pytest.mark.parametrize("height, width", [(72, 40), (17, 23)])
@pytest.mark.parametrize("batch, tokens", [(1, 77), (2, 154), (3, 231), (4, 77)])
def test_fp32_gives_diffusers_output(unet_of, family, batch, tokens, height, width):
    unet = unet_of(family)
    call = make_call(unet, batch, height, width, tokens)
    assert relative_error(denoiser_of(unet.state_dict(), family)(**call.inputs()), reference(unet, call)) <= 1e-4


@pytest.mark.parametrize("compute", list(DTYPES))
@pytest.mark.parametrize("height, width", [(72, 40), (17, 23), (64, 64)])
def test_half_precision_is_as_exact_as_pytorchs(unet_of, family, compute, height, width):
    dtype = DTYPES[compute]
    unet = unets.make_unet(family).to(dtype)
    call = make_call(unet, 2, height, width).to(dtype)
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    theirs = reference(unet.cuda(), moved(call))
    exact = reference(unet.float(), moved(call.to(torch.float32))).cpu()
    ours = denoiser_of(weights, family, compute=compute)(**moved(call).inputs())
    assert ours.is_cuda and ours.dtype == dtype
    assert relative_error(ours.cpu(), exact) <= 1.1 * relative_error(theirs.cpu(), exact)


def test_bits_repeat_and_the_current_device_stays(unet_of):
    unet = unet_of("sdxl")
    denoiser = denoiser_of(unet.state_dict(), "sdxl", compute="f16")
    inputs = moved(make_call(unet).to(torch.float16)).inputs()
    before = torch.cuda.current_device()
    first = denoiser(**inputs)
    assert all(torch.equal(first, denoiser(**inputs)) for _ in range(3))
    assert torch.cuda.current_device() == before


def test_500_calls_with_changing_shapes_and_prompts_leak_nothing(unet_of):
    unet = unet_of("sd1")
    denoiser = denoiser_of(unet.state_dict(), "sd1", compute="f16")
    calls = [moved(make_call(unet, batch, height, 40).to(torch.float16)).inputs() for batch in (1, 2) for height in (40, 56, 64)]

    def free_after(count):
        for i in range(count):
            inputs = dict(calls[i % len(calls)])
            inputs["context"] = inputs["context"] + i
            denoiser(**inputs)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    first = free_after(50)
    assert first - free_after(450) <= 4 << 20


def test_unloading_gives_the_memory_back_and_the_next_call_works(unet_of):
    unet = unet_of("sdxl")
    denoiser = denoiser_of(unet.state_dict(), "sdxl")
    inputs = make_call(unet).inputs()
    first = denoiser(**inputs)
    held = torch.cuda.mem_get_info()[0]
    denoiser.unload()
    assert torch.cuda.mem_get_info()[0] > held
    assert denoiser.stats()["allocated_weight_bytes"] == [0]
    assert torch.equal(first, denoiser(**inputs))


def test_a_limit_is_kept_and_the_error_says_what_was_needed(unet_of):
    denoiser = denoiser_of(unet_of("sdxl").state_dict(), "sdxl", devices="cuda:0@1MiB")
    with pytest.raises(comfytp.Error, match=r"\[memory\] cuda:0 needs [\d.]+ \wiB more, has .* in use and a limit of 1\.00 MiB"):
        denoiser.load()
    assert denoiser.stats()["allocated_weight_bytes"] == [0]


def test_a_gpu_that_is_not_there_is_named_with_those_that_are(unet_of):
    with pytest.raises(comfytp.Error, match=r"'cuda:63': there is no such device; devices here: .*cuda:0"):
        denoiser_of(unet_of("sd1").state_dict(), "sd1", devices="cuda:63")


def test_a_split_module_runs_where_its_inputs_lie():
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64), torch.nn.LayerNorm(64))
    x = torch.randn(3, 50, 64)
    expected = block(x)
    split = comfytp.split(block, devices="cuda:0")
    result = split(x.cuda())
    assert result.is_cuda
    assert relative_error(result.cpu(), expected) <= 1e-5


# ---- calls are queued on torch's current stream


def busy(seconds=0.2):
    """Work on the current stream, and an event behind it."""
    torch.cuda._sleep(int(seconds * 2e9))
    event = torch.cuda.Event()
    event.record()
    return event


@pytest.fixture
def half_sdxl(unet_of):
    unet = unets.make_unet("sdxl").half()
    return denoiser_of(unet.state_dict(), "sdxl", compute="f16"), moved(make_call(unet, 2, 32, 24).to(torch.float16)).inputs()


def test_a_call_is_in_the_order_of_the_current_stream_and_is_not_waited_for(half_sdxl):
    denoiser, inputs = half_sdxl
    expected = denoiser(**inputs) * 2
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        before = busy()
        x = inputs["x"].clone()  # not there before the work ahead is done
        result = denoiser(**{**inputs, "x": x}) * 2
        assert not before.query()
    torch.cuda.synchronize()
    assert torch.equal(result, expected)


def test_memory_that_is_freed_behind_a_call_is_not_given_away_too_early(half_sdxl):
    denoiser, inputs = half_sdxl
    expected = [denoiser(**{**inputs, "x": inputs["x"] + i}) for i in range(8)]
    busy()
    results = []
    for i in range(8):
        results.append(denoiser(**{**inputs, "x": inputs["x"] + i}).clone())  # neither the input nor the output outlives the line
        torch.full_like(inputs["x"], torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_prompt_is_known_by_its_tensors_or_their_content(half_sdxl):
    denoiser, inputs = half_sdxl

    def prologues(**changed):
        denoiser(**{**inputs, **changed})
        return denoiser.stats()["prologues"]

    first = prologues()
    before = busy()
    assert prologues() == first and not before.query(), "the same tensors need no look"
    assert prologues(context=inputs["context"].clone()) == first and before.query(), "equal content does"
    strided = torch.stack([inputs["context"], inputs["context"]], dim=-1)[..., 0]
    assert prologues(context=strided) == first
    with torch.inference_mode():
        assert prologues(context=inputs["context"].clone()) == first
    other = denoiser(**{**inputs, "context": inputs["context"] + 1})
    inputs["context"].add_(1)
    assert torch.equal(denoiser(**inputs), other), "a write is seen"
    changed = inputs["context"].clone()
    changed[-1, -1, -1] += 1
    assert prologues(context=changed) == first + 2


def test_a_result_may_be_the_next_calls_prompt():
    graph = comfytp.Graph()
    prompt = graph.add("linear", [graph.input("prompt", [4, 8], varies="prompt"), graph.weight("w", [8, 8])])
    graph.output("y", graph.add("add", [graph.input("x", [4, 8]), prompt]))
    engine = comfytp.Engine(graph, {"w": 2 * torch.eye(8)}, "cuda:0")
    x, first = torch.ones(4, 8, device="cuda"), torch.ones(4, 8, device="cuda")
    y = torch.empty(4, 8, device="cuda")
    engine.run({"x": x, "prompt": first}, out={"y": y})
    for expected in (3, 7, 15, 31):  # x + 2 prompt, written to where the prompt is read
        assert torch.equal(y, torch.full_like(y, expected))
        engine.run({"x": x, "prompt": y}, out={"y": y})


def test_cancelling_a_queued_call_makes_its_result_nan_and_is_told_once(half_sdxl):
    denoiser, inputs = half_sdxl
    expected = denoiser(**inputs)
    denoiser.synchronize()
    denoiser.cancel()  # of nothing
    busy()
    result = denoiser(**inputs)
    denoiser.cancel()
    with pytest.raises(comfytp.Cancelled):
        denoiser.synchronize()
    assert result.isnan().all()
    denoiser.check()
    assert torch.equal(denoiser(**inputs), expected)


def test_tensors_elsewhere_are_refused(half_sdxl):
    denoiser, inputs = half_sdxl
    if torch.cuda.device_count() > 1:
        with pytest.raises(comfytp.Error, match="on the same"):
            denoiser(**{**inputs, "x": inputs["x"].to("cuda:1")})


# ---- f16's range


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("module, shapes, scale", [
    (torch.nn.GroupNorm(8, 64), [(2, 64, 24, 24)], 2e4),
    (torch.nn.LayerNorm(64), [(2, 33, 64)], 2e4),
    (Attention(), [(2, 4, 96, 64)] * 3, 180.0),  # logits of 1e5 and more
    (torch.nn.Sequential(torch.nn.SiLU(), torch.nn.GroupNorm(8, 64)), [(2, 64, 24, 24)], 1.2e4),
])  # fmt: skip
def test_large_activations_are_computed_in_fp32(module, shapes, scale):
    torch.manual_seed(0)
    inputs = [(torch.randn(shape).clamp(-3, 3) * scale).half() for shape in shapes]
    expected = module(*[x.float() for x in inputs])
    result = comfytp.split(module.half(), devices="cuda:0")(*[x.cuda() for x in inputs])
    assert relative_error(result.float().cpu(), expected) <= 2e-3


class Square(torch.nn.Module):
    def forward(self, x):
        return x * x


@pytest.mark.filterwarnings("error")
def test_what_leaves_the_range_of_f16_is_told():
    split = comfytp.split(Square(), devices="cuda:0")
    split(torch.ones(2, 5, 64, device="cuda").half())
    split.synchronize()
    large = torch.full((2, 5, 64), 6e4, device="cuda")
    busy()  # it is told when it is known
    result = split(large.half())
    with pytest.warns(RuntimeWarning, match="range of f16"):
        split.synchronize()
    assert result.isinf().all()
    split.synchronize()
    assert torch.equal(split(large), large * large)


# ---- products in fp8


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no fp8 here")
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_products_in_fp8_are_a_few_hundredths_off_and_keep_weights_as_they_are(dtype, stored):
    graph = comfytp.Graph()
    x = graph.input("x", [2, 200, 512], dtype)
    for i in range(3):
        x = graph.add("linear", [x, graph.weight(f"{i}", [512, 512], dtype)])
    graph.output("y", x)
    torch.manual_seed(0)
    weights = {f"{i}": (torch.randn(512, 512) / 512**0.5).to(stored) for i in range(3)}
    call = {"x": torch.randn(2, 200, 512, device="cuda", dtype=torch.half if dtype == "f16" else torch.bfloat16)}
    call["x"][0, 0, 0] = 300  # one that is far larger than the others
    decoded, fp8 = (comfytp.Engine(graph, weights, "cuda:0", compute=compute) for compute in (None, "fp8"))
    expected, result = decoded(**call)["y"], fp8(**call)["y"]
    assert 0.005 <= relative_error(result.float(), expected.float()) <= 0.08
    assert torch.equal(fp8(**call)["y"], result)
    assert fp8.stats()["allocated_weight_bytes"] == [3 * 512 * 512]
    call["x"][1, 3, 5] = float("nan")
    with pytest.warns(RuntimeWarning):
        assert fp8(**call)["y"].isnan().all()
        fp8.synchronize()


@pytest.mark.parametrize(("rows", "outputs"), [(200, 512), (77, 100), (64, 33)])  # side by side in steps of their own size, and of more
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_linears_of_one_x_give_what_each_gives(dtype, rows, outputs):
    graph, names = comfytp.Graph(), ("q", "k", "v")
    x = graph.input("x", [2, rows, 256], dtype)
    for name in names:
        graph.output(name, graph.add("linear", [x, graph.weight(name, [outputs, 256], dtype)]))
    torch.manual_seed(0)
    kind = {"f32": torch.float32, "f16": torch.half, "bf16": torch.bfloat16}[dtype]
    weights = {name: (torch.randn(outputs, 256) / 16).to(kind) for name in names}
    engine = comfytp.Engine(graph, weights, "cuda:0")
    x = torch.randn(2, rows, 256, device="cuda", dtype=kind)
    for result in (engine(x=x), engine(x=x)):
        for name in names:
            expected = torch.nn.functional.linear(x.double(), weights[name].cuda().double())
            assert relative_error(result[name].double(), expected) <= {"f32": 1e-5, "f16": 1e-3, "bf16": 5e-3}[dtype]


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no fp8 here")
def test_linears_of_one_x_round_it_once_and_give_what_each_gives_alone():
    def of(names, weights):
        graph = comfytp.Graph()
        x = graph.input("x", [2, 200, 512], "bf16")
        for name in names:
            y = graph.add("linear", [x, graph.weight(name, list(weights[name].shape), "bf16")])
            graph.output(name, y if name != "k" else graph.add("add", [y, graph.weight("bias", [256], "bf16")]))
        return comfytp.Engine(graph, weights, "cuda:0", compute="fp8")

    torch.manual_seed(0)
    sizes = {"q": 512, "k": 256, "v": 256, "odd": 24}
    weights = {name: (torch.randn(size, 512) / 512**0.5).to(torch.float8_e4m3fn) for name, size in sizes.items()} | {"bias": torch.randn(256)}
    call = {"x": torch.randn(2, 200, 512, device="cuda", dtype=torch.bfloat16)}
    together = of(sizes, weights)(**call)
    for name in sizes:
        assert torch.equal(together[name], of([name], weights)(**call)[name]), name


def test_few_rows_and_odd_sizes_are_decoded():
    graph = comfytp.Graph()
    graph.output("few", graph.add("linear", [graph.input("x", [2, 64], "f16"), graph.weight("a", [32, 64], "f16")]))
    graph.output("odd", graph.add("linear", [graph.input("z", [64, 50], "f16"), graph.weight("b", [30, 50], "f16")]))
    torch.manual_seed(0)
    weights = {"a": torch.randn(32, 64).to(torch.float8_e4m3fn), "b": torch.randn(30, 50).to(torch.float8_e4m3fn)}
    call = {"x": torch.randn(2, 64, device="cuda").half(), "z": torch.randn(64, 50, device="cuda").half()}
    decoded, fp8 = (comfytp.Engine(graph, weights, "cuda:0", compute=compute)(**call) for compute in (None, "fp8"))
    assert all(torch.equal(decoded[name], fp8[name]) for name in decoded)


# ---- several GPUs

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA devices here")


@two_gpus
@pytest.mark.parametrize("mesh", ["tensor=2", "patch=2", "batch=2"])
@pytest.mark.parametrize("place", ["cuda:0", "cuda:1"])
def test_two_gpus_take_the_tensors_of_one(half_sdxl, place, mesh):
    unet = unets.make_unet("sdxl").half()
    both = denoiser_of(unet.state_dict(), "sdxl", devices="cuda:0,cuda:1", mesh=mesh, compute="f16")
    denoiser, inputs = half_sdxl
    expected = [denoiser(**{**inputs, "x": inputs["x"] * scale}).cpu() for scale in (1, 0.5, 0.25)]
    inputs = {name: tensor.to(place) for name, tensor in inputs.items() if tensor is not None}
    both(**{**inputs, "x": inputs["x"] * 1})  # torch too makes ready, for which it waits
    both.synchronize()
    current = torch.cuda.current_device()
    with torch.cuda.device(place):
        before = busy()
    results = [both(**{**inputs, "x": inputs["x"] * scale}) for scale in (1, 0.5, 0.25)]
    assert not before.query() and torch.cuda.current_device() == current
    assert all(str(result.device) == place for result in results)
    assert all(relative_error(a.cpu().float(), b.float()) <= 5e-3 for a, b in zip(results, expected, strict=True))
    on_host = both(**{name: tensor.cpu() for name, tensor in inputs.items()})
    assert torch.equal(on_host, both(**inputs).cpu())


@two_gpus
@pytest.mark.parametrize("mesh", ["tensor=2", "patch=2", "batch=2"])
@pytest.mark.parametrize("place", ["cuda:0", "cuda:1"])
def test_one_result_may_lie_on_a_gpu_and_another_in_the_hosts_memory(place, mesh):
    graph = comfytp.Graph()
    w = graph.weight("w", [64, 64])
    for name in ("a", "b"):
        graph.output(f"{name}_out", graph.add("linear", [graph.input(name, [2, 32, 64]), w]))
    engine = comfytp.Engine(graph, {"w": 2 * torch.eye(64)}, "cuda:0,cuda:1", mesh)
    a, b = torch.randn(2, 32, 64, device=place), torch.randn(2, 32, 64, device=place)
    out = {"a_out": torch.empty(2, 32, 64, device=place), "b_out": torch.empty(2, 32, 64)}
    engine.run({"a": a, "b": b}, out=out)
    assert relative_error(out["a_out"].cpu(), 2 * a.cpu()) <= 1e-6 and relative_error(out["b_out"], 2 * b.cpu()) <= 1e-6
    for name in ("a", "b"):
        with pytest.warns(RuntimeWarning, match="infinities"):
            engine.run({"a": a, "b": b, name: torch.full_like(a, torch.inf)}, out=out)


@two_gpus
def test_a_time_out_of_a_queued_call_makes_its_result_nan_and_is_told_once(half_sdxl):
    unet = unets.make_unet("sdxl").half()
    both = denoiser_of(unet.state_dict(), "sdxl", devices="cuda:0,cuda:1", compute="f16", timeout=0.05)
    inputs = {name: tensor for name, tensor in half_sdxl[1].items() if tensor is not None}
    expected = both(**inputs)
    both.synchronize()
    a = torch.randn(12288, 12288, device="cuda:1")
    for _ in range(6):
        b = a @ a  # all of cuda:1, for longer than the time-out
    result = both(**inputs)
    with pytest.raises(comfytp.Timeout, match=r"cuda:\d waited 0.05 s for cuda:\d"):
        both.synchronize()
    assert result.isnan().all()
    del b
    torch.cuda.synchronize("cuda:1")
    assert torch.equal(both(**inputs), expected)
