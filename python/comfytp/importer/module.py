"""comfytp.split: a torch module whose forward runs on the engine."""

import dataclasses
import re
import threading
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from .. import _core
from ..engine import device_list
from .calls import PROMPT_INPUTS, Calls, Stats
from .unsupported import Unsupported

_KEY = re.compile(r'key="((?:[^"\\]|\\.)*)"')


@dataclasses.dataclass(frozen=True)
class Plan:
    """What each device holds and does for the calls of one shape.

    devices: their names. weight_bytes_per_device: stored on each, in the stored dtype; weight_bytes_total: of the weights that
    the call reads, once. flops_per_device: of a call; a multiply-add counts as two. activation_bytes_per_device. collectives: by device, kind ->
    {"count", "bytes"}. notes: what could not be split as asked.
    """

    mesh: str
    devices: list[str]
    weight_bytes_per_device: list[int]
    weight_bytes_total: int
    flops_per_device: list[float]
    activation_bytes_per_device: list[int]
    collectives: list[dict[str, dict[str, int]]]
    notes: list[str]


def split(
    module: torch.nn.Module,
    devices: str | Iterable[str] = "cpu:0,cpu:1",
    mesh: str | None = None,
    placement: str | None = None,
    *,
    prompt_inputs: str | Iterable[str] = PROMPT_INPUTS,
    timeout: float = 600,
) -> "SplitModule":
    """A module of the same signature whose forward runs split over several devices.

    devices, mesh, placement, timeout: as in comfytp.Engine.
    prompt_inputs: names of arguments, or a regular expression of their names, that stay the same over the steps of a picture;
        what hangs on them alone runs once.

    The forward is captured at the first call with each set of shapes, and kept on disk (COMFYTP_CACHE). A call that cannot be
    captured is run by PyTorch, with one warning that says why. The module itself is never changed; its weights are read where
    they lie. It runs as in eval() and without gradients.
    """
    return SplitModule(module, devices, mesh, placement, prompt_inputs=prompt_inputs, timeout=timeout)


class SplitModule(torch.nn.Module):
    """What split() returns. Attributes that it lacks, its parameters and its state are the module's."""

    def __init__(
        self,
        module: torch.nn.Module,
        devices: str | Iterable[str],
        mesh: str | None,
        placement: str | None,
        *,
        prompt_inputs: str | Iterable[str],
        timeout: float,
    ) -> None:
        super().__init__()
        self.training = module.training
        # Not a submodule: names of parameters and modules are those of the module itself.
        object.__setattr__(self, "_module", module)
        self._engine_arguments = (device_list(devices), mesh or "", placement or "resident", timeout)
        self._prompt_inputs = prompt_inputs
        self._stats = Stats()
        self._calls: Calls | None = None
        self._engine: Any = None
        self._state: Any = None
        self._warned: set[str] = set()
        self._lock = threading.RLock()
        self._new_engine({})  # names devices that do not exist now

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._current()(*args, **kwargs)
        except Unsupported as reason:
            self._stats.torch_fallbacks += 1
            if str(reason) not in self._warned:
                self._warned.add(str(reason))
                warnings.warn(f"comfytp: {type(self._module).__name__} runs in PyTorch, not split: {reason}", stacklevel=2)
            return self._module(*args, **kwargs)

    @property
    def module(self) -> torch.nn.Module:
        """The module that was split."""
        return self._module

    @property
    def plan(self) -> Plan:
        """Of the last call's shape. Raises Error before the first call."""
        ready = self._calls.last if self._calls is not None else None
        if ready is None:
            raise _core.Error("[split] the plan is known after the first call")
        report = self._engine.report(ready.compiled)
        weights = {**_weights(self._module), **ready.program.tables}
        total = sum(weights[key].nbytes for key in set(_KEY.findall(ready.program.graph)))
        devices = report["devices"]
        return Plan(
            mesh=report["mesh"],
            devices=[d["name"] for d in devices],
            weight_bytes_per_device=[d["weight_bytes"] for d in devices],
            weight_bytes_total=total,
            flops_per_device=[d["flops"] for d in devices],
            activation_bytes_per_device=[d["activation_bytes"] for d in devices],
            collectives=[d["collectives"] for d in devices],
            notes=report["notes"],
        )

    def engine_stats(self) -> dict[str, Any]:
        """Counters since the split: "uploaded_bytes" of weights, "captures", "engine_calls", "torch_fallbacks" (calls that PyTorch
        ran); and the engine's own: "prologues" (how often the prompt's part ran), "allocated_weight_bytes" and
        "allocated_activation_bytes" (by device, now)."""
        engine = self._engine.stats()
        counters = dataclasses.asdict(self._stats)
        counters["uploaded_bytes"] += engine["uploaded_bytes"]
        return {**counters, **{key: engine[key] for key in ("prologues", "allocated_weight_bytes", "allocated_activation_bytes")}}

    def unload(self) -> None:
        """Frees what the devices hold; the next call loads again."""
        self._engine.unload()

    def cancel(self) -> None:
        """From any thread: the running call ends soon and raises Cancelled."""
        self._engine.cancel()

    # ---- the engine follows the module

    def _current(self) -> Calls:
        """The module's calls; anew where its parameters are others than before (loaded, moved, cast, a LoRA put in)."""
        with self._lock:
            state = _state(self._module)
            if self._calls is None or state != self._state:
                self._new_engine(_weights(self._module))
                self._calls = Calls(self._module, self._engine, self._prompt_inputs, self._stats)
                self._state = state
            return self._calls

    def _new_engine(self, weights: dict[str, torch.Tensor]) -> None:
        if self._engine is not None:
            self._stats.uploaded_bytes += self._engine.stats()["uploaded_bytes"]
            self._engine.unload()
        devices, mesh, placement, timeout = self._engine_arguments
        self._engine = _core.Programs({k: w.cpu() for k, w in weights.items()}, devices, mesh, placement, timeout)

    # ---- everything else is the module's

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_module"], name)

    def _apply(self, *args: Any, **kwargs: Any) -> "SplitModule":
        self._module._apply(*args, **kwargs)
        return self

    def train(self, mode: bool = True) -> "SplitModule":
        super().train(mode)
        self._module.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._module.load_state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self._module.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        return self._module.named_buffers(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        return self._module.named_modules(*args, **kwargs)

    def named_children(self) -> Any:
        return self._module.named_children()

    def extra_repr(self) -> str:
        return f"{type(self._module).__name__} on {self._engine_arguments[0]}"


def _weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters(remove_duplicate=False)}


def _state(module: torch.nn.Module) -> Any:
    """Other parameters, or the same after something was written to them, are another state."""
    return tuple((name, id(p), p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for name, p in module.named_parameters(remove_duplicate=False))


__all__ = ["Plan", "SplitModule", "split"]
