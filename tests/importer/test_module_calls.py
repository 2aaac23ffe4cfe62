"""What a module that was split promises around its forward: when it captures, and when it falls back."""

import dataclasses
import logging
import threading
import warnings

import comfytp
import pytest
import torch
import torch.fx.config
from comfytp.importer import calls as importer_calls
from comfytp.importer import module as importer_module
from small_module import Small, module, own_cache, same, x_of  # noqa: F401  fixtures among them


def test_arguments_are_the_same_however_they_are_given(module):
    split = comfytp.split(module)
    x, context = x_of(), x_of(2, 5, 8, seed=1)
    ways = [((x, context), {}), ((x,), {"context": context}), ((), {"context": context, "x": x}), ((), {"x": x, "context": context})]
    ways += [((x, None), {}), ((x,), {"context": None}), ((), {"context": None, "x": x})]
    for _ in range(3):
        for args, kwargs in ways:
            same(split(*args, **kwargs), module(*args, **kwargs))
    with pytest.raises(TypeError, match="multiple values"):
        split(x, x=x)
    assert split.engine_stats()["captures"] == 2


def test_one_capture_serves_all_calls_of_a_shape(module):
    split = comfytp.split(module)
    same(split(x_of()), module(x_of()))
    same(split(x=x_of(seed=1)), module(x_of(seed=1)))
    same(split(x_of(seed=2).transpose(0, 1).contiguous().transpose(0, 1)), module(x_of(seed=2)))
    stats = split.engine_stats()
    assert stats["captures"] == 1 and stats["engine_calls"] == 3 and stats["torch_fallbacks"] == 0


def test_other_shapes_and_optional_inputs_are_captures_of_their_own_over_the_same_weights(module):
    split = comfytp.split(module)
    split(x_of())
    uploaded = split.engine_stats()["uploaded_bytes"]
    assert uploaded > 0
    for call in ({"x": x_of(1, 5, 8)}, {"x": x_of(), "context": x_of(2, 4, 8)}, {"x": x_of()}):
        same(split(**call), module(**call))
    stats = split.engine_stats()
    assert stats["captures"] == 3
    assert stats["uploaded_bytes"] == uploaded


@pytest.mark.parametrize("kind", ["dict", "named"])
def test_result_has_the_structure_of_the_modules(module, kind):
    result, expected = comfytp.split(module)(x_of(), kind=kind), module(x_of(), kind=kind)
    assert type(result) is type(expected)
    same(result, expected)


def test_captures_are_kept_on_disk(module, own_cache):
    comfytp.split(module)(x_of())
    assert len(list(own_cache.iterdir())) == 1
    again = comfytp.split(Small())
    same(again(x_of(seed=1)), module(x_of(seed=1)))
    assert again.engine_stats()["captures"] == 0


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: data.replace(b"linear", b"lineal")])
def test_damaged_capture_is_made_anew(module, own_cache, damage):
    comfytp.split(module)(x_of())
    (file,) = own_cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    again = comfytp.split(module)
    same(again(x_of()), module(x_of()))
    assert again.engine_stats()["captures"] == 1
    third = comfytp.split(module)
    third(x_of())
    assert third.engine_stats()["captures"] == 0


def test_module_with_another_attribute_is_another_module():
    comfytp.split(Small())(x_of())
    other = Small(epsilon=0.5)
    split = comfytp.split(other)
    same(split(x_of()), other(x_of()))
    assert split.engine_stats()["captures"] == 1


def test_without_a_cache_folder_nothing_is_written(module, own_cache, monkeypatch):
    monkeypatch.setenv("COMFYTP_CACHE", "")
    comfytp.split(module)(x_of())
    assert not own_cache.exists()


def test_number_that_changes_becomes_an_input(module):
    split = comfytp.split(module)
    for scale in (1.0, 2.0, 3.5, 0.25, 7.0, 1.0):
        same(split(x_of(), scale=scale), module(x_of(), scale=scale))
    assert split.engine_stats()["captures"] == 2


def test_number_of_the_step_is_an_input_from_the_start(module):
    split = comfytp.split(module)
    for steps in (1, 2, 900):
        same(split(x_of(), steps=steps, kind="named"), module(x_of(), steps=steps, kind="named"))
    assert split.engine_stats()["captures"] == 1


def test_number_that_decides_is_captured_a_few_times_and_then_left_to_torch(module):
    split = comfytp.split(module)
    with pytest.warns(UserWarning, match="scale") as warned:
        for scale in range(10):
            same(split(x_of(), scale=float(scale), kind="branch"), module(x_of(), scale=float(scale), kind="branch"))
    assert len([w for w in warned if "comfytp" in str(w.message)]) == 1
    stats = split.engine_stats()
    assert stats["captures"] == 4 and stats["torch_fallbacks"] == 6


def test_contents_that_decide_are_part_of_the_key(module):
    split = comfytp.split(module)
    for length in (2, 3, 2):
        mask = torch.arange(3) < length
        same(split(x_of(), mask=mask, kind="mask"), module(x_of(), mask=mask, kind="mask"))
    stats = split.engine_stats()
    assert stats["captures"] == 2 and stats["torch_fallbacks"] == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_mask_that_hides_nothing_is_left_out(module, dtype):
    split = comfytp.split(module)
    for hidden in (0, 1, 0, 2):
        mask = (torch.arange(3) < torch.tensor([[3 - hidden], [3]])).to(dtype)
        same(split(x_of(), mask=mask, kind="attend"), module(x_of(), mask=mask, kind="attend"))
        attention = next(line for line in split._calls.last.program.graph.splitlines() if "= attention(" in line)
        assert attention.partition(")")[0].count("%") == (5 if hidden else 4), attention  # the result, queries, keys, values and a mask
    stats = split.engine_stats()
    assert stats["captures"] == 2 and stats["torch_fallbacks"] == 0


def test_masks_that_hide_nothing_count_for_no_variants(module):
    split = comfytp.split(module)
    for steps in (1, 2, 3):
        for hidden in (0, 1):
            mask = torch.arange(3) < torch.tensor([[3 - hidden], [3]])
            same(split(x_of(), mask=mask, steps=steps, kind="attend"), module(x_of(), mask=mask, steps=steps, kind="attend"))
    assert split.engine_stats()["torch_fallbacks"] == 0


def test_masks_on_a_gpu_that_are_new_in_every_call_are_not_waited_for(module, monkeypatch):
    read = []
    real = importer_calls.content_hash
    monkeypatch.setattr(importer_calls, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(importer_calls, "content_hash", lambda tensor: read.append(tensor) or real(tensor))
    split = comfytp.split(module)
    masks = [torch.ones(2, 3, dtype=torch.bool) for _ in range(12)]
    for mask in masks:
        same(split(x_of(), mask=mask, kind="attend"), module(x_of(), mask=mask, kind="attend"))
    assert sum(any(tensor is mask for tensor in read) for mask in masks) <= 5


def test_forward_that_cannot_be_hashed_is_called(module):
    class Forward:
        __hash__ = None

        def __call__(self, x):
            return type(module).forward(module, x)

    module.forward = Forward()
    try:
        same(comfytp.split(module)(x_of()), module(x_of()))
    finally:
        del module.forward


def test_mask_on_a_gpu_is_read_once_as_long_as_nothing_is_written_to_it(module, monkeypatch):
    read = []
    real = importer_calls.content_hash
    monkeypatch.setattr(importer_calls, "on_gpu", lambda tensor: True)
    split = comfytp.split(module)
    mask = torch.arange(3) < 2
    same(split(x_of(), mask=mask, kind="mask"), module(x_of(), mask=mask, kind="mask"))
    monkeypatch.setattr(importer_calls, "content_hash", lambda tensor: read.append(tensor) or real(tensor))
    same(split(x_of(), mask=mask, kind="mask"), module(x_of(), mask=mask, kind="mask"))
    assert not read
    for length in (3, 1, 2):
        mask.copy_(torch.arange(3) < length)
        same(split(x_of(), mask=mask, kind="mask"), module(x_of(), mask=mask, kind="mask"))
        same(split(x_of(), mask=mask.clone(), kind="mask"), module(x_of(), mask=mask, kind="mask"))
    assert any(tensor is mask for tensor in read) and any(tensor is not mask for tensor in read)
    assert split.engine_stats()["captures"] == 3


def test_unknown_op_is_named_in_one_warning_and_run_by_torch(module):
    split = comfytp.split(module)
    with pytest.warns(UserWarning, match=r"Small runs in PyTorch, not split: op aten.sort") as warned:
        for seed in range(3):
            same(split(x_of(seed=seed), kind="sort"), module(x_of(seed=seed), kind="sort"))
    assert len([w for w in warned if "comfytp" in str(w.message)]) == 1
    same(split(x_of()), module(x_of()))
    stats = split.engine_stats()
    assert stats["torch_fallbacks"] == 3 and stats["engine_calls"] == 1


class Broken:
    """Programs on a device that fails while they are made for it."""

    def __init__(self, programs, error):
        self._programs, self.error = programs, error

    def compile(self, *args):
        if self.error:
            raise self.error
        return self._programs.compile(*args)

    def __getattr__(self, name):
        return getattr(self._programs, name)


@pytest.mark.parametrize("error", [comfytp.OutOfMemory("cuda:0: linear: out of memory"), comfytp.DeviceFailure("cuda:0: linear: [cuda] it broke")], ids=lambda e: type(e).__name__)
def test_device_that_fails_is_no_module_that_cannot_be_captured(module, monkeypatch, error):
    real, made = importer_module._core.Programs, []
    monkeypatch.setattr(importer_module._core, "Programs", lambda *args: made.append(Broken(real(*args), error)) or made[-1])
    split = comfytp.split(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(type(error), match=str(error).replace("[", r"\[")):
                split(x_of())
        for programs in made:
            programs.error = None
        same(split(x_of()), module(x_of()))
    stats = split.engine_stats()
    assert stats["torch_fallbacks"] == 0 and stats["captures"] == 1


def test_kernel_that_is_not_there_leaves_the_call_to_torch(module, monkeypatch):
    real = importer_module._core.Programs
    monkeypatch.setattr(importer_module._core, "Programs", lambda *args: Broken(real(*args), comfytp.Error("[linear] cuda:0 has no kernel for this op")))
    split = comfytp.split(module)
    with pytest.warns(UserWarning, match="runs in PyTorch, not split: .* has no kernel"):
        same(split(x_of()), module(x_of()))


def test_call_that_cannot_be_captured_is_not_tried_for_ever(module, monkeypatch):
    tried = []
    real = importer_calls.import_call
    monkeypatch.setattr(importer_calls, "import_call", lambda *args: tried.append(args) or real(*args))
    split = comfytp.split(module)
    with pytest.warns(UserWarning, match=r"op aten.sort") as warned:
        for scale in range(10):
            same(split(x_of(), scale=scale, kind="sort"), module(x_of(), scale=scale, kind="sort"))
    assert len(tried) == 4 and len([w for w in warned if "comfytp" in str(w.message)]) == 1


def test_op_with_arguments_that_its_translation_does_not_know_is_run_by_torch(module):
    with pytest.warns(UserWarning, match="op aten.native_dropout.default is not supported as it is used in"):
        same(comfytp.split(module)(x_of(), kind="drop"), module(x_of(), kind="drop"))


def test_module_that_cannot_be_copied_is_run_by_torch(module):
    module.guard = threading.Lock()
    with pytest.warns(UserWarning, match="cannot be captured: TypeError"):
        same(comfytp.split(module)(x_of()), module(x_of()))


def test_capture_writes_to_no_argument(module):
    class Writing(Small):
        def forward(self, x, ids):
            ids += 1
            return super().forward(x)[: int(ids.sum())]

    ids = torch.tensor([1, 2])
    with pytest.warns(UserWarning, match="writes to its input"):
        comfytp.split(Writing())(x_of(), ids)
    assert ids.tolist() == [2, 3]


def test_argument_of_an_unknown_class_is_named(module):
    with pytest.warns(UserWarning, match="argument kind is a object"):
        same(comfytp.split(module)(x_of(), kind=object()), module(x_of()))


def test_call_for_gradients_is_left_to_torch(module):
    x = x_of().requires_grad_()
    with pytest.warns(UserWarning, match="gradients"):
        comfytp.split(module)(x).sum().backward()
    assert x.grad is not None


def test_call_in_autocast_is_left_to_torch(module):
    with pytest.warns(UserWarning, match="autocast"), torch.autocast("cpu", dtype=torch.bfloat16):
        same(comfytp.split(module)(x_of()), module(x_of()))


def test_inputs_of_the_prompt_run_once():
    class Prompted(Small):
        def forward(self, x, context):
            return super().forward(x) + self.up(context).mean((1, 2), keepdim=True)

    module = Prompted()
    split = comfytp.split(module, "cpu:0")
    for seed in range(4):
        same(split(x_of(seed=seed), x_of(2, 5, 8)), module(x_of(seed=seed), x_of(2, 5, 8)))
    assert split.engine_stats()["prologues"] == 1
    same(split(x_of(), x_of(2, 5, 8, seed=1)), module(x_of(), x_of(2, 5, 8, seed=1)))
    assert split.engine_stats()["prologues"] == 2
    named = comfytp.split(module, "cpu:0", prompt_inputs=["x"])
    for seed in range(3):
        same(named(x_of(), x_of(2, 5, 8, seed=seed)), module(x_of(), x_of(2, 5, 8, seed=seed)))
    assert named.engine_stats()["prologues"] == 1


@pytest.mark.parametrize("what", [None, "model.safetensors", lambda x: x])
def test_only_modules_are_split(what):
    with pytest.raises(comfytp.Error, match="expected a torch.nn.Module but got a"):
        comfytp.split(what)


def test_changed_weights_are_used(module):
    split = comfytp.split(module)
    split(x_of())
    module.up.weight.mul_(2)
    same(split(x_of()), module(x_of()))
    split.load_state_dict({name: p * 0.5 for name, p in module.state_dict().items()})
    same(split(x_of()), module(x_of()))
    module.down = torch.nn.Linear(32, 8).requires_grad_(False)
    same(split(x_of()), module(x_of()))
    split.to(torch.bfloat16)
    assert split(x_of().bfloat16()).dtype == torch.bfloat16


def test_module_of_another_structure_is_captured_anew(module):
    split = comfytp.split(module)
    split(x_of())
    module.down = torch.nn.Sequential(module.down, torch.nn.SiLU())
    same(split(x_of()), module(x_of()))


def test_tied_weights_and_buffers_and_plain_tensors(module):
    class Tied(Small):
        def __init__(self):
            super().__init__()
            self.again = self.up
            self.register_buffer("table", torch.arange(8.0), persistent=False)
            self.plain = torch.full((8,), 0.5)

        def forward(self, x):
            return self.down(self.up(x) + self.again(x)) + self.table + self.plain * x

    tied = Tied()
    same(comfytp.split(tied)(x_of()), tied(x_of()))


def test_plan_says_what_devices_hold(module):
    split = comfytp.split(module, "cpu:0,cpu:1", mesh="tensor=2")
    with pytest.raises(comfytp.Error, match="after the first call"):
        split.plan  # noqa: B018
    split(x_of())
    plan = split.plan
    assert plan.devices == ["cpu:0", "cpu:1"] and plan.mesh == "tensor=2"
    assert plan.weight_bytes_total == sum(p.nbytes for p in module.parameters())
    assert all(0 < held < plan.weight_bytes_total for held in plan.weight_bytes_per_device)
    assert dataclasses.is_dataclass(plan) and len(plan.flops_per_device) == 2
    split.unload()
    assert split.engine_stats()["allocated_weight_bytes"] == [0, 0]
    same(split(x_of()), module(x_of()))


@pytest.mark.parametrize("devices", ["", "cpu:0,,x", "cpu:-1", "tpu:0", "cpu:0,cpu:0", [0, 1]])
def test_bad_devices_are_refused_at_once(module, devices):
    with pytest.raises(comfytp.Error):
        comfytp.split(module, devices)


def test_long_capture_says_so(module, monkeypatch, capfd):
    monkeypatch.setattr(importer_calls, "_PROGRESS_AFTER", 3600.0)
    comfytp.split(module)(x_of())
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(importer_calls, "_PROGRESS_AFTER", 0.0)
    comfytp.split(module)(x_of(1, 2, 8))
    first, second = capfd.readouterr().err.strip().splitlines()
    assert "capturing Small" in first and "took" in second


def test_threads_share_a_module(module):
    split = comfytp.split(module)
    failures = []

    def call(seed):
        try:
            for i in range(5):
                size = 2 + (seed + i) % 3
                same(split(x_of(size, 3, 8, seed=seed)), module(x_of(size, 3, 8, seed=seed)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert split.engine_stats()["captures"] == 3


def test_modules_are_captured_from_several_threads():
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.disabled, list(warnings.filters), getattr(torch.fx.config, "do_not_emit_stack_traces", None)
    failures = []

    def call(size):
        try:
            module = Small(size)
            same(comfytp.split(module)(x_of(2, 3, size)), module(x_of(2, 3, size)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(size,)) for size in (4, 8, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert (log.disabled, warnings.filters, getattr(torch.fx.config, "do_not_emit_stack_traces", None)) == before


def test_no_warning_comes_from_a_capture(module):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comfytp.split(module)(x_of())
