"""The engine as the importer calls it, with ComfyUI's cancel button and progress bars."""

import time
from typing import Any

import comfy.model_management
import comfy.utils

from .. import _core
from ..importer.dtypes import NAMES
from .modes import Layout
from .patched_weights import PatchedWeights

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

    def __init__(self, reader: Reader, devices: list[str], layout: Layout) -> None:
        self.layout = layout
        self.programs = _core.Programs(reader, ",".join(devices), layout.meshes[0], layout.placement, _TIMEOUT)

    def add_weights(self, mapping: Any) -> None:
        self.programs.add_weights(mapping)

    def compile(self, graph: Any) -> Any:
        """Over the mesh that suits this graph best; of equal ones the first."""
        best, least = None, float("inf")
        for mesh in self.layout.meshes:
            compiled = self.programs.compile(graph, mesh)
            cost = self.layout.cost(self.programs.report(compiled)) if len(self.layout.meshes) > 1 else 0
            if cost < 0.98 * least:
                best, least = compiled, cost
        return best

    def run(self, compiled: Any, inputs: Any, outputs: Any) -> None:
        self.programs.run(compiled, inputs, outputs, _Watch(self.programs))

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
