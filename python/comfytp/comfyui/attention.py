"""Attention in a capture: one op, whatever kernel ComfyUI would run it with here. Its sub-quadratic and split kernels are small ops
whose number hangs on the memory that is free, xformers and Sage are ops that only their own libraries know."""

import contextlib
import sys
from collections.abc import Iterator

import comfy.ldm.modules.attention as comfy_attention


@contextlib.contextmanager
def as_one_op() -> Iterator[None]:
    """ComfyUI's attention functions are torch's scaled_dot_product_attention, under whatever name they were imported."""
    one = comfy_attention.attention_pytorch
    kernels = {id(f) for name, f in vars(comfy_attention).items() if name.startswith("attention") and callable(f) and f is not one}
    places = [
        (names, name, value)
        for names in [getattr(module, "__dict__", {}) for module in list(sys.modules.values())]
        for name, value in list(names.items())
        if id(value) in kernels
    ]
    for names, name, _ in places:
        names[name] = one
    try:
        yield
    finally:
        for names, name, value in places:
            names[name] = value
