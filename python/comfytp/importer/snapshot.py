"""Sees whether a module is still as it was when it was captured and loaded, fast enough to ask before every call: what is compared
is compared in a few calls of C functions over lists. A call that is only queued on a GPU does not wait for that: see SplitModule._call."""

import itertools
import operator
import types
from collections.abc import Iterable
from typing import Any

import torch

from .key import classes_of, functions_of, module_hash, python_modules_of

_STANDARD = frozenset(vars(torch.nn.Module()))  # attributes that every module has
_CHILDREN_AND_HOOKS = [operator.itemgetter(name) for name in ("_modules", "_forward_hooks", "_forward_pre_hooks")]
_SAMPLE = 64  # bytes of each tensor that are compared


class Code:
    """What the module's forward calls by name: of its parts' classes, and of the Python modules that they come from."""

    def __init__(self, module: torch.nn.Module) -> None:
        spaces = [*classes_of(module), *python_modules_of(module).values()]
        self._there = [(vars(space), list(functions.keys()), list(functions.values())) for space in spaces if (functions := functions_of(space))]

    def same(self) -> bool:
        return all(list(map(space.get, names)) == functions for space, names, functions in self._there)


class _Held:
    """What dicts hold."""

    def __init__(self, dicts: Iterable[dict[Any, Any]]) -> None:
        dicts = list(dicts)
        self._empty = [held for held in dicts if not held]
        self.filled = [held for held in dicts if held]
        self._values = list(_values(self.filled))

    def same(self) -> bool:
        return not any(self._empty) and list(_values(self.filled)) == self._values


class Parts:
    """A module's parts: which there are, of which classes, with which hooks and attributes. passing: attributes whose values do not count."""

    def __init__(self, module: torch.nn.Module, passing: frozenset[str] = frozenset()) -> None:
        self._parts = list(module.modules())
        self._classes = list(map(type, self._parts))
        self.module, self.dicts = module, list(map(vars, self._parts))
        self._sizes = list(map(len, self.dicts))
        owners: dict[str, list[dict[str, Any]]] = {}
        for own in self.dicts:
            for name in own:
                if name not in _STANDARD and name not in passing:
                    owners.setdefault(name, []).append(own)
        self._attributes = [(operator.itemgetter(name), having) for name, having in owners.items()]
        self._holders = self._holders_now()
        self._held = _Held(itertools.chain.from_iterable(self._holders))

    def _holders_now(self) -> list[list[dict[Any, Any]]]:
        """Asked for anew each time, since code that takes all hooks away may put another dict in the place of theirs."""
        return [list(map(get, self.dicts)) for get in _CHILDREN_AND_HOOKS]

    def same(self) -> bool:
        """Where values() raises nothing either, names of attributes are the same too: none is gone, and there are as many."""
        return (
            list(map(len, self.dicts)) == self._sizes
            and self._held.same()
            and self._holders_now() == self._holders
            and list(map(type, self._parts)) == self._classes
        )

    def same_parts(self, other: "Parts") -> bool:
        """The very same, whatever their attributes are."""
        return len(self._parts) == len(other._parts) and all(map(operator.is_, self._parts, other._parts))

    def values(self) -> list[list[Any]]:
        """Of the attributes that not every module has. Raises KeyError where one is gone."""
        return [list(map(get, having)) for get, having in self._attributes]


class Structure:
    """A module's parts, hooks, attributes and what these hold, and its code.

    seen: what module_hash() of the module saw. members: of these dicts of each part the tensors count too, which they are, not what they hold.
    """

    def __init__(
        self, module: torch.nn.Module, seen: dict[int, Any], members: Iterable[str] = ("_buffers",), passing: frozenset[str] = frozenset()
    ) -> None:
        self.parts = Parts(module, passing)
        self._attributes = self.parts.values()
        dicts = self.parts.dicts
        self._members = _Held(own[name] for own in dicts for name in members)
        # Tensors of one element are the only ones that can be equal without being the same.
        self._single = [(d, name, t) for d in self._members.filled for name, t in d.items() if isinstance(t, torch.Tensor) and t.numel() == 1]
        watched = {id(own[name]) for own in dicts for name in _STANDARD}
        self._live: list[Any] = [vars(cls) for cls in classes_of(module)]
        self._live += [value for value in seen.values() if isinstance(value, (dict, list, set)) and id(value) not in watched]
        self._copies = [set(value) if isinstance(value, set) else list(value) if isinstance(value, list) else dict(value) for value in self._live]
        self._code = Code(module)
        functions = [value for value in seen.values() if isinstance(value, types.FunctionType)]
        self._cells = [cell for function in functions for cell in function.__closure__ or ()]
        self._cell_contents = list(map(_contents, self._cells))

    def same(self) -> bool:
        """Numbers and the like that are equal are the same, everything else is when it is the same object."""
        try:
            return (
                self.parts.same()
                and self._members.same()
                and all(own.get(name) is tensor for own, name, tensor in self._single)
                and self.parts.values() == self._attributes
                and self._live == self._copies
                and self._code.same()
                and all(map(operator.is_, map(_contents, self._cells), self._cell_contents))
            )
        except Exception:  # an attribute is gone, or is one that cannot be compared, as a tensor is
            return False


class Snapshot:
    """What the module is now.

    hash: module_hash. weights: its parameters by every name they have.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        seen: dict[int, Any] = {}
        self.hash = module_hash(module, seen)
        self.weights = {name: parameter.detach() for name, parameter in module.named_parameters(remove_duplicate=False)}
        self._structure = Structure(module, seen, ("_parameters", "_buffers"))
        self._watch_tensors(module, seen)

    def same_structure(self) -> bool:
        return self._structure.same()

    # ---- what tensors hold

    def _watch_tensors(self, module: torch.nn.Module, seen: dict[int, Any]) -> None:
        tensors = {id(t): t for t in module.parameters()}
        plain = {id(t): t for t in (*module.buffers(), *(value for value in seen.values() if isinstance(value, torch.Tensor)))}
        tensors.update(plain)
        self._tensors = [t for t in tensors.values() if t.device.type != "meta" and type(t) in (torch.Tensor, torch.nn.Parameter)]
        self._baked = list(plain.values())
        self._versioned = [t for t in self._tensors if not t.is_inference()]
        names: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        self._names = [names.get(id(t), []) for t in self._tensors]
        self._places = [t.data_ptr() for t in self._tensors]
        sampled = [(t, _sample(t)) for t in self._tensors if t.device.type == "cpu" and t.untyped_storage().nbytes()]
        self._samples = [_Samples(sampled, dtype) for dtype in (torch.int64, torch.uint8)]
        self.remember()

    def remember(self) -> None:
        """What tensors hold now is what they are compared with from now on."""
        self._versions = [t._version for t in self._versioned]
        for samples in self._samples:
            samples.remember()

    def same_places(self) -> bool:
        return [t.data_ptr() for t in self._tensors] == self._places

    def written(self) -> tuple[set[str], bool]:
        """The weights that something was written to since remember(), and whether something was to a tensor that captures hold. Every
        write counts itself in the tensor, but those to inference tensors and through `.data`: for their sake some bytes of each
        are looked at too."""
        versions = [t._version for t in self._versioned]
        if versions == self._versions and all(samples.same() for samples in self._samples):
            return set(), False
        changed = {id(t) for t, now, then in zip(self._versioned, versions, self._versions, strict=True) if now != then}
        changed.update(id(t) for samples in self._samples for t in samples.changed())
        names = (names for tensor, names in zip(self._tensors, self._names, strict=True) if id(tensor) in changed)
        return set().union(*names), any(id(t) in changed for t in self._baked)

    def same_weights(self, other: "Snapshot") -> bool:
        """The same memory under the same names."""
        return self.weights.keys() == other.weights.keys() and all(t.is_set_to(other.weights[name]) and t.dtype == other.weights[name].dtype for name, t in self.weights.items())


def _values(dicts: Iterable[dict[Any, Any]]) -> Iterable[Any]:
    return itertools.chain.from_iterable(map(dict.values, dicts))


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Some bytes of its middle, or all of a small one, as a view: as int64, which is compared the fastest, where it fits."""
    storage = tensor.untyped_storage()
    first = tensor.storage_offset() * tensor.element_size()
    last = min(first + tensor.nbytes, storage.nbytes())
    if last - first <= _SAMPLE and (first % 8 or last % 8):
        return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage, first, (last - first,), (1,))
    count = min(_SAMPLE, last - first) // 8
    return torch.empty(0, dtype=torch.int64, device="cpu").set_(storage, (first + last) // 16 - count // 2, (count,), (1,))


class _Samples:
    """Views of tensors, and what they held."""

    def __init__(self, sampled: list[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> None:
        self._tensors = [tensor for tensor, view in sampled if view.dtype == dtype]
        self._views = [view for _, view in sampled if view.dtype == dtype]
        self._dtype = dtype

    def _now(self) -> torch.Tensor:
        return torch.cat(self._views) if self._views else torch.empty(0, dtype=self._dtype, device="cpu")

    def remember(self) -> None:
        self._then = self._now()

    def same(self) -> bool:
        return torch.equal(self._now(), self._then)

    def changed(self) -> list[torch.Tensor]:
        sizes = [view.numel() for view in self._views]
        pairs = zip(self._tensors, self._now().split(sizes), self._then.split(sizes), strict=True) if sizes else ()
        return [tensor for tensor, now, then in pairs if not torch.equal(now, then)]
