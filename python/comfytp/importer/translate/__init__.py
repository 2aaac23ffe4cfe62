"""From captured ATen ops to the engine's graph: a table with one entry an op, in one file for each kind."""

from . import elementwise, heavy, movement, norms, reductions
from .complex import COMPLEX
from .translator import TABLE, Translator

__all__ = ["COMPLEX", "TABLE", "Translator", "elementwise", "heavy", "movement", "norms", "reductions"]
