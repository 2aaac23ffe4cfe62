"""torch's dtypes by the engine's names."""

import torch

from .unsupported import Unsupported

NAMES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8_e4m3",
    torch.float8_e5m2: "f8_e5m2",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
TORCH = {name: dtype for dtype, name in NAMES.items()}
# What devices compute in. The dtypes that a graph does not compute in are widened or, f64, narrowed: models use it for
# angles of positions, which f32 holds.
_COMPUTED = {torch.float64: "f32", torch.float8_e4m3fn: "f32", torch.float8_e5m2: "f32"}
_COMPUTED |= {torch.complex64: "f32", torch.complex128: "f32"}  # each part


def computed(dtype: torch.dtype, halves: bool) -> str:
    """The name of the dtype in which the graph holds a value of `dtype`. halves: f16 too is computed in, as GPUs do."""
    if dtype == torch.float16 and not halves:
        return "f32"
    name = _COMPUTED.get(dtype) or NAMES.get(dtype)
    if name is None:
        raise Unsupported(f"values of {dtype} are not supported")
    return name
