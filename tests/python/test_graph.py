"""Graph: what an importer writes a model into."""

import numpy as np
import pytest
import torch

import comfytp


def small():
    graph = comfytp.Graph()
    x = graph.input("x", [2, 8])
    w = graph.weight("w", [4, 8])
    graph.output("y", graph.add("silu", [graph.add("linear", [x, w], name="proj")]))
    return graph


def test_the_text_reads_back_to_the_same_text():
    text = str(small())
    assert str(comfytp.Graph.parse(text)) == text
    assert "linear" in text and '"proj"' in text


def test_the_text_runs_as_the_graph_does():
    x, w = torch.randn(2, 8), torch.randn(4, 8)
    by_text = comfytp.Engine(str(small()), {"w": w})(x=x)["y"]
    assert torch.equal(by_text, comfytp.Engine(small(), {"w": w})(x=x)["y"])
    assert torch.allclose(by_text, torch.nn.functional.silu(x @ w.T), atol=1e-5)


def test_values_tell_their_type():
    graph = small()
    assert graph.inputs == {"x": ("f32", (2, 8))}
    assert graph.outputs == {"y": ("f32", (2, 4))}
    assert (graph.dtype(1), graph.shape(1), len(graph)) == ("f32", (4, 8), 4)
    assert "conv2d" in comfytp.ops()


def test_constants_take_arrays():
    graph = comfytp.Graph()
    table = np.arange(12, dtype=np.float32).reshape(3, 4).T
    graph.output("y", graph.add("add", [graph.input("x", [4, 3]), graph.constant(table)]))
    assert np.array_equal(comfytp.Engine(graph, {})(x=np.ones((4, 3), np.float32))["y"], table + 1)
    assert graph.dtype(graph.constant(torch.ones(2, dtype=torch.bfloat16))) == "bf16"
    assert graph.dtype(graph.constant(np.ones(2), dtype="f32")) == "f32"


def test_a_weights_shape_may_differ_in_dimensions_of_size_one():
    graph = comfytp.Graph()
    graph.output("y", graph.add("linear", [graph.input("x", [2, 8]), graph.weight("w", [4, 8])]))
    x, w = torch.randn(2, 8), torch.randn(4, 8, 1, 1)
    assert torch.allclose(comfytp.Engine(graph, {"w": w})(x=x)["y"], x @ w[:, :, 0, 0].T, atol=1e-5)


@pytest.mark.parametrize(
    "build, says",
    [
        (lambda g: g.add("no_such_op"), "no_such_op"),
        (lambda g: g.add("silu", [7]), "%7"),
        (lambda g: g.add("linear", [g.input("a", [2, 8]), g.weight("k", [4, 9])], name="block.7"), "block.7"),
        (lambda g: g.input("a", [2, -1]), "input"),
        (lambda g: g.input("a", [2], "f33"), "f33"),
        (lambda g: g.add("transpose", [g.input("a", [2, 3])], {"order": [0, "1"]}), "order"),
        (lambda g: g.add("transpose", [g.input("a", [2, 3])], {"order": {}}), "order"),
        (lambda g: g.add("attention", [g.input(n, [1, 1, 2, 4]) for n in "qkv"], {"scale": 1}), "scale"),
        (lambda g: g.output("y", 3), "3"),
        (lambda g: g.shape(-1), "-1"),
        (lambda g: comfytp.Graph.parse("%0 = input() {"), "line 1"),
    ],
)
def test_mistakes_are_told_at_once(build, says):
    with pytest.raises(comfytp.Error) as error:
        build(comfytp.Graph())
    assert says in str(error.value)


def test_thousands_of_nodes_are_no_matter():
    graph = comfytp.Graph()
    x = graph.input("x", [8])
    for i in range(5000):
        x = graph.add("silu", [x], name=f"layer.{i}")
    graph.output("y", x)
    graph.verify()
    assert len(comfytp.Graph.parse(str(graph))) == 5001
