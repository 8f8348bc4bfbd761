"""Sampling methods under comparison: one file a method, each a frozen dataclass."""
