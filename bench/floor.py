"""The library floor of a module's call: what its matmuls, convolutions and attentions take, from cuBLASLt and cuDNN as torch calls them.

Two ways: each op alone in short bursts, the best of several, summed; and all ops one behind the other in one CUDA graph, replayed as often as
a model is called, so that the card is as warm and as short of power as in a real call. No engine on these libraries is faster without fusing
or another precision; only norms, activations, copies and launches come on top.
"""

import collections
import copy
import statistics

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def milliseconds(call, runs, warm=3):
    """The median of `runs` calls, timed by events of the current stream."""
    for _ in range(warm):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(runs):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def graph_of(call, repeat=1):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            call()
    return graph


def heavy_ops(module, call):
    """Counts the matmuls, convolutions and attentions of module(**call) by shape."""
    ops, hooks = collections.Counter(), []

    def conv(layer, inputs, output):
        ops["conv", layer, tuple(inputs[0].shape)] += 1

    def linear(layer, inputs, output):
        ops["linear", inputs[0].numel() // layer.in_features, layer.in_features, layer.out_features, layer.bias is not None] += 1

    for part in module.modules():
        if isinstance(part, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
            hooks.append(part.register_forward_hook(conv))
        elif isinstance(part, torch.nn.Linear):
            hooks.append(part.register_forward_hook(linear))
    real = F.scaled_dot_product_attention

    def attention(query, key, value, *args, **kwargs):
        ops["attention", tuple(query.shape), key.shape[2]] += 1
        return real(query, key, value, *args, **kwargs)

    F.scaled_dot_product_attention = attention
    try:
        module(**call)
    finally:
        F.scaled_dot_product_attention = real
        for hook in hooks:
            hook.remove()
    return ops


class Floor:
    """Of a call that makes `ops` (heavy_ops) in `dtype` on `device`."""

    def __init__(self, ops, dtype, device="cuda"):
        self._ops, self._dtype, self._device = ops, dtype, device
        self._alone, self._calls = {}, {}
        with torch.backends.cudnn.flags(benchmark=True, allow_tf32=torch.backends.cudnn.allow_tf32):
            for op in ops:
                self._calls[op], self._alone[op] = self._fastest(op)

    def by_kind_ms(self):
        """The ops alone, summed by kind: {"linear": …, "conv": …, "attention": …}."""
        by_kind = collections.Counter()
        for op, count in self._ops.items():
            by_kind[op[0]] += count * self._alone[op]
        return dict(by_kind)

    def in_sequence_ms(self, runs):
        """All of them in one CUDA graph, replayed `runs` times."""

        def all_of_them():
            for op, count in self._ops.items():
                for _ in range(count):
                    self._calls[op]()

        if self._device == "cpu":
            all_of_them()
            return 0.0
        with torch.backends.cudnn.flags(benchmark=True, allow_tf32=torch.backends.cudnn.allow_tf32):
            return milliseconds(graph_of(all_of_them).replay, runs)

    def _noise(self, *shape):
        return torch.randn(*shape, device=self._device, dtype=self._dtype)

    def _fastest(self, op):
        calls = self._attentions(op) if op[0] == "attention" else [self._linear(op) if op[0] == "linear" else self._conv(op)]
        best = None
        for call in calls:
            try:
                ms = self._time(call, 3 if op[0] == "attention" and op[1][2] > 10000 else 10)
            except RuntimeError:
                continue  # a library that does not take these heads
            if best is None or ms < best[1]:
                best = call, ms
        if best is None:
            raise RuntimeError(f"no library takes {op}")
        return best

    def _linear(self, op):
        _, rows, inputs, outputs, has_bias = op
        x, weight = self._noise(rows, inputs), self._noise(outputs, inputs) * 0.02
        bias = self._noise(outputs) if has_bias else None
        return lambda: F.linear(x, weight, bias)

    def _conv(self, op):
        layer, x = op[1], self._noise(*op[2])
        if x.dim() == 4:
            x, layer = x.to(memory_format=torch.channels_last), copy.deepcopy(layer).to(memory_format=torch.channels_last)  # not the model's own
        return lambda: layer(x)

    def _attentions(self, op):
        (batch, heads, queries, width), keys = op[1:]
        q, k, v = (self._noise(batch, tokens, heads, width).transpose(1, 2) for tokens in (queries, keys, keys))

        def by(backend):
            def call():
                with sdpa_kernel(backend):
                    F.scaled_dot_product_attention(q, k, v)

            return call

        return [by(b) for b in ((SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if self._device == "cuda" else (SDPBackend.MATH,))]

    def _time(self, call, repeat):
        if self._device == "cpu":
            call()
            return 0.0
        graph, best = graph_of(call, repeat), float("inf")
        for _ in range(4):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            best = min(best, start.elapsed_time(stop) / repeat)
        return best
