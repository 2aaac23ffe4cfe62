"""LoRAs, hooks and keyframes reach the devices, and only what they change moves: checks 6, 7 and 8 of the twenty."""

import comfy.hooks
import comfy.lora
import comfy.sd
import models
import pytest
import torch
from test_families import TOLERANCE

from comfytp.comfyui import engine_stats, split_model

pytestmark = pytest.mark.usefixtures("on_engine")
ADAPTED = "attn1.to_q"


def uploaded(action):
    before = engine_stats()["uploaded_bytes"]
    result = action()
    return result, engine_stats()["uploaded_bytes"] - before


def lora_file(patcher, contains=ADAPTED, seed=3):
    """As safetensors hold a LoRA for the UNet: tensors by name."""
    generator = torch.Generator().manual_seed(seed)
    weights, tensors = patcher.model.state_dict(), {}
    for key in models.linear_keys(patcher, contains):
        out, inner = weights[key].shape
        for name, shape in (("lora_up", (out, 2)), ("lora_down", (2, inner))):
            tensors[f"{key.removesuffix('.weight')}.{name}.weight"] = torch.randn(shape, generator=generator) * 0.4
    return tensors


def test_a_lora_gives_the_same_before_and_after_the_node():
    plain = models.sd15()
    tensors = lora_file(plain)
    with_lora = comfy.sd.load_lora_for_models(plain, None, tensors, 0.8, 0)[0]
    expected = models.sample(with_lora, "sd15")
    before = models.sample(split_model(with_lora, "0,1"), "sd15")
    after = models.sample(comfy.sd.load_lora_for_models(split_model(plain, "0,1"), None, tensors, 0.8, 0)[0], "sd15")
    assert torch.equal(before, after)
    assert models.relative(before, expected) < TOLERANCE
    assert models.relative(before, models.sample(plain, "sd15")) > 0.01


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_change_of_strength_moves_only_the_keys_it_touches(place):
    plain = models.sd15()
    tensors = lora_file(plain)
    touched = sum(plain.model.state_dict()[key].nbytes for key in models.linear_keys(plain, ADAPTED))

    def run(strength):
        if place == "before":
            patched = split_model(comfy.sd.load_lora_for_models(plain, None, tensors, strength, 0)[0], "0,1")
        else:
            patched = comfy.sd.load_lora_for_models(split_model(plain, "0,1"), None, tensors, strength, 0)[0]
        return models.sample(patched, "sd15", steps=1)

    _, everything = uploaded(lambda: run(0.5))
    captures = engine_stats()["captures"]
    changed, moved = uploaded(lambda: run(0.9))
    assert everything > 10 * touched and moved == touched
    assert engine_stats()["captures"] == captures
    expected = models.sample(comfy.sd.load_lora_for_models(plain, None, tensors, 0.9, 0)[0], "sd15", steps=1)
    assert models.relative(changed, expected) < TOLERANCE
    _, moved = uploaded(lambda: run(0.9))
    assert moved in (0, touched), "the file may be read anew"
    _, moved = uploaded(lambda: models.sample(split_model(plain, "0,1"), "sd15", steps=1))
    assert moved == touched, "without the LoRA the originals come back"


def test_two_loras_of_which_one_changes():
    plain = models.sd15()
    first = comfy.sd.load_lora_for_models(plain, None, lora_file(plain, "attn1.to_k"), 0.7, 0)[0]
    second = lora_file(plain, "attn2.to_v")
    touched = sum(plain.model.state_dict()[key].nbytes for key in models.linear_keys(plain, "attn2.to_v"))

    def patched(strength):
        return comfy.sd.load_lora_for_models(first, None, second, strength, 0)[0]

    models.sample(split_model(patched(0.3), "0,1"), "sd15", steps=1)
    got, moved = uploaded(lambda: models.sample(split_model(patched(-0.6), "0,1"), "sd15", steps=1))
    assert moved == touched
    assert models.relative(got, models.sample(patched(-0.6), "sd15", steps=1)) < TOLERANCE


def hooked(patcher, tensors, strengths):
    """A prompt with a LoRA hook whose keyframes have these strengths, one after the other."""
    hooks = comfy.hooks.create_hook_lora(tensors, strength_model=1.0, strength_clip=0.0)
    if len(strengths) > 1:
        keyframes = comfy.hooks.HookKeyframeGroup()
        for i, strength in enumerate(strengths):
            keyframes.add(comfy.hooks.HookKeyframe(strength, start_percent=i / len(strengths), guarantee_steps=1))
        hooks.set_keyframes_on_hooks(keyframes)
    return comfy.hooks.set_hooks_for_conditioning(models.prompt("sd15", 1), hooks)


@pytest.mark.parametrize("strengths", [(0.8,), (0.9, 0.3, 0.0)], ids=["fixed", "keyframes"])
def test_hook_loras_follow_their_keyframes(strengths):
    plain = models.sd15()
    tensors = lora_file(plain)
    expected = models.sample(plain, "sd15", steps=4, positive=hooked(plain, tensors, strengths))
    split = split_model(plain, "0,1")
    got = models.sample(split, "sd15", steps=4, positive=hooked(split, tensors, strengths))
    assert models.relative(got, expected) < TOLERANCE
    assert models.relative(got, models.sample(plain, "sd15", steps=4)) > 1e-3
    # What the hooks did is over with the run.
    assert models.relative(models.sample(split, "sd15"), models.sample(plain, "sd15")) < TOLERANCE


def test_hooks_on_both_prompts_alternate_within_a_step():
    plain = models.sd15()
    tensors, others = lora_file(plain), lora_file(plain, "attn2.to_q", seed=8)
    negative = comfy.hooks.set_hooks_for_conditioning(models.prompt("sd15", 2), comfy.hooks.create_hook_lora(others, 0.7, 0.0))
    run = {"steps": 2, "negative": negative}
    expected = models.sample(plain, "sd15", positive=hooked(plain, tensors, (0.8,)), **run)
    split = split_model(plain, "0,1")
    assert models.relative(models.sample(split, "sd15", positive=hooked(split, tensors, (0.8,)), **run), expected) < TOLERANCE


def test_a_diff_patch_and_a_bias_patch():
    plain = models.sd15()
    key, bias = "diffusion_model.out.2.weight", "diffusion_model.out.2.bias"
    patched = plain.clone()
    generator = torch.Generator().manual_seed(1)
    for name in (key, bias):
        patched.add_patches({name: ("diff", (torch.randn(plain.model.state_dict()[name].shape, generator=generator) * 0.1,))}, 0.5)
    assert models.relative(models.sample(split_model(patched, "0,1"), "sd15"), models.sample(patched, "sd15")) < TOLERANCE


@pytest.mark.skipif(not hasattr(comfy.lora, "calculate_shape"), reason="came later")
def test_a_lora_that_resizes_a_weight():
    """As Flux' control LoRAs widen the input layer."""
    plain = models.sd15()
    key = "diffusion_model.input_blocks.0.0.weight"
    wide = torch.randn(32, 8, 3, 3, generator=torch.Generator().manual_seed(1)) * 0.1
    patched = plain.clone()
    patched.add_patches({key: ("diff", (wide, {"pad_weight": True}))}, 1.0)
    more = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(2))

    def run(patcher):
        patcher = patcher.clone()
        patcher.set_model_unet_function_wrapper(lambda apply, p: apply(p["input"], p["timestep"], **{**p["c"], "c_concat": more.repeat(len(p["input"]), 1, 1, 1)}))
        return models.sample(patcher, "sd15")

    split = split_model(patched, "0,1")
    assert models.relative(run(split), run(patched)) < TOLERANCE
    assert models.relative(models.sample(split_model(plain, "0,1"), "sd15"), models.sample(plain, "sd15")) < TOLERANCE
