"""The built-in pair: a real draft, and a Mixture-of-Experts target that is made from it."""

VARIANTS = ("8x", "32x")  # of the target: a few large experts, or many small ones
