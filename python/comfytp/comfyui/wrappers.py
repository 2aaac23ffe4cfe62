"""The two places where a call of the diffusion model is given to the engine."""

import contextlib
import functools
from typing import Any

import comfy.controlnet
import comfy.model_management
import comfy.patcher_extension
import torch

KEY = "comfytp"
_WRAPPERS = comfy.patcher_extension.WrappersMP


def install(patcher: Any, split: Any) -> None:
    """Families whose forward calls the DIFFUSION_MODEL wrappers are met there, innermost, so that other nodes' wrappers run
    around the engine in whatever order the nodes stand. Of the others the forward is swapped for the time of a call."""
    for kind in (_WRAPPERS.DIFFUSION_MODEL, _WRAPPERS.APPLY_MODEL, _WRAPPERS.OUTER_SAMPLE):
        patcher.remove_wrappers_with_key(kind, KEY)
    hooked = calls_wrappers(type(patcher.model.diffusion_model))
    if hooked:
        patcher.add_wrapper_with_key(_WRAPPERS.DIFFUSION_MODEL, KEY, functools.partial(_around_forward, split))
    patcher.add_wrapper_with_key(_WRAPPERS.OUTER_SAMPLE, KEY, functools.partial(_around_sampling, split))
    patcher.add_wrapper_with_key(_WRAPPERS.APPLY_MODEL, KEY, functools.partial(_around_apply_model, split, hooked))


def calls_wrappers(model: type) -> bool:
    """By the names in its code; a forward that calls its base's is what that is."""
    for base in model.__mro__:
        if "forward" in vars(base):
            names = getattr(getattr(vars(base)["forward"], "__code__", None), "co_names", ())
            if "DIFFUSION_MODEL" in names or not {"super", "forward"} <= set(names):
                return "DIFFUSION_MODEL" in names
    return False


@torch.compiler.disable
def _around_forward(split: Any, executor: Any, *args: Any, **kwargs: Any) -> Any:
    executor.original = functools.partial(split.call, executor.class_obj, executor.original)
    return executor(*args, **kwargs)


@torch.compiler.disable
def _around_apply_model(split: Any, hooked: bool, executor: Any, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = _uploaded(args, kwargs)
    module = executor.class_obj.diffusion_model
    module = getattr(module, "_orig_mod", module)  # of TorchCompileModel's
    # What may never come to the wrappers needs the weights where PyTorch looks for them.
    if "forward" in vars(module):
        split.run_plain("another node's forward stands on the model")
    elif "ar_state" in (kwargs.get("transformer_options") or next((a for a in args if isinstance(a, dict) and "sigmas" in a), {})):
        split.run_plain("the sampler keeps keys and values between calls")
    elif not hooked:
        # Code that torch has compiled would run the class's forward.
        with _Swapped(split, module), torch.compiler.set_stance("force_eager"):
            return executor(*args, **kwargs)
    return executor(*args, **kwargs)


def _uploaded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Conditions in host memory, as ComfyUI keeps and joins them in every step, on the latent's GPU. ComfyUI would copy them there itself, from
    memory that is not page-locked, and the host would wait until the GPU is through with the step before."""
    latent = args[0] if args else kwargs.get("x")
    device = latent.device if isinstance(latent, torch.Tensor) else torch.device("cpu")
    if device.type != "cuda":
        return args, kwargs

    def upload(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.layout == torch.strided and value.numel():
            try:
                return value.pin_memory().to(device, non_blocking=True)
            except RuntimeError:  # no memory can be locked here
                return value
        return [upload(one) for one in value] if isinstance(value, list) else value

    return tuple(map(upload, args)), {name: upload(value) for name, value in kwargs.items()}


def _around_sampling(split: Any, executor: Any, *args: Any, **kwargs: Any) -> Any:
    """A Control-LoRA takes the model's own weights, patched, out of the model."""
    guider = executor.class_obj
    guider.model_patcher.weights_wanted = any(
        isinstance(control, comfy.controlnet.ControlLora)
        for conds in guider.conds.values()
        for cond in conds or ()
        for control in _chain(cond.get("control"))
    )
    try:
        result = executor(*args, **kwargs)
    except BaseException:
        # What is queued ends before anybody goes on. What it has met is of less interest.
        with contextlib.suppress(Exception, comfy.model_management.InterruptProcessingException):
            split.synchronize()
        raise
    split.synchronize()
    return result


def _chain(control: Any) -> Any:
    while control is not None:
        yield control
        control = getattr(control, "previous_controlnet", None)


class _Swapped:
    """The engine in the place of a module's forward; the module is as it was while a call runs."""

    def __init__(self, split: Any, module: torch.nn.Module) -> None:
        self._split, self._module = split, module

    def __enter__(self) -> None:
        self._module.forward = self

    def __exit__(self, *_: Any) -> None:
        del self._module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        del self._module.forward
        try:
            return self._split.call(self._module, self._module.forward, *args, **kwargs)
        finally:
            self._module.forward = self
