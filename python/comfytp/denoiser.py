"""The denoiser of a checkpoint."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from . import _core
from ._arrays import Queue, empty_like_kind, warn_unless_finite
from .engine import device_list

# As diffusers' UNet2DConditionModel names its arguments.
_CONTROL_NAMES = {"down_block_additional_residuals": "down", "mid_block_additional_residual": "middle"}


class Denoiser:
    """A Stable Diffusion UNet (SD1.x, SD2.x, SDXL base and refiner, their inpainting and instruct variants, and narrower or
    deeper ones of the same construction) on one or several devices.

    weights: the path of a safetensors file (single-file checkpoint or bare denoiser), an index or a diffusers folder; or a
        mapping of their keys to arrays, such as a state_dict. They stay in their dtype and are decoded at use.
    devices, mesh, placement, timeout, communicator: as in Engine.
    compute: "f32", "bf16" or, on GPUs, "f16", the dtype of the arithmetic; sums and norms are f32 in all. "fp8" is bf16 with products of
        weights stored in fp8 as Engine makes them.
    heads, head_dim: number or width of the attention heads where the family's rule (8 heads for SD1.x, width 64 for the
        others) does not hold: shapes do not tell.

    Raises Error: not a diffusion model, missing keys, wrong shapes, unknown devices.
    """

    def __init__(
        self,
        weights: "Mapping[str, Any] | str | os.PathLike[str]",
        devices: str | Iterable[str] = "cpu:0",
        mesh: str | None = None,
        placement: str | None = None,
        *,
        compute: str = "f32",
        heads: int | None = None,
        head_dim: int | None = None,
        timeout: float = 600,
        communicator: str | None = None,
    ) -> None:
        self._core = _core.Denoiser(
            weights, device_list(devices), mesh or "", placement or "resident", compute, communicator or "best", heads, head_dim, timeout
        )
        self._info = self._core.info
        self._last = {"batch": 2, "height": 64, "width": 64, "tokens": 77, "control": False}
        self._queue = Queue()

    @property
    def info(self) -> dict[str, Any]:
        """"family", "layout", "in_channels", "out_channels", "model_channels", "context_dim", "label_dim" (width of y, or
        None) and "levels" (resolutions; an image is halved levels - 1 times)."""
        return dict(self._info)

    def __call__(self, x: Any, timesteps: Any, context: Any, y: Any = None, control: Mapping[str, Any] | None = None) -> Any:
        """The model's output for a noisy latent: [N,C,H,W], C being the model's out_channels.

        x: [N,C,H,W], the latent (for inpainting and instruct models with the mask's and image's channels behind it). H and W
            are the image's sizes over 8; any size.
        timesteps: [N], or one number for all samples; 0 to 999.
        context: [N,L,D], the text encoder's states.
        y: [N,A], where the model has a label embedding (SDXL: pooled text and sizes).
        control: ControlNet residuals, {"down": [one for each skip, from the first], "middle": one}, each of its skip's
            shape; diffusers' names down_block_additional_residuals and mid_block_additional_residual work too.

        All are arrays that speak DLPack, of any floating dtype and any strides, in host memory or on one of the model's
        GPUs; they are read where they lie. Of torch tensors on a GPU the call is queued on torch's current stream: see Engine.run.
        The result comes in the library and the dtype of x (f32 for fp8). Other Python threads
        run meanwhile; Ctrl-C ends the call. Raises Error naming the input, Cancelled, Timeout.
        """
        inputs = {"x": x, "timesteps": timesteps, "context": context}
        if y is not None:
            inputs["y"] = y
        if control is not None:
            inputs.update(_control_inputs(control))
        for name, value in inputs.items():
            if value is None:
                raise _core.Error(f"[denoiser] expected an array as {name} but got None")
        shape = _core.shape_of(x)
        if len(shape) != 4:
            raise _core.Error(f"[denoiser] expected x of shape [N,C,H,W] but got {list(shape)}")
        output = empty_like_kind(x, (shape[0], self._info["out_channels"], *shape[2:]), _core.dtype_of(x))
        self._queue.run(lambda **order: self._core.run(inputs, output, **order), inputs, {"output": output})
        tokens = _core.shape_of(context)[1]
        self._last = {"batch": shape[0], "height": shape[2], "width": shape[3], "tokens": tokens, "control": control is not None}
        return output

    def check(self) -> None:
        """Raises what queued calls that have ended met. Does not wait."""
        self._core.check()

    def synchronize(self) -> None:
        """Waits for queued calls and raises what they met."""
        warn_unless_finite(self._core.synchronize())

    def load(self, batch: int = 2, height: int = 64, width: int = 64, tokens: int = 77, control: bool = False) -> None:
        """Loads the weights and prepares calls of these sizes (latent's height and width) ahead of the first."""
        self._core.load(batch, height, width, tokens, control)

    def unload(self) -> None:
        """Frees the weights and activations of all devices; the next call loads again."""
        self._core.unload()

    def cancel(self) -> None:
        """From any thread: the running call ends soon and raises Cancelled; the results of queued ones become NaN, and the next
        call raises it. Without any nothing happens."""
        self._core.cancel()

    def report(
        self,
        batch: int | None = None,
        height: int | None = None,
        width: int | None = None,
        tokens: int | None = None,
        control: bool | None = None,
    ) -> dict[str, Any]:
        """What the devices hold and do for a call of these sizes (latent's height and width); see Engine.report. Those that are not given are
        the last call's, before any call 2, 64, 64, 77 and False. "call" says which they are."""
        given = {"batch": batch, "height": height, "width": width, "tokens": tokens, "control": control}
        call = {name: self._last[name] if size is None else size for name, size in given.items()}
        return {**self._core.report(*call.values()), "call": call}

    def stats(self) -> dict[str, Any]:
        """Counters since the denoiser was made; see Engine.stats."""
        return self._core.stats()


def _control_inputs(control: Mapping[str, Any]) -> dict[str, Any]:
    named = {_CONTROL_NAMES.get(name, name): value for name, value in control.items()}
    if set(named) != {"down", "middle"}:
        raise _core.Error(f"[denoiser] expected control with 'down' and 'middle' but got {sorted(control)}")
    down = {f"control.{i}": residual for i, residual in enumerate(named["down"])}
    return {**down, "control.middle": named["middle"]}
