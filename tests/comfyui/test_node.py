"""The node as ComfyUI loads and asks it, with the package and without; of the twenty checks the ids of 20."""

import asyncio
import json
import subprocess
import sys
import textwrap
import types

import comfy.model_management
import comfy.ops
import models
import pytest
import torch
from conftest import ROOT

from comfytp.comfyui.devices import Here, parse

NODE = "MultiGPUDiffusionModel"


@pytest.fixture
def cls(node):
    return node.NODE_CLASS_MAPPINGS[NODE]


def test_it_stands_where_users_look_for_it(node, cls):
    assert node.NODE_DISPLAY_NAME_MAPPINGS[NODE] == "Multi-GPU Diffusion Model"
    assert cls.CATEGORY == "advanced/model" and cls.RETURN_TYPES == ("MODEL",) and cls.DESCRIPTION
    inputs = cls.INPUT_TYPES()
    assert list(inputs["required"]) == ["model", "gpu_ids", "verbose"] and list(inputs["optional"]) == ["memory_mode", "compute"]
    for _, options in (*inputs["required"].values(), *inputs["optional"].values()):
        assert options["tooltip"]
    assert inputs["required"]["gpu_ids"][1]["default"] == "0,1" and inputs["required"]["verbose"][1]["default"] is False
    assert inputs["optional"]["memory_mode"][0] == ["balanced", "fast", "aggressive"]
    assert inputs["optional"]["compute"] == (["default", "fp8"], {**inputs["optional"]["compute"][1], "default": "default"})
    assert (ROOT / node.WEB_DIRECTORY / "docs" / f"{NODE}.md").is_file()


ON_CPU, TWO_GPUS = Here("cpu", 0), Here("cuda", 2)


@pytest.mark.parametrize(
    ("text", "here", "names"),
    [
        ("0", ON_CPU, ["cpu:0"]),
        ("0,1", ON_CPU, ["cpu:0", "cpu:1"]),
        ("1,0", ON_CPU, ["cpu:1", "cpu:0"]),
        ("2, 3 ", ON_CPU, ["cpu:2", "cpu:3"]),
        ("cpu:0,cpu:1@512MiB", ON_CPU, ["cpu:0", "cpu:1@512MiB"]),
        ("0,1", TWO_GPUS, ["cuda:0", "cuda:1"]),
        ("0,1@10GiB", TWO_GPUS, ["cuda:0", "cuda:1@10GiB"]),
        ("cuda:1,cpu:0", TWO_GPUS, ["cuda:1", "cpu:0"]),
        ("cuda:0,cuda:0", TWO_GPUS, ["cuda:0", "cuda:0"]),
    ],
)
def test_ids_name_devices(text, here, names):
    assert parse(text, here) == names


@pytest.mark.parametrize("here", [ON_CPU, TWO_GPUS], ids=["cpu", "gpus"])
@pytest.mark.parametrize(
    "text", ["", ",", "0,,1", "0,", "x", "-1", "0;1", "0.5", "gpu:0", "cuda:", "0@", "0@10", "0@GiB", "0@0GiB", "0,1@9999999GiB", "cuda:7", "cpu:64", "99999", "0,0", "cpu:1,cpu:1", "0,1,0", "cpu:0,cpu:0"]
)
def test_other_ids_are_refused_with_those_that_exist(text, here):
    with pytest.raises(ValueError, match="devices here: .*cpu:0 to cpu:63") as refused:
        parse(text, here)
    assert "gpu_ids" in str(refused.value) and "\n" not in str(refused.value)
    if here.cuda:
        assert "cuda:0, cuda:1" in str(refused.value)


def test_ids_are_checked_before_anything_runs(cls):
    assert cls.VALIDATE_INPUTS("0,1") is True
    assert cls.VALIDATE_INPUTS(None) is True, "what comes over a link is checked when it is there"
    assert "0,0" in cls.VALIDATE_INPUTS("0,0")
    assert "cuda:0" in cls.VALIDATE_INPUTS("cuda:0,cuda:1")
    with pytest.raises(ValueError, match="gpu_ids"):
        cls().split(models.sd15(), "0,0")
    with pytest.raises(ValueError, match="memory_mode: expected one of balanced, fast, aggressive but got 'fastest'"):
        cls().split(models.sd15(), "0,1", memory_mode="fastest")
    with pytest.raises(ValueError, match="compute: expected one of default, fp8 but got 'int4'"):
        cls().split(models.sd15(), "0,1", compute="int4")


def test_workflows_saved_before_an_input_was_added_load_as_they_were(cls, monkeypatch):
    """A workflow has the widgets' values in their order, a prompt has them by name; what is missing is the default."""
    inputs = cls.INPUT_TYPES()
    widgets = [*list(inputs["required"])[1:], *inputs["optional"]]
    assert widgets[:3] == ["gpu_ids", "verbose", "memory_mode"], "a new widget stands behind those that are saved"
    for path in (ROOT / "example_workflows").glob("*.json"):
        (saved,) = [n["widgets_values"] for n in json.loads(path.read_text())["nodes"] if n["type"] == NODE]
        assert len(saved) <= len(widgets) and saved[1] in (True, False) and saved[2] in inputs["optional"]["memory_mode"][0]

    import execution
    import nodes

    class Loader:
        INPUT_TYPES, RETURN_TYPES = classmethod(lambda cls: {"required": {}}), ("MODEL",)

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, NODE, cls)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Loader", Loader)
    for given in ({}, {"memory_mode": "fast"}, {"memory_mode": "fast", "compute": "fp8"}, {"compute": "int4"}):
        prompt = {
            "1": {"class_type": "Loader", "inputs": {}},
            "2": {"class_type": NODE, "inputs": {"model": ["1", 0], "gpu_ids": "0,1", "verbose": False, **given}},
        }
        valid, errors, _ = asyncio.run(execution.validate_inputs("id", prompt, "2", {}))
        assert valid == (given.get("compute") != "int4"), (given, errors)
    (patched,) = cls().split(models.sd15(), "0,1", False, "fast")
    assert (patched.split.mode, patched.split.compute) == ("fast", "default")


def test_its_counters_are_the_root_modules(node):
    assert set(node.engine_stats()) == {"uploaded_bytes", "captures", "engine_calls", "torch_fallbacks"}


@pytest.mark.parametrize("what", ["missing", "built for something else"])
def test_without_the_package_it_appears_and_says_what_to_run(what, tmp_path):
    if what != "missing":
        (tmp_path / "comfytp").mkdir()
        (tmp_path / "comfytp" / "__init__.py").write_text("raise ImportError('_core.so: undefined symbol: x')")
    program = f"""
        import importlib.util, sys
        sys.path.insert(0, {str(tmp_path)!r})
        sys.modules.pop("comfytp", None)
        spec = importlib.util.spec_from_file_location("node", {str(ROOT / "__init__.py")!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        cls = module.NODE_CLASS_MAPPINGS[{NODE!r}]
        cls.INPUT_TYPES()
        print(cls.VALIDATE_INPUTS("0,1"))
        try:
            cls().split(None, "0,1")
        except RuntimeError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-S", "-E", "-c", textwrap.dedent(program)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    validated, raised = done.stdout.splitlines()
    assert validated == raised
    assert raised.endswith(f'run: "{sys.executable}" -m pip install "{ROOT}"')


def test_the_model_that_comes_in_is_not_changed(cls):
    incoming = models.sd15()
    incoming.model_size()  # which any clone asks for
    before = {name: repr(value) for name, value in vars(incoming).items()}
    (patched,) = cls().split(incoming, "0,1")
    assert {name: repr(value) for name, value in vars(incoming).items()} == before
    assert patched.model is incoming.model and isinstance(patched, type(incoming))
    assert "forward" not in vars(incoming.model.diffusion_model)
    comfy.model_management.load_models_gpu([patched])
    assert comfy.model_management.loaded_models() and not patched.backup


class TestProductsInFp8:
    """Of a node that asks for them, on devices that have none."""

    def sample(self, caplog, patcher, times=2):
        caplog.clear()
        with caplog.at_level("WARNING", logger="comfytp"):
            results = [models.sample(patcher, "flux", steps=2, grad_mode=torch.no_grad) for _ in range(times)]
        assert all(torch.equal(result, results[0]) for result in results)
        return results[0], [record.getMessage() for record in caplog.records if record.name == "comfytp"]

    @pytest.mark.skipif(not hasattr(comfy.ops, "mixed_precision_ops"), reason="quantised layers came later")
    def test_scaled_weights_are_decoded_and_it_is_said_once(self, cls, caplog, on_engine):
        plain = models.flux_fp8()
        expected, silent = self.sample(caplog, cls().split(plain, "0,1")[0])
        (patched,) = cls().split(plain, "0,1", compute="fp8")
        got, (said,) = self.sample(caplog, patched)
        assert silent == [] and torch.equal(got, expected)
        assert said == "Flux, fp8: nothing is multiplied in it, for cpu:0, cpu:1 cannot (GPUs can from sm_89 on)"

    def test_a_choice_has_weights_of_its_own_on_the_devices(self, cls):
        plain = models.sd15()
        default, fp8, again = (cls().split(plain, "0,1", compute=compute)[0].split for compute in ("default", "fp8", "fp8"))
        assert fp8 is again and fp8 is not default

    @pytest.mark.parametrize(
        ("dtype", "operations"),
        [(torch.float8_e4m3fn, comfy.ops.manual_cast), (torch.float8_e4m3fn, comfy.ops.fp8_ops), (torch.bfloat16, comfy.ops.manual_cast)],
        ids=["fp8", "fast_fp8", "bf16"],
    )
    def test_it_says_what_is_in_the_way(self, cls, caplog, dtype, operations, on_engine):
        """Weights as UNETLoader's weight_dtype has them, in a model that computes in bf16."""
        plain = models.flux_stored_in(dtype, operations)
        expected, silent = self.sample(caplog, cls().split(plain, "0,1")[0])
        got, (said,) = self.sample(caplog, cls().split(plain, "0,1", compute="fp8")[0])
        assert silent == [] and torch.equal(got, expected)
        why = "cpu:0, cpu:1 cannot (GPUs can from sm_89 on)" if dtype is torch.float8_e4m3fn else "no linear's weight is stored in it"
        assert said == f"Flux, fp8: nothing is multiplied in it, for {why}"

    @pytest.mark.parametrize("everywhere", [True, False])
    def test_a_part_between_callouts_that_has_none_is_no_news(self, everywhere):
        """A graph in parts says that no weight is in fp8 where that holds for all of them."""
        from comfytp.comfyui import engine

        none = {"linears": 0, "note": "fp8: nothing is multiplied in it"}
        fp8 = [none, none if everywhere else {"linears": 3, "note": "fp8: some weights are decoded"}]
        whole, segments = (cls.__new__(cls) for cls in (engine.Engine, engine.Segments))
        whole.programs = types.SimpleNamespace(report=lambda part: {"devices": [], "notes": [fp8[part]["note"]], "fp8": fp8[part]})
        segments.parts, segments.sites = [(0,), None, (1,)], [None]
        report = whole.report(segments)
        assert report["notes"] == [fp8[1]["note"], "1 callouts to other nodes' code"] and report["fp8"] == fp8[1]
