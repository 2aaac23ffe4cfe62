"""Norms that a model writes out in small ops, found in a captured graph and written as one."""

from typing import Any

import torch

_ATEN = torch.ops.aten


def find_norms(graph: torch.fx.Graph) -> None:
    """x * rsqrt(mean(x²) + eps) over the last dimension becomes rms_norm; x's own dtype is kept where the mean is taken in
    another one, with a cast before the norm and none behind."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not _ATEN.mul.Tensor:
            continue
        for x, factor in (node.args, reversed(node.args)):
            found = _root_mean_square(factor)
            if found is None or _source(x) is not _source(found[0]) or not _same_or_finer(found[0], x):
                continue
            of, epsilon = found
            with graph.inserting_before(node):
                norm = graph.call_function(_ATEN.rms_norm.default, (of, [of.meta["val"].shape[-1]], None, epsilon))
            norm.meta = dict(node.meta)
            if norm.meta["val"].dtype == of.meta["val"].dtype:
                node.replace_all_uses_with(norm)
            break
    graph.eliminate_dead_code()


def _root_mean_square(node: Any) -> tuple[torch.fx.Node, float] | None:
    """For 1 / sqrt(mean(x², last dimension) + epsilon): x and epsilon."""
    node = _called(node, _ATEN.rsqrt.default)
    node = _called(node and node.args[0], _ATEN.add.Tensor)
    if node is None or not isinstance(node.args[1], float) or node.kwargs.get("alpha", 1) != 1:
        return None
    epsilon = node.args[1]
    node = _called(node.args[0], _ATEN.mean.dim)
    if node is None or len(node.args) < 3 or not node.args[2] or node.kwargs.get("dtype") is not None:
        return None
    squares, dims = node.args[0], node.args[1]
    if [d % squares.meta["val"].dim() for d in dims] != [squares.meta["val"].dim() - 1]:
        return None
    if power := _called(squares, _ATEN.pow.Tensor_Scalar):
        return (power.args[0], epsilon) if power.args[1] == 2 else None
    product = _called(squares, _ATEN.mul.Tensor)
    return (product.args[0], epsilon) if product and product.args[0] is product.args[1] else None


def _called(node: Any, target: Any) -> torch.fx.Node | None:
    return node if isinstance(node, torch.fx.Node) and node.op == "call_function" and node.target is target else None


def _source(node: Any) -> Any:
    """What a value was before it was cast or copied."""
    while isinstance(node, torch.fx.Node) and node.target in (_ATEN._to_copy.default, _ATEN.clone.default, _ATEN.alias.default):
        node = node.args[0]
    return node


def _same_or_finer(of: torch.fx.Node, x: torch.fx.Node) -> bool:
    """Taking `of` for `x` loses nothing: they are one value, in one dtype or in a wider one."""
    a, b = of.meta["val"].dtype, x.meta["val"].dtype
    return a == b or (a == torch.float32 and b in (torch.bfloat16, torch.float16))
