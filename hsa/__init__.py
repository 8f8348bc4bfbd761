"""HSA, Heterogeneous Step Allocation (Chu & Patel, arXiv 2605.06892), for diffusers pipelines.

    config = HSAConfig(budgets=(40, 10, 5), fractions=(0.1, 0.3, 0.6))
    with apply_hsa(pipe, config) as trace:
        video = pipe(prompt, num_inference_steps=40).frames[0]

`HSAConfig` needs no torch; it is `apply_hsa` that imports it.
"""

from typing import TYPE_CHECKING, Any

from hsa.config import HSAConfig

if TYPE_CHECKING:
    from hsa.hook import apply_hsa

__all__ = ["HSAConfig", "apply_hsa"]


def __getattr__(name: str) -> Any:
    if name == "apply_hsa":
        from hsa.hook import apply_hsa

        return apply_hsa
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
