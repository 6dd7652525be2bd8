from typing import Any

from numpy.typing import NDArray

from pycodesign.quantize import QuantizedTensor

from .program import SumProgram

__all__ = ["factor"]

METHODS: dict[str, Any]

def factor(q: QuantizedTensor, method: str = "pair", *, groups: int = 1, **options: Any) -> SumProgram: ...
def prepare(q: QuantizedTensor, groups: int) -> tuple[NDArray[Any], NDArray[Any]]: ...
def factor_unique(codes: NDArray[Any], levels: NDArray[Any], groups: int) -> SumProgram: ...
def factor_pair(codes: NDArray[Any], levels: NDArray[Any], groups: int, order: int = 0) -> SumProgram: ...
