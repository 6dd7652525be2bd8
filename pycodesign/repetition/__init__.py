"""The compiler behind prepack: quantized weights in, a program that computes each recurring partial sum once out."""

from .factor import factor
from .lower import LoweredProgram, lower
from .program import SumProgram

__all__ = ["LoweredProgram", "SumProgram", "factor", "lower"]
