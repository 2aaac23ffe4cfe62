"""What is told to the user."""

from typing import Any


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def table(report: dict[str, Any]) -> str:
    """The plan: a line a device, and below it what could not be split as asked."""
    devices = report["devices"]
    rows = [("device", "weights", "activations", "computes", "exchanges a call")]
    for device in devices:
        moved = ", ".join(f"{entry['count']} {kind} {size(entry['bytes'])}" for kind, entry in sorted(device["collectives"].items()))
        computes = f"{device['flops'] / 1e9:.2f} GFLOP a call"
        rows.append((device["name"], size(device["weight_bytes"]), size(device["activation_bytes"]), computes, moved or "nothing"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"note: {note}" for note in report["notes"])])
