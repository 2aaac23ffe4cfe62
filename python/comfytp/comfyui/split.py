"""A diffusion model on several devices: its captures, its engine, and what ComfyUI's memory management sees of it."""

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import comfy.model_management
import torch

from .. import _core
from .._arrays import warn_unless_finite
from ..importer import Unsupported
from ..importer.calls import Calls, gpus_of
from ..importer.key import module_hash
from ..importer.snapshot import Structure
from . import callouts, counters, modes, report
from .devices import torch_device
from .engine import Engine, Reader
from .patched_weights import PatchedWeights, Unreadable
from .patcher import Satellite, SplitPatcher
from .site import Site, split_arguments, visible
from .support import Looks, why_not

_log = logging.getLogger("comfytp")
_MOST_TRIES = 16  # entries of transformer_options found to be read, one a try
_MOST_VARIANTS = 4  # captures that differ in what patches give
_MOST_CHANGES = 4  # of attributes, each before another call

# Lives as long as ComfyUI's model does, so that a node that runs again with another LoRA finds the weights on the devices.
_splits: "weakref.WeakKeyDictionary[Any, dict[Any, SplitModel]]" = weakref.WeakKeyDictionary()


def split_of(model: Any, devices: list[str], mode: str, compute: str) -> "SplitModel":
    """The one for this model, these devices and these choices."""
    of_model = _splits.setdefault(model, {})
    key = (tuple(devices), mode, compute)
    if key not in of_model:
        of_model[key] = SplitModel(model, devices, mode, compute)
    return of_model[key]


class SplitModel:
    def __init__(self, model: Any, devices: list[str], mode: str, compute: str) -> None:
        self.devices, self.mode, self.compute = devices, mode, compute
        self._model = weakref.ref(model)
        self._lock = threading.RLock()
        self._reader = Reader()
        self._engine: Engine | None = None
        self._layout: modes.Layout | None = None
        self._sites: dict[str, tuple[Site, Calls]] = {}
        self._hashes: dict[str, str] = {}  # of the sites
        self._looks = Looks()
        self._structure: Structure | None = None  # that captures and weights are of
        self._changes = 0  # calls in a row before which something changed that captures hang on
        self._resized: Mapping[str, Any] = {}
        self._state: Any = None
        self._signatures: dict[str, Any] = {}
        self._variants: dict[str, list[int]] = {}  # by patches: which of their captures to try, the last that did first
        self._warned: set[str] = set()
        self._seen: set[int] = set()  # programs whose plan was told
        self._asked_for_fp8: set[int] = set()  # programs of which it was told where they cannot multiply in it
        self._tracked = False
        places = dict.fromkeys(torch_device(name) for name in devices)
        self.satellites = [Satellite(weakref.proxy(self), place, str(place).replace(":", "_")) for place in places]

    # ---- a call

    def call(self, module: torch.nn.Module, original: Any, *args: Any, **kwargs: Any) -> Any:
        """What original(*args, **kwargs) gives; `original` is a method of `module`. Several threads take turns."""
        patcher = self._patcher()
        with self._lock:
            if patcher is None:
                reason = "the model is run by other means than a sampler"
            else:
                try:
                    with _as_comfyui_says():
                        return self._on_engine(patcher, module, original, args, kwargs)
                except (Unsupported, Unreadable) as error:
                    reason = str(error)
            self.run_plain(reason)
        return original(*args, **kwargs)

    def synchronize(self) -> None:
        """Waits for the calls so far and raises what they met, before anybody looks at a result that is NaN."""
        with self._lock:
            if self._engine is not None:
                with _as_comfyui_says():
                    warn_unless_finite(self._engine.synchronize())

    def run_plain(self, reason: str) -> None:
        """Makes ready for a call that PyTorch runs, and says why, once for each reason."""
        patcher = self._patcher()
        counters.add(torch_fallbacks=1)
        if reason not in self._warned:
            self._warned.add(reason)
            _log.warning("%s runs as plain PyTorch on one device: %s", self._name(), reason)
        elif patcher is not None and patcher.verbose:
            _log.info("%s runs as plain PyTorch again: %s", self._name(), reason)
        if patcher is not None:
            patcher.load_plain()

    def _on_engine(self, patcher: SplitPatcher, module: torch.nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        if reason := why_not(patcher, module, original, self._looks):
            raise Unsupported(reason)
        args, kwargs, options = split_arguments(original, args, kwargs)
        start = time.monotonic()
        self._reader.weights = PatchedWeights(patcher)
        try:
            self._follow_module()
            self._follow_patches(patcher)
            before = self._engine.programs.stats()
            site, calls = self._site(module, original.__name__)
            captures = calls.stats.captures
            self._track()
            try:
                result = self._attempt(site, calls, args, kwargs, options)
                if patcher.verbose:
                    self._engine.synchronize()  # what is told is how long it took
            finally:
                after = self._engine.programs.stats()
                if any(before[what] != after[what] for what in ("uploaded_bytes", "programs_built")):
                    patcher.memory_changed()
                counters.add(uploaded_bytes=after["uploaded_bytes"] - self._counted, captures=calls.stats.captures - captures)
                self._counted = after["uploaded_bytes"]
        finally:
            self._reader.weights = None
        counters.add(engine_calls=1)
        self._last = calls.last.compiled
        self._tell(patcher, calls.last.compiled, before, after, time.monotonic() - start)
        return result

    def _attempt(self, site: Site, calls: Calls, args: Any, kwargs: Any, options: Mapping[str, Any]) -> Any:
        live = self._engine.live = site.live
        live.options, live.functions = dict(options), callouts.functions(options)
        sites = callouts.address_list(options)
        order = self._variants.setdefault(str(sites), list(range(_MOST_VARIANTS)))
        try:
            for variant in list(order) if sites else (0,):
                extra = {"sites": repr(sites), "variant": f"{variant}"} if sites else {}
                try:
                    result = self._learn(site, calls, args, {**kwargs, **extra}, options)
                except callouts.ShapesDiffer as error:
                    reason = error
                    continue
                order.remove(variant)
                order.insert(0, variant)
                return result
            raise Unsupported(f"what the {reason} gives changes its form again and again")
        finally:
            live.options, live.functions = {}, {}

    def _learn(self, site: Site, calls: Calls, args: Any, kwargs: Any, options: Mapping[str, Any]) -> Any:
        for _ in range(_MOST_TRIES):
            known = set(site.wanted.names)
            shown, hidden = visible(options, site.wanted)
            try:
                return calls(*args, options=shown, hidden=hidden, **kwargs)
            except Unsupported:
                if site.wanted.names == known:
                    raise
        raise Unsupported(f"the model reads more than {_MOST_TRIES} entries of transformer_options")

    def _site(self, module: torch.nn.Module, name: str) -> tuple[Site, Calls]:
        if name not in self._sites:
            # Messages of a capture name the class.
            site = type(type(module).__name__, (Site,), {})(module, name, self._resized)
            calls = Calls(site, self._engine, gpus=gpus_of(",".join(self.devices)))
            self._sites[name] = site, calls
            self._hashes[name] = module_hash(site)
            calls.renew(self._hashes[name])
        return self._sites[name]

    def _follow_module(self) -> None:
        """Where attributes or code have changed, captures are other ones; where parts have, their weights are too."""
        before, self._structure = self._structure, self._looks.structure
        if before is self._structure:
            self._changes = 0
            return
        if before is not None and not before.parts.same_parts(self._structure.parts):
            self._sites.clear()
            self._engine = None
        changed = False
        for name, (site, calls) in self._sites.items():
            now = module_hash(site)
            if now != self._hashes[name]:
                self._hashes[name], changed = now, True
                calls.renew(now)
        self._changes = self._changes + 1 if changed else 0
        if self._changes > _MOST_CHANGES:
            raise Unsupported("attributes of its parts change before every call")

    def _patcher(self) -> SplitPatcher | None:
        model = self._model()
        patcher = getattr(model, "current_patcher", None)
        return patcher if isinstance(patcher, SplitPatcher) and patcher.split is self else None

    # ---- weights

    def _follow_patches(self, patcher: SplitPatcher) -> None:
        """The devices' weights become those of this patcher: what differs is read again."""
        weights = self._reader.weights
        state = weights.state()
        if self._engine is not None and state == self._state:
            return
        resized, signatures = weights.resized(), weights.signatures()
        if self._engine is None or resized != self._resized:
            self._open(resized)
        changed = {key for key in {*signatures, *self._signatures} if signatures.get(key) != self._signatures.get(key)}
        self._state, self._signatures = None, signatures
        self._engine.update(changed)
        self._state = state

    def _open(self, resized: Mapping[str, Any]) -> None:
        self._sites.clear()
        self._engine = None
        sizes = [dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self._reader.weights.tensors().values()]
        self._layout = modes.layout(self.mode, len(self.devices), sum(sizes), _room(self.devices))
        self._engine = Engine(self._reader, self.devices, self._layout, self.compute)
        self._resized, self._signatures, self._counted = resized, {}, 0
        self._weight_bytes = sum(sizes)

    # ---- memory management

    def _track(self) -> None:
        """Shows ComfyUI the devices' shares before they are loaded; what it evicted comes back the same way."""
        if not self._tracked:
            comfy.model_management.load_models_gpu(list(self.satellites))
            self._tracked = True

    def unload(self) -> None:
        with self._lock:
            self._tracked = False
            if self._engine is not None:
                self._engine.programs.unload()

    def unload_unless_tracked(self, device: torch.device) -> None:
        """Where no share lies on `device`, its patcher stands for them all."""
        if all(satellite.load_device != device for satellite in self.satellites):
            self.unload()

    def device_bytes(self, device: torch.device) -> int:
        """What the engine holds there, or is expected to hold."""
        held = self.loaded_bytes(device)
        if held:
            return held
        here = sum(torch_device(name) == device for name in self.devices)
        if self._engine is None:
            model = self._model()
            return comfy.model_management.module_size(model) * here // len(self.devices) if model is not None else 0
        whole = len(self._layout.meshes) > 1 and self._layout.placement == "resident"
        return self._weight_bytes * here // (1 if whole else len(self.devices))

    def loaded_bytes(self, device: torch.device) -> int:
        if self._engine is None:
            return 0
        stats = self._engine.programs.stats()
        held = zip(self.devices, stats["allocated_weight_bytes"], stats["allocated_activation_bytes"], strict=True)
        return sum(weights + activations for name, weights, activations in held if torch_device(name) == device)

    # ---- what is told

    def stats(self) -> dict[str, Any]:
        """The engine's counters, from the first call on: see Engine.stats."""
        return self._engine.programs.stats()

    def report(self) -> dict[str, Any]:
        """What the devices hold and do for the last call: see Engine.report."""
        return self._engine.report(self._last)

    def _name(self) -> str:
        model = self._model()
        return type(model.diffusion_model).__name__ if model is not None else "the model"

    def _tell(self, patcher: SplitPatcher, compiled: Any, before: Mapping[str, Any], after: Mapping[str, Any], seconds: float) -> None:
        uploaded = after["uploaded_bytes"] - before["uploaded_bytes"]
        if uploaded:
            each = ", ".join(f"{name} {report.size(held)}" for name, held in zip(self.devices, after["allocated_weight_bytes"], strict=True))
            _log.info(
                "%s (%s): loaded %s of weights in %.1f s; %s",
                self._name(), self._layout.meaning, report.size(uploaded), after["load_seconds"] - before["load_seconds"], each,
            )  # fmt: skip
        if self.compute == "fp8" and id(compiled) not in self._asked_for_fp8:
            self._asked_for_fp8.add(id(compiled))
            notes = [note for note in self._engine.report(compiled)["notes"] if note.startswith("fp8: ")]
            for note in [note for note in notes if note not in self._warned]:
                self._warned.add(note)
                _log.warning("%s, %s", self._name(), note)
        if not patcher.verbose:
            return
        if id(compiled) not in self._seen:
            self._seen.add(id(compiled))
            _log.info("%s, mode %s: %s\n%s", self._name(), self.mode, self._layout.meaning, report.table(self._engine.report(compiled)))
        waited = ", ".join(f"{s:.3f}" for s in after["collective_seconds"])
        _log.info("%s: call took %.3f s, in collectives %s s", self._name(), seconds, waited)


@contextlib.contextmanager
def _as_comfyui_says() -> Iterator[None]:
    """Of too little memory ComfyUI frees all models and tells its user what may help, where it knows the exception."""
    try:
        yield
    except _core.OutOfMemory as error:
        raise torch.OutOfMemoryError(str(error)) from error


def _room(devices: list[str]) -> int | None:
    """Bytes for weights on the device that has least."""
    rooms = []
    for name in devices:
        place = torch_device(name)
        sharing = sum(torch_device(other) == place for other in devices)
        limit = _limit(name)
        rooms.append(limit or int(0.8 * comfy.model_management.get_total_memory(place)) // sharing)
    return min(rooms, default=None)


def _limit(name: str) -> int | None:
    _, _, limit = name.partition("@")
    if not limit:
        return None
    return int(float(limit[:-3]) * {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[limit[-3:]])
