"""DDiT: steps in which the latents accelerate little run on coarser patches, with fewer tokens.

Needs trained layers for the coarse patches. They ship for the embedded model alone, made by
`python -m experiments.embedded.train_ddit`; every other model is refused.

Shapes: B batch, C latent channels, F H W latent sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any, ClassVar

from baselines.base import Method, Request, is_number, require

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

WEIGHTS = files("baselines") / "tables/ddit_embedded.safetensors"
COARSE = 4  # latent pixels a side of a coarse patch
PIXELS = 4 * COARSE  # of the embedded model's videos


@dataclass(frozen=True)
class DDiT(Method):
    """Run a step on coarse patches if ``detail`` of the last latents is below ``threshold``.

    ``percentile``: of the patches, 0 to 1, whose detail is compared.
    """

    version: ClassVar[int] = 2
    implementation: ClassVar[str] = "from-paper"
    paper: ClassVar[str] = "arXiv 2602.16968"
    source: ClassVar[str] = "the paper's rule; layers trained by experiments.embedded.train_ddit"
    deviations: ClassVar[tuple[str, ...]] = (
        "one coarse size, twice the model's own; the paper's four times would leave 2 x 2 tokens "
        "a frame",
        "what coarse tokens cannot carry goes past the blocks, scaled by the time: the paper's "
        "residual block is not spelt out",
        "trained on rendered videos, where the paper samples its training videos from the model, "
        "and on the guided velocity too; errors are relative to the velocity",
        "image-to-video, which the paper does not have: a given frame has no part in the choice",
    )
    knob: ClassVar[tuple[str, float, float]] = ("threshold", 1e-5, 1.0)

    threshold: float = 0.001
    percentile: float = 0.4

    def validate(self, request: Request) -> None:
        require(is_number(self.threshold), "ddit.threshold", self.threshold, "a number >= 0")
        require(
            is_number(self.percentile) and self.percentile <= 1,
            "ddit.percentile",
            self.percentile,
            "a number in 0..1",
        )
        for name in ("height", "width"):
            size = getattr(request, name)
            require(size % PIXELS == 0, f"ddit: {name}", size, f"a multiple of {PIXELS}")

    def neutral(self, request: Request) -> DDiT:
        return replace(self, threshold=0.0)

    def sampler(self, pipe: DiffusionPipeline) -> AbstractContextManager[Any]:
        from baselines.patches import RememberingEuler
        from hsa.schedulers import euler

        return euler(pipe, RememberingEuler)

    def install(self, pipe: DiffusionPipeline, request: Request) -> AbstractContextManager[None]:
        from baselines.patches import coarse_steps

        given = int(request.task == "i2v")  # the first frame, whose latents nobody reads

        def coarse() -> bool:
            return self.coarse([latents[:, :, given:] for latents in pipe.scheduler.latents])

        return coarse_steps(pipe, WEIGHTS, coarse)

    def coarse(self, latents: Sequence[Tensor]) -> bool:
        """Whether a step that starts from the last of ``latents``, (1, C, F, H, W), is coarse."""
        if len(latents) < 4:
            return False
        require(len(latents[-1]) == 1, "ddit: batch", len(latents[-1]), "1, one video a call")
        return detail(latents, self.percentile) < self.threshold


def detail(latents: Sequence[Tensor], percentile: float) -> float:
    """How unevenly the latents (B, C, F, H, W) of four steps in a row accelerate within a patch.

    Their third-order difference, its standard deviation over each patch, and of those a percentile.
    """
    first, second, third, fourth = (latents_.float() for latents_ in latents)
    change = fourth - 3 * third + 3 * second - first
    patches = change.unflatten(4, (-1, COARSE)).unflatten(3, (-1, COARSE))
    return patches.std((1, 4, 6), correction=0).quantile(percentile).item()
