"""What comfytp.split says to arguments that are wrong, and how a split module stands beside torch.compile."""

import warnings

import comfytp
import pytest
import torch


@pytest.fixture
def module():
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 8)).requires_grad_(False)


def x_of():
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("devices", 2, "names such as 'cpu:0' but got 2"),
        ("devices", None, "names such as 'cpu:0' but got None"),
        ("devices", [0, 1], r"names such as 'cpu:0' but got \[0, 1\]"),
        ("devices", torch.device("cpu", 0), "names such as 'cpu:0' but got device"),
        ("mesh", 2, "None or text such as 'tensor=2' but got 2"),
        ("placement", True, "None, 'resident' or 'gathered' but got True"),
        ("prompt_inputs", 3, "a regular expression or a list of names but got 3"),
        ("prompt_inputs", "(", r"a regular expression but got '\(': missing \)"),
        ("timeout", "10", "a number of seconds but got '10'"),
        ("timeout", None, "a number of seconds but got None"),
    ],
)
def test_wrong_argument_is_refused_at_once_by_its_name(module, argument, value, says):
    with pytest.raises(comfytp.Error, match=rf"\[{argument}\] expected {says}"):
        comfytp.split(module, **{argument: value})


@pytest.mark.parametrize("names", [("cpu:0", "cpu:1"), iter(["cpu:0", "cpu:1"])], ids=["tuple", "iterator"])
def test_devices_are_any_list_of_names(module, names):
    split = comfytp.split(module, names, prompt_inputs=iter(["input"]))
    torch.testing.assert_close(split(x_of()), module(x_of()))
    assert split.plan.devices == ["cpu:0", "cpu:1"]


def test_module_that_is_split_is_split_anew(module):
    again = comfytp.split(comfytp.split(module), "cpu:0,cpu:1,cpu:2")
    torch.testing.assert_close(again(x_of()), module(x_of()))
    assert again.module is module and len(again.plan.devices) == 3 and again.engine_stats()["torch_fallbacks"] == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, x_of()), lambda m: torch.compile(m, backend="eager")])
def test_module_without_python_code_is_refused(module, make):
    with pytest.raises(comfytp.Error, match="expected a module of Python code but got a"):
        comfytp.split(make(module))


@pytest.mark.parametrize("how", ["function", "method"])
def test_split_module_may_be_compiled(module, how):
    split = comfytp.split(module)
    compiled = split
    if how == "function":
        compiled = torch.compile(split, backend="eager")
    else:
        split.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x_of()), module(x_of()))
    assert split.engine_stats()["engine_calls"] == 2 and split.engine_stats()["torch_fallbacks"] == 0


def test_warning_stands_at_the_line_of_the_call():
    class Sorts(torch.nn.Module):
        def forward(self, x):
            return x.sort()[0]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        comfytp.split(Sorts())(x_of())
    (warned,) = [w for w in caught if "comfytp" in str(w.message)]
    assert warned.filename == __file__
