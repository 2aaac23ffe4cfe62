"""Functions that other nodes put inside a model: kept in Python, called between two parts of the split model.

While a model is captured a stand-in takes the function's place. It asks the function once, with random tensors, what its result
looks like, and leaves an op `callout` in the graph that says what to call with what."""

import ast
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..importer import Unsupported
from ..importer.dtypes import NAMES, TORCH
from ..importer.translate.translator import TABLE

PREFIX = "callout."
_PLAIN = (type(None), bool, int, float, str)


class ShapesDiffer(Exception):
    """A function gave a result of another form than it gave while the model was captured; the text is its kind."""


# ---- the op


@torch.library.custom_op("comfytp::callout", mutates_args=())
def _callout(tensors: list[torch.Tensor], site: str, results: str) -> list[torch.Tensor]:
    raise RuntimeError("a callout is run by the engine's caller")


@_callout.register_fake
def _(tensors: list[torch.Tensor], site: str, results: str) -> list[torch.Tensor]:
    return [torch.empty(shape, dtype=TORCH[dtype]) for shape, dtype in ast.literal_eval(results)]


def _write(translator: Any, _: Any, tensors: list[Any], site: str, results: str) -> list[Any]:
    """What it is given becomes outputs of the graph, what it gives inputs; their names hold all that is needed to call it."""
    writer = translator.writer
    number = len({name.split(".")[1] for name in writer.graph.outputs if name.startswith(PREFIX)})
    what = f"{PREFIX}{number}.{repr((site, results)).encode().hex()}"
    for i, value in enumerate(tensors):
        getattr(writer, "output", writer.graph.output)(f"{what}.in.{i}", value)
    return [writer.input(f"{what}.out.{i}", tuple(shape) or (1,), TORCH[dtype], "call") for i, (shape, dtype) in enumerate(ast.literal_eval(results))]


TABLE["comfytp.callout.default"] = _write


# ---- the arguments of a call as text


def _describe(value: Any, tensors: list[torch.Tensor], is_options: Any) -> Any:
    """As plain tuples: ("t", number of a tensor), ("v", value), ("l" | "u", items), ("d" | "o", entries); "o" are the
    transformer_options, of which the entries that the model's code has set are told."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return ("t", len(tensors) - 1)
    if isinstance(value, _PLAIN):
        return ("v", value)
    if isinstance(value, (list, tuple)):
        return ("u" if isinstance(value, tuple) else "l", tuple(_describe(item, tensors, is_options) for item in value))
    if isinstance(value, Mapping):
        kind, entries = ("d", value) if not is_options(value) else ("o", is_options(value))
        return (kind, tuple((key, _describe(item, tensors, is_options)) for key, item in entries.items() if kind == "d" or _is_telling(item)))
    raise Unsupported(f"a patch is given a {type(value).__name__}, which only PyTorch can hand over")


def _is_telling(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_telling, value))
    return isinstance(value, (torch.Tensor, *_PLAIN))


def _restore(described: Any, tensors: list[torch.Tensor], options: Any) -> Any:
    kind, content = described
    if kind == "t":
        return tensors[content]
    if kind == "v":
        return content
    if kind in "lu":
        return (tuple if kind == "u" else list)(_restore(item, tensors, options) for item in content)
    entries = {key: _restore(item, tensors, options) for key, item in content}
    return entries if kind == "d" else {**options, **entries}


# ---- while capturing


class StandIn:
    """In the place of the function at `address` of transformer_options."""

    def __init__(self, address: tuple[Any, ...], function: Any, options: Mapping[str, Any], is_options: Any) -> None:
        self._address = address
        self._function = function
        self._options = options
        self._is_options = is_options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors: list[torch.Tensor] = []
        described = (_describe(list(args), tensors, self._is_options), _describe(dict(kwargs), tensors, self._is_options))
        if not tensors:
            raise Unsupported("a patch is given no tensor")
        form, results = self._ask(described, tensors)
        site = repr((self._address, described, tuple(NAMES[t.dtype] for t in tensors), form))
        given = _callout(tensors, site, repr(results))
        return _restore(form, given, {})

    def _ask(self, described: Any, tensors: list[torch.Tensor]) -> tuple[Any, list[Any]]:
        """The form of the function's result and its tensors' shapes and dtypes."""
        python, generator = random.getstate(), torch.random.get_rng_state()
        try:
            with _disable_current_modes(), torch.no_grad():
                device = device_of(self._options)
                real = [torch.rand(t.shape, device="cpu").to(device, t.dtype) for t in tensors]
                result = call(self._function, described, real, self._options)
                found: list[torch.Tensor] = []
                form = _describe(result, found, lambda _: None)
                return form, [(tuple(t.shape), NAMES[t.dtype]) for t in found]
        except Unsupported:
            raise
        except Exception as error:  # whatever another node's code raises
            raise Unsupported(f"a patch cannot be called outside its model: {type(error).__name__}: {error}") from error
        finally:
            random.setstate(python)
            torch.random.set_rng_state(generator)


def call(function: Any, described: Any, tensors: list[torch.Tensor], options: Mapping[str, Any]) -> Any:
    args, kwargs = (_restore(part, tensors, options) for part in described)
    return function(*args, **kwargs)


# ---- while running


class Site:
    """One callout of a captured model, read off the names of the graph's inputs and outputs."""

    def __init__(self, what: str) -> None:
        site, results = ast.literal_eval(bytes.fromhex(what.rsplit(".", 1)[1]).decode())
        self.address, self._described, dtypes, self._form = ast.literal_eval(site)
        self._results = ast.literal_eval(results)
        self.dtypes = [TORCH[dtype] for dtype in dtypes]

    def run(self, function: Any, tensors: list[torch.Tensor], options: Mapping[str, Any]) -> list[torch.Tensor]:
        """Raises ShapesDiffer."""
        found: list[torch.Tensor] = []
        form = _describe(call(function, self._described, tensors, options), found, lambda _: None)
        got = [(tuple(t.shape), NAMES[t.dtype]) for t in found]
        if form != self._form or got != self._results:
            raise ShapesDiffer(str(self.address[1]))
        return found


def device_of(options: Mapping[str, Any]) -> torch.device:
    """Where the functions expect their tensors: they may hold some of their own."""
    return options["sigmas"].device if "sigmas" in options else torch.device("cpu")


def functions(options: Mapping[str, Any]) -> dict[tuple[Any, ...], Any]:
    """The patches in transformer_options by where they stand."""
    found: dict[tuple[Any, ...], Any] = {}
    for kind, patches in (options.get("patches") or {}).items():
        found |= {("patches", kind, number): patch for number, patch in enumerate(patches)}
    for kind, patches in (options.get("patches_replace") or {}).items():
        found |= {("patches_replace", kind, block): patch for block, patch in patches.items()}
    return found


def address_list(options: Mapping[str, Any]) -> list[tuple[tuple[Any, ...], str]]:
    """Where patches stand and whose they are: what a capture hangs on."""
    return [(address, name_of(function)) for address, function in functions(options).items()]


def name_of(function: Any) -> str:
    function = getattr(function, "__func__", function)
    module = getattr(function, "__module__", None) or type(function).__module__
    return f"{module}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def is_native(name: str) -> bool:
    """Functions of ComfyUI's own nodes that only hand on what they are given, so that they can be captured with the model."""
    return name.endswith(_NATIVE)


_NATIVE = ("nodes_slg.SkipLayerGuidanceDiT.execute.<locals>.skip", "nodes_slg.SkipLayerGuidanceDiTSimple.execute.<locals>.skip",
           "nodes_slg.SkipLayerGuidanceDiT.skip_guidance.<locals>.skip", "nodes_slg.SkipLayerGuidanceDiTSimple.skip_guidance.<locals>.skip",
           "nodes_pag.PerturbedAttentionGuidance.execute.<locals>.perturbed_attention",
           "nodes_pag.PerturbedAttentionGuidance.patch.<locals>.perturbed_attention")  # fmt: skip
