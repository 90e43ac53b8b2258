"""The built-in pair: a real draft, and a Mixture-of-Experts target that is made from it."""
