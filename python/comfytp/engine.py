"""The engine for any graph."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from . import _core
from ._arrays import empty_like_kind


def device_list(devices: str | Iterable[str]) -> str:
    return devices if isinstance(devices, str) else ",".join(devices)


class Engine:
    """One graph on one or several devices.

    graph: a Graph or its text.
    weights: a mapping from the graph's keys to arrays, which are read where they lie and kept while the engine lives; or
        the path of a safetensors file, an index or a diffusers folder. They stay in their dtype (fp8 too) and are decoded
        at use.
    devices: "cpu:0,cpu:1@2GiB" or a list of such names; several cpu:N share the machine's cores.
    mesh: how the devices are arranged, "tensor=2" or "batch=2,tensor=2": batch divides samples, patch image rows and
        tokens, tensor channels and heads. None: the planner chooses.
    placement: "resident" (each device holds what it computes with; also None) or "gathered" (each stores its share of
        every weight and fetches the rest from the others just ahead of use).
    timeout: seconds a device waits for another before the call fails.

    Raises Error naming the argument, device or key. Weights are loaded at the first call, or by load().
    """

    def __init__(
        self,
        graph: "_core.Graph | str",
        weights: "Mapping[str, Any] | str | os.PathLike[str]",
        devices: str | Iterable[str] = "cpu:0",
        mesh: str | None = None,
        placement: str | None = None,
        *,
        timeout: float = 600,
    ) -> None:
        if isinstance(graph, str):
            graph = _core.Graph.parse(graph)
        self._outputs = graph.outputs
        self._core = _core.Engine(graph, weights, device_list(devices), mesh or "", placement or "resident", timeout)

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        """run() with the inputs by keyword."""
        return self.run(inputs)

    def run(self, inputs: Mapping[str, Any], out: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One call: named inputs to named outputs.

        inputs: an array for each input of the graph, of its shape, of any floating dtype and any strides, in host memory or,
            where the engine runs on one GPU alone, on that GPU; they are read where they lie.
        out: arrays to write some or all outputs to, of their shape and any floating dtype. The others are made: in the
            library of the first input and the graph's dtype (f32 where that library lacks it, as numpy lacks bf16).

        Other Python threads run meanwhile; Ctrl-C ends the call. Raises Error (wrong names, shapes, dtypes; a device's
        failure, with its name and op), Cancelled, Timeout. The engine can be called again afterwards.
        """
        inputs = dict(inputs)
        results = dict(out or {})
        kind = next(iter(inputs.values()), None)
        for name, (dtype, shape) in self._outputs.items():
            if name not in results:
                results[name] = empty_like_kind(kind, shape, dtype)
        self._core.run(inputs, results)
        return results

    def load(self) -> None:
        """Loads the weights now rather than at the first call."""
        self._core.load()

    def unload(self) -> None:
        """Frees the weights and activations of all devices; the next call loads again."""
        self._core.unload()

    def cancel(self) -> None:
        """From any thread: the running call ends soon and raises Cancelled. Without one nothing happens."""
        self._core.cancel()

    def report(self) -> dict[str, Any]:
        """What the devices hold and do, known before anything is loaded.

        {"mesh", "notes": what could not be split as asked, "devices": [{"name", "weight_bytes" in the stored dtype,
        "activation_bytes", "flops" of a call, "collectives": {kind: {"count", "bytes"}} of a call}]}
        """
        return self._core.report()

    def stats(self) -> dict[str, Any]:
        """Counters since the engine was made: "calls", "prologues" (how often the prompt's part ran), "programs_built",
        "uploaded_bytes", "load_seconds", and by device "collective_seconds" (of the last call), "allocated_weight_bytes",
        "allocated_activation_bytes" (now).
        """
        return self._core.stats()
