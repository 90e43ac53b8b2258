"""Policies, budgets and draft lengths against each other and against the bound."""

from spmoe.bench.grid import bench

__all__ = ["bench"]
