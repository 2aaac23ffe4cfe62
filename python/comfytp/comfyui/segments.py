"""A graph with callouts in it, as parts that run one after the other with Python in between."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .. import Graph
from ..importer.dtypes import TORCH
from .callouts import PREFIX, Site

_NODE = re.compile(r"(?P<ids>%\d+(?:, %\d+)*) = (?P<op>\w+)\((?P<operands>[^)]*)\)")
_OUTPUT = re.compile(r'output (?P<name>"(?:[^"\\]|\\.)*"|\S+) = %(?P<value>\d+)')
_NAME = re.compile(r'\bname="(?P<name>(?:[^"\\]|\\.)*)"')
_LIVE = "live."


class _Node:
    def __init__(self, line: str) -> None:
        match = _NODE.match(line)
        self.line, self.op = line, match["op"]
        self.ids = [int(i[1:]) for i in match["ids"].split(", ")]
        self.operands = [int(i) for i in re.findall(r"%(\d+)", match["operands"])]
        self.input = _NAME.search(line)["name"] if self.op == "input" else None

    @property
    def is_leaf(self) -> bool:
        """Stands in every part that reads it."""
        return self.op in ("input", "weight", "constant")


class Segments:
    """graph: its inputs and outputs are the model's, and those of the callouts. compile: of a graph's text."""

    def __init__(self, graph: Graph, compile: Callable[[Graph], Any]) -> None:
        lines = str(graph).splitlines()
        nodes = [_Node(line) for line in lines if line.startswith("%")]
        outputs = {m["name"].strip('"'): int(m["value"]) for m in map(_OUTPUT.match, lines) if m}
        whats = list(dict.fromkeys(re.match(rf"{re.escape(PREFIX)}\d+\.\w+", n)[0] for n in outputs if n.startswith(PREFIX)))
        self.sites = [Site(what) for what in whats]
        self._types = {i: (graph.dtype(i), tuple(graph.shape(i))) for node in nodes for i in node.ids}
        self._made_by = {i: node for node in nodes for i in node.ids}

        # A part begins where the results of a callout are first spoken of.
        part, of_value, parts = 0, {}, [[] for _ in range(len(whats) + 1)]
        for node in nodes:
            if node.input and node.input.startswith(PREFIX):
                part = int(node.input.split(".")[1]) + 1
            if not node.is_leaf:
                parts[part].append(node)
                of_value |= dict.fromkeys(node.ids, part)
        # Values that are read behind the part that makes them.
        wanted: dict[int, dict[str, int]] = {p: {} for p in range(len(parts))}
        self._callout_inputs = [[outputs[f"{what}.in.{i}"] for i in range(len(site.dtypes))] for what, site in zip(whats, self.sites, strict=True)]
        self._callout_results = [
            {node.input: node.ids[0] for node in nodes if node.input and node.input.startswith(f"{what}.out.")} for what in whats
        ]
        self._results = {name: value for name, value in outputs.items() if not name.startswith(PREFIX)}
        ends = [value for values in self._callout_inputs for value in values] + list(self._results.values())
        crossing = [v for p, of_part in enumerate(parts) for node in of_part for v in node.operands if of_value.get(v, p) != p]
        for value in (*crossing, *ends):
            if value in of_value:
                wanted[of_value[value]][f"{_LIVE}{value}"] = value
            elif self._made_by[value].op != "input":
                wanted[0][f"{_LIVE}{value}"] = value
        self.parts = [self._part(of_part, wanted[p], of_value, p, compile) for p, of_part in enumerate(parts)]

    def _part(self, nodes: list[_Node], wanted: Mapping[str, int], of_value: Mapping[int, int], part: int, compile: Any) -> Any:
        """(compiled, the names of its inputs, the values of its outputs by name), or None for a part that does nothing."""
        if not wanted:
            return None
        lines: list[str] = []
        inputs: list[str] = []
        there: set[int] = set()

        def bring(value: int) -> None:
            if value in there or of_value.get(value) == part:
                return
            there.add(value)
            node = self._made_by[value]
            if node.is_leaf:
                lines.append(node.line)
                if node.input:
                    inputs.append(node.input)
                return
            dtype, shape = self._types[value]
            name = f"{_LIVE}{value}"
            lines.append(f'%{value} = input() {{dtype="{dtype}", name="{name}", shape=[{",".join(map(str, shape))}], varies="call"}}')
            inputs.append(name)

        for node in nodes:
            for value in node.operands:
                bring(value)
            lines.append(node.line)
        for value in wanted.values():
            bring(value)
        lines += [f"output {name} = %{value}" for name, value in wanted.items()]
        return compile(Graph.parse("\n".join(lines) + "\n")), inputs, dict(wanted)

    def run(self, run: Any, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], call: Any) -> None:
        """run(compiled, inputs, outputs) and call(site, tensors) -> tensors do the work."""
        values: dict[str, torch.Tensor] = dict(inputs)
        for number, part in enumerate(self.parts):
            if part is not None:
                compiled, names, made = part
                given = {name: values[name] for name in names}
                results = {name: torch.empty(self._types[v][1], dtype=TORCH[self._types[v][0]]) for name, v in made.items()}
                run(compiled, given, results)
                values |= results
            if number < len(self.sites):
                site = self.sites[number]
                tensors = [self._value(v, values).to(dtype) for v, dtype in zip(self._callout_inputs[number], site.dtypes, strict=True)]
                found = call(site, tensors)
                for name in self._callout_results[number]:
                    tensor = found[int(name.rsplit(".", 1)[1])].to("cpu")
                    values[name] = tensor if tensor.dim() else tensor.reshape(1)
        for name, value in self._results.items():
            outputs[name].copy_(self._value(value, values))

    def _value(self, value: int, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return values[self._made_by[value].input or f"{_LIVE}{value}"]
