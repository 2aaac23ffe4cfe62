"""Programs on disk, so that a model is captured once and not once a process."""

import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any

import torch
from torch.utils._pytree import treespec_dumps, treespec_loads

from .dtypes import NAMES, TORCH
from .key import content_hash
from .program import Output, Program


def folder() -> pathlib.Path | None:
    """COMFYTP_CACHE, or comfytp in the user's cache folder; None where COMFYTP_CACHE is empty: nothing is kept."""
    chosen = os.environ.get("COMFYTP_CACHE")
    if chosen is not None:
        return pathlib.Path(chosen) if chosen else None
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or pathlib.Path.home() / "AppData/Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "comfytp"


def name_of(module_hash: str, key: Any) -> str:
    return hashlib.sha256(f"{module_hash} {key!r}".encode()).hexdigest()


def load(name: str) -> Program | None:
    """None when there is none, or none that can be read."""
    place = folder()
    if place is None:
        return None
    try:
        from safetensors import safe_open

        with safe_open(place / f"{name}.safetensors", "pt") as file:
            graph, call, digest = (file.metadata()[name] for name in ("graph", "call", "digest"))
            tables = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if digest != _digest(graph, call, tables):
            return None
        described = json.loads(call)
        return Program(graph, tables, described["inputs"], [_value(o) for o in described["outputs"]], treespec_loads(described["out_spec"]))
    except Exception:  # missing, cut short, of another version: whatever it is, the model is captured anew
        return None


def save(name: str, program: Program) -> None:
    """Does nothing where the program cannot be written: the cache only saves time."""
    place = folder()
    if place is None:
        return
    temporary = None
    try:
        from safetensors.torch import save_file

        described = {
            "inputs": program.inputs,
            "outputs": [_described(o) for o in program.outputs],
            "out_spec": treespec_dumps(program.out_spec),
        }
        call = json.dumps(described)
        place.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=place, suffix=".tmp")
        os.close(handle)
        tables = {key: table.contiguous() for key, table in program.tables.items()}
        save_file(tables, temporary, {"graph": program.graph, "call": call, "digest": _digest(program.graph, call, tables)})
        os.replace(temporary, place / f"{name}.safetensors")
    except Exception:  # no safetensors, a full or read-only disk, a result that has no text form
        if temporary is not None:
            pathlib.Path(temporary).unlink(missing_ok=True)


def _digest(graph: str, call: str, tables: dict[str, torch.Tensor]) -> str:
    contents = [(key, str(table.dtype), tuple(table.shape), content_hash(table)) for key, table in sorted(tables.items())]
    return hashlib.sha256(repr((graph, call, contents)).encode()).hexdigest()


def _described(output: Any) -> Any:
    if isinstance(output, Output):
        return {"name": output.name, "shape": output.shape, "dtype": NAMES[output.dtype]}
    return {"value": output}


def _value(described: dict[str, Any]) -> Any:
    if "name" not in described:
        return described["value"]
    dtype: torch.dtype = TORCH[described["dtype"]]
    return Output(described["name"], tuple(described["shape"]), dtype)
