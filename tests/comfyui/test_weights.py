"""Reading a patcher's weights key by key gives what ComfyUI itself loads, bit by bit, and changes nothing."""

import comfy.hooks
import comfy.model_management
import models
import pytest
import torch

from comfytp.comfyui.patched_weights import PREFIX, SCALE, PatchedWeights, Unreadable
from comfytp.comfyui.site import _ScaledLinear

ADAPTED = ("attn1.to_q", "ff.net", "in_layers.2", "emb_layers.1")


def whole(weights, key):
    shape = weights.tensors()[key][1]
    return weights.read(key, (0,) * len(shape), shape)


def loaded(patcher):
    """What the model holds once ComfyUI has loaded the patcher."""
    comfy.model_management.load_models_gpu([patcher])
    found = {k: v.detach().clone() for k, v in patcher.model.state_dict().items() if k.startswith(PREFIX)}
    comfy.model_management.unload_all_models()
    return found


def with_lora(patcher, strength, seed=3, keys=None):
    patched = patcher.clone()
    keys = [k for k in models.linear_keys(patcher) if any(part in k for part in keys or ADAPTED)]
    assert patched.add_patches(models.lora(patcher, keys, seed=seed), strength)
    return patched


@pytest.fixture
def base():
    return models.sd15()


def test_unpatched_weights_are_the_models(base):
    weights = PatchedWeights(base)
    state = {k: v for k, v in base.model.state_dict().items() if k.startswith(PREFIX)}
    assert set(weights.tensors()) == set(state)
    for key, value in state.items():
        assert torch.equal(whole(weights, key), value), key


def test_loras_give_what_comfyui_loads(base):
    patched = with_lora(with_lora(base, 0.7), -0.4, seed=9, keys=("attn1.to_q", "attn2.to_v"))
    weights = PatchedWeights(patched)
    read = {key: whole(weights, key) for key in weights.tensors()}
    expected = loaded(patched)
    assert not torch.equal(read[key := next(iter(weights.signatures()))], base.model.state_dict()[key])
    for key, value in expected.items():
        assert torch.equal(read[key], value), key


def test_a_plain_branch_that_is_loaded_makes_no_difference(base):
    """Its patches stand in the model while it is loaded: the originals are in its backup."""
    patched = with_lora(base, 0.7)
    expected = {key: whole(PatchedWeights(patched), key) for key in PatchedWeights(patched).tensors()}
    other = with_lora(base, 2.0, seed=5)
    comfy.model_management.load_models_gpu([other])
    for key, value in expected.items():
        assert torch.equal(whole(PatchedWeights(patched), key), value), key


def test_parts_are_parts_of_the_whole(base):
    patched = with_lora(base, 0.7)
    weights = PatchedWeights(patched)
    for key in (next(iter(weights.signatures())), PREFIX + "input_blocks.0.0.weight", PREFIX + "out.2.bias"):
        full = whole(weights, key)
        starts = tuple(size // 3 for size in full.shape)
        assert torch.equal(weights.read(key, starts, tuple(full.shape)), full[tuple(slice(s, None) for s in starts)])


def test_reading_changes_nothing(base):
    before = {k: (v.data_ptr(), v.clone()) for k, v in base.model.state_dict().items()}
    patched = with_lora(base, 0.7)
    weights = PatchedWeights(patched)
    for key in weights.tensors():
        whole(weights, key)
    for key, value in base.model.state_dict().items():
        assert value.data_ptr() == before[key][0] and torch.equal(value, before[key][1])
    assert not patched.backup


def test_only_what_changed_has_another_signature(base):
    first = with_lora(with_lora(base, 0.7), 0.5, seed=9, keys=("attn2.to_v",))
    second = with_lora(with_lora(base, 0.7), 0.6, seed=9, keys=("attn2.to_v",))
    a, b = PatchedWeights(first).signatures(), PatchedWeights(second).signatures()
    assert a == PatchedWeights(first.clone()).signatures()
    # The LoRAs were made anew, so their tensors are others: all keys they touch differ.
    assert {k for k in a if a[k] != b[k]} == set(a)
    shared = with_lora(base, 0.7)
    touched = [k for k in models.linear_keys(base) if "attn2.to_v" in k]
    tensors = models.lora(base, touched, seed=9)
    one, two = shared.clone(), shared.clone()
    one.add_patches(tensors, 0.5)
    two.add_patches(tensors, 0.6)
    a, b = PatchedWeights(one).signatures(), PatchedWeights(two).signatures()
    assert {k for k in a if a[k] != b[k]} == set(touched)
    assert PatchedWeights(one).state() != PatchedWeights(two).state()


def test_a_signature_keeps_no_lora_alive(base):
    import gc
    import weakref

    patched = base.clone()
    tensors = models.lora(base, models.linear_keys(base, "attn2.to_v"))
    patched.add_patches(tensors, 0.5)
    signatures = PatchedWeights(patched).signatures()
    assert signatures
    alive = weakref.ref(next(iter(tensors.values())).weights[0])
    del tensors, patched
    gc.collect()
    assert alive() is None


def test_hooks_on_top_of_a_lora_give_what_comfyui_patches(base):
    patched = with_lora(base, 0.7)
    hooks = comfy.hooks.HookGroup()
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=1.0)
    hooks.add(hook)
    keys = models.linear_keys(base, "attn1.to_q") + models.linear_keys(base, "attn1.to_v")
    patched.add_hook_patches(hook, models.lora(base, keys, seed=21), 0.8)
    hook.hook_keyframe.add(comfy.hooks.HookKeyframe(strength=0.5))

    weights = PatchedWeights(patched)
    without = weights.state()
    patched.current_hooks = hooks
    assert weights.state() != without
    read = {key: whole(weights, key) for key in weights.signatures()}
    assert set(keys) <= set(read)
    patched.current_hooks = None

    comfy.model_management.load_models_gpu([patched])
    patched.patch_hooks(hooks)
    for key, value in read.items():
        assert torch.equal(value, base.model.state_dict()[key]), key
    # The originals are found also while hooks stand in the model.
    for key, value in read.items():
        assert torch.equal(whole(PatchedWeights(patched), key), value), key
    patched.clean_hooks()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaled_sums_stay_in_the_range_of_the_dtype(dtype):
    weight, scale = torch.full((8, 512), 448.0).to(torch.float8_e4m3fn), torch.tensor(0.001)
    x = torch.ones(4, 512)
    y = _ScaledLinear(weight, "scale_weight", scale, None)(x.to(dtype))
    assert y.dtype is dtype and torch.allclose(y.float(), torch.nn.functional.linear(x, weight.float() * scale), rtol=0.01)


@pytest.mark.skipif(not hasattr(__import__("comfy.ops").ops, "mixed_precision_ops"), reason="quantised layers came later")
class TestQuantised:
    def test_fp8_stays_fp8_with_its_scale(self):
        patcher = models.flux_fp8()
        weights = PatchedWeights(patcher)
        key = PREFIX + "single_blocks.0.linear1.weight"
        assert weights.tensors()[key][0] is torch.float8_e4m3fn
        numbers, scale = whole(weights, key), whole(weights, key + SCALE)
        assert numbers.dtype is torch.float8_e4m3fn and scale.shape == (1,)
        layer = patcher.model.diffusion_model.single_blocks[0].linear1
        assert torch.equal(numbers.float() * scale, layer.weight.dequantize())

    def test_a_lora_gives_what_comfyui_loads(self):
        patcher = models.flux_fp8()
        patched = patcher.clone()
        keys = [PREFIX + f"{name}.weight" for name in ("single_blocks.0.linear1", "single_blocks.1.linear1")]
        patched.add_patches({k: ("diff", (torch.randn(256 + 192, 64, generator=torch.Generator().manual_seed(1)) * 0.1,)) for k in keys}, 0.6)
        weights = PatchedWeights(patched)
        assert {keys[0], keys[0] + SCALE, keys[1]} <= set(weights.signatures())
        numbers, scale, other = whole(weights, keys[0]), whole(weights, keys[0] + SCALE), whole(weights, keys[1])
        comfy.model_management.load_models_gpu([patched])
        blocks = patcher.model.diffusion_model.single_blocks
        assert torch.equal(numbers.float() * scale, blocks[0].linear1.weight.dequantize())
        assert torch.equal(other, blocks[1].linear1.weight)


def test_a_foreign_kind_of_tensor_is_named(base):
    class Foreign(torch.Tensor):
        pass

    linear = base.model.diffusion_model.time_embed[0]
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Foreign), requires_grad=False)
    with pytest.raises(Unreadable, match=r"diffusion_model.time_embed.0.weight is a Foreign"):
        PatchedWeights(base).tensors()
