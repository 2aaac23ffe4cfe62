"""The engine for any graph."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from . import _core
from ._arrays import Queue, empty_like_kind, warn_unless_finite


def device_list(devices: str | Iterable[str]) -> str:
    if isinstance(devices, str):
        return devices
    if isinstance(devices, Iterable):
        names = list(devices)
        if all(isinstance(name, str) for name in names):
            return ",".join(names)
    raise _core.Error(f"[devices] expected names such as 'cpu:0' but got {devices!r}")


class Engine:
    """One graph on one or several devices.

    graph: a Graph or its text.
    weights: a mapping from the graph's keys to arrays, which are read where they lie and kept while the engine lives; or
        the path of a safetensors file, an index or a diffusers folder. They stay in their dtype (fp8 too) and are decoded
        at use.
    devices: "cpu:0,cpu:1@2GiB" or a list of such names; several cpu:N share the machine's cores.
    mesh: how the devices are arranged, "tensor=2" or "batch=2,tensor=2": batch divides samples, patch image rows, frames
        and tokens, tensor channels and heads. None: "tensor=N" over N devices.
    placement: "resident" (each device holds what it computes with; also None) or "gathered" (each stores a part of them
        and fetches the rest from the others just ahead of use).
    timeout: seconds a device waits for another before the call fails.
    communicator: how GPUs exchange: "peer" (they read and write each other's memory), "staged" (through the host's); None: peer
        where it is possible.
    compute: None, or "fp8": linears whose weights are stored in fp8 multiply in it, on GPUs that can (from sm_89 on). What goes in is
        rounded to fp8 by one scale, so that the result is a few hundredths off.

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
        communicator: str | None = None,
        compute: str | None = None,
    ) -> None:
        if isinstance(graph, str):
            graph = _core.Graph.parse(graph)
        self._outputs = graph.outputs
        self._queue = Queue()
        self._core = _core.Engine(
            graph, weights, device_list(devices), mesh or "", placement or "resident", communicator or "best", timeout, compute or ""
        )

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        """run() with the inputs by keyword."""
        return self.run(inputs)

    def run(self, inputs: Mapping[str, Any], out: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One call: named inputs to named outputs.

        inputs: an array for each input of the graph, of its shape, of any floating dtype and any strides, in host memory or on one
            of the engine's GPUs; they are read where they lie.
        out: arrays to write some or all outputs to, of their shape and any floating dtype. The others are made: in the
            library of the first input and the graph's dtype (f32 where that library lacks it, as numpy lacks bf16).

        Where the outputs are torch tensors on a GPU, the call is queued on torch's current stream, as torch's own ops are, and not
        waited for; what goes wrong later makes its outputs NaN and is raised by the next call, check() or synchronize(). A prompt
        whose tensors are the same objects as before, to which torch has counted no write, is taken for the same; any other is
        compared on the GPU, which the call waits for.

        Other Python threads run meanwhile; Ctrl-C ends the call. Raises Error (wrong names, shapes, dtypes; a device's
        failure, with its name and op), Cancelled, Timeout. The engine can be called again afterwards. Warns (RuntimeWarning) of a
        GPU's result with infinities or NaNs, of a queued call's at the next one.
        """
        inputs = dict(inputs)
        results = dict(out or {})
        kind = next(iter(inputs.values()), None)
        for name, (dtype, shape) in self._outputs.items():
            if name not in results:
                results[name] = empty_like_kind(kind, shape, dtype)
        self._queue.run(lambda **order: self._core.run(inputs, results, **order), inputs, results)
        return results

    def check(self) -> None:
        """Raises what queued calls that have ended met. Does not wait."""
        self._core.check()

    def synchronize(self) -> None:
        """Waits for queued calls and raises what they met."""
        warn_unless_finite(self._core.synchronize())

    def load(self) -> None:
        """Loads the weights now rather than at the first call."""
        self._core.load()

    def unload(self) -> None:
        """Frees the weights and activations of all devices; the next call loads again."""
        self._core.unload()

    def cancel(self) -> None:
        """From any thread: the running call ends soon and raises Cancelled; the results of queued ones become NaN, and the next
        call raises it. Without any nothing happens."""
        self._core.cancel()

    def report(self) -> dict[str, Any]:
        """What the devices hold and do, known before anything is loaded.

        {"mesh", "notes": what could not be split as asked, "devices": [{"name", "weight_bytes" in the stored dtype,
        "activation_bytes", "flops" of a call, "collectives": {kind: {"count", "bytes"}} of a call}]}; with compute="fp8" also
        "fp8": {"linears": over weights stored in fp8, where one device at least can multiply in it (those of few rows or odd sizes
        decode all the same), "note": why there are none, or not on all devices, "" otherwise}.
        """
        return self._core.report()

    def stats(self) -> dict[str, Any]:
        """Counters since the engine was made: "calls", "prologues" (how often the prompt's part ran), "programs_built",
        "uploaded_bytes", "load_seconds", and by device "collective_seconds" (of the last call), "allocated_weight_bytes",
        "allocated_activation_bytes" (now).
        """
        return self._core.stats()
