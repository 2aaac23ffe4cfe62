"""What the importer writes for a denoiser is what the denoiser computes; run by torch, so that no kernel has a part in it."""

import denoisers
import pytest
import torch
from comfytp.importer.calls import Calls
from interpreted import InterpretedEngine
from torch.utils._pytree import tree_flatten

CASES = [(name, sizes) for name, family in denoisers.FAMILIES.items() for sizes in ({}, *family.variants)]


def relative_error(result, expected):
    result, expected = tree_flatten(result)[0], tree_flatten(expected)[0]
    assert len(result) == len(expected)
    errors = []
    for a, b in zip(result, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        errors.append(float((a - b).double().norm() / b.double().norm()))
    return max(errors)


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(f"{k}={x}" for k, x in v.items()) or "base")
@torch.no_grad()
def test_graph_computes_what_the_module_does_for_other_inputs_too(make, name, sizes):
    module = make(name)
    calls = Calls(module, InterpretedEngine(dict(module.named_parameters())))
    for seed in (2, 7):
        call = denoisers.call_arguments(name, seed=seed, **sizes)
        assert relative_error(calls(**call), module(**call)) <= 1e-5
    assert calls.stats.captures <= 1  # 0 where another test has captured it
