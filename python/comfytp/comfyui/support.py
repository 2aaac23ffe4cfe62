"""Decides whether a call can be given to the engine: what other nodes put on a model must be honoured or left to PyTorch."""

import functools
import types
from typing import Any

import torch

from ..importer.key import seen_in
from ..importer.snapshot import Structure
from .callouts import name_of
from .patched_weights import PREFIX
from .site import LOADING


def why_not(patcher: Any, module: torch.nn.Module, original: Any, looks: "Looks") -> str | None:
    """Why PyTorch has to run this call, or None. looks: the same for all calls of a model."""
    if foreign := _foreign_forward(module, original) or looks.foreign(module):
        return foreign
    if patcher.injections:
        return f"{_names(patcher.injections)} injects code into the model"
    if patched := [name for name in patcher.object_patches if name.startswith(PREFIX)]:
        return f"the node behind the object patch {_names(patched)} replaces a part of the model"
    if wrapped := [name for name in patcher.weight_wrapper_patches if name.startswith(PREFIX)]:
        return f"weights are computed by a function ({_names(wrapped)})"
    return None


def _foreign_forward(module: torch.nn.Module, original: Any) -> str | None:
    name = getattr(original, "__name__", "")
    if getattr(original, "__self__", None) is not module or getattr(original, "__func__", None) is not _of_class(module, name):
        return f"{name_of(original)} stands in for the model's forward"
    return None


class Looks:
    """Looks for code on a module and its parts that is not their classes' own. To look into thousands of parts takes longer than all else
    that a call needs: where nothing was found, later calls only see whether the parts are still what they were."""

    def __init__(self) -> None:
        self.structure: Structure | None = None  # which had nothing but its classes' code; another object where anything has changed

    def foreign(self, module: torch.nn.Module) -> str | None:
        if self.structure is not None and self.structure.parts.module is module and self.structure.same():
            return None
        found = _foreign_part(module)
        self.structure = None if found else Structure(module, seen_in(module, LOADING), passing=LOADING)
        return found


def _foreign_part(module: torch.nn.Module) -> str | None:
    for path, part in module.named_modules():
        if not _methods(type(part)).isdisjoint(vars(part)):
            name = min(_methods(type(part)).intersection(vars(part)))
            return f"{name_of(vars(part)[name])} stands in for the {name} of '{path}'"
        if part._forward_hooks or part._forward_pre_hooks:
            return f"a forward hook stands on '{path}'"
    return None


@functools.cache
def _methods(cls: type) -> frozenset[str]:
    return frozenset(name for base in cls.__mro__ for name, value in vars(base).items() if isinstance(value, types.FunctionType))


def _of_class(module: torch.nn.Module, name: str) -> Any:
    return getattr(type(module), name, None)


def _names(names: Any) -> str:
    names = sorted(set(map(str, names)))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
