"""Costs of decoding on this machine: measured, kept, and modelled."""
