"""What changes in a module after its capture is seen at the next call."""

import sys
import types
import warnings

import comfytp
import pytest
import torch
from comfytp.importer import calls as importer_calls
from comfytp.importer import module as importer_module
from test_module_calls import Small, own_cache, same, x_of  # noqa: F401


class Scaler:
    def __init__(self):
        self.factor = 1.5

    def __call__(self, x):
        return x * self.factor


class Stateful(Small):
    """Reads what a module can hold besides its parameters."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.arange(8.0))
        self.register_buffer("bias", torch.ones(1))
        self.plain = torch.full((8,), 0.5)
        self.tables = [torch.arange(8.0)]
        self.options = {"gain": 2.0, "terms": [1.0]}
        self.scaler = Scaler()

    def forward(self, x):
        y = self.scaler(super().forward(x) * self.options["gain"]) + sum(self.options["terms"])
        return y + self.shift + self.bias + self.plain * x + self.tables[0]


@pytest.fixture
def module():
    return Stateful()


def replace_epsilon(module):
    module.epsilon = 0.5


def replace_plain(module):
    module.plain = torch.full((8,), 3.0)


def replace_single_parameter(module):
    module.bias = torch.ones(1) * 4


def write_buffer(module):
    module.shift[3] = 7


def write_plain(module):
    module.plain.mul_(3)


def write_table(module):
    module.tables[0][0] = 5


def change_entry(module):
    module.options["gain"] = 0.25


def append(module):
    module.options["terms"].append(2.0)


def change_object(module):
    module.scaler.factor = 3.0


def replace_submodule(module):
    module.up = torch.nn.Linear(8, 32).requires_grad_(False)


def wrap_submodule(module):
    module.down = torch.nn.Sequential(module.down, torch.nn.Tanh())


def add_hook(module):
    module.down.register_forward_hook(lambda part, args, output: output * 2)


def add_pre_hook(module):
    module.up.register_forward_pre_hook(lambda part, args: (args[0] * 2,))


def replace_forward(module):
    module.up.forward = types.MethodType(lambda part, x: x.repeat(1, 1, 4), module.up)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def change_class(module):
    module.up.__class__ = Doubled


def hook_in_another_dict(module):
    """As code leaves it that takes all hooks away."""
    module.down._forward_hooks = type(module.down._forward_hooks)()
    add_hook(module)


ATTRIBUTES = [
    replace_epsilon,
    replace_plain,
    replace_single_parameter,
    write_buffer,
    write_plain,
    write_table,
    change_entry,
    append,
    change_object,
    replace_submodule,
    wrap_submodule,
    add_hook,
    add_pre_hook,
    replace_forward,
    change_class,
    hook_in_another_dict,
]


@pytest.mark.parametrize("change", ATTRIBUTES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kept", [True, False], ids=["cache", "no-cache"])
@torch.no_grad()
def test_change_of_what_the_forward_reads_is_seen(module, change, kept, monkeypatch):
    if not kept:
        monkeypatch.setenv("COMFYTP_CACHE", "")
    split = comfytp.split(module)
    before = split(x_of())
    change(module)
    expected = module(x_of())
    assert (before - expected).abs().max() > 1e-2
    same(split(x_of()), expected)
    same(split(x_of()), expected)
    stats = split.engine_stats()
    assert stats["torch_fallbacks"] == 0 and stats["captures"] == 1 + (change is not replace_submodule)


@torch.no_grad()
def test_patched_class_is_seen(module, monkeypatch):
    split = comfytp.split(module)
    split(x_of())
    monkeypatch.setattr(Stateful, "forward", lambda self, x: Small.forward(self, x) * 3)
    same(split(x_of()), module(x_of()))
    monkeypatch.undo()
    monkeypatch.setenv("COMFYTP_CACHE", "")
    same(split(x_of()), module(x_of()))
    assert split.engine_stats()["captures"] == 2  # what it was before is known


def half(x):
    return x * 0.5


class Named(Small):
    """Reads what its class and its file hold."""

    gain = 2.0

    @staticmethod
    def shifted(x):
        return x + 1

    @property
    def offset(self):
        return 1.0

    def forward(self, x):
        return half(self.shifted(super().forward(x)) * self.gain + self.offset)


@torch.no_grad()
def test_function_that_is_replaced_where_the_model_calls_it_is_seen(monkeypatch):
    module = Named()
    split = comfytp.split(module)
    split(x_of())
    monkeypatch.setattr(sys.modules[__name__], "half", lambda x: x * 3)
    same(split(x_of()), module(x_of()))
    same(comfytp.split(module)(x_of()), module(x_of()))
    assert split.engine_stats()["captures"] == 2 and split.engine_stats()["torch_fallbacks"] == 0


@torch.no_grad()
@pytest.mark.parametrize("name, value", [("gain", 4.0), ("shifted", staticmethod(lambda x: x + 5)), ("offset", property(lambda self: 3.0))])
def test_member_that_a_class_gets_anew_is_seen(name, value, monkeypatch):
    module = Named()
    split = comfytp.split(module)
    split(x_of())
    monkeypatch.setattr(Named, name, value)
    same(split(x_of()), module(x_of()))


def write(module):
    module.up.weight.mul_(2)


def write_a_number(module):
    module.up.weight[0, 0] += 100


def write_through_data(module):
    module.up.weight.data.mul_(2)


def multiply_data(module):
    module.up.weight.data *= 1.5


def replace_data(module):
    module.up.weight.data = module.up.weight * 2


def replace_parameter(module):
    module.up.weight = torch.nn.Parameter(module.up.weight * 2, requires_grad=False)


def assign_state(module):
    module.load_state_dict({name: p * 0.5 for name, p in module.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    "change", [write, write_a_number, write_through_data, multiply_data, replace_data, replace_parameter, assign_state], ids=lambda f: f.__name__
)
@torch.no_grad()
def test_change_of_weights_is_seen_without_a_capture(change, monkeypatch):
    monkeypatch.setenv("COMFYTP_CACHE", "")
    module = Small()
    split = comfytp.split(module)
    before = split(x_of())
    for _ in range(2):
        change(module)
        expected = module(x_of())
        same(split(x_of()), expected)
    assert (before - expected).abs().max() > 1e-2
    assert split.engine_stats()["captures"] == 1


@pytest.mark.parametrize("change", [*ATTRIBUTES, write, write_through_data, replace_data, replace_parameter, assign_state], ids=lambda f: f.__name__)
@torch.no_grad()
def test_call_that_was_made_before_the_change_was_seen_is_made_again(module, change, monkeypatch):
    monkeypatch.setattr(importer_module, "gpus_of", lambda devices: {torch.device("cpu")})  # tensors there are taken for a GPU's
    split = comfytp.split(module)

    def calls():
        before = split.engine_stats()["engine_calls"]
        same(split(x_of()), module(x_of()))
        return split.engine_stats()["engine_calls"] - before

    assert [calls() for _ in range(3)] == [1, 1, 1]
    change(module)
    assert [calls() for _ in range(3)] == [2, 1, 1]
    change(module)
    calls()
    change(module)
    assert calls() == 1  # behind a change it is looked first
    assert split.engine_stats()["torch_fallbacks"] == 0


@torch.no_grad()
def test_call_is_made_before_the_module_is_looked_at_where_nobody_waits_for_it(module, monkeypatch):
    monkeypatch.setattr(importer_module, "gpus_of", lambda devices: {torch.device("cpu")})
    split = comfytp.split(module)
    split(x_of())
    split(x_of())
    order = []
    monkeypatch.setattr(split._snapshot, "same_structure", lambda: order.append("look") or True)
    real = split._calls._run
    monkeypatch.setattr(split._calls, "_run", lambda *arguments: order.append("call") or real(*arguments))
    same(split(x_of()), module(x_of()))
    assert order == ["call", "look"]
    split.unload()
    same(split(x_of()), module(x_of()))
    assert order == ["call", "look", "look", "call"]
    split(x_of(5, 3, 8))  # of another shape: nothing is ready
    assert order == ["call", "look", "look", "call", "look", "call"]


@torch.no_grad()
def test_written_weights_are_all_that_is_loaded_again():
    module = Small()
    split = comfytp.split(module, "cpu:0")
    split(x_of())
    uploaded = split.engine_stats()["uploaded_bytes"]
    write(module)
    same(split(x_of()), module(x_of()))
    assert split.engine_stats()["uploaded_bytes"] - uploaded == module.up.weight.nbytes
    split(x_of())
    assert split.engine_stats()["uploaded_bytes"] - uploaded == module.up.weight.nbytes


def test_writes_to_inference_tensors_are_seen():
    with torch.inference_mode():
        module = Small()
        split = comfytp.split(module)
        before = split(x_of())
        write(module)
        expected = module(x_of())
        assert (before - expected).abs().max() > 1e-2
        same(split(x_of()), expected)
    same(split(x_of()), expected)


@torch.no_grad()
def test_update_reads_all_weights():
    module = Small()
    split = comfytp.split(module)
    split(x_of())
    module.up.weight.data[0, 0] += 100  # one that cannot be seen
    split.update()
    same(split(x_of()), module(x_of()))
    assert split.engine_stats()["captures"] == 1


@torch.no_grad()
def test_tied_weights_are_loaded_again_under_every_name():
    module = Small()
    module.again = module.up
    module.forward = types.MethodType(lambda self, x: self.up(x) + self.again(x), module)
    split = comfytp.split(module)
    split(x_of())
    write(module)
    same(split(x_of()), module(x_of()))


@torch.no_grad()
def test_what_runs_once_a_prompt_runs_again_over_written_weights():
    class Prompted(Small):
        def forward(self, x, context):
            return super().forward(x) + self.up(context).mean((1, 2), keepdim=True)

    module = Prompted()
    split = comfytp.split(module)
    split(x_of(), x_of(2, 5, 8))
    module.up.bias.add_(3)
    same(split(x_of(), x_of(2, 5, 8)), module(x_of(), x_of(2, 5, 8)))


@torch.no_grad()
def test_training_mode_and_gradients_flags_make_no_capture(module):
    split = comfytp.split(module)
    split(x_of())
    uploaded = split.engine_stats()["uploaded_bytes"]
    split.train()
    split(x_of())
    split.eval()
    split.requires_grad_(True)
    split(x_of())
    stats = split.engine_stats()
    assert stats["captures"] == 1 and stats["uploaded_bytes"] == uploaded


@torch.no_grad()
def test_attribute_that_changes_before_every_call_is_left_to_torch(module):
    split = comfytp.split(module)
    split(x_of())
    with pytest.warns(UserWarning, match="change before every call") as warned:
        for i in range(12):
            module.options["gain"] = 3.0 + i
            same(split(x_of()), module(x_of()))
    assert len([w for w in warned if "comfytp" in str(w.message)]) == 1
    stats = split.engine_stats()
    assert stats["captures"] == 5 and stats["torch_fallbacks"] == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(split(x_of()), module(x_of()))  # the last one stays
    assert split.engine_stats()["captures"] == 6


class Counting(Small):
    calls = 0

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class Accumulating(Small):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(8))

    def forward(self, x):
        self.total.add_(x.mean((0, 1)))
        return super().forward(x) + self.total


@pytest.mark.parametrize(("kind", "names"), [(Counting, "attribute calls"), (Accumulating, "buffer total")])
@torch.no_grad()
def test_forward_with_a_memory_of_earlier_calls_is_left_to_torch(kind, names):
    ours, theirs = kind(), kind()
    split = comfytp.split(ours)
    with pytest.warns(UserWarning, match=names):
        for seed in range(3):
            same(split(x_of(seed=seed)), theirs(x_of(seed=seed)))
    assert split.engine_stats()["engine_calls"] == 0


@torch.no_grad()
def test_buffer_that_is_written_and_never_read_does_not_matter():
    class Recording(Small):
        def __init__(self):
            super().__init__()
            self.register_buffer("last", torch.zeros(()))

        def forward(self, x):
            self.last.copy_(x.mean())
            return super().forward(x)

    module = Recording()
    split = comfytp.split(module)
    same(split(x_of()), module(x_of()))
    assert split.engine_stats()["torch_fallbacks"] == 0


# ---- what is kept in memory


@torch.no_grad()
def test_only_the_programs_used_last_are_kept(monkeypatch):
    monkeypatch.setattr(importer_calls, "_MOST_READY", 3)
    module = Small()
    split = comfytp.split(module)
    for size in (1, 2, 3, 1, 4):  # 2 is the one used the longest ago
        same(split(x_of(1, size, 8)), module(x_of(1, size, 8)))
    kept = split._calls._ready
    assert len(kept) == 3 and {ready.program.outputs[0].shape[1] for ready in kept.values()} == {3, 1, 4}
    for size in (2, 1, 3, 4) * 5:
        same(split(x_of(1, size, 8)), module(x_of(1, size, 8)))
    stats = split.engine_stats()
    assert stats["captures"] == 4  # they come from the disk, however often
    assert stats["torch_fallbacks"] == 0
