"""What a captured call depends on: the arguments without the tensors' values, and the module without its weights."""

import functools
import hashlib
import inspect
import itertools
import pathlib
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from .unsupported import Unsupported

# Of a module: what is hashed by itself, or does not count, since captures are made as in eval().
_NO_ATTRIBUTES = frozenset(("_parameters", "_buffers", "_modules", "training"))
_UNORDERED = "_use_default_values"  # in configs of diffusers: a list in the order of a set, another in each process
_FIXED_TYPES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_OF_A_CLASS = (types.FunctionType, *_FIXED_TYPES)


@dataclass(frozen=True)
class Form:
    """The tree of a call's (args, kwargs), as torch has it and as text, and a name for each leaf: "added_cond_kwargs.text_embeds"."""

    spec: Any
    text: str
    names: list[str]


@dataclass
class Arguments:
    """A call's arguments as the leaves of (args, kwargs)."""

    leaves: list[Any]
    form: Form

    @property
    def spec(self) -> Any:
        return self.form.spec

    @property
    def names(self) -> list[str]:
        return self.form.names

    @functools.cached_property
    def tensors(self) -> list[int]:
        """The leaves that are tensors."""
        return [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]

    @functools.cached_property
    def numbers(self) -> list[int]:
        return [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, (int, float)) and not isinstance(leaf, bool)]

    def key(self, without: Iterable[int] = ()) -> tuple[Any, ...]:
        """Equal for calls that one program serves; without the values of some numbers."""
        without = set(without)
        parts: list[Any] = [self.form.text, str(torch.get_default_dtype())]
        for i, leaf in enumerate(self.leaves):
            if isinstance(leaf, torch.Tensor):
                parts.append(("tensor", str(leaf.dtype), tuple(leaf.shape)))
            elif i in without:
                parts.append((type(leaf).__name__,))
            else:
                parts.append((type(leaf).__name__, repr(leaf)))
        return tuple(parts)

    def call(self, function: Any) -> Any:
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        return function(*args, **kwargs)


def arguments_of(forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """The same for a call with positional and with named arguments. Raises Unsupported for arguments that are neither tensors
    nor plain values."""
    names: list[str] = []
    try:
        signature = inspect.signature(forward)
        bound = signature.bind(*args, **kwargs)
        args, kwargs = bound.args, bound.kwargs
        names = [
            p.name
            for p in signature.parameters.values()
            if p.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) and p.name in bound.arguments
        ]
    except (TypeError, ValueError):  # the call itself will say so
        pass
    pairs, spec = tree_flatten_with_path((args, dict(kwargs)))
    leaves, leaf_names = [], []
    for path, leaf in pairs:
        name = _name(path, names)
        if not isinstance(leaf, (torch.Tensor, *_FIXED_TYPES)):
            raise Unsupported(f"argument {name} is a {type(leaf).__name__}, neither a tensor nor a plain value")
        leaves.append(leaf)
        leaf_names.append(name)
    return Arguments(leaves, Form(spec, str(spec), leaf_names))


class Forms:
    """arguments_of() for many calls of few forms: what does not depend on the leaves' values is found once for each form."""

    _MOST = 1000

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Form, list[int]]] = {}  # by function and tree: the form, and where its leaves are among those given

    def arguments_of(self, forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        given: list[Any] = []
        tree = (type(forward), getattr(forward, "__func__", forward), _tree(args, given), _tree(dict(kwargs), given))
        try:
            known = self._known.get(tree)
        except TypeError:  # a forward that cannot be hashed
            return arguments_of(forward, args, kwargs)
        if known is not None:
            return Arguments([given[i] for i in known[1]], known[0])
        arguments = arguments_of(forward, args, kwargs)
        if all(isinstance(leaf, (torch.Tensor, *_FIXED_TYPES)) for leaf in given):  # no leaf of ours is a container of torch's
            count = itertools.count()
            order = arguments_of(forward, _numbered(args, count), _numbered(dict(kwargs), count)).leaves
            if len(self._known) >= self._MOST:
                self._known.clear()
            self._known[tree] = arguments.form, order
        return arguments


def _tree(value: Any, leaves: list[Any]) -> Any:
    """Of tuples, lists and dicts within each other what is not their leaves, which it appends to `leaves`."""
    kind = type(value)
    if kind is tuple or kind is list:
        return (kind, *[_tree(part, leaves) for part in value])
    if kind is dict:
        return (kind, *[(key, _tree(part, leaves)) for key, part in value.items()])
    leaves.append(value)
    return kind


def _numbered(value: Any, count: Iterator[int]) -> Any:
    """The same tree with the leaves' numbers instead of them."""
    if type(value) in (tuple, list):
        return type(value)(_numbered(part, count) for part in value)
    if type(value) is dict:
        return {key: _numbered(part, count) for key, part in value.items()}
    return next(count)


def _name(path: tuple[Any, ...], names: list[str]) -> str:
    parts = [str(getattr(entry, "idx", getattr(entry, "key", getattr(entry, "name", entry)))) for entry in path]
    if parts[0] == "0":
        position = int(parts[1])
        parts[1] = names[position] if position < len(names) else f"arg{position}"
    return ".".join(parts[1:])


def content_hash(tensor: torch.Tensor) -> str:
    tensor = tensor.detach().to("cpu").contiguous()
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"").hexdigest()


def module_hash(module: torch.nn.Module, seen: dict[int, Any] | None = None) -> str:
    """Of everything that the capture of a module's forward depends on but the arguments: its code, its attributes, the shapes
    of its parameters and the contents of its buffers, and the versions of torch and of the importer. Attributes of its parts that
    it names in `passing_attributes` do not count. seen: takes the objects whose contents are part of it, by id."""
    digest = hashlib.sha256()

    def add(*parts: Any) -> None:
        digest.update(repr(parts).encode())

    add("torch", torch.__version__)
    own = pathlib.Path(__file__).parent
    for file in sorted(own.rglob("*.py")):
        digest.update(file.read_bytes())
    loaded = python_modules_of(module)
    add(*sorted((name, _source(origin)) for name, origin in loaded.items()))
    for name, origin in sorted(loaded.items()):  # a function may have been replaced by another file's
        add(name, [(own, f.__module__, f.__qualname__, _code(f.__code__)) for own, f in sorted(functions_of(origin).items())])
    for name, parameter in module.named_parameters(remove_duplicate=False):
        add(name, tuple(parameter.shape), str(parameter.dtype))
    for name, buffer in module.named_buffers(remove_duplicate=False):
        add(name, tuple(buffer.shape), str(buffer.dtype), content_hash(buffer))
    seen = {} if seen is None else seen
    for state in _states(module, seen, getattr(module, "passing_attributes", frozenset())):
        add(*state)
    return digest.hexdigest()


def seen_in(module: torch.nn.Module, passing: frozenset[str]) -> dict[int, Any]:
    """What module_hash() sees of a module with these passing attributes."""
    seen: dict[int, Any] = {}
    for _ in _states(module, seen, passing):
        pass
    return seen


def _states(module: torch.nn.Module, seen: dict[int, Any], passing: frozenset[str]) -> Iterator[tuple[Any, ...]]:
    """Pictures of its parts' classes and of its parts."""
    for cls in classes_of(module):
        yield ([(name, _state(_function(value), seen)) for name, value in sorted(vars(cls).items()) if isinstance(_function(value), _OF_A_CLASS)],)
    without = _NO_ATTRIBUTES | passing
    for name, part in module.named_modules():
        yield name, _state(part, seen, without)


def classes_of(module: torch.nn.Module) -> list[type]:
    """The classes of a module's parts and their bases, in a fixed order; torch's own are fixed by its version."""
    classes = dict.fromkeys(base for part in module.modules() for base in type(part).__mro__)
    return [cls for cls in classes if cls.__module__.partition(".")[0] not in ("torch", "builtins")]


def functions_of(names: Any) -> dict[str, types.FunctionType]:
    """What a class or a Python module calls by name."""
    return {name: value for name, value in list(vars(names).items()) if isinstance(value, types.FunctionType)}


def _function(value: Any) -> Any:
    """Behind a staticmethod, a classmethod or a property."""
    return getattr(value, "__func__", None) or getattr(value, "fget", None) or value


def python_modules_of(module: torch.nn.Module) -> dict[str, Any]:
    """Those that the module's parts come from, and those of the same packages that these import at their top: whatever else the
    process has loaded does not count."""
    ahead = [cls.__module__ for cls in classes_of(module)]
    packages = {name.partition(".")[0] for name in ahead}
    found: dict[str, Any] = {}
    while ahead:
        name = ahead.pop()
        if name in found or name.partition(".")[0] not in packages or name not in sys.modules:
            continue
        loaded = found[name] = sys.modules[name]
        if type(loaded) is types.ModuleType:  # one that loads lazily has what was asked of it
            for value in list(vars(loaded).values()):
                origin = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
                ahead += [origin] if isinstance(origin, str) else []
    return found


def _source(loaded: Any) -> str:
    try:
        stat = pathlib.Path(loaded.__file__).stat()
        return _file_hash(loaded.__file__, stat.st_size, stat.st_mtime_ns)
    except (AttributeError, OSError, TypeError):  # no file
        return ""


@functools.lru_cache(maxsize=None)
def _file_hash(file: str, size: int, modified: int) -> str:
    return hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()


def _state(value: Any, seen: dict[int, Any], without: frozenset[str] = _NO_ATTRIBUTES) -> Any:
    """A picture of an object's plain contents; functions by their code and what they close over.

    `seen` holds what has been pictured, not its address alone: another object may get the address of one that is gone.
    """
    if isinstance(value, _FIXED_TYPES):
        return repr(value)
    if isinstance(value, torch.Tensor):
        seen[id(value)] = value
        return ("tensor", str(value.dtype), tuple(value.shape), "" if value.is_meta else content_hash(value))  # a capture keeps them
    if id(value) in seen:
        return "seen"
    seen[id(value)] = value
    if isinstance(value, torch.nn.Module):
        return (_class(value), [(k, _state(v, seen)) for k, v in vars(value).items() if k not in without])
    if isinstance(value, Mapping):
        return [(str(k), _state(v, seen)) for k, v in value.items() if k != _UNORDERED]
    if isinstance(value, (list, tuple)):
        return [_state(v, seen) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, functools.partial):
        return ("partial", [_state(part, seen) for part in (value.func, value.args, value.keywords)])
    if isinstance(value, types.MethodType):
        return ("method", _state(value.__func__, seen), _state(value.__self__, seen))
    if isinstance(value, types.FunctionType):
        cells = [_state(cell.cell_contents, seen) for cell in value.__closure__ or () if _is_filled(cell)]
        defaults = (_state(value.__defaults__, seen), _state(value.__kwdefaults__, seen))
        return (value.__module__, value.__qualname__, _code(value.__code__), defaults, cells)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return (_class(value), _state(vars(value), seen) if hasattr(value, "__dict__") else "")


def _code(code: types.CodeType) -> Any:
    def constant(value: Any) -> Any:
        if isinstance(value, types.CodeType):
            return _code(value)
        return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)  # sets have another order in each process

    return (code.co_code.hex(), code.co_names, [constant(c) for c in code.co_consts])


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _class(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
