"""What a method is: a context manager on an unmodified diffusers pipeline.

Importing this package costs no torch, so that planning a grid stays fast.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from hsa.trace import Trace


SHOWN = 160  # characters of a value in an error


def rgb(image: Image | Path) -> Image:
    """A picture, or the one in a file, in RGB.

    Raises:
        ValueError: the file cannot be read.
    """
    from PIL import Image

    try:
        return (image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB")
    except OSError as error:
        raise ValueError(f"cannot read the image {image}") from error


@dataclass(frozen=True)
class Request:
    """One video to make. Sizes are in pixels, ``num_frames`` counts decoded frames.

    A file for ``image`` is opened when the video is made: a suite's pictures fit in no memory.
    """

    task: Literal["t2v", "i2v"]
    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance_scale: float
    height: int
    width: int
    num_frames: int
    max_sequence_length: int
    image: Image | Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def kwargs(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """Arguments of ``pipe(...)``; the noise comes from a CPU generator of this sample alone.

        Raises:
            ValueError: the pipeline has no parameter for something that the request asks for.
        """
        import torch

        kwargs = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "height": self.height,
            "width": self.width,
            # Wan pipelines round to 1 + a multiple of the temporal factor; with a factor of 1 that
            # adds a frame to every count.
            "num_frames": self.num_frames - (getattr(pipe, "vae_scale_factor_temporal", 4) == 1),
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "max_sequence_length": self.max_sequence_length,
            "generator": torch.Generator("cpu").manual_seed(self.seed),
            **({"image": rgb(self.image)} if self.task == "i2v" else {}),
            **self.extra,
        }
        accepted = inspect.signature(pipe.__call__).parameters
        if unknown := sorted(kwargs.keys() - accepted.keys()):
            raise ValueError(
                f"request: {type(pipe).__name__} does not take {', '.join(unknown)}; "
                f"choices: {', '.join(accepted)}"
            )
        return kwargs


@dataclass(frozen=True)
class Method(ABC):
    """A way of sampling, with its settings as fields.

    ``version`` goes up whenever the output changes at the same settings. ``implementation`` says
    whose code decides: official-rule, diffusers-hook, cache-dit, from-paper, or native where
    there is nothing but the sampler. ``steps`` replaces the schedule's number of steps. ``knob``
    is what `hsa-bench calibrate` turns to meet a runtime: a field and the ends of its range, whole
    numbers where the field is one. More of it means steadily less, or more, to compute.
    """

    version: ClassVar[int]
    implementation: ClassVar[str]
    paper: ClassVar[str]
    source: ClassVar[str]
    deviations: ClassVar[tuple[str, ...]] = ()
    steps: ClassVar[int | None] = None
    knob: ClassVar[tuple[str, float, float] | None] = None

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, entry.name, tuple(value))

    def validate(self, request: Request) -> None:  # noqa: B027
        """Raise a one-line ValueError if this method cannot serve the request; loads nothing."""

    @abstractmethod
    def neutral(self, request: Request) -> Method:
        """This method set to skip nothing: bit-identical to flow matching with the same steps."""

    def turned(self, value: float) -> Method:
        """This method with its knob at a value."""
        return replace(self, **{self.knob[0]: value})

    @contextmanager
    def attach(self, pipe: DiffusionPipeline, request: Request) -> Iterator[Trace]:
        """Run the method inside the block; afterwards, by exception too, the pipe is as before.

        Raises:
            ValueError: the settings do not fit the request, or the pipe has a cache already.
        """
        from hsa.trace import Trace, experts, record_calls

        self.validate(request)
        for expert, transformer in experts(pipe).items():
            if transformer.is_cache_enabled:
                raise ValueError(f"{expert}: a cache is enabled already; disable_cache() first")
        trace = Trace()
        with self.sampler(pipe), self.install(pipe, request), record_calls(pipe, trace):
            yield trace

    def sampler(self, pipe: DiffusionPipeline) -> AbstractContextManager[Any]:
        """Sets the pipe's scheduler: Euler, the same for all methods under comparison."""
        from hsa.schedulers import euler

        return euler(pipe)

    def install(self, pipe: DiffusionPipeline, request: Request) -> AbstractContextManager[None]:
        """The method's own hooks on a pipe whose scheduler is set."""
        return nullcontext()


def is_number(value: Any, minimum: float = 0) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and value >= minimum


def is_count(value: Any, minimum: int = 1) -> bool:
    return isinstance(value, Integral) and is_number(value, minimum)


def is_numbers(values: Any, minimum: float = 0) -> bool:
    return isinstance(values, tuple) and all(is_number(value, minimum) for value in values)


def require(valid: bool, name: str, value: Any, choices: str) -> None:
    """Raise the one-line ValueError that names the field, its value and what it may be."""
    if not valid:
        shown = repr(value)
        if len(shown) > SHOWN:
            shown = f"{shown[: SHOWN - 4]} ..."
        raise ValueError(f"{name}={shown}: choose {choices}")


def require_own_forward(pipe: DiffusionPipeline, method: str) -> None:
    """Refuse CPU offload for a method that replaces the forward of whole transformers."""
    from hsa.trace import experts

    for transformer in experts(pipe).values():
        require(
            not hasattr(transformer, "_hf_hook"),
            f"{method}: transformer",
            "with CPU offload",
            "one without: re-installing its hooks after a call drops those of the method",
        )


def require_wan(pipe: DiffusionPipeline, method: str, reason: str) -> None:
    """Refuse a pipe with another transformer than Wan's; ``reason`` completes the sentence."""
    from hsa.trace import experts

    for transformer in experts(pipe).values():
        kind, wan = type(transformer).__name__, "WanTransformer3DModel"
        require(kind == wan, f"{method}: transformer", kind, f"{wan}, {reason}")
