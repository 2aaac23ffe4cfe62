"""Loads the extension module, and oneDNN for it where the loader does not find it by itself."""

import ctypes
import importlib
import importlib.metadata

_PACKAGE = "onednn-cpu-gomp"


def load_core() -> None:
    """Imports comfytp._core. Raises ImportError that says what to install when oneDNN is missing."""
    try:
        importlib.import_module("comfytp._core")
        return
    except ImportError as error:
        if "libdnnl" not in str(error):
            raise
        cause = error
    # Installed elsewhere than <prefix>/lib, on another path of PYTHONPATH say. Once it is in the process,
    # the loader takes it for the module's.
    try:
        ctypes.CDLL(_find_library())
    except OSError:
        raise ImportError(
            f"comfytp needs oneDNN 3 (libdnnl.so.3), which is not installed; run: pip install {_PACKAGE}==2023.2.0"
        ) from cause
    importlib.import_module("comfytp._core")


def _find_library() -> str:
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "libdnnl.so.3":
            return str(file.locate())
    return "libdnnl.so.3"
