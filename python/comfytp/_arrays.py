"""The caller's arrays: results in the kind that it brought, and calls in the order of its stream, without importing anybody's library."""

import functools
import itertools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from . import _core


def empty_like_kind(kind: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """A new array of the library that `kind` belongs to, with the same memory as an array of the core; for a torch tensor on a
    GPU one there.

    dtype is the engine's name. Where the library lacks bf16 (numpy), or the engine does not write the dtype (fp8), it is
    f32. Libraries without a from_dlpack of their own get the core's array, which has __dlpack__.
    """
    library = type(kind).__module__.partition(".")[0]
    if dtype.startswith("f8") or (library == "numpy" and dtype == "bf16"):
        dtype = "f32"
    if library == "torch" and kind.is_cuda:
        return sys.modules["torch"].empty(shape, dtype=_torch_dtype(dtype), device=kind.device)
    array = _core.empty(shape, dtype)
    from_dlpack = getattr(sys.modules.get(library), "from_dlpack", None)
    return from_dlpack(array) if from_dlpack else array


@functools.cache
def _torch_dtype(dtype: str) -> Any:
    return sys.modules["torch"].from_dlpack(_core.empty((1,), dtype)).dtype


class Queue:
    """Makes an engine's calls where torch's tensors lie on a GPU: queued on torch's current stream there, like an op of torch.

    Nothing needs to be kept for a call that has not run yet: torch's stream waits for it, and torch gives freed memory away in the
    order of that stream. Of tensors in host memory, and arrays of other libraries, a call is waited for.
    """

    def __init__(self) -> None:
        self._contents = Contents()

    def run(
        self, run: Callable[..., bool], inputs: Mapping[str, Any], outputs: Mapping[str, Any], owners: Mapping[str, Any] | None = None
    ) -> None:
        """run(stream=…, contents=…), or run(), makes the call. owners: the tensors that the caller holds, where `inputs` are views of
        them."""
        try:
            warn_unless_finite(self._run(run, inputs, outputs, owners or inputs))
        finally:
            count_write(outputs.values())

    def _run(self, run: Callable[..., bool], inputs: Mapping[str, Any], outputs: Mapping[str, Any], owners: Mapping[str, Any]) -> bool:
        place = next((array.device for array in (*inputs.values(), *outputs.values()) if on_gpu(array)), None)
        if place is None:
            return run()
        cuda = sys.modules["torch"].cuda
        contents = {name: self._contents.number(array) for name, array in owners.items() if on_gpu(array)}
        with cuda.device(place):  # DLPack wants it so; and where it is current already, the engine needs no other thread
            return run(stream=cuda.current_stream().cuda_stream, contents=contents)


class Contents:
    """Numbers for what tensors hold: the same one for the same tensor as long as torch has counted no write to it. Writes that torch
    does not count (through `.data`, by a CUDA graph's replay, by other libraries) are not seen."""

    _numbers = itertools.count(1)

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, Any, int]] = {}  # by id: a weak reference, the state, the number

    def number(self, tensor: Any) -> int:
        """0 where torch counts no writes (inference_mode)."""
        if tensor.is_inference():
            return 0
        key, state = id(tensor), (tensor._version, tensor.data_ptr(), tensor.shape, tensor.stride())
        known = self._known.get(key)
        if known is not None and known[0]() is tensor and known[1] == state:
            return known[2]
        number = next(self._numbers)
        self._known[key] = (weakref.ref(tensor, self._forget(key)), state, number)
        return number

    def _forget(self, key: int) -> Callable[[Any], None]:
        def gone(reference: Any) -> None:
            known = self._known.get(key)
            if known is not None and known[0] is reference:  # not another tensor's in the same place
                del self._known[key]

        return gone


def count_write(arrays: Iterable[Any]) -> None:
    """torch's count of writes goes up, which it does not by itself for what the engine writes."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    for array in arrays:
        if isinstance(array, torch.Tensor) and not array.is_inference():
            torch.autograd.graph.increment_version(array)


def on_gpu(array: Any) -> bool:
    """A torch tensor on a CUDA device."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor) and array.is_cuda


def warn_unless_finite(not_finite: bool) -> None:
    if not_finite:
        warnings.warn(
            "comfytp: a result holds infinities or NaNs; if its inputs did not, values have left the range of f16 (65504): "
            "compute in bf16 or f32",
            RuntimeWarning,
            stacklevel=4,
        )
