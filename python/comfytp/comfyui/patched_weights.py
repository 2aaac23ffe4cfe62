"""The weights of a model as a patcher would have them, read one key at a time without changing the model."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch

from .fingerprint import fingerprint

PREFIX = "diffusion_model."
SCALE = "_scale"  # behind the key of a quantised weight: its factor
_KEPT = 2  # patched weights in memory: devices read their slices of one key after another
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Unreadable(Exception):
    """A weight of a kind that cannot be read; the text names its key."""


class PatchedWeights:
    """Reads are safe from several threads. `patcher` may be put in another state (hooks, patches) between loads only."""

    def __init__(self, patcher: Any) -> None:
        self._patcher = patcher
        self._lock = threading.Lock()
        self._patched: OrderedDict[str, Any] = OrderedDict()

    # ---- what there is

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Of every key of the diffusion model: the dtype it is stored in and its shape with the patches applied."""
        found = {}
        for key in self._keys():
            weight = self._original(key)
            shape = tuple(weight.shape)
            if patches := self._patcher.patches.get(key):
                shape = tuple(_patched_shape(patches, weight, key))
            if fp8 := as_fp8(weight):
                found[key] = (fp8[0].dtype, shape)
                found[key + SCALE] = (torch.float32, (1,))
            else:
                found[key] = (self._dtype(key, weight), shape)
        return found

    def resized(self) -> dict[str, tuple[int, ...]]:
        """The keys whose shape the patches change."""
        sizes = {}
        for key, patches in self._patcher.patches.items():
            if key.startswith(PREFIX):
                weight = self._original(key)
                shape = tuple(_patched_shape(patches, weight, key))
                if shape != tuple(weight.shape):
                    sizes[key] = shape
        return sizes

    # ---- what has changed

    def state(self) -> Any:
        """Equal states mean equal weights; unequal ones may."""
        hooks = self._patcher.current_hooks
        return self._patcher.patches_uuid, None if hooks is None else tuple((hook.hook_ref, hook.strength) for hook in hooks.hooks)

    def signatures(self) -> dict[str, Any]:
        """Of every patched key what its value depends on."""
        hooked = self._hook_patches()
        keys = [key for key in {*self._patcher.patches, *hooked} if key.startswith(PREFIX)]
        found = {}
        for key in keys:
            found[key] = (fingerprint(self._patcher.patches.get(key)), fingerprint(hooked.get(key)))
            if as_fp8(self._original(key)):
                found[key + SCALE] = found[key]
        return found

    # ---- values

    def read(self, key: str, starts: tuple[int, ...], stops: tuple[int, ...]) -> torch.Tensor:
        """The part of a weight inside a box, in host memory, in the dtype that tensors() tells."""
        if key.endswith(SCALE) and (fp8 := as_fp8(self._value(key.removesuffix(SCALE)))):
            return fp8[1].detach().to("cpu", torch.float32).reshape(1)
        with torch.inference_mode():
            weight = self._value(key)
            if fp8 := as_fp8(weight):
                weight = fp8[0]
            elif hasattr(weight, "dequantize") and type(weight) not in (torch.Tensor, torch.nn.Parameter):
                weight = weight.dequantize()
            box = tuple(slice(start, stop) for start, stop in zip(starts, stops, strict=True))
            part = weight.detach()[box]
            return part.to("cpu", self._dtype(key, self._original(key)) if not fp8 else None)

    def forget(self) -> None:
        """Frees the patched weights that are kept between reads."""
        with self._lock:
            self._patched.clear()

    def _value(self, key: str) -> Any:
        if key not in self._patcher.patches and key not in self._hook_patches():
            return self._original(key)
        with self._lock, torch.inference_mode():
            if key not in self._patched:
                self._patched[key] = self._patch(key)
                while len(self._patched) > _KEPT:
                    self._patched.popitem(last=False)
            return self._patched[key]

    def _patch(self, key: str) -> Any:
        """As ModelPatcher patches a weight, and hooks on top of that, rounding after each."""
        device = self._patcher.load_device
        value = self._original(key)
        if key in self._patcher.patches:
            value = self._apply(key, value, self._patcher.patches[key], _lora_dtype(device), {})
        hooked = self._hook_patches()
        if key in hooked:
            unpatched = _Originals(self)
            value = self._apply(key, value, hooked[key], torch.float32, {"original_weights": unpatched})
        return value

    def _apply(self, key: str, weight: Any, patches: list[Any], dtype: torch.dtype, extra: dict[str, Any]) -> Any:
        _, set_func, convert_func = comfy.model_patcher.get_key_weight(self._patcher.model, key)
        seed = _seed_of(key)
        changed = comfy.model_management.cast_to_device(weight, self._patcher.load_device, dtype, copy=True)
        if convert_func is not None:
            changed = convert_func(changed, inplace=True)
        changed = comfy.lora.calculate_weight(patches, changed, key, **extra)
        if set_func is not None:
            return set_func(changed, inplace_update=False, seed=seed, return_weight=True)
        return comfy.float.stochastic_rounding(changed, self._dtype(key, weight), seed=seed)

    def _original(self, key: str) -> Any:
        """As it was before anybody patched it, in the dtype the model wants it in."""
        patcher = self._patcher
        if key in patcher.backup:
            weight = patcher.backup[key].weight
        elif key in patcher.hook_backup:  # as it was before the hooks, which may be patched
            weight = patcher.hook_backup[key][0]
        elif key in getattr(patcher, "backup_buffers", {}):
            weight = patcher.backup_buffers[key]
        else:
            weight = comfy.utils.get_attr(patcher.model, key)
        if not is_quantised(weight) and type(weight) not in (torch.Tensor, torch.nn.Parameter):
            raise Unreadable(f"{key} is a {type(weight).__name__}, which only its own node can read")
        if weight.is_meta:
            weight = torch.zeros(weight.shape, dtype=weight.dtype)
        return weight

    def _dtype(self, key: str, weight: Any) -> torch.dtype:
        """A dynamic patcher keeps the file's dtype and casts at use."""
        if not getattr(self._patcher, "plain_is_dynamic", False) or is_quantised(weight):
            return weight.dtype
        module, name = key.rpartition(".")[::2]
        return getattr(comfy.utils.get_attr(self._patcher.model, module), name + "_comfy_model_dtype", None) or weight.dtype

    def _hook_patches(self) -> Mapping[str, list[Any]]:
        hooks = self._patcher.current_hooks
        return {} if hooks is None else self._patcher.get_combined_hook_patches(hooks)

    def _keys(self) -> list[str]:
        module = self._patcher.model.diffusion_model
        module = getattr(module, "_orig_mod", module)  # TorchCompileModel's stands there while a call runs
        names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        names += [name for name, _ in module.named_buffers(remove_duplicate=False)]
        return [PREFIX + name for name in names]


class _Originals(dict):
    """Every key's unpatched weight in the form that comfy.lora expects, looked up when asked for."""

    def __init__(self, weights: PatchedWeights) -> None:
        super().__init__()
        self._weights = weights

    def __missing__(self, key: str) -> Any:
        _, _, convert = comfy.model_patcher.get_key_weight(self._weights._patcher.model, key)
        return [(self._weights._original(key), convert or (lambda weight, **_: weight))]


def is_quantised(weight: Any) -> bool:
    return hasattr(weight, "_qdata") and hasattr(weight, "_params")


def is_scaled(layer: torch.nn.Module) -> bool:
    """A linear of scaled fp8 as ComfyUI had them before weights were quantised tensors."""
    scale, weight = getattr(layer, "scale_weight", None), getattr(layer, "weight", None)
    return isinstance(layer, torch.nn.Linear) and isinstance(scale, torch.Tensor) and scale.numel() == 1 and weight.dtype in _FP8


def as_fp8(weight: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The fp8 numbers of a quantised weight and their one scale."""
    if not is_quantised(weight) or weight._qdata.dtype not in _FP8 or weight._qdata.shape != weight.shape:
        return None
    scale = getattr(weight._params, "scale", None)
    return (weight._qdata, scale) if isinstance(scale, torch.Tensor) and scale.numel() == 1 else None


def _patched_shape(patches: list[Any], weight: Any, key: str) -> Any:
    calculate = getattr(comfy.lora, "calculate_shape", None)
    return calculate(patches, weight, key) if calculate else weight.shape


# It moved to utils after 0.3.64.
_seed_of = getattr(comfy.utils, "string_to_seed", None) or comfy.model_patcher.string_to_seed


def _lora_dtype(device: torch.device) -> torch.dtype:
    choose = getattr(comfy.model_management, "lora_compute_dtype", None)
    return choose(device) if choose else torch.float32
