"""comfytp.split: a torch module whose forward runs on the engine."""

import dataclasses
import re
import threading
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch._dynamo

from .. import _core
from .._arrays import warn_unless_finite
from ..engine import device_list
from .calls import PROMPT_INPUTS, Calls, Stats, gpus_of
from .snapshot import Snapshot
from .unsupported import Unsupported

_MOST_CHANGES = 4  # of attributes, each before another call
_KEY = re.compile(r'key="((?:[^"\\]|\\.)*)"')


@dataclasses.dataclass(frozen=True)
class Plan:
    """What each device holds and does for the calls of one shape.

    devices: their names. weight_bytes_per_device: stored on each, in the stored dtype; weight_bytes_total: of the weights that
    the call reads, once. flops_per_device: of a call; a multiply-add counts as two. activation_bytes_per_device.
    collectives: by device, kind -> {"count", "bytes"}. notes: what could not be split as asked.
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
    communicator: str | None = None,
    compute: str | None = None,
) -> "SplitModule":
    """A module of the same signature whose forward runs split over several devices.

    module: any of Python code; of one that is split already, the module within, which is split anew.
    devices, mesh, placement, timeout, communicator, compute: as in comfytp.Engine.
    prompt_inputs: names of arguments, or a regular expression of their names, that stay the same over the steps of a picture;
        what hangs on them alone runs once.

    The forward is captured at the first call with each set of shapes, and kept on disk (COMFYTP_CACHE). A call that cannot be
    captured is run by PyTorch, with one warning that says why. A device's failure is none of that and is raised (DeviceFailure, and
    OutOfMemory). The module itself is never changed; its weights are read where
    they lie. It runs as in eval() and without gradients.

    What changes in the module afterwards is seen at the next call: weights that are replaced or written to, submodules, hooks,
    attributes, buffers. One thing may not be: a write past torch's own counters (through `.data`, or to tensors of
    inference_mode) that leaves the middle of a tensor as it was; call update() after such a one. Nor is one through `.data` to an
    argument on a GPU that is a prompt, or a mask whose contents code reads, when the same tensor is given again.
    """
    return SplitModule(
        module, devices, mesh, placement, prompt_inputs=prompt_inputs, timeout=timeout, communicator=communicator, compute=compute
    )


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
        communicator: str | None,
        compute: str | None,
    ) -> None:
        if isinstance(module, SplitModule):
            module = module.module
        if not isinstance(module, torch.nn.Module):
            raise _core.Error(f"[split] expected a torch.nn.Module but got a {type(module).__name__}")
        if isinstance(module, (torch.jit.ScriptModule, torch._dynamo.OptimizedModule)):
            raise _core.Error(f"[split] expected a module of Python code but got a {type(module).__name__}: split the one in it")
        devices = list(devices) if isinstance(devices, Iterable) and not isinstance(devices, str) else devices
        prompt_inputs = list(prompt_inputs) if isinstance(prompt_inputs, Iterable) and not isinstance(prompt_inputs, str) else prompt_inputs
        _check_arguments(devices, mesh, placement, prompt_inputs, timeout, communicator, compute)
        super().__init__()
        # From here on attributes that are not among these are the module's, which is no submodule: names stay as they are.
        self.__dict__.update(
            training=module.training,
            _module=module,
            _engine_arguments=(device_list(devices), mesh or "", placement or "resident", timeout, communicator or "best", compute or ""),
            _prompt_inputs=prompt_inputs,
            _stats=Stats(),
            _calls=None,
            _engine=None,
            _snapshot=None,
            _changes=0,  # calls in a row before which an attribute changed
            _seen=0,  # changes of any kind
            _steady=False,  # the last call saw none
            _warned=set(),
            _lock=threading.RLock(),
        )
        self._new_engine({})  # names devices that do not exist now

    @torch.compiler.disable  # where a pipeline compiles its modules
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._call(args, kwargs)
        except Unsupported as error:
            reason = str(error)
        self._stats.torch_fallbacks += 1
        result = self._module(*args, **kwargs)  # what fails here too fails as it would without us, and needs no warning
        if reason not in self._warned:
            self._warned.add(reason)
            # At the line that calls the module: three functions of torch stand between.
            warnings.warn(f"comfytp: {type(self._module).__name__} runs in PyTorch, not split: {reason}", stacklevel=5)
        return result

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
        weights = {**self._snapshot.weights, **ready.program.tables}
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
        """Counters since the split: "uploaded_bytes" of weights, "captures", "engine_calls" (also those whose result was thrown away,
        since the module had changed), "torch_fallbacks" (calls that PyTorch ran); and the engine's own: "prologues" (how often the
        prompt's part ran), "allocated_weight_bytes" and "allocated_activation_bytes" (by device, now)."""
        engine = self._engine.stats()
        counters = dataclasses.asdict(self._stats)
        counters["uploaded_bytes"] += engine["uploaded_bytes"]
        return {**counters, **{key: engine[key] for key in ("prologues", "allocated_weight_bytes", "allocated_activation_bytes")}}

    def profile(self) -> list[dict[str, Any]]:
        """Where the time of the last call goes, by device: {"seconds": of the whole step as it is run, "launches": [{"label", "op", "shapes",
        "seconds", "flops", "bytes"}], each timed alone}. Runs the step again; raises Error before the first call."""
        ready = self._calls.last if self._calls is not None else None
        if ready is None:
            raise _core.Error("[split] the profile is known after the first call")
        return self._engine.profile(ready.compiled)

    def unload(self) -> None:
        """Frees what the devices hold; the next call loads again."""
        self._steady = False
        self._engine.unload()

    def update(self) -> None:
        """The next call reads the module anew, with all its weights: for writes that cannot be seen (see split())."""
        with self._lock:
            self._steady = False
            self._snapshot = None

    def cancel(self) -> None:
        """From any thread: the running call ends soon and raises Cancelled; the results of queued ones become NaN, and the next
        call raises it."""
        self._engine.cancel()

    def check(self) -> None:
        """Raises what queued calls that have ended met (see Engine.run). Does not wait."""
        self._engine.check()

    def synchronize(self) -> None:
        """Waits for queued calls and raises what they met."""
        warn_unless_finite(self._engine.synchronize())

    # ---- the engine follows the module

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that nobody waits for is made over the module as the last call saw it, and the GPU works while the host looks whether
        that still holds. If not, its result is thrown away. The call after a change looks first, as there may be another."""
        seen = self._seen
        ahead = self._calls.ahead(args, kwargs) if self._steady else None
        calls = self._current()
        return ahead[0] if ahead is not None and self._seen == seen else calls(*args, **kwargs)

    def _current(self) -> Calls:
        """The module's calls, on an engine that holds its weights as they are now."""
        with self._lock:
            snapshot = self._snapshot
            same = snapshot is not None and snapshot.same_structure() and snapshot.same_places()
            written, captured = snapshot.written() if same else (set(), False)
            self._steady = same and not written and not captured
            if not self._steady:
                self._seen += 1
            if same and not captured:
                if written:
                    self._reload(snapshot, written)
                    snapshot.remember()
                self._changes = 0
                return self._calls
            self._snapshot = None
            self._snapshot = self._follow(snapshot, Snapshot(self._module))
            if self._changes > _MOST_CHANGES:
                raise Unsupported("its attributes or buffers change before every call")
            return self._calls

    def _follow(self, old: Snapshot | None, new: Snapshot) -> Snapshot:
        """After any change: another module's captures are others, and other weights are another engine's."""
        other = old is None or old.hash != new.hash
        self._changes = self._changes + 1 if old is not None and other else 0
        if old is None or not old.same_weights(new):
            self._new_engine(new.weights)
            if self._calls is None:
                self._calls = Calls(self._module, self._engine, self._prompt_inputs, self._stats, gpus_of(self._engine_arguments[0]))
            self._calls.renew(new.hash, self._engine)
            return new
        if other:
            self._calls.renew(new.hash)
        self._reload(new, old.written()[0])
        return new

    def _reload(self, snapshot: Snapshot, written: set[str]) -> None:
        if all(weight.device.type == "cpu" for weight in snapshot.weights.values()):
            self._engine.update(written)
        else:  # what the engine reads is a copy
            self._new_engine(snapshot.weights)
            self._calls.renew(snapshot.hash, self._engine)

    def _new_engine(self, weights: dict[str, torch.Tensor]) -> None:
        if self._engine is not None:
            self._stats.uploaded_bytes += self._engine.stats()["uploaded_bytes"]
            self._engine.unload()
        self._engine = _core.Programs({k: w.cpu() for k, w in weights.items()}, *self._engine_arguments)

    # ---- everything else is the module's

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            setattr(self._module, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            object.__delattr__(self, name)
        else:
            delattr(self._module, name)

    def __reduce__(self) -> Any:
        """Copies and pickles are of the module, split in the same way."""
        devices, mesh, placement, timeout, communicator, compute = self._engine_arguments
        return _split_again, (self._module, devices, mesh, placement, self._prompt_inputs, timeout, communicator, compute)

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


def _check_arguments(devices: Any, mesh: Any, placement: Any, prompt_inputs: Any, timeout: Any, communicator: Any, compute: Any) -> None:
    def names(value: Any) -> bool:
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))

    for name, good, expected, value in (
        ("devices", names(devices), "names such as 'cpu:0'", devices),
        ("mesh", mesh is None or isinstance(mesh, str), "None or text such as 'tensor=2'", mesh),
        ("placement", placement is None or isinstance(placement, str), "None, 'resident' or 'gathered'", placement),
        ("prompt_inputs", names(prompt_inputs), "a regular expression or a list of names", prompt_inputs),
        ("timeout", isinstance(timeout, (int, float)), "a number of seconds", timeout),
        ("communicator", communicator is None or isinstance(communicator, str), "None, 'peer' or 'staged'", communicator),
        ("compute", compute in (None, "fp8"), "None or 'fp8'", compute),
    ):
        if not good:
            raise _core.Error(f"[{name}] expected {expected} but got {value!r}")
    if isinstance(prompt_inputs, str):
        try:
            re.compile(prompt_inputs)
        except re.error as error:
            raise _core.Error(f"[prompt_inputs] expected a regular expression but got '{prompt_inputs}': {error}") from error


def _split_again(
    module: torch.nn.Module, devices: str, mesh: str, placement: str, prompt_inputs: Any, timeout: float, communicator: str, compute: str
) -> SplitModule:
    return SplitModule(
        module, devices, mesh, placement, prompt_inputs=prompt_inputs, timeout=timeout, communicator=communicator, compute=compute or None
    )


__all__ = ["Plan", "SplitModule", "split"]
