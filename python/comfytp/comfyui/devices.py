"""gpu_ids: from the text of the node to the engine's names of devices."""

import re
import typing
from dataclasses import dataclass

if typing.TYPE_CHECKING:
    import torch

_ITEM = re.compile(r"(?:(?P<kind>cpu|cuda):)?(?P<index>[0-9]{1,4})(?P<limit>@(?P<size>[0-9]{1,6}(?:\.[0-9]+)?)(?:KiB|MiB|GiB))?")
_CPU_DEVICES = 64  # the engine's virtual devices


@dataclass(frozen=True)
class Here:
    """kind: what a bare id means, "cuda" or "cpu". cuda: how many GPUs there are."""

    kind: str
    cuda: int

    def count(self, kind: str) -> int:
        return self.cuda if kind == "cuda" else _CPU_DEVICES

    def __str__(self) -> str:
        gpus = ", ".join(f"cuda:{i}" for i in range(self.cuda))
        cpus = f"cpu:0 to cpu:{_CPU_DEVICES - 1}"
        bare = f"a bare id means {self.kind}:id"
        return f"devices here: {gpus + ', ' if gpus else ''}{cpus}; {bare}"


def here() -> Here:
    """The devices that ComfyUI works on."""
    import comfy.model_management as management
    import torch

    kind = "cuda" if management.get_torch_device().type == "cuda" else "cpu"
    return Here(kind, torch.cuda.device_count() if kind == "cuda" else 0)


def parse(gpu_ids: str, here: Here) -> list[str]:
    """ "0,1@10GiB" as ["cuda:0", "cuda:1@10GiB"]. Raises ValueError that names the item and the devices that exist."""
    names: list[str] = []
    seen: dict[str, bool] = {}
    for item in gpu_ids.split(","):
        match = _ITEM.fullmatch(item.strip())
        if match is None or (match["size"] and not float(match["size"])):
            raise ValueError(f"gpu_ids: expected ids such as '0,1' or 'cuda:0,cuda:1@10GiB' but got '{gpu_ids}'; {here}")
        kind, index = match["kind"] or here.kind, int(match["index"])
        name = f"{kind}:{index}"
        if index >= here.count(kind):
            raise ValueError(f"gpu_ids: there is no device {name} ('{item.strip()}'); {here}")
        # Two ranks on one GPU are for tests and have to be asked for in full.
        in_full = kind == "cuda" and match["kind"] is not None
        if name in seen and not (in_full and seen[name]):
            hint = f"; for two parts on one GPU write '{name},{name}'" if kind == "cuda" else ""
            raise ValueError(f"gpu_ids: {name} stands twice in '{gpu_ids}'; {here}{hint}")
        seen[name] = in_full
        names.append(name + (match["limit"] or ""))
    return names


def torch_device(name: str) -> "torch.device":
    """Where a device's memory lies as torch and ComfyUI call it: all virtual CPU devices share the host's."""
    import torch

    kind, _, index = name.partition("@")[0].partition(":")
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, int(index))
