"""VBench and VBench-I2V, by the real vbench package in an environment of its own."""

from analysis.metrics.vbench.aggregation import aggregate
from analysis.metrics.vbench.metric import VBench

__all__ = ["VBench", "aggregate"]
