"""The engine as the importer calls it, with ComfyUI's cancel button and progress bars."""

import time
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from .. import _core
from ..importer.dtypes import NAMES
from . import callouts
from .modes import Layout
from .patched_weights import PatchedWeights
from .segments import Segments
from .site import Live

_TIMEOUT = 600.0
_PROGRESS_AFTER = 2.0


class Reader:
    """What the engine reads weights from: those of the patcher whose call it is."""

    def __init__(self) -> None:
        self.weights: PatchedWeights | None = None

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {key: (NAMES[dtype], shape) for key, (dtype, shape) in self.weights.tensors().items() if dtype in NAMES}

    def read(self, key: str, starts: tuple[int, ...], stops: tuple[int, ...]) -> Any:
        return self.weights.read(key, starts, stops)


class Engine:
    """A _core.Programs that looks at the cancel button while it runs. Raises InterruptProcessingException for that."""

    def __init__(self, reader: Reader, devices: list[str], layout: Layout, compute: str) -> None:
        self.layout = layout
        self.live = Live()  # of the call that runs
        products = "fp8" if compute == "fp8" else ""
        self.programs = _core.Programs(reader, ",".join(devices), layout.meshes[0], layout.placement, _TIMEOUT, compute=products)

    def add_weights(self, mapping: Any) -> None:
        self.programs.add_weights(mapping)

    def compile(self, graph: Any) -> Any:
        if any(name.startswith(callouts.PREFIX) for name in graph.inputs):
            return Segments(graph, self._compile)
        return self._compile(graph)

    def _compile(self, graph: Any) -> Any:
        """Over the mesh that suits this graph best; of equal ones the first."""
        best, least = None, float("inf")
        for mesh in self.layout.meshes:
            compiled = self.programs.compile(graph, mesh)
            cost = self.layout.cost(self.programs.report(compiled)) if len(self.layout.meshes) > 1 else 0
            if cost < 0.98 * least:
                best, least = compiled, cost
        return best

    def run(self, compiled: Any, inputs: Any, outputs: Any, **order: Any) -> bool:
        """As _core.Programs.run. Raises ShapesDiffer where a callout's function does."""
        watch = _Watch(self.programs)
        watch()  # a call that is only queued asks no more
        if not isinstance(compiled, Segments):
            return self.programs.run(compiled, inputs, outputs, watch, **order)
        device = callouts.device_of(self.live.options)

        def call(site: callouts.Site, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            function = self.live.functions[site.address]
            return site.run(function, [tensor.to(device) for tensor in tensors], self.live.options)

        not_finite = []

        def run(part: Any, given: Any, results: Any) -> None:
            not_finite.append(self.programs.run(part, given, results, watch, **order))

        compiled.run(run, inputs, outputs, call)
        return any(not_finite)

    def synchronize(self) -> bool:
        """Waits for queued calls and raises what they met."""
        return self.programs.synchronize(_Watch(self.programs))

    def report(self, compiled: Any) -> dict[str, Any]:
        """Of parts with callouts in between: their sums, and the most of their activations."""
        if not isinstance(compiled, Segments):
            return self.programs.report(compiled)
        reports = [self.programs.report(part[0]) for part in compiled.parts if part is not None]
        whole = {**reports[0], "devices": [dict(device) for device in reports[0]["devices"]]}
        for report in reports[1:]:
            for device, more in zip(whole["devices"], report["devices"], strict=True):
                device["weight_bytes"] += more["weight_bytes"]
                device["flops"] += more["flops"]
                device["activation_bytes"] = max(device["activation_bytes"], more["activation_bytes"])
                kinds = {**device["collectives"]}
                for kind, entry in more["collectives"].items():
                    known = kinds.get(kind, {"count": 0, "bytes": 0})
                    kinds[kind] = {key: known[key] + entry[key] for key in known}
                device["collectives"] = kinds
        notes = dict.fromkeys(note for report in reports for note in report["notes"])
        fp8 = [report["fp8"] for report in reports if "fp8" in report]
        if any(part["linears"] for part in fp8):  # then it is no news that another part has none
            for part in fp8:
                if not part["linears"]:
                    notes.pop(part["note"], None)
        if fp8:
            told = dict.fromkeys(part["note"] for part in fp8 if part["note"] in notes)
            whole["fp8"] = {"linears": sum(part["linears"] for part in fp8), "note": "; ".join(told)}
        whole["notes"] = [*notes, f"{len(compiled.sites)} callouts to other nodes' code"]
        return whole

    def update(self, keys: set[str]) -> None:
        self.programs.update(keys, _Watch(self.programs))


class _Watch:
    """Called now and then while the engine works."""

    def __init__(self, programs: Any) -> None:
        self._programs = programs
        self._since = time.monotonic()
        self._bar: Any = None

    def __call__(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        done, total = self._programs.loading()
        if total and self._bar is None and time.monotonic() - self._since > _PROGRESS_AFTER:
            self._bar = comfy.utils.ProgressBar(total)
        if total and self._bar is not None:
            self._bar.update_absolute(done, total)
