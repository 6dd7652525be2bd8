"""The compiler behind prepack: quantized weights in, a program that computes each recurring partial sum once out."""

from .factor import factor
from .program import SumProgram

__all__ = ["SumProgram", "factor"]
