"""memory_mode: how the devices share the work and where the weights lie. compute: what they multiply in."""

from dataclasses import dataclass
from typing import Any

MODES = ("balanced", "fast", "aggressive")
COMPUTES = ("default", "fp8")


@dataclass(frozen=True)
class Layout:
    """meshes: arrangements over the same parts of the weights, of which the best is taken for each shape."""

    meshes: tuple[str, ...]
    placement: str
    meaning: str

    def cost(self, report: dict[str, Any]) -> float:
        """Of a plan that Programs.report tells: what the busiest device computes, or where memory counts what the fullest holds."""
        what = "flops" if self.placement == "resident" else "activation_bytes"
        return max(device[what] for device in report["devices"])


def check(mode: str, compute: str) -> None:
    for name, value, known in (("memory_mode", mode, MODES), ("compute", compute, COMPUTES)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)} but got '{value}'")


def layout(mode: str, count: int, weight_bytes: int, room: int | None) -> Layout:
    """room: bytes that the smallest of `count` devices has for weights, None where that is not known."""
    if mode == "aggressive":
        return Layout(_whole_weights(count), "gathered", "batch, rows and tokens split, weights fetched from the other devices ahead of use")
    if mode == "fast" and (room is None or weight_bytes <= room):
        return Layout(_whole_weights(count), "resident", "batch split first, whole weights on each device")
    return Layout((f"tensor={count}",), "resident", "arithmetic split, weights stored once over all devices")


def _whole_weights(count: int) -> tuple[str, ...]:
    """Every mesh of samples and rows; in all of them a device computes with whole weights."""
    meshes = []
    for batch in range(count, 0, -1):
        if count % batch == 0:
            axes = {"batch": batch, "patch": count // batch}
            meshes.append(",".join(f"{name}={size}" for name, size in axes.items() if size > 1) or "batch=1")
    return tuple(meshes)
