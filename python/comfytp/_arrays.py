"""Results in the kind of array that the caller brought, without importing anybody's library."""

import sys
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
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=torch.from_dlpack(_core.empty((1,), dtype)).dtype, device=kind.device)
    array = _core.empty(shape, dtype)
    from_dlpack = getattr(sys.modules.get(library), "from_dlpack", None)
    return from_dlpack(array) if from_dlpack else array
