"""Takes the forward of a torch module for a graph of the engine: the only part of the package that imports torch."""

from .unsupported import Unsupported

__all__ = ["Unsupported"]
