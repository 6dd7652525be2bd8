from pycodesign.quantize import QuantizedTensor

from .program import SumProgram

__all__ = ["factor"]

def factor(q: QuantizedTensor, method: str = "pair", *, groups: int = 1) -> SumProgram: ...
