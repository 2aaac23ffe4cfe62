"""Prints the values that reference_test.cpp expects: outputs of diffusers' UNet2DConditionModel in double precision.

Run it with diffusers and torch installed after a change of the small UNets there; both sides make weights and inputs by
the same formula from the tensor's LDM name.
"""

import math

import numpy as np
import torch
from diffusers import UNet2DConditionModel

BLOCKS = {
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_name(key, upsampler):
    blocks = BLOCKS | {"up_blocks.0.upsamplers.0.conv": upsampler}
    block = next(b for b in blocks if key.startswith(b + "."))
    rest = key[len(block) + 1 :]
    if ".resnets." in key:
        module, _, rest = rest.partition(".")
        rest = f"{RESNET[module]}.{rest}"
    return f"{blocks[block]}.{rest}"


def uniform(name, shape):
    """In [-1, 1): FNV-1a of the name and a mix of it with the element's number, 32 bit."""
    seed = 2166136261
    for byte in name.encode():
        seed = (seed ^ byte) * 16777619 % 2**32
    h = (np.arange(math.prod(shape), dtype=np.uint64) * 2654435761 + seed) % 2**32
    for multiplier in (0x7FEB352D, 0x846CA68B):
        h = (h ^ (h >> np.uint64(16))) * np.uint64(multiplier) % 2**32
    return torch.from_numpy((h ^ (h >> np.uint64(16))) / 2**31 - 1).reshape(shape)


def weight(name, shape):
    if len(shape) > 1:
        return uniform(name, shape) * math.sqrt(3 / math.prod(shape[1:]))
    return 0.2 * uniform(name, shape) + (0 if name.endswith(".bias") else 1)


def reference(linear, **config):
    unet = UNet2DConditionModel(
        in_channels=4, out_channels=4, layers_per_block=1, cross_attention_dim=24, use_linear_projection=linear, **config
    ).double()
    upsampler = "output_blocks.1.2.conv" if linear else "output_blocks.1.1.conv"
    state = unet.state_dict()
    unet.load_state_dict({key: weight(ldm_name(key, upsampler), tuple(t.shape)) for key, t in state.items()})
    low, high = config["block_out_channels"]
    extra = {}
    if linear:  # y of the engine: text, then the embedded sizes, of which there are none here
        extra["added_cond_kwargs"] = {"text_embeds": uniform("y", (2, 40)), "time_ids": torch.zeros(2, 0).double()}
    shapes = [(low, 5, 3), (low, 5, 3), (low, 3, 2), (high, 3, 2)]
    output = unet(
        uniform("x", (2, 4, 5, 3)),
        torch.tensor([7.0, 2.5]).double(),
        uniform("context", (2, 3, 24)),
        down_block_additional_residuals=[uniform(f"control.{i}", (2, *shape)) for i, shape in enumerate(shapes)],
        mid_block_additional_residual=uniform("control.middle", (2, high, 3, 2)),
        **extra,
    ).sample
    print("{" + ", ".join(f"{v:.9f}" for v in output.flatten()[::15].tolist()) + "}")


CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
with torch.no_grad():
    reference(
        False,
        block_out_channels=(32, 64),
        down_block_types=(CROSS[0], PLAIN[0]),
        up_block_types=(PLAIN[1], CROSS[1]),
        attention_head_dim=8,  # which diffusers takes for the number of heads
    )
    reference(
        True,
        block_out_channels=(64, 128),
        down_block_types=(PLAIN[0], CROSS[0]),
        up_block_types=(CROSS[1], PLAIN[1]),
        attention_head_dim=(1, 2),
        transformer_layers_per_block=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=40,
    )
