"""A reshape as splits and merges of single dimensions, so that a part of a tensor can follow it with sizes of its own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """Splits dimension `dim` into `sizes`, or merges `count` dimensions from `dim` on. of_ones: only dimensions of size 1 come
    or go."""

    dim: int
    sizes: tuple[int, ...] = ()
    count: int = 0
    of_ones: bool = False


def reshape_steps(before: Sequence[int], after: Sequence[int]) -> list[Step]:
    """The fewest steps from one shape to the other. Dimensions that only change as a block are merged and split again as
    little as their sizes allow."""
    steps: list[Step] = []
    # Backwards, so that the dimensions before a block keep their numbers.
    for first, old, new in reversed(_blocks(tuple(before), tuple(after))):
        steps += _steps_of_block(first, old, new)
    return steps


def _blocks(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Smallest runs of dimensions of equal product: (first dimension before, sizes before, sizes after)."""
    blocks: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        first, start = i, j
        old, new = before[i], after[j]
        i, j = i + 1, j + 1
        while old != new:
            if old < new:
                if i == len(before):
                    raise ValueError(f"cannot reshape {before} to {after}")
                old, i = old * before[i], i + 1
            else:
                if j == len(after):
                    raise ValueError(f"cannot reshape {before} to {after}")
                new, j = new * after[j], j + 1
        blocks.append((first, before[first:i], after[start:j]))
    # Dimensions of size 1 at the end belong to the last block.
    first, old, new = blocks.pop()
    blocks.append((first, old + before[i:], new + after[j:]))
    return blocks


def _steps_of_block(dim: int, old: tuple[int, ...], new: tuple[int, ...]) -> list[Step]:
    if old == new:
        return []
    fine = _refinement(old, new)
    if fine is None:
        fine = (math.prod(old),)
        old_parts: list[tuple[int, ...]] = []
        steps = [Step(dim, count=len(old))]
    else:
        old_parts = _grouped(fine, old)
        steps = []
        at = dim
        for size, part in zip(old, old_parts, strict=True):
            if part != (size,):
                steps.append(Step(at, sizes=part, of_ones=size in part))
            at += len(part)
    at = dim
    if fine == (math.prod(old),) and len(new) > 1 and not old_parts:
        return [*steps, Step(dim, sizes=new)]
    for size, part in zip(new, _grouped(fine, new), strict=True):
        if len(part) > 1:
            steps.append(Step(at, count=len(part), of_ones=size in part))
        at += 1
    return steps


def _refinement(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...] | None:
    """Sizes that both shapes are merges of; None where there are none."""
    fine: list[int] = []
    a, b = list(old), list(new)
    while a or b:
        if not a or not b:
            # Only dimensions of size 1 are left on one side.
            fine += [1] * len(a or b)
            break
        small = min(a[0], b[0])
        if small == 0 or a[0] % small or b[0] % small:
            return None
        fine.append(small)
        for rest in (a, b):
            rest[0] //= small
            if rest[0] == 1:
                rest.pop(0)
    return tuple(fine)


def _grouped(fine: tuple[int, ...], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The run of `fine` that each dimension of `shape` is made of."""
    groups: list[list[int]] = [[] for _ in shape]
    product = [1] * len(shape)
    d = 0
    for size in fine:
        while product[d] == shape[d] and d + 1 < len(shape) and (size != 1 or shape[d] != 1 or groups[d]):
            d += 1
        groups[d].append(size)
        product[d] *= size
    return [tuple(group) for group in groups]
