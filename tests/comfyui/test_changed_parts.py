"""What changes on a model's parts after calls is seen at the next one, though they are looked at only when something differs."""

import logging

import models
import pytest
import torch

from comfytp.comfyui import engine_stats, split_model


def _halved(part):
    return lambda *args, **kwargs: type(part).forward(part, *args, **kwargs) * 0.5


def own_forward(unet):
    unet.middle_block[0].forward = _halved(unet.middle_block[0])


def own_forward_for_another_attribute(unet):
    """As many attributes as before."""
    block = unet.middle_block[0]
    del block.use_conv  # its forward reads it nowhere
    block.forward = _halved(block)


def part_with_own_forward(unet):
    part = models._fill(torch.nn.Conv2d(32, 4, 3, padding=1))
    part.forward = _halved(part)
    unet.out[2] = part


def own_forward_within_a_new_part(unet):
    unet.out[2] = torch.nn.Sequential(unet.out[2])
    unet.out[2][0].forward = _halved(unet.out[2][0])


def hook(unet):
    unet.middle_block[0].register_forward_hook(lambda part, args, output: output * 0.5)


def pre_hook(unet):
    unet.out[2].register_forward_pre_hook(lambda part, args: (args[0] * 0.5,))


def hook_in_another_dict(unet):
    """As code leaves it that takes all hooks away."""
    unet.middle_block[0]._forward_hooks = type(unet.middle_block[0]._forward_hooks)()
    hook(unet)


@pytest.mark.parametrize(
    "change, told",
    [
        (own_forward, "the forward of 'middle_block.0'"),
        (own_forward_for_another_attribute, "the forward of 'middle_block.0'"),
        (part_with_own_forward, "the forward of 'out.2'"),
        (own_forward_within_a_new_part, "the forward of 'out.2.0'"),
        (hook, "hook stands on 'middle_block.0'"),
        (pre_hook, "hook stands on 'out.2'"),
        (hook_in_another_dict, "hook stands on 'middle_block.0'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_change_after_calls_that_found_nothing(change, told, caplog):
    """The reference is another model, as a run by PyTorch leaves marks on layers, for which a look at all of them is taken."""
    reference, plain = models.sd15(), models.sd15()
    change(reference.model.diffusion_model)
    expected = models.sample(reference, "sd15")
    split = split_model(plain, "0,1")
    without = models.sample(split, "sd15")
    before = engine_stats()
    caplog.set_level(logging.WARNING, logger="comfytp")
    caplog.clear()
    change(plain.model.diffusion_model)
    assert torch.equal(models.sample(split, "sd15"), expected)
    after = engine_stats()
    assert after["torch_fallbacks"] - before["torch_fallbacks"] == 3 and after["engine_calls"] == before["engine_calls"]
    assert told in caplog.text
    assert models.relative(without, expected) > 1e-2


def attribute(unet):
    unet.out[0].eps = 0.5


def other_class(unet):
    part = unet.middle_block[1].transformer_blocks[0].norm1
    base = type(part)
    part.__class__ = type("Scaled", (base,), {"forward": lambda self, x: base.forward(self, x) * 0.5})


def other_part(unet):
    """With weights of its own, under the same names and of the same shapes."""
    unet.out[2] = models._fill(type(unet.out[2])(32, 4, 3, padding=1), seed=5)


def part_before_another(unet):
    unet.out[2] = torch.nn.Sequential(torch.nn.Tanh(), unet.out[2])


@pytest.mark.parametrize("change", [attribute, other_class, other_part, part_before_another], ids=lambda change: change.__name__)
def test_a_change_that_the_engine_can_follow(change, on_engine):
    plain = models.sd15()
    split = split_model(plain, "0,1")
    without = models.sample(split, "sd15")
    change(plain.model.diffusion_model)
    expected = models.sample(plain, "sd15")
    assert models.relative(without, expected) > 1e-3
    before = engine_stats()["captures"]
    for _ in range(2):
        assert models.relative(models.sample(split, "sd15"), expected) < 1e-4
    # A part that differs in its weights alone may need none: that hangs on what ComfyUI's layers are made of.
    assert engine_stats()["captures"] - before in ((0, 1) if change is other_part else (1,))


def test_an_attribute_that_is_put_back_needs_no_capture(on_engine):
    plain = models.sd15()
    split = split_model(plain, "0,1")
    before = models.sample(split, "sd15")
    norm = plain.model.diffusion_model.out[0]
    eps = norm.eps
    norm.eps = 0.5
    changed = models.sample(split, "sd15")
    captures = engine_stats()["captures"]
    for value, expected in ((eps, before), (0.5, changed)):
        norm.eps = value
        assert torch.equal(models.sample(split, "sd15"), expected)
    assert engine_stats()["captures"] == captures


def test_an_attribute_that_changes_before_every_call_is_left_to_pytorch(caplog, monkeypatch):
    monkeypatch.setattr("comfytp.comfyui.split._MOST_CHANGES", 1)
    plain = models.sd15()
    split = split_model(plain, "0,1")
    norm = plain.model.diffusion_model.out[0]

    def count(function, arguments):
        norm.eps += 0.01
        return function(arguments["input"], arguments["timestep"], **arguments["c"])

    split.set_model_unet_function_wrapper(count)
    caplog.set_level(logging.WARNING, logger="comfytp")
    before = engine_stats()
    models.sample(split, "sd15", steps=4)
    after = engine_stats()
    assert after["torch_fallbacks"] > before["torch_fallbacks"]
    assert "attributes of its parts change before every call" in caplog.text


def test_what_is_taken_away_again_is_run_by_the_engine_again():
    plain = models.sd15()
    split = split_model(plain, "0,1")
    before = models.sample(split, "sd15")
    part = plain.model.diffusion_model.middle_block[0]
    for _ in range(2):
        handle = part.register_forward_hook(lambda part, args, output: output * 0.5)
        expected = models.sample(plain, "sd15")
        assert torch.equal(models.sample(split, "sd15"), expected)
        handle.remove()
        fallbacks = engine_stats()["torch_fallbacks"]
        assert torch.equal(models.sample(split, "sd15"), before)
        assert engine_stats()["torch_fallbacks"] == fallbacks
