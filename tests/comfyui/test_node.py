"""The node as ComfyUI loads and asks it, with the package and without; of the twenty checks the ids of 20."""

import subprocess
import sys
import textwrap

import comfy.model_management
import models
import pytest
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
    assert list(inputs["required"]) == ["model", "gpu_ids", "verbose"] and list(inputs["optional"]) == ["memory_mode"]
    for _, options in (*inputs["required"].values(), *inputs["optional"].values()):
        assert options["tooltip"]
    assert inputs["required"]["gpu_ids"][1]["default"] == "0,1" and inputs["required"]["verbose"][1]["default"] is False
    assert inputs["optional"]["memory_mode"][0] == ["balanced", "fast", "aggressive"]
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
