"""Importing this package registers every model with timm."""

from . import bat
from .bat import BATVisionTransformer
from .complexity import count_gmacs, count_parameters, describe, find_keep_rate
from .reduction import REDUCTIONS

__all__ = [
    "REDUCTIONS",
    "BATVisionTransformer",
    "bat",
    "count_gmacs",
    "count_parameters",
    "describe",
    "find_keep_rate",
]
