"""Loading, evicting, cancelling, saving, and other branches over the same model.

Of the twenty checks: 16 TestMemory, 17 TestBranches, 18 TestCancel, 19 saving; of 20 the fifty runs, previews and other devices."""

import copy
import gc
import logging
import threading
import time

import comfy.model_management as management
import comfy.sd
import models
import psutil
import pytest
import torch
from test_families import TOLERANCE
from test_patches import lora_file

import comfytp
from comfytp.comfyui import engine_stats, split_model
from comfytp.comfyui.engine import Engine
from comfytp.comfyui.site import Site
from comfytp.comfyui.split import SplitModel, _splits
from comfytp.importer.key import module_hash


def held(split):
    stats = split.split.stats()
    return sum(stats["allocated_weight_bytes"]) + sum(stats["allocated_activation_bytes"])


@pytest.mark.usefixtures("on_engine")
class TestMemory:
    def test_comfyui_loads_nothing_and_sees_what_the_engine_holds(self):
        plain = models.sd15()
        split = split_model(plain, "0,1")
        models.sample(split, "sd15", steps=1)
        assert plain.model.model_loaded_weight_memory == 0
        shown = sum(model.loaded_size() for model in management.loaded_models() if model is not None)
        assert shown == held(split) > 0

    def test_unloading_frees_every_device_and_the_next_run_works(self):
        plain = models.sd15()
        expected = models.sample(plain, "sd15")
        split = split_model(plain, "0,1")
        for _ in range(2):
            assert models.relative(models.sample(split, "sd15"), expected) < TOLERANCE
            assert held(split) > 0
            management.unload_all_models()  # the button
            assert held(split) == 0

    def test_eviction_in_mid_sampling_is_made_up_for(self):
        plain = models.sd15()
        expected = models.sample(plain, "sd15")
        split = split_model(plain, "0,1")
        got = models.sample(split, "sd15", callback=lambda *_: management.unload_all_models())
        assert models.relative(got, expected) < TOLERANCE
        assert held(split) == 0, "the last callback came behind the last call"

    def test_the_weights_go_with_the_model(self):
        plain = models.sd15()
        split = split_model(plain, "0,1")
        models.sample(split, "sd15", steps=1)
        count = len(_splits)
        del plain, split
        gc.collect()
        assert len(_splits) == count - 1

    def test_the_same_node_run_again_finds_its_weights(self):
        plain = models.sd15()
        models.sample(split_model(plain, "0,1"), "sd15", steps=1)
        gc.collect()
        before = engine_stats()["uploaded_bytes"]
        models.sample(split_model(plain, "0,1"), "sd15", steps=1)
        assert engine_stats()["uploaded_bytes"] == before


@pytest.mark.usefixtures("on_engine")
class TestBranches:
    def test_a_plain_branch_is_the_same_bits_before_after_and_between(self):
        plain = models.sd15()
        weights = {k: v.clone() for k, v in plain.model.state_dict().items()}
        with_lora = comfy.sd.load_lora_for_models(plain, None, lora_file(plain), 0.8, 0)[0]
        first, first_lora = models.sample(plain, "sd15"), models.sample(with_lora, "sd15")
        split, split_lora = split_model(plain, "0,1"), split_model(with_lora, "0,1")
        for _ in range(2):
            assert models.relative(models.sample(split, "sd15"), first) < TOLERANCE
            assert torch.equal(models.sample(with_lora, "sd15"), first_lora)
            assert models.relative(models.sample(split_lora, "sd15"), first_lora) < TOLERANCE
            assert torch.equal(models.sample(plain, "sd15"), first)
        management.unload_all_models()
        for key, value in plain.model.state_dict().items():
            assert torch.equal(value, weights[key]), key

    def test_two_splits_of_one_model_over_other_devices(self):
        plain = models.sd15()
        expected = models.sample(plain, "sd15")
        for ids in ("0", "1,0", "2,3", "0,1"):
            assert models.relative(models.sample(split_model(plain, ids), "sd15"), expected) < TOLERANCE

    def test_the_node_twice_in_a_row_is_the_second(self):
        plain = models.sd15()
        expected = models.sample(plain, "sd15")
        twice = split_model(split_model(plain, "0,1"), "0,1,2")
        assert len(twice.split.devices) == 3
        assert models.relative(models.sample(twice, "sd15"), expected) < TOLERANCE
        assert len(twice.split.stats()["allocated_weight_bytes"]) == 3


def test_what_a_plain_branch_has_loaded_is_no_part_of_a_capture():
    """Neither the marks that loading leaves on layers, nor the patches that it hangs on them where memory is short."""
    plain = models.sd15()
    site = Site(plain.model.diffusion_model, "_forward", {})
    fresh = module_hash(site)
    models.sample(plain, "sd15", steps=1)
    loaded = [part for part in site.modules() if hasattr(part, "weight_function")]
    for part in loaded:
        part.weight_function = [lambda weight: weight * 2]
        part._v = threading.Lock()  # a handle that cannot be copied
    copied = copy.deepcopy(site)
    assert module_hash(site) == fresh
    assert not any(getattr(part, "weight_function", None) or hasattr(part, "_v") for part in copied.modules())
    assert loaded and all(part.weight_function and hasattr(part, "_v") for part in loaded)


def test_saving_a_checkpoint_writes_what_it_would_have_written(tmp_path):
    plain = models.sd15()
    with_lora = comfy.sd.load_lora_for_models(plain, None, lora_file(plain), 0.8, 0)[0]
    expected, got = tmp_path / "expected.safetensors", tmp_path / "got.safetensors"
    comfy.sd.save_checkpoint(str(expected), with_lora)
    management.unload_all_models()
    split = split_model(with_lora, "0,1")
    models.sample(split, "sd15", steps=1)
    comfy.sd.save_checkpoint(str(got), split)
    assert got.read_bytes() == expected.read_bytes()
    reference = models.sample(with_lora, "sd15", steps=1)
    assert models.relative(models.sample(split, "sd15", steps=1), reference) < TOLERANCE


class TestCancel:
    def test_in_the_middle_of_a_call_it_takes_less_than_a_second(self):
        plain = models.sd15(model_channels=128)
        split = split_model(plain, "0,1")
        latent = torch.randn(2, 4, 56, 56, generator=torch.Generator().manual_seed(1))
        models.sample(split, "sd15", steps=1, noise=latent)  # captured and loaded
        start = time.monotonic()
        models.sample(split, "sd15", steps=1, noise=latent)
        whole = time.monotonic() - start
        pressed = []

        def press():
            pressed.append(time.monotonic())
            management.interrupt_current_processing()

        timer = threading.Timer(0.3 * whole, press)
        timer.start()
        with pytest.raises(management.InterruptProcessingException):
            models.sample(split, "sd15", steps=20, noise=latent)
        assert time.monotonic() - pressed[0] < 1
        assert not management.processing_interrupted(), "the next prompt starts afresh"
        expected = models.sample(plain, "sd15", steps=1)
        assert models.relative(models.sample(split, "sd15", steps=1), expected) < TOLERANCE

    @pytest.mark.parametrize("met", [None, comfytp.Error("cuda:1: it broke"), management.InterruptProcessingException()])
    def test_what_is_queued_ends_also_where_sampling_fails(self, monkeypatch, met):
        split = split_model(models.sd15(), "0,1")
        models.sample(split, "sd15", steps=1)
        waited = []

        def synchronize(self):
            waited.append(self)
            if met is not None:
                raise met

        def preview(*_):
            raise RuntimeError("no preview")

        monkeypatch.setattr(SplitModel, "synchronize", synchronize)
        with pytest.raises(RuntimeError, match="no preview"):
            models.sample(split, "sd15", steps=2, callback=preview)
        assert waited == [split.split]

    def test_a_failing_device_is_an_error_and_no_reason_for_plain_pytorch(self, monkeypatch):
        split = split_model(models.sd15(), "0,1")
        models.sample(split, "sd15", steps=1)
        before = engine_stats()["torch_fallbacks"]

        def run(*_, **__):
            raise comfytp.Error("cuda:1: it broke")

        with monkeypatch.context() as patch:
            patch.setattr(Engine, "run", run)
            with pytest.raises(comfytp.Error, match="it broke"):
                models.sample(split, "sd15", steps=1)
        assert engine_stats()["torch_fallbacks"] == before
        models.sample(split, "sd15", steps=1)

    def test_other_threads_run_while_the_engine_works(self):
        split = split_model(models.sd15(model_channels=128), "0,1")
        latent = torch.randn(2, 4, 56, 56, generator=torch.Generator().manual_seed(1))
        models.sample(split, "sd15", steps=1, noise=latent)
        longest, stop = [0.0], threading.Event()

        def tick():
            last = time.monotonic()
            while not stop.is_set():
                time.sleep(0.005)
                now = time.monotonic()
                longest[0], last = max(longest[0], now - last), now

        thread = threading.Thread(target=tick)
        thread.start()
        start = time.monotonic()
        models.sample(split, "sd15", steps=1, noise=latent)
        taken = time.monotonic() - start
        stop.set()
        thread.join()
        assert longest[0] < taken / 2


@pytest.mark.usefixtures("on_engine")
def test_fifty_runs_leave_neither_memory_nor_threads_behind():
    plain = models.sd15()
    tensors = lora_file(plain)
    process = psutil.Process()
    sizes, threads = [], []
    for i in range(50):
        patched = comfy.sd.load_lora_for_models(split_model(plain, "0,1"), None, tensors, 0.1 * (i % 7), 0)[0]
        models.sample(patched, "sd15", steps=1)
        if i % 7 == 0:
            management.unload_all_models()
        if i >= 10:
            gc.collect()
            sizes.append(process.memory_info().rss)
            threads.append(process.num_threads())
    assert max(threads) <= threads[0] + 2
    assert max(sizes[-10:]) < max(sizes[:10]) + (24 << 20)


@pytest.mark.usefixtures("on_engine")
def test_progress_and_previews_come_as_before():
    plain = models.sd15()
    seen = {}
    for name, patcher in (("plain", plain), ("split", split_model(plain, "0,1"))):
        steps = seen[name] = []
        models.sample(patcher, "sd15", callback=lambda step, x0, x, total, steps=steps: steps.append((step, total, x0.clone())))
    assert [s[:2] for s in seen["split"]] == [s[:2] for s in seen["plain"]]
    for (_, _, a), (_, _, b) in zip(seen["split"], seen["plain"], strict=True):
        assert models.relative(a, b) < TOLERANCE


def test_a_devices_failure_is_the_nodes_error_and_the_next_run_works(monkeypatch):
    plain = models.sd15()
    split = split_model(plain, "0,1")
    expected = models.sample(plain, "sd15", steps=1)
    from comfytp.comfyui.patched_weights import PatchedWeights

    whole = PatchedWeights.read

    def broken(self, key, starts, stops):
        if key.endswith("out.2.weight"):
            raise OSError("the disk is gone")
        return whole(self, key, starts, stops)

    monkeypatch.setattr(PatchedWeights, "read", broken)
    with pytest.raises(RuntimeError, match="out.2.weight.* cannot be read.*the disk is gone"):
        models.sample(split, "sd15", steps=1)
    monkeypatch.undo()
    assert models.relative(models.sample(split, "sd15", steps=1), expected) < TOLERANCE


@pytest.mark.parametrize("where", ["_compile", "run", "synchronize"])
def test_too_little_memory_is_what_comfyui_knows_as_such_and_the_next_run_works(monkeypatch, where):
    """It then unloads all models and tells its user what may help; a device's fault it shows."""
    plain = models.sd15()
    split = split_model(plain, "0,1")
    expected = models.sample(plain, "sd15", steps=1)
    before = engine_stats()["torch_fallbacks"]
    full, fault = comfytp.OutOfMemory("cuda:0 is full"), comfytp.DeviceFailure("cuda:0 broke")
    for error, seen in ((full, management.OOM_EXCEPTION), (fault, comfytp.DeviceFailure)):

        def broken(*args, error=error, **kwargs):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Engine, where, broken)
            with pytest.raises(seen, match=str(error)):
                models.sample(split, "sd15", steps=1)
    assert engine_stats()["torch_fallbacks"] == before
    assert models.relative(models.sample(split, "sd15", steps=1), expected) < TOLERANCE


def test_a_load_says_one_line_and_verbose_prints_the_plan(caplog):
    caplog.set_level(logging.INFO, logger="comfytp")
    plain = models.sd15()
    models.sample(split_model(plain, "0,1"), "sd15", steps=2)
    assert len(caplog.records) == 1 and "loaded" in caplog.text and "cpu:1" in caplog.text
    caplog.clear()
    models.sample(split_model(plain, "0,1", verbose=True), "sd15", steps=2)
    for word in ("device", "weights", "activations", "computes", "balanced", "call took"):
        assert word in caplog.text
