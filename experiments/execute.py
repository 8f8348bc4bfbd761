"""Makes videos: a cell and its model in, a stored sample out."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from baselines.base import Request
from experiments import provenance
from experiments.cell import Cell
from experiments.config import ModelConfig, build
from experiments.errors import one_line
from experiments.models import Model
from experiments.store import Store
from hsa.trace import Trace, experts


@dataclass
class Stopwatch:
    """Times of one pipeline call, in seconds of a clock that waits for the device.

    Text encoding ends where the first denoiser call begins; denoising ends with the last step.
    """

    start: float = 0.0
    steps: list[float] = field(default_factory=list)  # begin of the first, end of every step
    end: float = 0.0
    latents: torch.Tensor | None = None  # (B, C, F, H, W) after the last step

    def to_dict(self) -> dict[str, float]:
        begin, *_, finish = self.steps
        return {
            "text_s": begin - self.start,
            "denoise_s": finish - begin,
            "decode_s": self.end - finish,
        }


@dataclass(frozen=True)
class Outcome:
    """What became of a cell; `error` is None where it is stored."""

    key: str
    label: str
    error: str | None = None


@dataclass(frozen=True)
class Video:
    """One finished run of a cell. `output` is [F, H, W, 3] in 0..1, or latents if asked for."""

    output: Any
    trace: Trace
    watch: Stopwatch


def sample(
    model: Model, cell: Cell, output_type: str = "np", each_step: Callable[[], None] | None = None
) -> Video:
    """Run diffusers' own pipeline with the cell's method attached.

    Args:
        each_step: called after every step.
    """
    pipe = model.pipeline(cell.task)
    arguments = cell.request.kwargs(pipe)
    with cell.method.attach(pipe, cell.request) as trace, _timed(pipe) as watch:
        after_step = _after_step(watch, each_step)
        output = pipe(**arguments, output_type=output_type, callback_on_step_end=after_step)
    watch.latents = _on_grid(watch.latents, pipe, cell.request)
    return Video(output.frames[0], trace, watch)


class Worker:
    """Makes cells and stores them; keeps the model of the last one."""

    def __init__(self, store: Store):
        self.store = store
        self._config: ModelConfig | None = None
        self._model: Model | None = None
        self._environment: dict[str, Any] | None = None

    def model(self, config: ModelConfig) -> Model:
        if config != self._config:
            _hush_libraries()
            self._model = None  # free the memory before the next one comes
            self._model = build(config.load, f"model={config.name}")
            self._config = config
        return self._model

    def make(self, cell: Cell) -> Outcome:
        """Generate and store; a cell that fails leaves a failure record and no sample.

        Raises:
            StoreError: nothing can be stored, so there is no use in going on.
            UserError: the model cannot be loaded.
        """
        if self.store.has(cell.key):  # another writer was faster
            return Outcome(cell.key, cell.label)
        model = self.model(cell.config.model)
        started = provenance.now()
        try:
            video = sample(model, cell)
            frames = _frames(video, cell)
        except Exception as error:
            failure = {"error": one_line(error), "traceback": traceback.format_exc()}
            self.store.write_failure(cell.key, failure | self._provenance(cell, started))
            return Outcome(cell.key, cell.label, f"{type(error).__name__}: {one_line(error)}")
        self.store.write_sample(
            cell.inputs,
            frames,
            _arrays(video),
            cell.config.model.request.fps,
            _result(video),
            self._provenance(cell, started),
        )
        return Outcome(cell.key, cell.label)

    def _provenance(self, cell: Cell, started: str) -> dict[str, Any]:
        if self._environment is None:
            patch = provenance.code().patch
            stored = self.store.write_patch(patch) if patch else None
            self._environment = provenance.environment() | {"patch": stored}
        return {
            **self._environment,
            "config": asdict(cell.config),
            "started": started,
            "finished": provenance.now(),
        }


def _hush_libraries() -> None:
    """Their warnings come with every video and tell of sizes and dtypes that the plan checked."""
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()


@contextmanager
def _timed(pipe: Any) -> Iterator[Stopwatch]:
    watch = Stopwatch()

    def first_call(module: torch.nn.Module, args: tuple) -> None:
        if not watch.steps:
            watch.steps.append(_clock())

    handles = [expert.register_forward_pre_hook(first_call) for expert in experts(pipe).values()]
    try:
        watch.start = _clock()
        yield watch
        watch.end = _clock()
    finally:
        for handle in handles:
            handle.remove()


def _after_step(watch: Stopwatch, each_step: Callable[[], None] | None):
    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        watch.steps.append(_clock())
        watch.latents = tensors["latents"]
        if each_step:
            each_step()
        return tensors

    return after_step


def _on_grid(latents: torch.Tensor, pipe: Any, request: Request) -> torch.Tensor:
    """LTX packs latents, (B, F * H * W, C) -> (B, C, F, H, W); Wan's are as they are."""
    if latents.ndim == 5:
        return latents
    frames = (request.num_frames - 1) // pipe.vae_temporal_compression_ratio + 1
    sides = (side // pipe.vae_spatial_compression_ratio for side in (request.height, request.width))
    return latents.transpose(1, 2).unflatten(2, (frames, *sides))


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _frames(video: Video, cell: Cell) -> np.ndarray:
    """uint8 [F, H, W, 3], of the size that was asked for."""
    if not np.isfinite(video.output).all():
        raise ValueError("the frames are not finite")
    frames = (np.clip(video.output, 0, 1) * 255).round().astype(np.uint8)
    request = cell.request
    asked = (request.num_frames, request.height, request.width, 3)
    if frames.shape != asked:
        raise ValueError(f"the pipeline made frames {frames.shape}, the request asks for {asked}")
    return frames


def _arrays(video: Video) -> dict[str, np.ndarray]:
    """The latents, and what the method recorded; floats in fp32."""
    tensors = {"latents": video.watch.latents, **video.trace.arrays}
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor)[0]
        .cpu()
        .contiguous()
        .numpy()
        for name, tensor in tensors.items()
    }


def _result(video: Video) -> dict[str, Any]:
    trace = video.trace.to_dict()
    return {
        "active_fraction": trace.pop("active_fraction"),
        "block_calls": trace.pop("block_calls"),
        "timing": video.watch.to_dict(),
        "trace": trace,
    }
