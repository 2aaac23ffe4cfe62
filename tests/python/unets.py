"""Small UNets of diffusers with random weights, in every layout that a checkpoint can have."""

import dataclasses
import json
import pathlib

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file


@dataclasses.dataclass(frozen=True)
class Family:
    """A published family's construction at small width. heads: the rule that the engine cannot read off the shapes."""

    config: dict
    heads: dict = dataclasses.field(default_factory=dict)


_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


def _family(channels, attention, head_counts, **config):
    """attention: by level, whether it has transformers; head_counts: by level, what diffusers calls attention_head_dim."""
    up = {_CROSS: "CrossAttnUpBlock2D", _PLAIN: "UpBlock2D"}
    down = [_CROSS if has else _PLAIN for has in attention]
    return {
        "block_out_channels": channels,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up[block] for block in reversed(down)),
        "attention_head_dim": head_counts,
        "sample_size": 32,
        **config,
    }


FAMILIES = {
    "sd1": Family(_family((32, 64, 64, 128), (1, 1, 1, 0), 8, cross_attention_dim=48)),
    "sd2": Family(
        _family((32, 64, 64, 128), (1, 1, 1, 0), (2, 4, 4, 8), cross_attention_dim=40, use_linear_projection=True),
        {"head_dim": 16},
    ),
    "sdxl": Family(
        _family(
            (32, 64, 128),
            (0, 1, 1),
            (1, 2, 4),
            cross_attention_dim=64,
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2, 3),
            addition_embed_type="text_time",
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=6 * 16 + 24,
        ),
        {"head_dim": 32},
    ),
    # 96 channels: 3 heads at one level and 6 at the next, which no two devices share equally.
    "refiner": Family(
        _family(
            (32, 96, 192, 192),
            (0, 1, 1, 0),
            (1, 3, 6, 6),
            cross_attention_dim=40,
            use_linear_projection=True,
            transformer_layers_per_block=2,
            addition_embed_type="text_time",
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=5 * 16 + 24,
        ),
        {"head_dim": 32},
    ),
}


def make_unet(family, seed=0, **changes):
    """Every parameter is random: nothing that starts as 0 or 1 can hide an error."""
    unet = UNet2DConditionModel(**{**FAMILIES[family].config, **changes}).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    for name, parameter in unet.named_parameters():
        noise = torch.randn(parameter.shape, generator=random)
        if parameter.ndim > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
    return unet


@dataclasses.dataclass
class Call:
    """Inputs of one call; `added` is what diffusers makes y of."""

    x: torch.Tensor
    timesteps: torch.Tensor
    context: torch.Tensor
    y: torch.Tensor | None = None
    added: dict | None = None

    def inputs(self):
        return {k: v for k, v in vars(self).items() if k != "added" and v is not None}

    def to(self, dtype):
        # Sizes in pixels stay exact: bf16 has no 1001.
        added = self.added and {**self.added, "text_embeds": self.added["text_embeds"].to(dtype)}
        return Call(self.x.to(dtype), self.timesteps, self.context.to(dtype), self.y if self.y is None else self.y.to(dtype), added)


def make_call(unet, batch=2, height=24, width=16, tokens=77, seed=1):
    random = torch.Generator().manual_seed(seed)
    config = unet.config
    call = Call(
        torch.randn(batch, config.in_channels, height, width, generator=random),
        torch.linspace(37.0, 951.0, batch),
        torch.randn(batch, tokens, config.cross_attention_dim, generator=random),
    )
    if config.addition_embed_type == "text_time":
        width_of_time = config.addition_time_embed_dim
        ids = (config.projection_class_embeddings_input_dim - 24) // width_of_time
        text = torch.randn(batch, 24, generator=random)
        time_ids = torch.randint(0, 1024, (batch, ids), generator=random).float()
        call.added = {"text_embeds": text, "time_ids": time_ids}
        call.y = torch.cat([text, unet.add_time_proj(time_ids.flatten()).reshape(batch, -1)], dim=1)
    return call


def reference(unet, call, **residuals):
    with torch.no_grad():
        return unet(call.x, call.timesteps, call.context, added_cond_kwargs=call.added, **residuals).sample


def relative_error(got, expected):
    got, expected = (torch.as_tensor(t).double() for t in (got, expected))
    assert got.shape == expected.shape
    return ((got - expected).norm() / expected.norm()).item()


# ---- layouts -------------------------------------------------------------------------------------------------------

_TOP = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_names(unet):
    """diffusers' names of the parameters -> LDM's."""
    config = unet.config
    levels, layers = len(config.block_out_channels), config.layers_per_block
    blocks = dict(_TOP)
    for level in range(levels):
        for layer in range(layers):
            number = 1 + level * (layers + 1) + layer
            blocks[f"down_blocks.{level}.resnets.{layer}."] = f"input_blocks.{number}.0."
            blocks[f"down_blocks.{level}.attentions.{layer}."] = f"input_blocks.{number}.1."
        blocks[f"down_blocks.{level}.downsamplers.0.conv."] = f"input_blocks.{(level + 1) * (layers + 1)}.0.op."
        for layer in range(layers + 1):
            number = level * (layers + 1) + layer
            blocks[f"up_blocks.{level}.resnets.{layer}."] = f"output_blocks.{number}.0."
            blocks[f"up_blocks.{level}.attentions.{layer}."] = f"output_blocks.{number}.1."
        has_attention = config.up_block_types[level] == "CrossAttnUpBlock2D"
        last = level * (layers + 1) + layers
        blocks[f"up_blocks.{level}.upsamplers.0.conv."] = f"output_blocks.{last}.{2 if has_attention else 1}.conv."
    names = {}
    for name in unet.state_dict():
        old, new = next(item for item in blocks.items() if name.startswith(item[0]))
        rest = name[len(old) :]
        if ".resnets." in old:
            part, _, kind = rest.partition(".")
            rest = f"{_RESNET[part]}.{kind}"
        names[name] = new + rest
    return names


def _contiguous(tensors):
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def save_ldm(unet, path, prefix="model.diffusion_model.", dtype=None):
    names = ldm_names(unet)
    tensors = {prefix + names[name]: t.to(dtype or t.dtype) for name, t in unet.state_dict().items()}
    if prefix:  # what else a single-file checkpoint holds
        tensors["first_stage_model.decoder.conv_in.weight"] = torch.zeros(8, 4, 3, 3)
        tensors["cond_stage_model.transformer.text_model.final_layer_norm.weight"] = torch.zeros(8)
        tensors["alphas_cumprod"] = torch.zeros(16, dtype=torch.float64)
    save_file(_contiguous(tensors), path)
    return path


def save_file_of(unet, path, dtype=None):
    save_file(_contiguous({name: t.to(dtype or t.dtype) for name, t in unet.state_dict().items()}), path)
    return path


def save_sharded(unet, folder):
    unet.save_pretrained(folder, max_shard_size="1MB")
    index = pathlib.Path(folder) / "diffusion_pytorch_model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    return index


LAYOUTS = {
    "ldm": lambda unet, folder: save_ldm(unet, folder / "model.safetensors"),
    "bare": lambda unet, folder: save_ldm(unet, folder / "unet.safetensors", prefix=""),
    "diffusers-file": lambda unet, folder: save_file_of(unet, folder / "diffusion_pytorch_model.safetensors"),
    "diffusers-index": lambda unet, folder: save_sharded(unet, folder),
    "diffusers-folder": lambda unet, folder: save_sharded(unet, folder).parent,
    "pipeline-folder": lambda unet, folder: save_sharded(unet, folder / "unet").parent.parent,
    "mapping": lambda unet, folder: unet.state_dict(),
    "ldm-mapping": lambda unet, folder: {ldm_names(unet)[name]: t for name, t in unet.state_dict().items()},
}
