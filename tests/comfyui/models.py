"""Small models of ComfyUI with fixed weights, and how to sample with them."""

import dataclasses

import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch

CPU = torch.device("cpu")


def _fill(module, seed=0):
    """Fixed weights, near to what initialisation gives; norms and biases are not left at ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        positions = [(name, b) for name, b in module.named_buffers() if name.endswith("pos_embed")]
        for name, p in (*module.named_parameters(), *positions):
            fan_in = max(1, p[0].numel()) if p.dim() > 1 else 1
            value = torch.randn(p.shape, generator=generator) * (fan_in**-0.5 if p.dim() > 1 else 0.1)
            p.copy_(value + (1 if p.dim() == 1 and "norm" in name and name.endswith("weight") else 0))
    return module


def patcher_of(model):
    return comfy.model_patcher.ModelPatcher(_fill(model), CPU, CPU)


_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "use_checkpoint": False,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "dtype": torch.float32,
}


def sd15(**changes):
    config = {**_UNET, "context_dim": 48, "num_heads": 4, "use_linear_in_transformer": False, "adm_in_channels": None, **changes}
    return patcher_of(comfy.model_base.BaseModel(_config(comfy.supported_models.SD15, config)))


def sdxl(**changes):
    config = {**_UNET, "context_dim": 64, "num_head_channels": 16, "use_linear_in_transformer": True}
    config |= {"num_classes": "sequential", "adm_in_channels": 1280 + 1536, "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2], **changes}
    return patcher_of(comfy.model_base.SDXL(_config(comfy.supported_models.SDXL, config)))


def sdxl_refiner(**changes):
    """Of the base's widths, so that both take the same prompts."""
    config = {**_UNET, "context_dim": 64, "num_head_channels": 16, "use_linear_in_transformer": True, "num_classes": "sequential"}
    config |= {"adm_in_channels": 1280 + 5 * 256, "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1], **changes}
    return patcher_of(comfy.model_base.SDXLRefiner(_config(comfy.supported_models.SDXLRefiner, config)))


def flux(**changes):
    config = {"image_model": "flux", "in_channels": 16, "patch_size": 2, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 48, "hidden_size": 64}
    config |= {"mlp_ratio": 4.0, "num_heads": 4, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6], "theta": 10000, "qkv_bias": True}
    config |= {"guidance_embed": True, "dtype": torch.float32, **changes}
    if "txt_ids_dims" in {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}:
        config |= {"txt_ids_dims": []}
    return patcher_of(comfy.model_base.Flux(_config(comfy.supported_models.Flux, config)))


def wan(**changes):
    config = {"image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "text_len": 16, "in_dim": 16, "dim": 96, "ffn_dim": 128}
    config |= {"freq_dim": 32, "text_dim": 40, "out_dim": 16, "num_heads": 4, "num_layers": 2, "window_size": (-1, -1), "qk_norm": True}
    config |= {"cross_attn_norm": True, "eps": 1e-6, "dtype": torch.float32, **changes}
    return patcher_of(comfy.model_base.WAN21(_config(comfy.supported_models.WAN21_T2V, config)))


def sd3(**changes):
    config = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 40, "num_patches": 36 * 36}
    config |= {"pos_embed_max_size": 36, "pos_embed_scaling_factor": None, "qk_norm": "rms", "dtype": torch.float32}
    config |= {"context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 128}}, **changes}
    return patcher_of(comfy.model_base.SD3(_config(comfy.supported_models.SD3, config)))


def sd35(**changes):
    """Medium's second self-attention in its first block."""
    return sd3(x_block_self_attn_layers=[0], **changes)


def _config(family, unet_config):
    config = family(dict(unet_config))
    config.unet_config = {**unet_config, **{k: v for k, v in family.unet_extra_config.items() if k not in unet_config}}
    if "num_head_channels" in unet_config:
        config.unet_config.pop("num_heads", None)
    return config


# ---- sampling

LATENTS = {"sd15": (4, 16, 24), "sdxl": (4, 16, 16), "flux": (16, 16, 16), "sd3": (16, 16, 16), "sd35": (16, 16, 16), "wan": (16, 2, 8, 8)}
FAMILIES = {"sd15": sd15, "sdxl": sdxl, "flux": flux, "sd3": sd3, "sd35": sd35, "wan": wan}
_WIDTHS = {"sd15": (48, None), "sdxl": (64, 1280), "flux": (48, 32), "sd3": (48, 40), "sd35": (48, 40), "wan": (40, None)}


def prompt(family, seed, tokens=77, **extra):
    generator = torch.Generator().manual_seed(seed)
    width, pooled = _WIDTHS[family]
    entries = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
    return [[torch.randn(1, tokens, width, generator=generator), {**entries, **extra}]]


def noise(family, batch=1, seed=7):
    return torch.randn(batch, *LATENTS[family], generator=torch.Generator().manual_seed(seed))


def sample(patcher, family, *, steps=3, cfg=4.0, positive=None, negative=None, latent=None, seed=11, batch=1, **more):
    """A few steps with CFG, as KSampler takes them."""
    start = more.pop("noise", None)
    start = noise(family, batch) if start is None else start
    with more.pop("grad_mode", torch.inference_mode)():
        return comfy.sample.sample(
            patcher,
            start,
            steps,
            cfg,
            more.pop("sampler", "euler"),
            "normal",
            positive if positive is not None else prompt(family, 1),
            negative if negative is not None else prompt(family, 2),
            torch.zeros_like(start) if latent is None else latent,
            seed=seed,
            disable_pbar=True,
            **more,
        )


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def lora(patcher, keys, rank=2, seed=3, alpha=None):
    """Patches as a LoRA file gives them, for keys of two dimensions or more."""
    import comfy.lora

    generator = torch.Generator().manual_seed(seed)
    weights = patcher.model.state_dict()
    loaded, names = {}, {}
    for key in keys:
        out, inner = weights[key].shape[0], weights[key][0].numel()
        name = key.removesuffix(".weight").replace(".", "_")
        names[name] = key
        up, down = torch.randn(out, rank, generator=generator) * 0.3, torch.randn(rank, inner, generator=generator) * 0.3
        if weights[key].dim() == 4:
            up, down = up[:, :, None, None], down.reshape(rank, *weights[key].shape[1:])
        loaded |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    return comfy.lora.load_lora(loaded, names)


def linear_keys(patcher, contains=""):
    return [k for k, v in patcher.model.state_dict().items() if k.endswith(".weight") and v.dim() in (2, 4) and contains in k]


def flux_stored_in(dtype, operations):
    """A Flux that computes in bf16 with ComfyUI's `operations` over linears stored in another dtype, as UNETLoader's weight_dtype has them."""
    whole = flux(dtype=torch.bfloat16)
    config = _config(comfy.supported_models.Flux, whole.model.model_config.unet_config)
    config.custom_operations = operations
    config.set_inference_dtype(torch.bfloat16, torch.bfloat16)
    model = comfy.model_base.Flux(config)
    model.diffusion_model.load_state_dict(whole.model.diffusion_model.state_dict())
    for module in model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.to(dtype)
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


def flux_scaled_fp8(fast):
    """A Flux as ComfyUI loaded scaled fp8 before 0.29; fast: its layers round their inputs too."""
    import comfy.ops

    whole = flux()
    config = _config(comfy.supported_models.Flux, whole.model.model_config.unet_config)
    config.custom_operations = comfy.ops.scaled_fp8_ops(fp8_matrix_mult=fast, scale_input=fast, override_dtype=torch.float8_e4m3fn)
    model = comfy.model_base.Flux(config)
    state = {k: v.clone() for k, v in whole.model.diffusion_model.state_dict().items()}
    for name, module in model.diffusion_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            scale = state[f"{name}.weight"].abs().max() / 448
            state |= {f"{name}.weight": (state[f"{name}.weight"] / scale).to(torch.float8_e4m3fn), f"{name}.scale_weight": scale}
            if fast:
                state[f"{name}.scale_input"] = torch.ones(())
    model.diffusion_model.load_state_dict(state)
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


def flux_fp8(quantised="single_blocks.0", **changes):
    """A Flux whose linears under `quantised` are stored as fp8 with one scale each (from 0.29 on)."""
    import json

    import comfy.ops

    whole = flux(**changes)
    state = {k: v.clone() for k, v in whole.model.diffusion_model.state_dict().items()}
    for key in [k for k, v in state.items() if quantised in k and k.endswith(".weight") and v.dim() == 2]:
        scale = state[key].abs().max() / 448
        state[key] = (state[key] / scale).to(torch.float8_e4m3fn)
        state[key + "_scale"] = scale
        state[key.removesuffix("weight") + "comfy_quant"] = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    config = _config(comfy.supported_models.Flux, whole.model.model_config.unet_config)
    config.custom_operations = comfy.ops.mixed_precision_ops({}, torch.float32, disabled={"float8_e4m3fn"})
    model = comfy.model_base.Flux(config)
    model.diffusion_model.load_state_dict(state)
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)
