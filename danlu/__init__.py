"""Danlu (丹炉): train large models end to end, with runs that cannot lie."""

__version__ = "0.1.0"
