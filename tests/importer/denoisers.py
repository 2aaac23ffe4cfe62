"""Denoisers of diffusers at small width: how to build each and what to call it with."""

from dataclasses import dataclass, field
from typing import Any, Callable

import torch


@dataclass
class Family:
    """`build` gives the module; `inputs(generator, **sizes)` the keyword arguments of a call. `sizes` are changed shapes."""

    build: Callable[[], torch.nn.Module]
    inputs: Callable[..., dict[str, Any]]
    variants: list[dict[str, Any]] = field(default_factory=list)


FAMILIES: dict[str, Family] = {}


def family(name: str, *variants: dict[str, Any]):
    """Registers a class with static methods build and inputs."""

    def register(cls: type) -> type:
        FAMILIES[name] = Family(cls.build, cls.inputs, list(variants))
        return cls

    return register


def make(name: str) -> torch.nn.Module:
    """The module with seeded weights; norms and biases too are random, so that none of them can be left out unseen."""
    torch.manual_seed(0)
    module = FAMILIES[name].build().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(parameter + noise)
        elif parameter.abs().max() == 0:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module


def call_arguments(name: str, seed: int = 2, **sizes: Any) -> dict[str, Any]:
    return FAMILIES[name].inputs(torch.Generator().manual_seed(seed), **sizes)


def _randn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def _timesteps(generator: torch.Generator, batch: int, scale: float = 1000.0) -> torch.Tensor:
    return torch.rand(batch, generator=generator) * scale


@family("unet", {"height": 10, "width": 6, "batch": 1}, {"control": True})
class _Unet:
    @staticmethod
    def build():
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
        )

    @staticmethod
    def inputs(g, batch=2, height=8, width=8, tokens=7, control=False):
        call = {
            "sample": _randn(g, batch, 4, height, width),
            "timestep": _timesteps(g, batch),
            "encoder_hidden_states": _randn(g, batch, tokens, 32),
        }
        if control:
            half = ((height + 1) // 2, (width + 1) // 2)
            call["down_block_additional_residuals"] = (
                _randn(g, batch, 32, height, width),
                _randn(g, batch, 32, height, width),
                _randn(g, batch, 32, *half),
                _randn(g, batch, 64, *half),
            )
            call["mid_block_additional_residual"] = _randn(g, batch, 64, *half)
        return call


@family("sdxl", {"height": 10, "width": 6, "batch": 1})
class _Sdxl:
    @staticmethod
    def build():
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=48,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        )

    @staticmethod
    def inputs(g, batch=2, height=8, width=8, tokens=7):
        return {
            "sample": _randn(g, batch, 4, height, width),
            "timestep": _timesteps(g, batch),
            "encoder_hidden_states": _randn(g, batch, tokens, 48),
            "added_cond_kwargs": {"text_embeds": _randn(g, batch, 16), "time_ids": torch.rand(batch, 6, generator=g) * 64},
        }


@family("flux", {"height": 4, "width": 6, "batch": 1}, {"tokens": 9})
class _Flux:
    @staticmethod
    def build():
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )

    @staticmethod
    def inputs(g, batch=2, height=4, width=4, tokens=7):
        rows = torch.arange(height).repeat_interleave(width).float()
        columns = torch.arange(width).repeat(height).float()
        return {
            "hidden_states": _randn(g, batch, height * width, 16),
            "encoder_hidden_states": _randn(g, batch, tokens, 32),
            "pooled_projections": _randn(g, batch, 24),
            "timestep": _timesteps(g, batch, 1.0),
            "img_ids": torch.stack([torch.zeros(height * width), rows, columns], -1),
            "txt_ids": torch.zeros(tokens, 3),
            "guidance": torch.full((batch,), 3.5),
        }


@family("chroma", {"height": 4, "width": 6, "batch": 1})
class _Chroma:
    @staticmethod
    def build():
        from diffusers import ChromaTransformer2DModel

        return ChromaTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
        )

    @staticmethod
    def inputs(g, batch=2, height=4, width=4, tokens=7):
        call = _Flux.inputs(g, batch, height, width, tokens)
        del call["pooled_projections"], call["guidance"]
        mask = torch.ones(batch, tokens + height * width, dtype=torch.bool)
        mask[:, tokens - 2 : tokens] = False
        return call | {"attention_mask": mask}


@family("sd3", {"height": 10, "width": 6, "batch": 1})
class _Sd3:
    @staticmethod
    def build():
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            caption_projection_dim=64,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            out_channels=4,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )

    @staticmethod
    def inputs(g, batch=2, height=8, width=8, tokens=7):
        return {
            "hidden_states": _randn(g, batch, 4, height, width),
            "encoder_hidden_states": _randn(g, batch, tokens, 32),
            "pooled_projections": _randn(g, batch, 24),
            "timestep": _timesteps(g, batch),
        }


@family("pixart", {"height": 12, "width": 6, "batch": 1}, {"masked": False})
class _PixArt:
    @staticmethod
    def build():
        from diffusers import PixArtTransformer2DModel

        return PixArtTransformer2DModel(
            sample_size=16,
            num_layers=2,
            patch_size=2,
            attention_head_dim=16,
            num_attention_heads=4,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=64,
            caption_channels=32,
            use_additional_conditions=False,
        )

    @staticmethod
    def inputs(g, batch=2, height=8, width=8, tokens=7, masked=True):
        call = {
            "hidden_states": _randn(g, batch, 4, height, width),
            "encoder_hidden_states": _randn(g, batch, tokens, 32),
            "timestep": _timesteps(g, batch),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
        if masked:
            call["encoder_attention_mask"] = (torch.arange(tokens)[None] < torch.tensor([[tokens - 2], [tokens]])[:batch]).float()
        return call


@family("lumina2", {"height": 12, "width": 8, "batch": 1}, {"tokens": 9})
class _Lumina2:
    @staticmethod
    def build():
        from diffusers import Lumina2Transformer2DModel

        return Lumina2Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            hidden_size=64,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(32, 32, 32),
            cap_feat_dim=32,
        )

    @staticmethod
    def inputs(g, batch=2, height=8, width=8, tokens=7):
        return {
            "hidden_states": _randn(g, batch, 4, height, width),
            "timestep": _timesteps(g, batch, 1.0),
            "encoder_hidden_states": _randn(g, batch, tokens, 32),
            "encoder_attention_mask": torch.ones(batch, tokens, dtype=torch.bool),
        }


@family("qwen_image", {"height": 4, "width": 6, "batch": 1}, {"tokens": 9})
class _QwenImage:
    @staticmethod
    def build():
        from diffusers import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        )

    @staticmethod
    def inputs(g, batch=2, height=4, width=4, tokens=7):
        return {
            "hidden_states": _randn(g, batch, height * width, 16),
            "encoder_hidden_states": _randn(g, batch, tokens, 32),
            "encoder_hidden_states_mask": torch.ones(batch, tokens, dtype=torch.long),
            "timestep": _timesteps(g, batch, 1.0),
            "img_shapes": [[(1, height, width)]] * batch,
        }


@family("wan", {"height": 10, "width": 6, "batch": 1}, {"frames": 2, "image": True})
class _Wan:
    @staticmethod
    def build():
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=96,
            num_layers=2,
            rope_max_seq_len=32,
            image_dim=24,
            added_kv_proj_dim=64,
        )

    @staticmethod
    def inputs(g, batch=2, frames=3, height=8, width=8, tokens=512, image=False):
        call = {
            "hidden_states": _randn(g, batch, 4, frames, height, width),
            "timestep": (_timesteps(g, batch)).long(),
            "encoder_hidden_states": _randn(g, batch, tokens, 32),
        }
        if image:
            call["encoder_hidden_states_image"] = _randn(g, batch, 257, 24)
        return call


@family("hunyuan_video", {"height": 10, "width": 6, "batch": 1})
class _HunyuanVideo:
    @staticmethod
    def build():
        from diffusers import HunyuanVideoTransformer3DModel

        return HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            text_embed_dim=32,
            pooled_projection_dim=24,
            rope_axes_dim=(4, 6, 6),
        )

    @staticmethod
    def inputs(g, batch=2, frames=3, height=8, width=8, tokens=7):
        mask = (torch.arange(tokens)[None] < torch.tensor([[tokens - 2], [tokens]])[:batch]).long()
        return {
            "hidden_states": _randn(g, batch, 4, frames, height, width),
            "timestep": _timesteps(g, batch),
            "encoder_hidden_states": _randn(g, batch, tokens, 32),
            "encoder_attention_mask": mask,
            "pooled_projections": _randn(g, batch, 24),
            "guidance": torch.full((batch,), 6000.0),
        }


@family("ltx", {"frames": 2, "height": 3, "width": 4, "batch": 1})
class _Ltx:
    @staticmethod
    def build():
        from diffusers import LTXVideoTransformer3DModel

        return LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=16,
            cross_attention_dim=64,
            num_layers=2,
            caption_channels=32,
        )

    @staticmethod
    def inputs(g, batch=2, frames=3, height=4, width=4, tokens=7):
        return {
            "hidden_states": _randn(g, batch, frames * height * width, 8),
            "encoder_hidden_states": _randn(g, batch, tokens, 32),
            "timestep": _timesteps(g, batch),
            "encoder_attention_mask": (torch.arange(tokens)[None] < torch.tensor([[tokens - 2], [tokens]])[:batch]).float(),
            "num_frames": frames,
            "height": height,
            "width": width,
        }


@family("cogvideox", {"height": 12, "width": 6, "batch": 1})
class _CogVideoX:
    @staticmethod
    def build():
        from diffusers import CogVideoXTransformer3DModel

        return CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=32,
            text_embed_dim=32,
            num_layers=2,
            sample_width=8,
            sample_height=8,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=7,
            use_rotary_positional_embeddings=True,
        )

    @staticmethod
    def inputs(g, batch=2, frames=3, height=8, width=8, tokens=7):
        tokens_of_video = frames * (height // 2) * (width // 2)
        angles = torch.rand(tokens_of_video, 8, generator=g).repeat_interleave(2, -1)
        return {
            "hidden_states": _randn(g, batch, frames, 4, height, width),
            "encoder_hidden_states": _randn(g, batch, tokens, 32),
            "timestep": _timesteps(g, batch).long(),
            "image_rotary_emb": (angles.cos(), angles.sin()),
        }


@family("sana", {"height": 10, "width": 6, "batch": 1})
class _Sana:
    @staticmethod
    def build():
        from diffusers import SanaTransformer2DModel

        return SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=4,
            cross_attention_head_dim=16,
            cross_attention_dim=64,
            caption_channels=32,
            sample_size=8,
            patch_size=1,
        )

    @staticmethod
    def inputs(g, batch=2, height=8, width=8, tokens=7):
        return {
            "hidden_states": _randn(g, batch, 4, height, width),
            "encoder_hidden_states": _randn(g, batch, tokens, 32),
            "timestep": _timesteps(g, batch),
            "encoder_attention_mask": (torch.arange(tokens)[None] < torch.tensor([[tokens - 2], [tokens]])[:batch]).float(),
        }


@family("aura_flow", {"height": 12, "width": 6, "batch": 1})
class _AuraFlow:
    @staticmethod
    def build():
        from diffusers import AuraFlowTransformer2DModel

        return AuraFlowTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=64,
            out_channels=4,
            pos_embed_max_size=64,
        )

    @staticmethod
    def inputs(g, batch=2, height=8, width=8, tokens=7):
        return {
            "hidden_states": _randn(g, batch, 4, height, width),
            "encoder_hidden_states": _randn(g, batch, tokens, 32),
            "timestep": _timesteps(g, batch, 1.0),
        }
