"""Speculative decoding of one text: draft, verify, accept, and how far to draft."""
