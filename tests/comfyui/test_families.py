"""A model of each family, sampled with CFG over several devices, gives what the plain model gives.

Of the twenty checks: 1 SD1.5, 2 base and refiner, 3 SD3.5, 4 Flux with prompts of unequal lengths, 5 Wan's timestep a frame, 15 what
the fullest device holds."""

import comfy.ops
import models
import pytest
import torch

from comfytp.comfyui import modes, split_model

TOLERANCE = 1e-4  # of latents after a few steps


@pytest.mark.usefixtures("on_engine")
class TestEveryFamily:
    @pytest.mark.parametrize("family", list(models.FAMILIES))
    @pytest.mark.parametrize(("ids", "mode"), [("0,1", "balanced"), ("0,1,2", "balanced"), ("0,1", "fast"), ("1,0", "aggressive")])
    def test_gives_what_the_plain_model_gives(self, family, ids, mode):
        plain = models.FAMILIES[family]()
        expected = models.sample(plain, family)
        assert models.relative(models.sample(split_model(plain, ids, memory_mode=mode), family), expected) < TOLERANCE

    @pytest.mark.parametrize("family", list(models.FAMILIES))
    def test_one_sample_is_divided_by_its_rows_or_tokens(self, family):
        plain = models.FAMILIES[family]()
        expected = models.sample(plain, family, steps=1, cfg=1.0)
        flops = {}
        for ids in ("0", "0,1"):
            split = split_model(plain, ids, memory_mode="fast")
            assert models.relative(models.sample(split, family, steps=1, cfg=1.0), expected) < TOLERANCE
            flops[ids] = max(device["flops"] for device in split.split.report()["devices"])
        assert flops["0,1"] < 0.65 * flops["0"]

    def test_prompts_of_unequal_lengths(self):
        for family in ("sd15", "flux"):
            plain = models.FAMILIES[family]()
            prompts = {"positive": models.prompt(family, 1, tokens=154), "negative": models.prompt(family, 2, tokens=77)}
            expected = models.sample(plain, family, **prompts)
            assert models.relative(models.sample(split_model(plain, "0,1"), family, **prompts), expected) < TOLERANCE

    def test_a_timestep_for_each_frame(self):
        """Wan with a noise mask over frames gives its model two-dimensional timesteps."""
        plain = models.wan()
        frames, tokens = 2, models.noise("wan", 2)
        t = torch.tensor([[700.0, 0.0], [500.0, 0.0]])
        context = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(1))
        split = split_model(plain, "0,1")
        with torch.inference_mode():
            expected = plain.model.diffusion_model(tokens, t, context=context, transformer_options={})
            got = through_the_node(split, tokens, t, context=context)
        assert expected.shape[2] == frames and models.relative(got, expected) < TOLERANCE

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    def test_half_precision_is_as_near_to_f32_as_the_plain_model(self, dtype):
        exact = models.sample(models.sd15(), "sd15")
        plain = models.sd15(dtype=dtype)
        plain.model.model_config.set_inference_dtype(dtype, None)
        split = split_model(plain, "0,1")
        got = models.sample(split, "sd15")
        assert models.relative(got, exact) < 1.1 * models.relative(models.sample(plain, "sd15"), exact)
        assert max(split.split.stats()["allocated_weight_bytes"]) < 0.6 * sum(p.nbytes for p in plain.model.diffusion_model.parameters())

    @pytest.mark.skipif(not hasattr(comfy.ops, "mixed_precision_ops"), reason="quantised layers came later")
    def test_fp8_layers(self):
        plain = models.flux_fp8()
        mode = {"grad_mode": torch.no_grad}  # ComfyUI cannot move quantised layers in inference mode
        expected = models.sample(plain, "flux", **mode)
        assert models.relative(models.sample(split_model(plain, "0,1"), "flux", **mode), expected) < TOLERANCE

    @pytest.mark.skipif(not hasattr(comfy.ops, "scaled_fp8_ops"), reason="quantised layers came instead")
    def test_scaled_fp8_layers_of_older_versions(self):
        plain, fast = models.flux_scaled_fp8(False), models.flux_scaled_fp8(True)
        expected = models.sample(plain, "flux")
        for patcher in (plain, fast):
            split = split_model(patcher, "0,1")
            assert models.relative(models.sample(split, "flux"), expected) < TOLERANCE
            stored = sum(p.nbytes for p in plain.model.diffusion_model.parameters())
            assert sum(split.split.stats()["allocated_weight_bytes"]) < 1.2 * stored

    def test_sdxl_base_and_refiner_one_after_the_other(self):
        base, refiner = models.sdxl(), models.sdxl_refiner()
        prompts = {"positive": models.prompt("sdxl", 1), "negative": models.prompt("sdxl", 2)}

        def both(first, second):
            latent = models.sample(first, "sdxl", steps=4, last_step=2, force_full_denoise=False, **prompts)
            return models.sample(second, "sdxl", steps=4, start_step=2, disable_noise=True, latent=latent, **prompts)

        expected = both(base, refiner)
        assert models.relative(both(split_model(base, "0,1"), split_model(refiner, "0,1")), expected) < TOLERANCE

    def test_other_sizes_and_batches_in_between(self):
        plain = models.sd15()
        split = split_model(plain, "0,1")
        for shape in ((1, 4, 16, 24), (3, 4, 16, 24), (1, 4, 24, 8), (1, 4, 16, 24)):
            latent = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            expected = models.sample(plain, "sd15", noise=latent, cfg=1.0, steps=2)
            assert models.relative(models.sample(split, "sd15", noise=latent, cfg=1.0, steps=2), expected) < TOLERANCE


def through_the_node(split, x, t, **kwargs):
    """One call of the diffusion model as a sampler makes it."""
    import comfy.patcher_extension

    options = {"wrappers": comfy.patcher_extension.copy_nested_dicts(split.wrappers)}
    split.pre_run()
    try:
        return split.model.diffusion_model(x, t, transformer_options=options, **kwargs)
    finally:
        split.cleanup()


@pytest.mark.parametrize("kernel", ["attention_basic", "attention_sub_quad", "attention_split"])
def test_attention_is_one_op_whatever_kernel_comfyui_uses(kernel, monkeypatch):
    """Scores that are written out would need memory that grows with the square of the tokens."""
    import comfy.ldm.modules.attention as attention

    from comfytp.comfyui.engine import Engine

    texts, compile = [], Engine.compile
    monkeypatch.setattr(Engine, "compile", lambda self, graph: texts.append(str(graph)) or compile(self, graph))
    monkeypatch.setattr(attention, "optimized_attention", getattr(attention, kernel))
    models.sample(split_model(models.sd15(), "0,1"), "sd15", steps=1)
    assert texts[0].count(" = attention(") == 14 and " = softmax(" not in texts[0]
    assert attention.optimized_attention is getattr(attention, kernel)


@pytest.mark.parametrize("family", list(models.FAMILIES))
def test_no_device_holds_the_whole(family):
    plain = models.FAMILIES[family]()
    split = split_model(plain, "0,1")
    models.sample(split, family, steps=1)
    total = sum(p.nbytes for p in plain.model.diffusion_model.parameters())
    held = split.split.stats()["allocated_weight_bytes"]
    assert max(held) <= 0.6 * total and sum(held) <= 1.1 * total


def test_the_modes_have_different_plans():
    plain = models.sd15()
    total = sum(p.nbytes for p in plain.model.diffusion_model.parameters())
    held, active, collectives = {}, {}, {}
    latent = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(1))  # activations count beside the weights in use
    for mode in ("fast", "balanced", "aggressive"):
        split = split_model(plain, "0,1", memory_mode=mode)
        models.sample(split, "sd15", steps=1, noise=latent)
        report = split.split.report()["devices"]
        held[mode] = max(device["weight_bytes"] for device in report)
        active[mode] = max(device["activation_bytes"] for device in report)
        collectives[mode] = set().union(*(device["collectives"] for device in report))
    assert held["fast"] >= 0.95 * total and held["balanced"] < 0.6 * total and held["aggressive"] < 0.6 * total
    assert not collectives["fast"] and "all_reduce" in collectives["balanced"] and "fetch_weight" in collectives["aggressive"]
    assert active["aggressive"] < active["balanced"]


def test_fast_mode_splits_the_image_where_there_is_one_sample():
    split = split_model(models.sd15(), "0,1", memory_mode="fast")
    meshes = []
    for cfg in (4.0, 1.0):
        models.sample(split, "sd15", steps=1, cfg=cfg)
        meshes.append(split.split.report()["mesh"])
        flops = [device["flops"] for device in split.split.report()["devices"]]
        assert max(flops) < 1.2 * min(flops)
    assert meshes == ["batch=2", "patch=2"]
    whole = sum(p.nbytes for p in split.model.diffusion_model.parameters())
    assert max(split.split.stats()["allocated_weight_bytes"]) <= whole, "both over the same weights"


def test_fast_mode_stores_whole_weights_only_where_they_fit():
    assert modes.layout("fast", 2, 1000, 1000).meshes == ("batch=2", "patch=2")
    assert modes.layout("fast", 4, 1000, None).meshes == ("batch=4", "batch=2,patch=2", "patch=4")
    assert modes.layout("fast", 2, 1001, 1000) == modes.layout("balanced", 2, 1001, 1000)
