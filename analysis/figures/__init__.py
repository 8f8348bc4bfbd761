"""Figures for a two-column paper: each kind is a frozen dataclass and a yaml in conf/figure/."""
