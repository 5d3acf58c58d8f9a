"""A module and a layout become this process's part of the model; and the process itself is made ready."""

from danlu.parallel.device import DTYPES, Precision, autocast, fastest, give_back, old_objects_apart, peak, start
from danlu.parallel.world import World, join, launched, leave

__all__ = ["DTYPES", "Precision", "World", "autocast", "fastest", "give_back", "join", "launched", "leave", "old_objects_apart",
           "peak", "start"]
