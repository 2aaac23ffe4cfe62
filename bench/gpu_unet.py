"""The engine on one GPU against PyTorch on the same GPU: UNets at full size with seeded weights, fp16.

    PYTHONPATH=build/python python bench/gpu_unet.py [--models sd15,sdxl,sd2,refiner] [--runs 30] [--errors] [--json FILE]

For every model and shape: milliseconds per call of PyTorch (eager, and as a CUDA graph), of the library floor both ways (floor.py) and of the
engine, and the error of both in fp16 against PyTorch in fp32 (TF32 off) on the same fp16 weights. Tensors stay on the GPU. --errors: the errors alone, at odd
sizes, batches of 1 to 4 and 77 to 231 tokens. Needs torch with CUDA, and diffusers.
"""

import argparse
import datetime
import gc
import json
import sys
import tempfile

import torch
from configs import REFINER, SD2, SD15, SDXL
from diffusers import UNet2DConditionModel
from floor import Floor, graph_of, heavy_ops, milliseconds

import comfytp

MODELS = {"sd15": SD15, "sd2": SD2, "sdxl": SDXL, "refiner": REFINER}
SHAPES = {  # batch, pixels high and wide, tokens
    "sd15": [(2, 512, 512, 77), (1, 512, 512, 77)],
    "sd2": [(2, 768, 768, 77)],
    "sdxl": [(2, 1024, 1024, 77), (1, 1024, 1024, 77), (2, 2048, 2048, 77)],
    "refiner": [(2, 1024, 1024, 77)],
}
ODD_SHAPES = [(1, 520, 776, 77), (3, 768, 512, 154), (4, 648, 584, 231)]


def unet(config):
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = UNet2DConditionModel(**config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.6 / parameter[0].numel() ** 0.5)
        else:
            parameter.data.fill_(float("norm" in name and name.endswith("weight")))
    return model.half().eval().requires_grad_(False)


def inputs_of(model, batch, height, width, tokens):
    def noise(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.half)

    call = dict(
        sample=noise(batch, 4, height // 8, width // 8),
        timestep=torch.full((batch,), 500.0, device="cuda"),
        encoder_hidden_states=noise(batch, tokens, model.config.cross_attention_dim),
    )
    if model.config.addition_embed_type:
        ids = (model.config.projection_class_embeddings_input_dim - 1280) // model.config.addition_time_embed_dim
        call["added_cond_kwargs"] = dict(text_embeds=noise(batch, 1280), time_ids=torch.full((batch, ids), 1024.0, device="cuda"))
    return call


def label_of(model, call):
    """What the single-file layout calls y: the pooled text, then the cosines and sines of the sizes."""
    added = call.get("added_cond_kwargs")
    if added is None:
        return None
    sizes = model.add_time_proj(added["time_ids"].flatten()).reshape(added["text_embeds"].shape[0], -1)
    return torch.cat([added["text_embeds"], sizes.half()], dim=-1)


def error(result, reference):
    difference = (result.double() - reference.double()).norm()
    return float(difference / reference.double().norm())


def errors(model, call, theirs, ours):
    """Of PyTorch and of the engine against PyTorch in fp32."""
    model.float()
    exact = {k: v.float() if isinstance(v, torch.Tensor) else {n: t.float() for n, t in v.items()} for k, v in call.items()}
    reference = model(**exact).sample
    model.half()
    return dict(torch_error=error(theirs, reference), engine_error=error(ours, reference))


def times(model, call, run, runs):
    row = dict(torch_eager_ms=milliseconds(lambda: model(**call), 10))
    graph = graph_of(lambda: model(**call))
    row["torch_graph_ms"] = milliseconds(graph.replay, runs)
    del graph
    limit = Floor(heavy_ops(model, call), torch.half)
    row["floor_ms"], row["floor_in_sequence_ms"] = sum(limit.by_kind_ms().values()), limit.in_sequence_ms(runs)
    del limit
    torch.cuda.empty_cache()
    row["engine_ms"] = milliseconds(run, runs)
    return row


@torch.no_grad()
def main():
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--models", default="sd15,sdxl")
    arguments.add_argument("--runs", type=int, default=30)
    arguments.add_argument("--errors", action="store_true")
    arguments.add_argument("--json", help="also write the result to this file")
    options = arguments.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows = []
    for name in options.models.split(","):
        model = unet(MODELS[name])
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            engine = comfytp.Denoiser(folder, "cuda:0", compute="f16", head_dim=None if name == "sd15" else 64)
            for batch, height, width, tokens in ODD_SHAPES if options.errors else SHAPES[name]:
                torch.manual_seed(1)
                call = inputs_of(model, batch, height, width, tokens)
                x, timesteps, context, y = call["sample"], call["timestep"], call["encoder_hidden_states"], label_of(model, call)
                row = dict(model=name, batch=batch, height=height, width=width, tokens=tokens)

                def run(arguments=(x, timesteps, context, y)):
                    return engine(*arguments)

                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                theirs = model(**call).sample
                row["torch_activation_bytes"] = torch.cuda.max_memory_allocated() - before
                ours = run()
                row["same_bits"] = bool(torch.equal(ours, run()))
                row["engine_activation_bytes"] = engine.report(batch, height // 8, width // 8, tokens=tokens)["devices"][0]["activation_bytes"]
                if not options.errors:
                    row |= times(model, call, run, options.runs)
                if height * width <= 1 << 20:
                    row |= errors(model, call, theirs, ours)
                rows.append(row)
                print(json.dumps(row), flush=True)
            row["load_seconds"] = engine.stats()["load_seconds"]
            engine.unload()
        del model, engine
        gc.collect()
        torch.cuda.empty_cache()
    if options.json:
        gpu = torch.cuda.get_device_name()
        about = dict(command=" ".join(["python", *sys.argv]), date=datetime.date.today().isoformat(), gpu=gpu)
        about |= dict(torch=torch.__version__, cudnn=torch.backends.cudnn.version(), rows=rows)
        with open(options.json, "w") as file:
            json.dump(about, file, indent=1)


if __name__ == "__main__":
    main()
