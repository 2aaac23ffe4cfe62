"""The program under test, and a call small enough for a test."""

import json
import os
import pathlib

import numpy as np

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("COMFYTP", str(REPOSITORY / "build" / "comfytp"))

# Sizes of a call: latents of 16x8 (width x height).
SMALL = ("--size", "128x64", "--tokens", "7")


class Result:
    def __init__(self, process):
        self.status, self.out, self.err = process.returncode, process.stdout, process.stderr

    @property
    def json(self):
        return json.loads(self.out)


def call_inputs(dtype=np.float32, batch=2, height=8, width=16, tokens=7, context=768, seed=0):
    random = np.random.default_rng(seed)
    return {
        "x": random.standard_normal((batch, 4, height, width)).astype(dtype),
        "timesteps": np.full(batch, 400, np.float32),
        "context": random.standard_normal((batch, tokens, context)).astype(dtype),
    }
