"""Importing this package registers every model with timm."""

from . import bat
from .complexity import (
    count_gmacs,
    count_parameters,
    describe,
    describe_rates,
    describe_reduction,
    find_keep_rate,
)
from .reduction import REDUCTIONS
from .vit import ReducingTransformer, make_reducing

__all__ = [
    "REDUCTIONS",
    "ReducingTransformer",
    "bat",
    "count_gmacs",
    "count_parameters",
    "describe",
    "describe_rates",
    "describe_reduction",
    "find_keep_rate",
    "make_reducing",
]
