"""A small module to be split, for tests of what goes on around a forward."""

import collections

import pytest
import torch
import torch.nn.functional as F

Result = collections.namedtuple("Result", "first second")


class Small(torch.nn.Module):
    """A feed-forward with what models do around one."""

    def __init__(self, size=8, epsilon=1e-5):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = torch.nn.Linear(size, 4 * size)
        self.down = torch.nn.Linear(4 * size, size)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        self.requires_grad_(False)
        self.epsilon = epsilon
        self.config = {"size": size}

    def forward(self, x, context=None, scale=1.0, steps=1, mask=None, kind="plain"):
        y = self.down(F.silu(self.up(F.layer_norm(x, x.shape[-1:], eps=self.epsilon)))) * scale
        if context is not None:
            y = y + context.mean(1, keepdim=True)
        if kind == "dict":
            return {"y": y, "none": None, "count": 3, "pair": (y * 2, x)}
        if kind == "branch" and scale > 2:
            return y * 100
        if kind == "mask":
            return y[:, : int(mask.sum())]
        if kind == "attend":
            seen = torch.cat([mask.bool(), torch.ones(len(mask), 2, dtype=torch.bool)], 1)[:, None, None]
            keys = torch.cat([y, x[:, :2]], 1).unsqueeze(1)
            return F.scaled_dot_product_attention(y.unsqueeze(1), keys, keys, attn_mask=seen)
        if kind == "sort":
            return y.sort(-1)[0] * scale
        if kind == "drop":
            return torch.native_dropout(y, 0.5, False)[0]
        if kind == "named":
            return Result(y, y + steps)
        return y


def x_of(*shape, seed=0):
    return torch.randn(*(shape or (2, 3, 8)), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def module():
    return Small()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYTP_CACHE", str(tmp_path / "captures"))
    return tmp_path / "captures"


def same(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
