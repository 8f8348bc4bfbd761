"""SenCache: skip while the output, predicted from how sensitive it is, has changed little.

The paper's sensitivities are secants in the sampler's direction, |v(x', t) - v(x, t)| / |x' - x|
and |v(x, t') - v(x, t)| / |t' - t|, tabulated once for a model. It writes L2 norms; its code
multiplies the threshold by the square root of the number of latents. Here all norms are root mean
squares, which is the same, for videos of any size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from baselines.base import Request, is_count, is_number, is_numbers, require
from baselines.policy import Call, Policy, ReuseMethod, one_video

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

START = 0.2  # share of the steps that `start_threshold` is for
TIMES = ("timestep", "audio_timestep", "sigma", "audio_sigma")  # arguments that tell the time


@dataclass(frozen=True)
class SenCache(ReuseMethod):
    """Reuse while |J_x| |x - x_c| + |J_t| |t - t_c| is within the threshold, c the computed step.

    The conditional branch decides for all branches. Norms are root mean squares, t is the noise
    level. ``start_threshold`` holds for the first fifth of the steps, ``threshold`` for the others,
    and no more than ``max_skips`` steps in a row are skipped: the paper's values for Wan 2.1 are
    0.01 and 0.1 with 2 skips (slow) or 0.2 with 3 (fast). The sensitivities come from `calibrate`:
    at each of ``sigmas`` that to the latents (``latent_norms``) and to time.
    """

    version: ClassVar[int] = 2
    implementation: ClassVar[str] = "from-paper"
    paper: ClassVar[str] = "arXiv 2602.24208"
    source: ClassVar[str] = "the paper's rule; its code has no licence and was not used"
    deviations: ClassVar[tuple[str, ...]] = (
        "norms are root mean squares and a skipped step reuses the blocks' residual, as in the "
        "authors' code; the paper writes L2 and speaks of the whole output",
        "the table is measured along sampled, guided videos of one task, and serves the model's "
        "others too; the authors' is measured on real videos with noise",
        "LTX-2: the batched conditional and unconditional call decides, by the video latents",
        "two experts: each starts with a computed step",
        "bf16 checkpoints: latents are compared as the model gets them, in its dtype",
    )
    joint: ClassVar[bool] = True
    knob: ClassVar[tuple[str, float, float]] = ("threshold", 0.001, 10.0)

    threshold: float = 0.2
    start_threshold: float = 0.01
    max_skips: int = 3
    sigmas: Sequence[float] = ()
    latent_norms: Sequence[float] = ()
    time_norms: Sequence[float] = ()

    def validate(self, request: Request) -> None:
        for name in ("threshold", "start_threshold"):
            value = getattr(self, name)
            require(is_number(value), f"sencache.{name}", value, "a number >= 0")
        require(
            is_count(self.max_skips), "sencache.max_skips", self.max_skips, "a whole number >= 1"
        )
        tables = self.sigmas, self.latent_norms, self.time_norms
        require(
            all(map(is_numbers, tables)) and len(set(map(len, tables))) == 1,
            "sencache.sigmas, latent_norms, time_norms",
            tables,
            "lists of numbers of one length, from `hsa-bench calibrate method=sencache`",
        )
        require(
            len(self.sigmas) > 0 or self == self.neutral(request),
            "sencache.sigmas",
            self.sigmas,
            "a list from `hsa-bench calibrate method=sencache`",
        )

    def neutral(self, request: Request) -> SenCache:
        return replace(self, threshold=0.0, start_threshold=0.0)

    def policy(self, request: Request) -> Policy:
        return _Rule(self, START * request.steps)


class _Rule(Policy):
    def __init__(self, method: SenCache, start_steps: float) -> None:
        self.method, self.start_steps = method, start_steps
        self.cached: tuple[Tensor, float] | None = None  # latents and sigma of the computed step
        self.skips = 0

    def decide(self, call: Call) -> bool:
        one_video(call, "sencache")
        method = self.method
        threshold = method.start_threshold if call.step < self.start_steps else method.threshold
        if (
            self.cached is not None
            and self.skips < method.max_skips
            and self._predicted_change(call) <= threshold
        ):
            self.skips += 1
            return False
        self.skips = 0
        return True

    def observe(self, call: Call, residual: Tensor) -> None:
        self.cached = call.latents, call.sigma

    def _predicted_change(self, call: Call) -> float:
        latents, sigma = self.cached
        if not self.method.sigmas:
            return float("inf")
        nearest = np.abs(np.array(self.method.sigmas) - sigma).argmin()
        return self.method.latent_norms[nearest] * _rms(call.latents - latents) + (
            self.method.time_norms[nearest] * abs(call.sigma - sigma)
        )


def calibrate(pipe: DiffusionPipeline, requests: Iterable[Request]) -> dict[str, Any]:
    """Measure the sensitivity of the velocity along full runs of requests of one step count.

    Between a step c and the next one i of the branch that decides, with velocity v(x, t):
    |v(x_i, t_c) - v(x_c, t_c)| / |x_i - x_c| and |v(x_c, t_i) - v(x_c, t_c)| / |t_i - t_c|, which
    takes two more forwards a step.

    Returns:
        ``sigmas``, ``latent_norms`` and ``time_norms`` for `SenCache`, the mean over requests.
    """
    from hsa.schedulers import euler
    from hsa.trace import experts

    found: dict[float, list[tuple[float, float]]] = defaultdict(list)
    with euler(pipe) as scheduler, ExitStack() as stack:
        for transformer in experts(pipe).values():
            probe = _Probe(scheduler, found)
            handle = transformer.register_forward_hook(probe.measure, with_kwargs=True)
            stack.callback(handle.remove)
        for request in requests:
            pipe(**request.kwargs(pipe) | {"output_type": "latent"})
    latent_norms, time_norms = np.array([np.mean(norms, axis=0) for norms in found.values()]).T
    return {
        "sigmas": list(found),
        "latent_norms": latent_norms.tolist(),
        "time_norms": time_norms.tolist(),
    }


class _Probe:
    """Measures one expert at the first call of every step, which is that of the deciding branch."""

    def __init__(self, scheduler: Any, found: dict[float, list[tuple[float, float]]]) -> None:
        self.scheduler, self.found = scheduler, found
        self.step = -1
        self.before: tuple[Mapping[str, Any], Tensor, float] | None = None

    def measure(self, module: nn.Module, args: tuple, inputs: Mapping, output: tuple) -> None:
        from hsa.schedulers import current_step

        step = current_step(self.scheduler)
        if step == self.step:
            return
        sigma, velocity = self.scheduler.sigmas[step].item(), output[0]
        if step == self.step + 1 and self.before is not None:
            then, velocity_then, sigma_then = self.before
            moved = {"hidden_states": inputs["hidden_states"]}
            later = {name: inputs[name] for name in TIMES if name in inputs}
            by_latents, by_time = (
                _rms(module.forward(**{**then, **changed})[0] - velocity_then)
                for changed in (moved, later)
            )
            distance = _rms(_noisy(inputs, velocity) - _noisy(then, velocity))
            norms = by_latents / distance, by_time / abs(sigma - sigma_then)
            self.found[sigma_then].append(norms)
        self.step, self.before = step, (inputs, velocity, sigma)


def _noisy(inputs: Mapping[str, Any], velocity: Tensor) -> Tensor:
    """The latents without the channels of an image condition (Wan, (B, C, F, H, W))."""
    latents = inputs["hidden_states"]
    return latents[:, : velocity.shape[1]] if latents.ndim == 5 else latents


def _rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()
