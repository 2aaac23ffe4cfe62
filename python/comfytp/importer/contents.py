"""Lets code that is captured read the contents of some tensors: masks and lengths that decide what it does."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

_READERS = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
}
_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_WRITING_OPERATORS = {"__setitem__", *(f"__i{op}__" for op in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"))}
_MOST_ELEMENTS = 1 << 20


class KnownContents(TorchFunctionMode):
    """While a forward runs on fake tensors, what hangs on tensors of known contents alone is computed beside it, and is what
    item(), tolist() and the like read."""

    def __init__(self, contents: Mapping[int, torch.Tensor], tensors: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        # The fake tensors are kept, so that no other takes their id.
        self._real = {id(tensors[i]): (tensors[i], real) for i, real in contents.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION:
            args, kwargs = self._without_full_mask(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not all(id(tensor) in self._real for tensor in tensors) or self._is_random(func):
            result = func(*args, **kwargs)
            self._forget_written(func, args)
            return result
        known = tree_unflatten([self._real[id(leaf)][1] if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec)
        with _disable_current_modes():
            real = func(*known[0], **known[1])
        if func in _READERS:
            return real
        result = func(*args, **kwargs)
        for fake, value in zip(tree_flatten(result)[0], tree_flatten(real)[0]):
            if isinstance(fake, torch.Tensor) and isinstance(value, torch.Tensor) and value.numel() <= _MOST_ELEMENTS:
                self._real[id(fake)] = (fake, value)
        return result

    def _without_full_mask(self, query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """A mask that is known to hide nothing costs an attention a third of its speed."""
        _, mask = self._real.get(id(attn_mask), (None, None))
        if mask is not None:
            with _disable_current_modes():
                hides = not mask.all() if mask.dtype == torch.bool else mask.any()
            attn_mask = attn_mask if hides else None
        return (query, key, value, attn_mask, *args), kwargs

    def _forget_written(self, func: Any, args: Any) -> None:
        """A known tensor that something unknown was written to is known no more."""
        name = getattr(func, "__name__", "")
        if args and (name in _WRITING_OPERATORS or (name.endswith("_") and not name.endswith("__"))):
            self._real.pop(id(args[0]), None)

    @staticmethod
    def _is_random(func: Any) -> bool:
        name = getattr(func, "__name__", "")
        return "rand" in name or name in ("normal", "bernoulli", "multinomial", "empty", "empty_like", "new_empty")
