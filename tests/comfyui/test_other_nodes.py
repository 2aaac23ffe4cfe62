"""What other nodes put on a model or a prompt is honoured: by the engine where it can, else by PyTorch with one warning.

Of the twenty checks: 9 TestControl, 10 to 13 the patches inside a model and EasyCache, 14 TestConditioning."""

import logging
import unittest.mock

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.sd
import models
import pytest
import torch
from models import CPU
from test_families import TOLERANCE
from test_patches import lora_file

from comfytp.comfyui import engine_stats, split_model
from comfytp.comfyui.callouts import StandIn


def both(plain, run):
    """What `run` gives with the plain model, and with the node."""
    return run(split_model(plain, "0,1")), run(plain)


# ---- control


# Two blocks a level, as T2I adapters count.
DEEP = {"num_res_blocks": [2, 2], "transformer_depth": [1, 1, 1, 1], "transformer_depth_output": [1] * 6}


def control_model(seed=5, **changes):
    config = {k: v for k, v in models.sd15(**changes).model.model_config.unet_config.items() if k not in ("out_channels", "transformer_depth_output")}
    model = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, operations=comfy.ops.disable_weight_init)
    return models._fill(model, seed).eval()


def with_control(conds, *controls):
    """Chained, the last of them outermost."""
    hint = torch.rand(1, 3, 128, 192, generator=torch.Generator().manual_seed(4))
    previous = None
    for i, control in enumerate(controls):
        control = control.copy().set_cond_hint(hint, 0.6 + 0.2 * i, (0.0, 1.0))
        control.set_previous_controlnet(previous)
        previous = control
    return [[tensor, {**entries, "control": previous, "control_apply_to_uncond": False}] for tensor, entries in conds]


def t2i_adapter():
    import comfy.t2i_adapter.adapter

    model = comfy.t2i_adapter.adapter.Adapter(cin=192, channels=[32, 64], nums_rb=2, ksize=1, sk=True, use_conv=False, xl=False)
    return comfy.controlnet.T2IAdapter(models._fill(model, 6), 3, 8, "nearest-exact", device=CPU)


@pytest.mark.usefixtures("on_engine")
class TestControl:
    def run(self, *controls, **more):
        prompts = {"positive": with_control(models.prompt("sd15", 1), *controls), "negative": with_control(models.prompt("sd15", 2), *controls)}
        return lambda patcher: models.sample(patcher, "sd15", **prompts, **more)

    def test_a_controlnet(self):
        got, expected = both(models.sd15(), self.run(comfy.controlnet.ControlNet(control_model(), load_device=CPU)))
        assert models.relative(got, expected) < TOLERANCE
        assert models.relative(got, models.sample(models.sd15(), "sd15")) > 1e-3

    def test_two_controlnets_and_a_t2i_adapter_in_a_chain(self):
        first, second = (comfy.controlnet.ControlNet(control_model(seed, **DEEP), load_device=CPU) for seed in (5, 8))
        plain = models.sd15(**DEEP)
        got, expected = both(plain, self.run(first, t2i_adapter(), second))
        without = models.sample(plain, "sd15", positive=with_control(models.prompt("sd15", 1), first, second))
        assert models.relative(got, without) > 1e-3
        assert models.relative(got, expected) < TOLERANCE

    def test_a_controlnet_on_one_of_the_prompts(self):
        control = comfy.controlnet.ControlNet(control_model(), load_device=CPU)
        run = {"positive": with_control(models.prompt("sd15", 1), control)}
        got, expected = both(models.sd15(), lambda patcher: models.sample(patcher, "sd15", **run))
        assert models.relative(got, expected) < TOLERANCE

    @pytest.mark.parametrize("adapted", [False, True], ids=["alone", "with a LoRA on the model"])
    def test_a_control_lora_takes_the_models_patched_weights(self, adapted):
        generator = torch.Generator().manual_seed(2)
        own = control_model().state_dict()
        weights = {k: v for k, v in own.items() if k.startswith(("input_hint_block", "zero_convs", "middle_block_out"))}
        for name in [k.removesuffix(".weight") for k, v in own.items() if "attn1.to_" in k and k.endswith("weight")]:
            out, inner = own[name + ".weight"].shape
            weights |= {name + ".up": torch.randn(out, 2, generator=generator) * 0.2, name + ".down": torch.randn(2, inner, generator=generator) * 0.2}
        plain = models.sd15()
        if adapted:
            plain = comfy.sd.load_lora_for_models(plain, None, lora_file(plain), 0.8, 0)[0]
        got, expected = both(plain, self.run(comfy.controlnet.ControlLora(weights)))
        assert models.relative(got, expected) < TOLERANCE


# ---- prompts and masks


@pytest.mark.usefixtures("on_engine")
class TestConditioning:
    def test_a_mask_on_the_latent(self):
        mask = torch.zeros(1, 1, 128, 192)
        mask[..., 40:90, 60:150] = 1
        latent = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(3))
        got, expected = both(models.sd15(), lambda patcher: models.sample(patcher, "sd15", latent=latent, noise_mask=mask))
        assert models.relative(got, expected) < TOLERANCE

    def test_an_inpainting_model_with_its_mask_and_image(self):
        plain = models.sd15(in_channels=9)
        plain.model.set_inpaint()
        mask = torch.zeros(1, 1, 16, 24)
        mask[..., 4:12, 6:18] = 1
        image = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(3))
        extra = {"concat_latent_image": image, "concat_mask": mask}
        run = {"positive": models.prompt("sd15", 1, **extra), "negative": models.prompt("sd15", 2, **extra)}
        got, expected = both(plain, lambda patcher: models.sample(patcher, "sd15", **run))
        assert models.relative(got, expected) < TOLERANCE

    def test_areas_and_masks_of_prompts(self):
        first = models.prompt("sd15", 1, area=(8, 12, 0, 0), strength=1.0)
        second = models.prompt("sd15", 3, area=(16, 12, 0, 12), strength=0.8)
        mask = torch.zeros(1, 16, 24)
        mask[:, 4:10] = 1
        third = models.prompt("sd15", 4, mask=mask, mask_strength=0.7, set_area_to_bounds=False)
        got, expected = both(models.sd15(), lambda patcher: models.sample(patcher, "sd15", positive=[*first, *second, *third, *models.prompt("sd15", 5)]))
        assert models.relative(got, expected) < TOLERANCE

    def test_boxes_of_gligen(self):
        import comfy.gligen

        plain = models.sd15()
        blocks = [part for part in plain.model.diffusion_model.modules() if type(part).__name__ == "BasicTransformerBlock"]
        widths = [block.norm1.normalized_shape[0] for block in blocks]
        fusers = [comfy.gligen.GatedSelfAttentionDense(width, 48, 4, width // 4) for width in widths]
        model = models._fill(comfy.gligen.Gligen(fusers, comfy.gligen.PositionNet(48, 48), 48), 9)
        gligen = comfy.model_patcher.ModelPatcher(model, CPU, CPU)
        boxes = [(models.prompt("sd15", 6)[0][0][0, :1], 8, 12, 4, 6), (models.prompt("sd15", 7)[0][0][0, :1], 6, 6, 0, 16)]
        run = {"positive": models.prompt("sd15", 1, gligen=("position", gligen, boxes))}
        got, expected = both(plain, lambda patcher: models.sample(patcher, "sd15", **run))
        assert models.relative(got, expected) < TOLERANCE
        assert models.relative(got, models.sample(plain, "sd15")) > 1e-3

    def test_reference_latents(self):
        reference = torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(3))
        run = {"positive": models.prompt("flux", 1, reference_latents=[reference]), "negative": models.prompt("flux", 2)}
        got, expected = both(models.flux(), lambda patcher: models.sample(patcher, "flux", **run))
        assert models.relative(got, expected) < TOLERANCE

    def test_guidance_of_another_strength(self):
        plain = models.flux()
        split = split_model(plain, "0,1")
        for guidance in (3.5, 1.0):
            run = {"positive": models.prompt("flux", 1, guidance=guidance), "cfg": 1.0, "steps": 2}
            assert models.relative(models.sample(split, "flux", **run), models.sample(plain, "flux", **run)) < TOLERANCE

    def test_batches_of_latents(self):
        got, expected = both(models.sd15(), lambda patcher: models.sample(patcher, "sd15", batch=3, steps=2))
        assert models.relative(got, expected) < TOLERANCE

    def test_another_noise_schedule_and_prediction(self):
        """An object patch of what stands around the diffusion model."""
        import comfy.model_sampling

        plain = models.sd15()

        class Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
            pass

        patched = plain.clone()
        patched.add_object_patch("model_sampling", Sampling(plain.model.model_config))
        got, expected = both(patched, lambda patcher: models.sample(patcher, "sd15"))
        assert models.relative(got, expected) < TOLERANCE


# ---- wrappers


@pytest.mark.usefixtures("on_engine")
@pytest.mark.parametrize("order", ["before", "after"])
def test_easycache_skips_the_same_steps(order):
    nodes_easycache = pytest.importorskip("comfy_extras.nodes_easycache")
    plain = models.sd15()

    def cached(patcher):
        return apply(nodes_easycache.EasyCacheNode, patcher, 0.6, 0.1, 0.95, False)

    def run(patcher):
        called = []

        def note(executor, *args, **kwargs):
            options = next(value for value in (*args, *kwargs.values()) if isinstance(value, dict) and "sigmas" in value)
            called.append(float(options["sigmas"][0]))
            return executor(*args, **kwargs)

        patcher.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, note)  # behind the cache's
        return models.sample(patcher, "sd15", steps=8), called

    expected, theirs = run(cached(plain))
    before = engine_stats()["engine_calls"]
    got, ours = run(split_model(cached(plain), "0,1") if order == "before" else cached(split_model(plain, "0,1")))
    assert 0 < len(ours) < 8 and ours == theirs
    assert engine_stats()["engine_calls"] - before == len(ours)
    assert models.relative(got, expected) < 1e-3
    assert models.relative(got, models.sample(plain, "sd15", steps=8)) > 1e-3


@pytest.mark.usefixtures("on_engine")
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("calls_wrappers", [True, False])
def test_compiled_model_runs_on_the_engine_from_the_first_call(order, calls_wrappers):
    from comfy_api.torch_helpers.torch_compile import set_torch_compile_wrapper  # TorchCompileModel's

    def compiled(patcher):
        patcher = patcher.clone()
        set_torch_compile_wrapper(patcher, backend="eager")
        return patcher

    plain = models.sd15()
    if not calls_wrappers:

        class Own(type(plain.model.diffusion_model)):
            def forward(self, x, timesteps=None, context=None, y=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
                return self._forward(x, timesteps, context, y, control, transformer_options, **kwargs)

        plain.model.diffusion_model.__class__ = Own
    got = models.sample(split_model(compiled(plain), "0,1") if order == "before" else compiled(split_model(plain, "0,1")), "sd15")
    assert models.relative(got, models.sample(plain, "sd15")) < TOLERANCE


@pytest.mark.usefixtures("on_engine")
def test_wrappers_of_other_nodes_run_around_the_engine():
    seen = []

    def around(name):
        def wrapper(executor, *args, **kwargs):
            seen.append(name)
            return executor(*args, **kwargs) * 1.25

        return wrapper

    plain = models.sd15()
    kinds = comfy.patcher_extension.WrappersMP
    first = plain.clone()
    first.add_wrapper(kinds.DIFFUSION_MODEL, around("inner"))
    split = split_model(first, "0,1")
    split.add_wrapper(kinds.APPLY_MODEL, around("outer"))
    expected = first.clone()
    expected.add_wrapper(kinds.APPLY_MODEL, around("outer"))
    assert models.relative(models.sample(split, "sd15"), models.sample(expected, "sd15")) < TOLERANCE
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :] and "inner" in seen


# ---- what stands inside the model


def apply(node, *args):
    """What a node's function gives, of either kind of node."""
    function = node.execute if hasattr(node, "execute") else getattr(node(), node.FUNCTION)
    result = function(*args)
    return getattr(result, "args", result)[0]


def freeu(patcher):
    from comfy_extras.nodes_freelunch import FreeU_V2

    return apply(FreeU_V2, patcher, 1.3, 1.4, 0.9, 0.2)


def ip_adapter(patcher):
    """Image tokens beside the prompt's, as IPAdapter adds them."""
    generator = torch.Generator().manual_seed(5)
    k, v = (torch.randn(1, 4, 64, generator=generator) for _ in range(2))

    def replace(q, k_text, v_text, extra_options):
        from comfy.ldm.modules.attention import optimized_attention

        heads = extra_options["n_heads"]
        image = optimized_attention(q, k[..., : q.shape[-1]].expand(len(q), -1, -1), v[..., : q.shape[-1]].expand(len(q), -1, -1), heads)
        return optimized_attention(q, k_text, v_text, heads) + 0.7 * image

    patched = patcher.clone()
    patched.set_model_attn2_replace(replace, "middle", 0)
    return patched


def ip_adapter_and_freeu(patcher):
    return freeu(ip_adapter(patcher))


def hypertile(patcher):
    from comfy_extras.nodes_hypertile import HyperTile

    return apply(HyperTile, patcher, 64, 2, 0, False)


def tome(patcher):
    from comfy_extras.nodes_tomesd import TomePatchModel

    return apply(TomePatchModel, patcher, 0.4)


def deep_shrink(patcher):
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

    return apply(PatchModelAddDownscale, patcher, 2, 2.0, 0.0, 0.5, True, "bicubic", "bicubic")


def pag(patcher):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return apply(PerturbedAttentionGuidance, patcher, 2.0)


def sag(patcher):
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    return apply(SelfAttentionGuidance, patcher, 0.5, 2.0)


@pytest.mark.usefixtures("on_engine")
@pytest.mark.parametrize("node", [freeu, ip_adapter, ip_adapter_and_freeu, hypertile, tome, deep_shrink, pag, sag])
@pytest.mark.parametrize("order", ["before", "after"])
def test_patches_inside_a_unet_are_honoured(node, order):
    plain = models.sd15()

    def run(patcher):
        torch.manual_seed(3)
        return models.sample(patcher, "sd15", steps=3)

    expected = run(node(plain))
    got = run(split_model(node(plain), "0,1") if order == "before" else node(split_model(plain, "0,1")))
    assert models.relative(got, expected) < TOLERANCE
    assert models.relative(got, run(plain)) > 1e-3


@pytest.mark.usefixtures("on_engine")
def test_a_patch_is_given_what_comfyui_gives_it():
    seen = {}

    def patch(q, k, v, extra_options):
        told = {key: value for key, value in extra_options.items() if isinstance(value, (int, float, str, tuple, list)) and key != "uuids"}
        seen.setdefault(len(told), []).append((tuple(q.shape), tuple(k.shape), float(extra_options["sigmas"][0]), told))
        return q, k, v * 1.1

    def run(patcher):
        patched = patcher.clone()
        patched.set_model_attn1_patch(patch)
        result = models.sample(patched, "sd15", steps=2)
        got = dict(seen)
        seen.clear()
        return result, got

    plain = models.sd15()
    expected, theirs = run(plain)
    split = split_model(plain, "0,1")
    run(split)  # while it is captured the patch is asked too
    got, ours = run(split)
    assert models.relative(got, expected) < TOLERANCE
    assert ours == theirs


def test_a_patch_is_asked_with_tensors_on_the_device_of_the_sampling():
    """It may hold weights of its own there."""
    own = torch.empty(8, 8, device="meta")
    stand_in = StandIn(("patches", "attn1_patch", 0), lambda x: x @ own, {"sigmas": own}, lambda _: None)
    _, results = stand_in._ask((("l", (("t", 0),)), ("d", ())), [torch.empty(3, 8)])
    assert results == [((3, 8), "f32")]


@pytest.mark.usefixtures("on_engine")
def test_skipped_layers_of_a_dit_are_honoured():
    from comfy_extras import nodes_slg

    plain = models.sd3()

    def slg(patcher):
        return apply(nodes_slg.SkipLayerGuidanceDiT, patcher, 3.0, 0.0, 1.0, "0", "", 0.0)

    got, expected = both(slg(plain), lambda patcher: models.sample(patcher, "sd3"))
    assert models.relative(got, expected) < TOLERANCE
    assert models.relative(got, models.sample(plain, "sd3")) > 1e-3


@pytest.mark.usefixtures("on_engine")
def test_without_patches_nothing_is_called_out():
    split = split_model(models.sd15(), "0,1")
    models.sample(split, "sd15", steps=1)
    assert not any("callout" in note for note in split.split.report()["notes"])


def test_a_patch_whose_results_change_their_form_again_and_again_is_left_to_pytorch(caplog):
    caplog.set_level(logging.WARNING, logger="comfytp")
    counts = iter(range(1, 1000))

    def repeat(q, k, v, extra_options):
        """Keys that stand there several times change no result."""
        count = next(counts)
        return q, k.repeat(1, count, 1), v.repeat(1, count, 1)

    plain = models.sd15(transformer_depth=[0, 0], transformer_depth_output=[0] * 4)
    patched = split_model(plain, "0,1")
    patched.set_model_attn1_patch(repeat)
    assert models.relative(models.sample(patched, "sd15", steps=2), models.sample(plain, "sd15", steps=2)) < 1e-3
    assert caplog.text.count("changes its form again and again") == 1

# ---- what PyTorch runs


class TestFallBack:
    def run_and_warn(self, caplog, patcher, plain):
        caplog.set_level(logging.WARNING, logger="comfytp")
        expected = models.sample(plain, "sd15")
        caplog.clear()
        before = engine_stats()
        got = models.sample(patcher, "sd15")
        after = engine_stats()
        assert torch.equal(got, expected)
        assert after["torch_fallbacks"] - before["torch_fallbacks"] == 3 and after["engine_calls"] == before["engine_calls"]
        (record,) = caplog.records
        assert "plain PyTorch" in record.message
        return record.message

    def test_a_foreign_forward_on_a_part(self, caplog):
        plain = models.sd15()
        block = plain.model.diffusion_model.middle_block[0]
        block.forward = lambda x, emb: type(block).forward(block, x, emb) * 0.5
        message = self.run_and_warn(caplog, split_model(plain, "0,1"), plain)
        assert "'middle_block.0'" in message

    @pytest.mark.parametrize("before", [False, True], ids=["at the first call", "after calls of the engine"])
    def test_another_method_that_is_swapped_for_the_time_of_a_call(self, before, caplog):
        """As nodes do that skip steps: by a model_function_wrapper."""
        plain = models.flux()
        module = plain.model.diffusion_model

        def other(self, *args, **kwargs):
            return type(self).forward_orig(self, *args, **kwargs) * 0.5

        def swapped(apply_model, given):
            with unittest.mock.patch.object(module, "forward_orig", other.__get__(module)):
                return apply_model(given["input"], given["timestep"], **given["c"])

        wrapped = plain.clone()
        wrapped.set_model_unet_function_wrapper(swapped)
        if before:
            models.sample(split_model(plain, "0,1"), "flux")
        caplog.set_level(logging.WARNING, logger="comfytp")
        got, expected = (models.sample(patcher, "flux") for patcher in (split_model(wrapped, "0,1"), wrapped))
        assert torch.equal(got, expected) and "the forward_orig of" in caplog.text
        assert models.relative(models.sample(split_model(plain, "0,1"), "flux"), models.sample(plain, "flux")) < TOLERANCE

    def test_a_foreign_forward_on_the_whole_with_a_lora(self, caplog):
        plain = models.sd15()
        module = plain.model.diffusion_model
        module.forward = lambda *args, **kwargs: type(module).forward(module, *args, **kwargs) * 0.5
        patched = comfy.sd.load_lora_for_models(plain, None, lora_file(plain), 0.8, 0)[0]
        caplog.set_level(logging.WARNING, logger="comfytp")
        got, expected = both(patched, lambda patcher: models.sample(patcher, "sd15"))
        assert torch.equal(got, expected)

    def test_injections(self, caplog):
        from comfy.patcher_extension import PatcherInjection

        plain = models.sd15()
        patched = plain.clone()
        bias = plain.model.diffusion_model.out[2].bias

        def add(amount):
            def change(_):
                with torch.no_grad():
                    bias.add_(amount)

            return change

        patched.set_injections("theirs", [PatcherInjection(add(1.0), add(-1.0))])
        message = self.run_and_warn(caplog, split_model(patched, "0,1"), patched)
        assert "theirs injects" in message

    def test_an_object_patch_inside_the_model(self, caplog):
        plain = models.sd15()
        patched = plain.clone()
        patched.add_object_patch("diffusion_model.middle_block.1", models.sd15().model.diffusion_model.middle_block[1])
        patched.add_object_patch("diffusion_model.out.2", torch.nn.Conv2d(32, 4, 3, padding=1, bias=False))
        self.run_and_warn(caplog, split_model(patched, "0,1"), patched)


# ---- the built-in split by prompts


class TestWorkUnits:
    @pytest.fixture
    def multigpu(self):
        return pytest.importorskip("comfy.multigpu")

    def test_behind_ours_it_steps_aside(self, multigpu, monkeypatch, caplog):
        import comfy.model_management
        import comfytp.comfyui.patcher as ours

        monkeypatch.setattr(ours, "_warned", False)
        caplog.set_level(logging.WARNING, logger="comfytp")
        monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: [CPU, torch.device("meta")])
        plain = models.sd15()
        expected = models.sample(plain, "sd15")
        both = multigpu.create_multigpu_deepclones(split_model(plain, "0,1"), 2)
        monkeypatch.undo()
        assert models.relative(models.sample(both, "sd15"), expected) < TOLERANCE
        assert caplog.text.count("MultiGPU CFG Split steps aside") == 1

    def test_before_ours_it_steps_aside(self, multigpu, monkeypatch, caplog):
        import comfytp.comfyui.patcher as ours

        monkeypatch.setattr(ours, "_warned", False)
        caplog.set_level(logging.WARNING, logger="comfytp")
        plain = models.sd15()
        expected = models.sample(plain, "sd15")
        units = plain.clone()
        second = models.sd15()
        second.is_multigpu_base_clone = True
        units.set_additional_models("multigpu", [second])
        split = split_model(units, "0,1")
        assert models.relative(models.sample(split, "sd15"), expected) < TOLERANCE
        assert "multigpu" not in split.additional_models and "multigpu" in units.additional_models
        assert caplog.text.count("MultiGPU CFG Split steps aside") == 1
