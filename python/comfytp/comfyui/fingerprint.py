"""Tells whether a weight's patches are the ones that a device has, without keeping tensors alive."""

import weakref
from typing import Any

import torch


class _Same:
    """Equal to another of the same object, for as long as that lives."""

    __slots__ = ("_ref", "_state", "_strong")

    def __init__(self, value: Any, state: Any = None) -> None:
        try:
            self._ref, self._strong = weakref.ref(value), None
        except TypeError:
            self._ref, self._strong = None, value
        self._state = state

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or self._state != other._state:
            return False
        mine, its = self._object(), other._object()
        return mine is not None and mine is its

    __hash__ = None  # type: ignore[assignment]

    def _object(self) -> Any:
        return self._strong if self._ref is None else self._ref()


def fingerprint(value: Any) -> Any:
    """Equal for equal numbers, texts and containers of the same tensors and functions. An adapter that is made anew over
    the same tensors stays equal; a tensor that was written to does not."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        return value
    if isinstance(value, torch.Tensor):
        return _Same(value, value._version if not value.is_inference() else None)
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *(fingerprint(item) for item in value))
    if isinstance(value, dict):
        return ("dict", *((fingerprint(key), fingerprint(item)) for key, item in value.items()))
    if isinstance(value, (set, frozenset)) and all(isinstance(item, (str, int)) for item in value):
        return ("set", *sorted(map(str, value)))
    weights = getattr(value, "weights", None)  # comfy's weight adapters
    if weights is not None and not callable(value):
        return (type(value), fingerprint(weights), fingerprint(getattr(value, "dora_scale", None)))
    return _Same(value)
