"""Runs a module's calls on the engine: a program for each key, captured once, over one set of weights."""

import collections
import contextlib
import dataclasses
import functools
import re
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_unflatten

from .. import Graph, _core
from .._arrays import Contents, Queue, on_gpu
from . import cache
from .key import Arguments, Forms, content_hash, module_hash
from .program import Output, Program, import_call
from .unsupported import Unsupported

# Arguments that stay the same over the steps of a picture; what hangs on them alone runs once.
PROMPT_INPUTS = r"encoder|context|pooled|text|txt|prompt|clip|caption|attention_mask|_ids|rotary|guidance|(^|\.)y$"
# Numbers that go with the step: an input, however they are given.
_STEP = re.compile(r"time|sigma|step|(^|\.)t$")
_MOST_VARIANTS = 4  # captures that differ in numbers or contents alone
_MOST_NEW_MASKS = 4  # are looked at, before it is thought that every call has another
_MOST_READY = 16  # programs that are kept in memory
_MOST_KNOWN = 1000  # forms of calls of which is known what varies in them, and that cannot be captured
_PROGRESS_AFTER = 2.0


@dataclasses.dataclass
class Stats:
    """Counters since the split was made; uploaded_bytes: of weights to devices."""

    captures: int = 0
    engine_calls: int = 0
    torch_fallbacks: int = 0
    uploaded_bytes: int = 0


@dataclasses.dataclass
class Ready:
    """A program and the engine's form of it."""

    program: Program
    compiled: Any


@dataclasses.dataclass
class _Variants:
    """Calls that differ in numbers or in the contents of small tensors alone."""

    numbers: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)
    inputs: set[int] = dataclasses.field(default_factory=set)  # leaves that are numbers and became inputs
    fixed: set[int] = dataclasses.field(default_factory=set)  # those that cannot
    contents: bool = False  # what small tensors hold is part of the key
    tried: set[Any] = dataclasses.field(default_factory=set)  # keys, full masks apart, that were captured or could not be
    new_masks: int = 0  # on a GPU, one call after another


class Recent(collections.OrderedDict):
    """Keeps the `most` entries that were used last."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def get(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            return default
        self.move_to_end(key)
        return self[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > self._most:
            self.popitem(last=False)


class Calls:
    """module: is read, never changed. engine: a _core.Programs whose keys are the module's. prompt_inputs: a pattern, or names
    of arguments, that stay the same over many calls. gpus: those that the engine runs on, if on nothing else: tensors there are
    read and written where they lie. Calls from several threads take turns while one captures."""

    def __init__(
        self,
        module: torch.nn.Module,
        engine: Any,
        prompt_inputs: str | Iterable[str] = PROMPT_INPUTS,
        stats: Stats | None = None,
        gpus: Iterable[torch.device] = (),
    ) -> None:
        self.stats = stats or Stats()
        self._gpus = frozenset(gpus)
        self._queue = Queue()
        self._forms = Forms()
        self._numbers = Contents()
        self._hashes = Recent(_MOST_KNOWN)  # of contents, by their numbers
        self.last: Ready | None = None  # what served the last call
        self._module = module
        self._engine = engine
        names = prompt_inputs if isinstance(prompt_inputs, str) else "|".join(rf"(^|\.){re.escape(n)}($|\.)" for n in prompt_inputs)
        self._prompt = re.compile(names or r"$^")
        self._ready = Recent(_MOST_READY)
        self._refused = Recent(_MOST_KNOWN)  # key -> the reason
        self._variants = Recent(_MOST_KNOWN)
        self._programs = Recent(_MOST_READY)  # name in the cache -> program, for when the module becomes what it was
        self._module_hash: str | None = None
        self._tables: dict[str, str] = {}  # content -> key in the engine
        self._lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result. Raises Unsupported where the call cannot be captured."""
        arguments = self._arguments(args, kwargs)
        with self._lock:
            arguments, ready = self._find(arguments)
            engine = self._engine
        return self._run(arguments, ready, engine)

    def ahead(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any] | None:
        """(the result,) of a call that nobody waits for, over what is ready; else None."""
        if not self._gpus:
            return None
        try:
            arguments = self._arguments(args, kwargs)
        except Unsupported:
            return None
        if _device_of(arguments) not in self._gpus:
            return None
        with self._lock:
            found = self._ready_for(arguments)
            engine = self._engine
        return (self._run(*found, engine),) if found is not None else None

    def renew(self, module_hash: str, engine: Any = None) -> None:
        """The module has become another one, with this hash, or its weights are those of another engine."""
        with self._lock:
            self._module_hash = module_hash
            if engine is not None:
                self._engine, self._tables = engine, {}
            self._ready.clear()
            self._refused.clear()
            self._variants.clear()
            self.last = None

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in (*args, *kwargs.values())):
            raise Unsupported("an argument asks for gradients")
        if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
            raise Unsupported("the call stands in torch.autocast")
        return self._forms.arguments_of(self._module.forward, args, kwargs)

    def _run(self, arguments: Arguments, ready: Ready, engine: Any) -> Any:
        tensors = [arguments.leaves[i] for i in arguments.tensors]
        device = _device_of(arguments)
        place = device if device in self._gpus else torch.device("cpu")
        owners = {name: tensor for name, tensor in zip(ready.program.inputs, tensors, strict=True) if name is not None}
        leaves, outputs = [], {}
        for output in ready.program.outputs:
            if isinstance(output, Output):
                result = torch.empty(output.shape, dtype=output.dtype, device=place)
                outputs[output.name] = result.reshape(output.shape or (1,))
                output = result
            leaves.append(output)
        inputs = {name: _outside(tensor, place) for name, tensor in owners.items()}
        self._queue.run(lambda **order: engine.run(ready.compiled, inputs, outputs, **order), inputs, outputs, owners)
        self.stats.engine_calls += 1
        self.last = ready
        leaves = [leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return tree_unflatten(leaves, ready.program.out_spec)

    # ---- which program

    def _ready_for(self, arguments: Arguments) -> tuple[Arguments, Ready] | None:
        skeleton = arguments.key(without=arguments.numbers)
        variants = self._variants.get(skeleton)
        if variants is None:
            return None
        self._learn_numbers(arguments, variants)
        arguments, _, key = self._as_captured(arguments, skeleton, variants)
        ready = self._ready.get(key)
        return (arguments, ready) if ready is not None else None

    def _as_captured(self, given: Arguments, skeleton: Any, variants: _Variants) -> tuple[Arguments, dict[int, torch.Tensor], Any]:
        """With numbers that became inputs; the contents that a capture hangs on; the key."""
        arguments = _with_inputs(given, variants.inputs)
        exact = arguments.key() if given.numbers else skeleton
        if variants.contents:
            contents = self._contents(arguments)
            return arguments, contents, (exact, tuple((i, self._hash_of(t)) for i, t in contents.items()))
        contents = self._full_masks(arguments, variants)
        return arguments, contents, (exact, tuple((i, "ones") for i in contents))

    def _hash_of(self, tensor: torch.Tensor) -> str:
        """Of a tensor on a GPU, for which the host must wait, only where torch has counted a write since the last time."""
        number = self._numbers.number(tensor) if on_gpu(tensor) else 0
        known = self._hashes.get(number) if number else None
        if known is None:
            known = content_hash(tensor)
            if number:
                self._hashes[number] = known
        return known

    def _find(self, arguments: Arguments) -> tuple[Arguments, Ready]:
        skeleton = arguments.key(without=arguments.numbers)
        variants = self._variants.get(skeleton)
        if variants is None:
            variants = self._variants[skeleton] = _Variants()
        self._learn_numbers(arguments, variants)
        given = arguments
        while True:
            arguments, contents, key = self._as_captured(given, skeleton, variants)
            found = self._ready.get(key)
            if found is not None:
                return arguments, found
            if refusal := self._refused.get(key):
                raise Unsupported(refusal)
            counted = key if variants.contents else key[0]
            if counted not in variants.tried and len(variants.tried) >= _MOST_VARIANTS:
                refusal = next((self._refused[tried] for tried in variants.tried if tried in self._refused), None)
                raise Unsupported(
                    refusal
                    or f"{type(self._module).__name__} has been captured {len(variants.tried)} times for calls that differ in numbers or "
                    f"contents of {', '.join(self._varying(given, variants))} alone"
                )
            try:
                ready = self._compile(self._program(key, arguments, contents))
            except Unsupported as error:
                if variants.inputs - variants.fixed:
                    variants.fixed |= variants.inputs
                    variants.inputs = set()
                elif not variants.contents and self._contents(arguments):
                    variants.contents = True
                else:
                    variants.tried.add(counted)
                    self._refused[key] = self._refused[counted] = str(error)
                    raise
                continue
            variants.tried.add(counted)
            self._ready[key] = ready

    def _learn_numbers(self, arguments: Arguments, variants: _Variants) -> None:
        """A number that was another one in an earlier call becomes an input, and one that goes with the step at once."""
        numbers = tuple(arguments.leaves[i] for i in arguments.numbers)
        for i in arguments.numbers:
            if _STEP.search(arguments.names[i]) and i not in variants.fixed:
                variants.inputs.add(i)
        for earlier in variants.numbers:
            for i, a, b in zip(arguments.numbers, numbers, earlier, strict=True):
                if a != b and isinstance(a, float) and i not in variants.fixed:
                    variants.inputs.add(i)
        if numbers not in variants.numbers and len(variants.numbers) <= _MOST_VARIANTS:
            variants.numbers.append(numbers)

    def _contents(self, arguments: Arguments) -> dict[int, torch.Tensor]:
        """Masks, lengths and the like, which code may decide by, by their number among the tensors."""
        found = {}
        for number, i in enumerate(arguments.tensors):
            tensor = arguments.leaves[i]
            if not tensor.dtype.is_floating_point and not tensor.dtype.is_complex and not _STEP.search(arguments.names[i]):
                found[number] = tensor
        return found

    def _full_masks(self, arguments: Arguments, variants: _Variants) -> dict[int, torch.Tensor]:
        """Masks of ones, as a prompt without padding has: captured without a mask. To look at one on a GPU the host must wait; so those whose writes
        torch does not count are not looked at, nor are those that are made anew for every call."""
        found = {}
        for number, tensor in self._contents(arguments).items():
            if "mask" not in arguments.names[arguments.tensors[number]]:
                continue
            if on_gpu(tensor):
                known = self._numbers.number(tensor)
                variants.new_masks = 0 if known in self._hashes else variants.new_masks + 1
                if not known or variants.new_masks > _MOST_NEW_MASKS:
                    continue
            if self._hash_of(tensor) == _hash_of_ones(tensor.shape, tensor.dtype):
                found[number] = tensor
        return found

    def _varying(self, arguments: Arguments, variants: _Variants) -> list[str]:
        numbers = [arguments.names[i] for i in arguments.numbers]
        tensors = [arguments.names[arguments.tensors[n]] for n in self._contents(arguments)] if variants.contents else []
        return numbers + tensors

    # ---- making one

    def _program(self, key: Any, arguments: Arguments, contents: dict[int, torch.Tensor]) -> Program:
        if self._module_hash is None:
            self._module_hash = module_hash(self._module)
        names = [arguments.names[i] for i in arguments.tensors]
        varies = ["prompt" if self._prompt.search(name) else "call" for name in names]
        halves = bool(self._gpus)
        stored = cache.name_of(self._module_hash, (key, varies, halves))
        program = self._programs.get(stored) or cache.load(stored)
        if program is None:
            with _progress(f"capturing {type(self._module).__name__}, once for each shape of its inputs"):
                program = import_call(self._module, arguments.leaves, arguments.spec, names, varies, contents, halves)
            self.stats.captures += 1
            cache.save(stored, program)
        self._programs[stored] = program
        return program

    def _compile(self, program: Program) -> Ready:
        graph = program.graph
        renamed: dict[str, str] = {}
        for key, table in program.tables.items():
            content = f"{table.dtype} {tuple(table.shape)} {content_hash(table)}"
            if content not in self._tables:
                self._tables[content] = f"comfytp.table.{len(self._tables)}"
                self._engine.add_weights({self._tables[content]: table})
            renamed[key] = self._tables[content]
        graph = re.sub(r'key="(table\.\d+)"', lambda m: f'key="{renamed[m[1]]}"', graph)
        try:
            return Ready(program, self._engine.compile(Graph.parse(graph)))
        except (_core.Cancelled, _core.Timeout, _core.DeviceFailure):  # the model can be run, though not here and now
            raise
        except _core.Error as error:
            raise Unsupported(str(error)) from error


def _with_inputs(arguments: Arguments, numbers: set[int]) -> Arguments:
    """Numbers as tensors of rank 0."""
    if not numbers:
        return arguments
    leaves = list(arguments.leaves)
    for i in numbers:
        leaves[i] = torch.tensor(leaves[i], dtype=torch.float32 if isinstance(leaves[i], float) else torch.int64, device="cpu")
    return Arguments(leaves, arguments.form)


@functools.lru_cache(maxsize=64)
def _hash_of_ones(shape: torch.Size, dtype: torch.dtype) -> str:
    return content_hash(torch.ones(shape, dtype=dtype, device="cpu"))


def _device_of(arguments: Arguments) -> torch.device:
    """Where the call's tensors lie; a number may lie anywhere."""
    tensors = (arguments.leaves[i] for i in arguments.tensors)
    return next((t.device for t in tensors if t.dim()), torch.device("cpu"))


def gpus_of(devices: str) -> set[torch.device]:
    """Those of a list of GPUs ("cuda:0,cuda:1@10GiB"); none where another device is among them."""
    found = [re.fullmatch(r"(cuda:\d+)(@.*)?", name.strip()) for name in devices.split(",")]
    return {torch.device(match[1]) for match in found} if all(found) else set()


def _outside(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    """What is in host memory stays there."""
    tensor = tensor.detach()
    if tensor.device != place and tensor.device.type != "cpu":
        tensor = tensor.to(place)
    return tensor if tensor.dim() else tensor.reshape(1)


@contextlib.contextmanager
def _progress(what: str):
    """A line on stderr when it takes long, and another when it is done."""
    start = time.monotonic()
    said = threading.Event()

    def say() -> None:
        said.set()
        _write(f"comfytp: {what} …")

    timer = threading.Timer(_PROGRESS_AFTER, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if said.is_set():
            _write(f"comfytp: … took {time.monotonic() - start:.1f} s")


def _write(line: str) -> None:
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


__all__ = ["PROMPT_INPUTS", "Calls", "Ready", "Stats"]
