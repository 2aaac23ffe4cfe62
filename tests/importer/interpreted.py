"""An engine that runs graphs with torch, in the place of comfytp._core.Programs."""

from typing import Any

import interpret


class InterpretedEngine:
    def __init__(self, weights: dict[str, Any]) -> None:
        self._weights = dict(weights)

    def add_weights(self, mapping: dict[str, Any]) -> None:
        self._weights.update(mapping)

    def compile(self, graph: Any) -> str:
        return str(graph)

    def run(self, compiled: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        for name, value in interpret.run(compiled, inputs, self._weights).items():
            outputs[name].copy_(value.reshape(outputs[name].shape))
