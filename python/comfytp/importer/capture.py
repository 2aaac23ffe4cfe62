"""Captures a module's forward as a graph of few ATen ops, without touching the module."""

import contextlib
import copy
import functools
import logging
import sys
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.config as fx_config
from torch._subclasses.fake_tensor import FakeTensorMode

from .contents import KnownContents
from .unsupported import Unsupported

# Ops that torch would take apart and that have a meaning of their own in the engine's graph.
_KEPT = (
    "conv1d.default",
    "conv1d.padding",
    "conv2d.default",
    "conv2d.padding",
    "conv3d.default",
    "conv3d.padding",
    "group_norm.default",
    "instance_norm.default",
    "layer_norm.default",
    "linear.default",
    "linspace.default",
    "logspace.default",
    "matmul.default",
    "pad.default",
    "pixel_shuffle.default",
    "pixel_unshuffle.default",
    "repeat_interleave.self_int",
    "rms_norm.default",
    "scaled_dot_product_attention.default",
    "silu.default",
    "softmax.int",
    "split.Tensor",
    "stack.default",
    "unbind.int",
    "upsample_nearest2d.default",
    "upsample_nearest2d.vec",
    "upsample_nearest3d.vec",
)


_ONE_AT_A_TIME = threading.RLock()  # what is put back belongs to the process


@dataclass
class Captured:
    """A module's forward for one set of shapes.

    module: fx graph over ATen ops; its placeholders are named in `sources` in order.
    sources: for each placeholder ("parameter" | "buffer" | "constant" | "input", name, or index for an input).
    constants: tensors that belong to the code rather than to the module, by name.
    out_spec: torch's tree of the outputs; outputs: for each leaf an fx node, or a value that is no tensor.
    """

    module: torch.fx.GraphModule
    sources: dict[str, tuple[str, Any]]
    constants: dict[str, torch.Tensor]
    outputs: list[Any]
    out_spec: Any


class _Forward(torch.nn.Module):
    """Calls the module with the leaves of (args, kwargs): tensors are inputs, everything else is fixed."""

    def __init__(self, module: torch.nn.Module, leaves: list[Any], spec: Any, contents: Mapping[int, torch.Tensor]) -> None:
        super().__init__()
        self.module = module
        self._leaves = leaves
        self._spec = spec
        self._contents = contents

    def forward(self, *tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        leaves = [next(given) if leaf is None else leaf[0] for leaf in self._leaves]
        args, kwargs = torch.utils._pytree.tree_unflatten(leaves, self._spec)
        numbers = _numbers(self.module)
        with KnownContents(self._contents, tensors) if self._contents else contextlib.nullcontext():
            result = self.module(*args, **kwargs)
        if changed := [name for name, number in _numbers(self.module).items() if numbers.get(name, number) != number]:
            raise Unsupported(f"the forward of {type(self.module).__name__} changes its attribute {changed[0]}")
        return result


def capture(module: torch.nn.Module, leaves: list[Any], spec: Any, contents: Mapping[int, torch.Tensor] | None = None) -> Captured:
    """Captures module(*args, **kwargs), the leaves of (args, kwargs) and their tree being given. contents: of the tensors (by their
    number among the leaves' tensors) whose values the code may read and decide by.

    A copy of the module with fake parameters is what runs, so that neither memory nor arithmetic of a model's size is needed
    and the module keeps every attribute it has. It runs in this process: modules of custom nodes cannot be sent to another.
    Caches that code keeps (functools) are cleared before and after, since they would keep fake tensors or give away real
    ones; random state, default dtype and default device are put back.

    Raises Unsupported when torch cannot capture it.
    """
    mode = FakeTensorMode()
    contents = {i: tensor.detach().to("cpu", copy=True) for i, tensor in (contents or {}).items()}  # code may write to them
    inputs = [_fake(mode, leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
    fixed = [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]
    with _ONE_AT_A_TIME, _undisturbed(module):
        try:
            forward = _Forward(_copy_with_fakes(module, mode), fixed, spec, contents).eval()
            program = torch.export.export(forward, tuple(inputs), strict=False)
            program = program.run_decompositions(_decompositions())
        except (Unsupported, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # torch raises whatever its own parts and the model's code raise
            raise Unsupported(f"{type(module).__name__} cannot be captured: {_first_line(error)}") from error
    return _read(program)


def _fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _copy_with_fakes(module: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = torch.nn.Parameter(_fake(mode, parameter), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = _fake(mode, buffer)
    return copy.deepcopy(module, memo)


def _numbers(module: torch.nn.Module) -> dict[str, Any]:
    """Attributes that may count calls or steps."""
    return {
        f"{name}.{key}".lstrip("."): value
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


@functools.cache
def _decompositions() -> Any:
    table = torch.export.default_decompositions()
    for name in _KEPT:
        packet, overload = name.split(".")
        table.pop(getattr(getattr(torch.ops.aten, packet), overload), None)
    return table


def _read(program: torch.export.ExportedProgram) -> Captured:
    from torch.export.graph_signature import InputKind, OutputKind

    prefix = "module."
    sources: dict[str, tuple[str, Any]] = {}
    constants: dict[str, torch.Tensor] = {}
    inputs = 0
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind is InputKind.USER_INPUT:
            sources[name] = ("input", inputs)
            inputs += 1
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            kind = "parameter" if spec.kind is InputKind.PARAMETER else "buffer"
            sources[name] = (kind, spec.target.removeprefix(prefix))
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            sources[name] = ("constant", spec.target)
            constants[spec.target] = program.constants[spec.target]
        else:
            raise Unsupported(f"expected tensors as inputs but got {spec.kind.name.lower()} {spec.target}")
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    outputs, written = [], set()
    for value, spec in zip(output.args[0], program.graph_signature.output_specs, strict=True):
        if spec.kind is OutputKind.USER_INPUT_MUTATION:
            raise Unsupported(f"the forward writes to its input {spec.target}")
        if spec.kind is OutputKind.BUFFER_MUTATION:
            written.add(spec.target.removeprefix(prefix))
        if spec.kind is OutputKind.USER_OUTPUT:
            outputs.append(value)
    # What the forward writes to its buffers is state that no engine keeps: only what no result hangs on may be left out.
    for node in _ancestors(outputs) if written else ():
        if node.op == "placeholder" and sources[node.name][0] == "buffer" and sources[node.name][1] in written:
            raise Unsupported(f"the forward writes to its buffer {sources[node.name][1]}, and reads it")
    return Captured(program.graph_module, sources, constants, outputs, program.call_spec.out_spec)


def _ancestors(outputs: list[Any]) -> set[torch.fx.Node]:
    found: set[torch.fx.Node] = set()
    ahead = [value for value in outputs if isinstance(value, torch.fx.Node)]
    while ahead:
        node = ahead.pop()
        if node not in found:
            found.add(node)
            ahead += node.all_input_nodes
    return found


@contextlib.contextmanager
def _undisturbed(module: torch.nn.Module):
    caches = _caches_of(module)
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    state = torch.random.get_rng_state()
    log = logging.getLogger("torch._subclasses.fake_tensor")  # prints a traceback for what becomes one line of ours
    silent = log.disabled
    traces = getattr(fx_config, "do_not_emit_stack_traces", None)  # a fifth of the time; an older torch always takes them
    for cache in caches:
        cache.cache_clear()
    log.disabled = True
    if traces is not None:
        fx_config.do_not_emit_stack_traces = True
    try:
        with torch.no_grad(), torch.device("cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own parts, and what the model says when it really runs
            yield
    finally:
        log.disabled = silent
        if traces is not None:
            fx_config.do_not_emit_stack_traces = traces
        for cache in caches:
            cache.cache_clear()
        torch.random.set_rng_state(state)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)


def _caches_of(module: torch.nn.Module) -> list[Any]:
    """functools caches of the Python modules that the parts of `module` and their bases come from, and of what these import
    by name from the same package."""
    files = {base.__module__ for part in module.modules() for base in type(part).__mro__}
    found: dict[int, Any] = {}
    for name in files:
        if name.partition(".")[0] in ("torch", "builtins"):
            continue
        for value in list(vars(sys.modules.get(name, object())).values()) if name in sys.modules else ():
            for item in (value, *(vars(value).values() if isinstance(value, type) else ())):
                if hasattr(item, "cache_clear") and hasattr(item, "cache_info"):
                    found[id(item)] = item
    return list(found.values())


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
