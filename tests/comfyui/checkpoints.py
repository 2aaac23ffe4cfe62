"""Files that ComfyUI's own loaders take, with seeded weights: SD1.5 of few layers, with its text encoder and a tiny VAE."""

import math
import pathlib

import torch


def write_sd15(path: pathlib.Path) -> None:
    """About 330 MB in fp16, most of it the text encoder, whose size the loader fixes."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.taesd.taesd import TAESD
    from safetensors.torch import save_file

    import comfy.ops

    unet = UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1, 1], channel_mult=[1, 2], num_heads=8, context_dim=768,
        transformer_depth=[1, 1], transformer_depth_output=[1, 1, 1, 1], transformer_depth_middle=1, use_spatial_transformer=True, legacy=False,
        use_temporal_attention=False, operations=comfy.ops.disable_weight_init, dtype=torch.float16,
    )  # fmt: skip
    shapes = {f"model.diffusion_model.{k}": v.shape for k, v in unet.state_dict().items()}
    shapes |= {f"cond_stage_model.transformer.text_model.{k}": v for k, v in _clip_shapes().items()}
    shapes |= {f"first_stage_model.{k}": v.shape for k, v in TAESD(latent_channels=4).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in shapes.items():
        value = torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
        if len(shape) > 1:
            value *= 0.7 / math.sqrt(max(1, value[0].numel()))
        else:
            value = value * 0.02 + (1 if "norm" in key and key.endswith("weight") else 0)
        tensors[key] = value.half()
    tensors["first_stage_model.vae_scale"], tensors["first_stage_model.vae_shift"] = torch.tensor(0.18215), torch.tensor(0.0)
    save_file(tensors, path)


def _clip_shapes():
    width, inner = 768, 3072
    shapes = {"embeddings.token_embedding.weight": (49408, width), "embeddings.position_embedding.weight": (77, width)}
    for i in range(12):
        layer = f"encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}self_attn.{name}.weight": (width, width), f"{layer}self_attn.{name}.bias": (width,)}
        shapes |= {f"{layer}mlp.fc1.weight": (inner, width), f"{layer}mlp.fc1.bias": (inner,)}
        shapes |= {f"{layer}mlp.fc2.weight": (width, inner), f"{layer}mlp.fc2.bias": (width,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{name}.weight": (width,), f"{layer}{name}.bias": (width,)}
    return shapes | {"final_layer_norm.weight": (width,), "final_layer_norm.bias": (width,)}

