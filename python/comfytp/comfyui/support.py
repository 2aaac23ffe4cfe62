"""Decides whether a call can be given to the engine: what other nodes put on a model must be honoured or left to PyTorch."""

from collections.abc import Mapping
from typing import Any

import torch

from .patched_weights import PREFIX

# What ComfyUI itself puts into transformer_options, none of which changes what a forward computes unless it is read (and
# what is read is part of a capture's key).
_SIGHTS = ("patches", "patches_replace")


def why_not(patcher: Any, module: torch.nn.Module, original: Any, transformer_options: Mapping[str, Any]) -> str | None:
    """Why PyTorch has to run this call, or None."""
    if foreign := _foreign_forward(module, original):
        return foreign
    if patcher.injections:
        return f"{_names(patcher.injections)} injects code into the model"
    if patched := [name for name in patcher.object_patches if name.startswith(PREFIX)]:
        return f"the node behind the object patch {_names(patched)} replaces a part of the model"
    if wrapped := [name for name in patcher.weight_wrapper_patches if name.startswith(PREFIX)]:
        return f"weights are computed by a function ({_names(wrapped)})"
    if found := list(_patches(transformer_options)):
        return f"{_names(found)} has to run inside the model"
    return None


def _foreign_forward(module: torch.nn.Module, original: Any) -> str | None:
    """Code that is not the class's own, on the module or on a part of it."""
    name = getattr(original, "__name__", "")
    if getattr(original, "__self__", None) is not module or getattr(original, "__func__", None) is not _of_class(module, name):
        return f"{_where(original)} stands in for the model's forward"
    for path, part in module.named_modules():
        for name in ("forward", "_forward"):
            if name in vars(part):
                return f"{_where(vars(part)[name])} stands in for the {name} of '{path}'"
        if part._forward_hooks or part._forward_pre_hooks:
            return f"a forward hook stands on '{path}'"
    return None


def _of_class(module: torch.nn.Module, name: str) -> Any:
    return getattr(type(module), name, None)


def _patches(options: Mapping[str, Any]) -> Any:
    for sort in _SIGHTS:
        for name, patches in (options.get(sort) or {}).items():
            for patch in patches.values() if isinstance(patches, Mapping) else patches:
                yield f"{name} of {_where(patch)}"


def _where(function: Any) -> str:
    function = getattr(function, "__func__", function)
    module = getattr(function, "__module__", None) or type(function).__module__
    return f"{module}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _names(names: Any) -> str:
    names = sorted(set(map(str, names)))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
