# ruff: noqa: I001
# Written by `python -m tools.stubs` from the `__all__` of the modules.
from .charts import bars as bars
from .charts import lines as lines
from .diagrams import Arrow as Arrow
from .diagrams import Box as Box
from .diagrams import Matrix as Matrix
from .diagrams import diagram as diagram
from .facets import boxes as boxes
from .facets import scatter as scatter
from .house import GREY as GREY
from .house import PALETTE as PALETTE
from .house import Plot as Plot
from .house import png as png
from .house import style as style
from .pictures import graph as graph
from .pictures import images as images
from .seeds import curves as curves
from .seeds import dots as dots
from .tradeoffs import tradeoff as tradeoff

__all__ = [
    "Arrow",
    "Box",
    "GREY",
    "Matrix",
    "PALETTE",
    "Plot",
    "bars",
    "boxes",
    "curves",
    "diagram",
    "dots",
    "graph",
    "images",
    "lines",
    "png",
    "scatter",
    "style",
    "tradeoff",
]
