"""Sampling methods under comparison: one file a method, each a frozen dataclass.

To add one, write a `Method` (a `ReuseMethod` and its `Policy` if it caches the whole model) and a
yaml in conf/method whose `_target_` names it. The conformance tests pick the yaml up.
"""
