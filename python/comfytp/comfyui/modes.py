"""memory_mode: how the devices share the work and where the weights lie."""

from dataclasses import dataclass

MODES = ("balanced", "fast", "aggressive")


@dataclass(frozen=True)
class Layout:
    mesh: str
    placement: str
    meaning: str


def check(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"memory_mode: expected one of {', '.join(MODES)} but got '{mode}'")


def layout(mode: str, count: int, weight_bytes: int, room: int | None) -> Layout:
    """room: bytes that the smallest of `count` devices has for weights, None where that is not known."""
    if mode == "aggressive":
        return Layout(f"patch={count}", "gathered", "rows and tokens split, weights fetched from the other devices ahead of use")
    if mode == "fast" and (room is None or weight_bytes <= room):
        return Layout(f"batch={count}", "resident", "batch split, whole weights on each device")
    return Layout(f"tensor={count}", "resident", "arithmetic split, weights stored once over all devices")
