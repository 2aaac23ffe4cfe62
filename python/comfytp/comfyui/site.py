"""The place where a diffusion model is called, as a module that can be captured."""

import ast
import copy
import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import comfy.ops
import torch
from torch.overrides import TorchFunctionMode

from ..importer import Unsupported
from . import attention, callouts
from .patched_weights import PREFIX, as_fp8, is_quantised, is_scaled

_PLAIN = (type(None), bool, int, float, str, torch.Tensor, torch.dtype, torch.device)


# What ComfyUI's loading leaves on layers: where a plain branch over the same model has its weights, and what patches them there.
LOADING = frozenset((
    "_pin_state", "_pins", "_prefetch", "_v", "_v_signature", "bias_function", "bias_lowvram_function", "comfy_cast_weights",
    "comfy_force_cast_weights", "comfy_patched_weights", "prev_comfy_cast_weights", "seed_key", "weight_function", "weight_lowvram_function",
))  # fmt: skip


class Wanted:
    """Entries of transformer_options that the model's code was seen to read. Shared with copies of whatever holds it."""

    __slots__ = ("names",)  # no part of what a capture hangs on

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __deepcopy__(self, memo: Any) -> "Wanted":
        return self


class Live:
    """The transformer_options of the call that runs, and the functions that other nodes put in them."""

    __slots__ = ("functions", "options")

    def __init__(self) -> None:
        self.options: Mapping[str, Any] = {}
        self.functions: dict[tuple[Any, ...], Any] = {}

    def __deepcopy__(self, memo: Any) -> "Live":
        return self


class _Unread:
    """Stands for an entry that code passes on without looking at it. A look at it is noted and ends the capture."""

    def __init__(self, look: Any) -> None:
        object.__setattr__(self, "_look", look)

    def __getattr__(self, _: str) -> Any:
        self._look()

    def _used(self, *_: Any) -> Any:
        self._look()

    __bool__ = __call__ = __contains__ = __eq__ = __getitem__ = __iter__ = __len__ = __lt__ = __gt__ = __add__ = __mul__ = __float__ = _used
    __hash__ = None  # type: ignore[assignment]


class Options(dict):
    """transformer_options with the entries that are known to be read. A look at another one that is there is noted and ends the
    capture, which is then made again with that entry as a part of its key."""

    def __init__(self, entries: Mapping[str, Any], hidden: frozenset[str], wanted: Wanted) -> None:
        super().__init__(entries)
        self._hidden = hidden
        self._wanted = wanted
        self._passed_on = False  # code went over all entries

    def _look(self, name: Any) -> None:
        if name in self._hidden and not super().__contains__(name):
            self._wanted.names.add(name)
            raise LookupError(f"transformer_options['{name}'] is read")

    def __getitem__(self, name: Any) -> Any:
        if self._passed_on and name in self._hidden and not super().__contains__(name):
            return _Unread(lambda: self._look(name))
        self._look(name)
        return super().__getitem__(name)

    def __contains__(self, name: Any) -> bool:
        self._look(name)
        return super().__contains__(name)

    def get(self, name: Any, default: Any = None) -> Any:
        self._look(name)
        return super().get(name, default)

    def pop(self, name: Any, *default: Any) -> Any:
        self._look(name)
        return super().pop(name, *default)

    def setdefault(self, name: Any, default: Any = None) -> Any:
        self._look(name)
        return super().setdefault(name, default)

    def __iter__(self) -> Any:
        self._passed_on = True
        return iter([*super().__iter__(), *sorted(self._hidden.difference(super().keys()))])

    def keys(self) -> Any:
        return list(self)

    def items(self) -> Any:
        return [(name, self[name]) for name in self]

    def copy(self) -> "Options":
        return Options(dict.copy(self), self._hidden, self._wanted)


class Site(torch.nn.Module):
    """model's method `name`, with keys as ComfyUI's patches name them. resized: shapes that patches give to weights. Weights of
    fp8 are captured as fp8 with their scale, other quantised ones as what they decode to; layers that multiply in fp8 (UNETLoader's
    fp8_e4m3fn_fast) as those that decode, so that the node alone chooses. The copy that is captured is as it was
    before ComfyUI loaded it."""

    passing_attributes = LOADING

    def __init__(self, model: torch.nn.Module, name: str, resized: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.diffusion_model = model
        self._name = name
        self._resized = dict(resized)
        self.wanted = Wanted()
        self.live = Live()

    def forward(self, *args: Any, options: Mapping[str, Any], hidden: str, sites: str = "", variant: str = "", **kwargs: Any) -> Any:
        options = Options(options, frozenset(hidden.split(",")) - {""}, self.wanted)
        for address, name in ast.literal_eval(sites or "[]"):
            self._place(options, address, name)
        with attention.as_one_op(), _KitchenOpened():
            return getattr(self.diffusion_model, self._name)(*args, transformer_options=options, **kwargs)

    def _place(self, options: Options, address: tuple[Any, ...], name: str) -> None:
        """What stands at `address` of transformer_options while the model is captured."""
        function = self.live.functions[address]
        if not callouts.is_native(name):
            function = callouts.StandIn(address, function, self.live.options, _entries_of)
        group, kind, place = address
        if group == "patches":
            dict.setdefault(dict.setdefault(options, group, {}), kind, []).append(function)
        else:
            dict.setdefault(dict.setdefault(options, group, {}), kind, {})[place] = function

    def __deepcopy__(self, memo: dict[int, Any]) -> "Site":
        quantised = {name: part for name, part in self.diffusion_model.named_modules() if is_quantised(getattr(part, "weight", None))}
        loading = [value for part in self.diffusion_model.modules() for name, value in vars(part).items() if name in LOADING]
        memo.update((id(value), None) for value in loading if not isinstance(value, (bool, int, float, str)))
        site = Site(copy.deepcopy(self.diffusion_model, memo), self._name, self._resized)
        for part in site.modules():
            for name in LOADING.intersection(vars(part)) - {"comfy_cast_weights"}:  # what is cast already is not changed by it
                delattr(part, name)
        site.wanted, site.live = self.wanted, self.live
        for name, part in [*site.diffusion_model.named_modules()]:
            if isinstance(part, comfy.ops.fp8_ops.Linear):  # which would round its input: that is the engine's to do
                part.__class__ = comfy.ops.manual_cast.Linear
            elif is_scaled(part):
                owner, _, own = name.rpartition(".")
                setattr(site.diffusion_model.get_submodule(owner), own, _ScaledLinear(part.weight, "scale_weight", part.scale_weight, part.bias))
        for name, part in quantised.items():
            _open(site.diffusion_model, name, part)
        for key, shape in self._resized.items():
            module, _, name = key.removeprefix(PREFIX).rpartition(".")
            owner = site.diffusion_model.get_submodule(module)
            owner._parameters[name] = _parameter(getattr(owner, name).new_empty(shape))
        return site


def _entries_of(value: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Of transformer_options, or of a copy of them with all entries, those that are not as they were given; else None."""
    if isinstance(value, Options):
        return {key: item for key, item in dict.items(value) if key not in ("patches", "patches_replace")}
    if any(isinstance(item, _Unread) for item in value.values()):
        return {key: item for key, item in value.items() if not isinstance(item, _Unread)}
    return None


# Of methods by their functions, since a method would keep its model alive. Inspecting one takes longer than all else here.
_signatures: "weakref.WeakKeyDictionary[Any, inspect.Signature]" = weakref.WeakKeyDictionary()


def _signature(method: Any) -> inspect.Signature:
    if method.__func__ not in _signatures:
        _signatures[method.__func__] = inspect.signature(method)
    return _signatures[method.__func__]


def split_arguments(original: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Positional and named arguments of the method `original` without transformer_options, and those."""
    try:
        bound = _signature(original).bind(*args, **kwargs)
    except TypeError as error:
        raise Unsupported(f"the call does not fit {getattr(original, '__qualname__', original)}: {error}") from error
    named = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            if value:
                raise Unsupported(f"{original.__qualname__} takes any number of arguments")
        else:
            named[name] = value
    options = named.pop("transformer_options", None) or {}
    return (), named, options


def visible(options: Mapping[str, Any], wanted: Wanted) -> tuple[dict[str, Any], str]:
    """The entries that are read, and the names of the others that are there. Patches are told apart from these."""
    there = {name: value for name, value in options.items() if not (value is None or (isinstance(value, (dict, list, tuple)) and not value))}
    there.pop("patches", None)
    there.pop("patches_replace", None)
    shown = {name: there.pop(name) for name in sorted(wanted.names) if name in there}
    for name, value in shown.items():
        if not _is_plain(value):
            raise Unsupported(f"the model reads transformer_options['{name}'], which is a {type(value).__name__}")
    return shown, ",".join(sorted(there))


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


class _KitchenOpened(TorchFunctionMode):
    """Ops of comfy_kitchen, which a capture would keep closed, as the torch code that the package itself has for them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "_qualified_op_name", getattr(func, "__module__", "")).startswith("comfy_kitchen::"):
            from comfy_kitchen.backends import eager

            func = getattr(eager, func._qualified_op_name.partition("::")[2], func)
        return func(*args, **(kwargs or {}))


# ---- quantised layers


class _ScaledLinear(torch.nn.Module):
    """A linear over fp8 numbers with one scale, the parameter of that name. It multiplies the sums, or in f16, whose range they could
    leave before, what goes in."""

    def __init__(self, weight: torch.Tensor, name: str, scale: torch.Tensor, bias: Any) -> None:
        super().__init__()
        self.weight = _parameter(weight)
        self.register_parameter(name, _parameter(scale))
        self.bias = bias
        self._scale = name

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weight, scale = self.weight.to(x.dtype), getattr(self, self._scale).to(x.dtype)
        first = x.dtype == torch.float16
        y = torch.nn.functional.linear(x * scale, weight) if first else torch.nn.functional.linear(x, weight) * scale
        return y if self.bias is None else y + self.bias.to(x.dtype)


def _open(model: torch.nn.Module, name: str, part: torch.nn.Module) -> None:
    """Replaces the copy of a quantised layer by one whose weight has the dtype that devices store."""
    owner, _, own = name.rpartition(".")
    made = model.get_submodule(name)
    fp8 = as_fp8(part.weight)
    if fp8 and part.weight.dim() == 2:
        weight = made.weight.new_empty(made.weight.shape, dtype=fp8[0].dtype)
        scale = made.weight.new_empty((1,), dtype=torch.float32)
        setattr(model.get_submodule(owner), own, _ScaledLinear(weight, "weight_scale", scale, made.bias))
        return
    made._full_precision_mm = True  # inputs are not quantised
    made.layout_type = None


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)
