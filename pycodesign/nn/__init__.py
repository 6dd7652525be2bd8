"""Packed layers in torch: modules, operators (``torch.ops.pycodesign``), and conversion of whole networks."""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError("pycodesign.nn needs torch: `pip install 'pycodesign[torch]'`") from error

from pycodesign.nn.codebooks import Codebook, anneal_codebooks, use_codebooks
from pycodesign.nn.conversion import convert
from pycodesign.nn.modules import Conv2d, Linear, Segment
from pycodesign.nn.reports import Report, Row, report

__all__ = [
    "Codebook",
    "Conv2d",
    "Linear",
    "Report",
    "Row",
    "Segment",
    "anneal_codebooks",
    "convert",
    "report",
    "use_codebooks",
]
