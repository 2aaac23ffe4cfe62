"""ComfyUI's handle of a split model: it looks like a ModelPatcher, but its weights are loaded by the engine."""

import logging
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

_Plain = comfy.model_patcher.ModelPatcher
_Dynamic = getattr(comfy.model_patcher, "ModelPatcherDynamic", None)
_log = logging.getLogger("comfytp")


class SplitPatcher(_Plain):
    """A clone of a patcher over the same model. ComfyUI's loading moves nothing; what patches, hooks and keyframes say is
    read by the engine. plain() is the patcher for what PyTorch has to do: running a call, saving a checkpoint."""

    split: Any  # SplitModel
    plain_class: type
    plain_parent: Any  # the patcher that came in
    verbose: bool = False
    weights_wanted: bool = False  # something beside the engine reads the patched weights in the run that begins
    _twin: Any = None
    _free: dict[torch.device, int] | None = None  # while it is sampled with

    @classmethod
    def of(cls, incoming: Any, split: Any) -> "SplitPatcher":
        patcher = incoming.clone()
        if isinstance(incoming, SplitPatcher):
            patcher.split = split
        else:
            patcher.plain_class, patcher.plain_parent = type(incoming), incoming
            patcher.__class__ = cls
            patcher.split = split
        _drop_work_units(patcher.additional_models.pop("multigpu", []))
        patcher.model_options.pop("multigpu_options", None)
        return patcher

    @property
    def plain_is_dynamic(self) -> bool:
        return _Dynamic is not None and issubclass(self.plain_class, _Dynamic)

    def clone(self, *args: Any, **kwargs: Any) -> "SplitPatcher":
        patcher = super().clone(*args, **kwargs)
        for name, value in vars(self).items():  # those of the incoming patcher's class too
            if name not in ("_twin", "_free"):
                vars(patcher).setdefault(name, value)
        return patcher

    # ---- loading: the engine's shares are tracked by the satellites, this patcher itself holds nothing

    def is_dynamic(self) -> bool:
        return False

    def model_size(self) -> int:
        return 0

    def loaded_size(self) -> int:
        return 0

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        if force_patch_weights:  # a checkpoint is about to be saved
            return self.plain().partially_load(device_to, 1e32, force_patch_weights=True)
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            self.release_plain()
            self.patch_model(load_weights=False)
        return 0

    def partially_unload(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def detach(self, unpatch_all: bool = True) -> Any:
        if unpatch_all:
            self.split.unload_unless_tracked(self.load_device)
        return super().detach(unpatch_all)

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            self.release_plain()
        super().unpatch_model(device_to, unpatch_weights=False)

    def release_plain(self) -> None:
        """Takes back what a plain branch over the same model loaded and patched, which nobody else tracks any more."""
        model = self.model
        if self.plain_is_dynamic:
            plain = self.plain()
            plain.unpatch_model(plain.offload_device, unpatch_weights=True)
            plain.restore_loaded_backups()
        elif self.backup or self.hook_backup or model.model_loaded_weight_memory or model.model_lowvram:
            _Plain.unpatch_model(self, self.offload_device, unpatch_weights=True)

    # ---- hooks: recorded, the engine patches

    def patch_hooks(self, hooks: Any) -> None:
        self.current_hooks = hooks

    # ---- what PyTorch does

    def plain(self) -> Any:
        """A patcher of the incoming one's class with this one's patches."""
        if self._twin is None or self._twin.patches_uuid != self.patches_uuid:
            twin = _Plain.clone(self)
            twin.__class__ = self.plain_class
            for name, value in vars(self).items():
                if name not in ("split", "_twin", "plain_class", "plain_parent"):
                    vars(twin).setdefault(name, value)
            twin.parent, twin.size, twin.additional_models, twin.is_injected = self.plain_parent, 0, {}, False
            if hasattr(twin, "register_load_device"):
                twin.register_load_device(twin.load_device)
            self._twin = twin
        self._twin.hook_patches, self._twin.hook_mode = self.hook_patches, self.hook_mode
        self._twin.object_patches, self._twin.current_hooks = self.object_patches, None
        return self._twin

    def load_plain(self) -> None:
        """Loads and patches the model for PyTorch, as a sampler with the plain patcher would."""
        plain = self.plain()
        self.eject_model()
        comfy.model_management.load_models_gpu([plain])
        if self.current_hooks is not None:
            plain.apply_hooks(self.current_hooks)

    def pre_run(self) -> None:
        # Some models prepare prompts with a part of their own weights before they are sampled.
        wanted = self.weights_wanted or hasattr(self.model.diffusion_model, "preprocess_text_embeds")
        if wanted and (self.patches or self.load_device.type != "cpu"):
            self.load_plain()
        self._free = {}
        # Its tables of sigmas are looked up in every step, which would wait for the GPU if they lay in host memory.
        if isinstance(sampling := getattr(self.model, "model_sampling", None), torch.nn.Module):
            sampling.to(self.load_device)
        super().pre_run()

    def get_free_memory(self, device: torch.device) -> int:
        """Asked in every step, for how many conditions one call may have. It takes the host some time: so one answer serves until the engine
        takes other memory."""
        free = {} if self._free is None else self._free
        if device not in free:
            free[device] = super().get_free_memory(device)
        return free[device]

    def memory_changed(self) -> None:
        """Of what is free."""
        if self._free is not None:
            self._free = {}

    def cleanup(self) -> None:
        if self._twin is not None:
            self._twin.clean_hooks()
        self._free = None
        super().cleanup()

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> Any:
        plain = self.plain()
        self.eject_model()
        comfy.model_management.load_models_gpu([plain])
        return plain.state_dict_for_saving(*args, **kwargs)

    # ---- the built-in MultiGPU CFG Split

    def deepclone_multigpu(self, new_load_device: torch.device | None = None, models_cache: Any = None) -> "SplitPatcher":
        """No second model: the engine takes inputs from every device."""
        patcher = self.clone()
        if new_load_device is not None:
            patcher.load_device = new_load_device
        return patcher

    def set_additional_models(self, key: str, models: list[Any]) -> None:
        if key == "multigpu":
            _drop_work_units(models)
            return
        super().set_additional_models(key, models)

    def match_multigpu_clones(self) -> None:
        _drop_work_units(self.additional_models.pop("multigpu", []))


class _Share(torch.nn.Module):
    """Stands for one device's part of a split model in ComfyUI's lists, which name classes of modules."""

    device: torch.device
    model_loaded_weight_memory = 0
    current_patcher = None


class Satellite(_Plain):
    """One device's share of a split model, so that ComfyUI's free-memory logic sees it and can evict it. A share alone is
    of no use, so evicting one evicts all. Lives as long as the SplitModel; clones are itself."""

    def __init__(self, split: Any, device: torch.device, name: str) -> None:
        share = type(f"Share_{name}", (_Share,), {})()
        share.device = device
        super().__init__(share, device, device)
        self.split = split  # a weakref.proxy

    def clone(self, *args: Any, **kwargs: Any) -> "Satellite":
        return self

    def deepclone_multigpu(self, *args: Any, **kwargs: Any) -> "Satellite":
        return self

    def is_dynamic(self) -> bool:
        return False

    def model_size(self) -> int:
        split = getattr(self, "split", None)  # the base class asks while it is made
        return split.device_bytes(self.load_device) if split is not None else 0

    def loaded_size(self) -> int:
        return self.split.loaded_bytes(self.load_device)

    def model_dtype(self) -> None:
        return None

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        return 0  # the engine loads when it is called

    def partially_unload(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def detach(self, unpatch_all: bool = True) -> Any:
        if unpatch_all:
            self.split.unload()
        return self.model

    def __del__(self) -> None:
        pass


_warned = False


def _drop_work_units(models: list[Any]) -> None:
    global _warned
    if models and not _warned:
        _warned = True
        _log.warning(
            "MultiGPU CFG Split steps aside: the model is split by Multi-GPU Diffusion Model, whose devices take the whole batch."
        )
