"""What all split models of this process have done."""

import threading
from typing import Any

_lock = threading.Lock()
_totals = {"uploaded_bytes": 0, "captures": 0, "engine_calls": 0, "torch_fallbacks": 0}


def add(**amounts: int) -> None:
    with _lock:
        for name, amount in amounts.items():
            _totals[name] += amount


def totals() -> dict[str, Any]:
    with _lock:
        return dict(_totals)
