"""The built-in pair: a real draft, and a Mixture-of-Experts target that is made from it."""

from spmoe.demo.pair import VARIANTS, Pair, describe, ensure_pair

__all__ = ["VARIANTS", "Pair", "describe", "ensure_pair"]
