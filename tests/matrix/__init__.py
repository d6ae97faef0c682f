"""The gradient matrix: its cells, and the two processes that run them. `matrix.run` is where to begin."""

from matrix.cells import CHECKPOINTING, FURTHER, LAUNCHERS, MAIN, Cell
from matrix.launching import run

__all__ = ["CHECKPOINTING", "FURTHER", "LAUNCHERS", "MAIN", "Cell", "run"]
