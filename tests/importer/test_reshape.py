import math

import pytest
from comfytp.importer.reshape import reshape_steps


def shapes_of(count, ones=2):
    """Every way to write `count` as a product of ordered factors, with dimensions of size 1 put in."""
    found = [(count,)] if count > 1 else [()]
    for first in range(2, count):
        if count % first == 0:
            found += [(first, *rest) for rest in shapes_of(count // first, 0)]
    return found + [(*shape[:at], 1, *shape[at:]) for shape in found for at in range(len(shape) + 1) if ones]


def follow(shape, steps):
    shape = list(shape)
    for step in steps:
        if step.count:
            shape[step.dim : step.dim + step.count] = [math.prod(shape[step.dim : step.dim + step.count])]
        else:
            assert math.prod(step.sizes) == shape[step.dim]
            shape[step.dim : step.dim + 1] = step.sizes
    return tuple(shape)


@pytest.mark.parametrize("count", [2, 6, 8, 12, 36])
def test_steps_lead_from_every_shape_to_every_other(count):
    for before in shapes_of(count):
        for after in shapes_of(count):
            assert follow(before, reshape_steps(before, after)) == after


@pytest.mark.parametrize(
    ("before", "after", "dims"),
    [
        ((2, 16, 64), (2, 16, 4, 16), 1),  # heads
        ((2, 16, 4, 16), (2, 16, 64), 1),
        ((2, 4, 8, 8), (2, 4, 64), 1),  # tokens
        ((2, 3, 64), (6, 64), 1),
        ((2, 8, 4, 6), (2, 2, 4, 24), 2),
        ((5,), (1, 5, 1), 1),
        ((2, 3), (2, 3), 0),
    ],
)
def test_only_the_dimensions_that_change_are_touched(before, after, dims):
    assert len(reshape_steps(before, after)) == dims


def test_sizes_that_do_not_divide_are_merged_first():
    assert follow((4, 6), reshape_steps((4, 6), (3, 8))) == (3, 8)


def test_shapes_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="cannot reshape"):
        reshape_steps((4, 6), (5, 5))
