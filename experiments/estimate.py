"""What missing videos will cost, from the stored ones, or from the shape of the model.

Times are of one worker. Without a stored video they are modelled: the floating-point operations
of the transformer alone, at an assumed throughput of a named GPU. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from statistics import mean, median

from baselines.base import Request
from baselines.flow_matching import FlowMatching
from baselines.hsa import HSA
from experiments.cell import Cell
from experiments.config import ModelConfig, TransformerConfig
from experiments.store import Store
from hsa.memory import KVMemory

LOOKED_AT = 3  # stored videos of a setting
ASSUMED = "an H100 SXM at 40 % of its 989 dense bf16 TFLOPS"
THROUGHPUT = 0.4 * 989e12  # of that, in operations a second
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
ARCHIVED = 0.5  # of the raw frames' bytes, in the lossless archive


@dataclass(frozen=True)
class Estimate:
    """Of some cells. `seconds` are None where nothing is stored and nothing can be modelled.

    Attributes:
        disk: bytes.
        modelled: how many of the cells have a modelled time; the others' come from the store.
        at_most: some method is counted as if it skipped nothing.
    """

    seconds: float | None
    disk: float
    modelled: int = 0
    at_most: bool = False

    def basis(self) -> str:
        """Where `seconds` come from, in words."""
        if not self.modelled:
            return "from stored videos"
        skips = "; methods that decide while they run are counted in full" if self.at_most else ""
        return f"{self.modelled} modelled: the transformer alone on {ASSUMED}{skips}"


class Costs:
    """What the stored cells of a plan tell of its missing ones.

    A setting takes what its stored videos took; one without any takes what the model's others took
    a step; a model without any takes what its arithmetic takes.
    """

    def __init__(self, stored: Iterable[Cell], store: Store):
        self._seconds: dict[tuple[str, str], list[float]] = {}
        self._per_step: dict[str, list[float]] = {}
        self._disk: dict[str, list[float]] = {}
        for cell in stored:
            known = self._seconds.setdefault(cell.setting, [])
            if len(known) < LOOKED_AT:
                record, model = store.sample(cell.key).record, cell.config.model.name
                known.append(sum(record["result"]["timing"].values()))
                self._per_step.setdefault(model, []).append(known[-1] / cell.request.steps)
                size = sum(file["bytes"] for file in record["files"].values())
                self._disk.setdefault(model, []).append(size / _pixels(cell.request))

    def of(self, cells: Sequence[Cell]) -> Estimate:
        seconds = [self._measured(cell) for cell in cells]
        unknown = [cell for cell, known in zip(cells, seconds, strict=True) if known is None]
        modelled = [modelled_seconds(cell) for cell in unknown]
        total = None
        if None not in modelled:
            total = sum(known for known in seconds if known is not None) + sum(modelled)
        return Estimate(
            total,
            disk=sum(self._bytes(cell) for cell in cells),
            modelled=len(modelled),
            at_most=any(share(cell) is None for cell in unknown),
        )

    def _measured(self, cell: Cell) -> float | None:
        if cell.setting in self._seconds:
            return median(self._seconds[cell.setting])
        if steps := self._per_step.get(cell.config.model.name):
            return median(steps) * cell.request.steps
        return None

    def _bytes(self, cell: Cell) -> float:
        known = self._disk.get(cell.config.model.name)
        return _pixels(cell.request) * (mean(known) if known else 3 * ARCHIVED)


def modelled_seconds(cell: Cell) -> float | None:
    """Of the denoising loop on the GPU of `ASSUMED`; None for what is not made for one."""
    shape, model = cell.config.model.transformer, cell.config.model
    if shape is None or ITEMSIZE[model.dtype] > 2:
        return None
    known = share(cell)
    step = guidance_passes(cell.request) * forward_flops(
        shape,
        tokens(shape, cell.request),
        cell.request.max_sequence_length,
        1.0 if known is None else known,
    )
    return cell.request.steps * step / THROUGHPUT


def share(cell: Cell) -> float | None:
    """Mean share of tokens that run, as far as it is known before; None: the video decides."""
    if isinstance(cell.method, HSA):
        return cell.method.config.expected_fraction
    return 1.0 if isinstance(cell.method, FlowMatching) else None


def forward_flops(
    shape: TransformerConfig, tokens: int, text_tokens: int, share: float = 1.0
) -> float:
    """Floating-point operations of a forward of one video in which a share of its tokens runs.

    Multiplications and additions of projections and attention in all blocks; embeddings, norms and
    the few tokens of LTX-2's audio are left out.
    """
    active, width = share * tokens, shape.width
    # self-attention's four projections, text attention's query and output, feed-forward, and the
    # queries, outputs, keys and values between video and audio
    weights = 6 * width**2 + 2 * width * shape.ffn + 4 * width * shape.audio_width
    projections = 2 * (active * weights + text_tokens * 2 * width**2)
    attention = 4 * active * (tokens + text_tokens) * width
    return shape.layers * (projections + attention)


def kv_memory(model: ModelConfig, request: Request) -> KVMemory | None:
    """What HSA keeps for one video; None where the model's shape is not known."""
    shape = model.transformer
    if shape is None:
        return None
    widths = (shape.width, shape.audio_width) if shape.audio_width else (shape.width,)
    return KVMemory(
        tokens=tokens(shape, request),
        passes=guidance_passes(request),
        layers=tuple((width, shape.heads) for width in widths) * shape.layers,
        itemsize=ITEMSIZE[model.dtype],
        device=None,
    )


def tokens(shape: TransformerConfig, request: Request) -> int:
    """Video tokens of a request."""
    frames, rows, columns = shape.token
    grid = (
        (request.num_frames - 1) // frames + 1,
        request.height // rows,
        request.width // columns,
    )
    return prod(grid)


def guidance_passes(request: Request) -> int:
    """Videos that a step runs through the transformer: one, and one for each guidance that is on.

    The rules are those of diffusers' pipelines: LTX-2's scales below.
    """
    extra: Mapping[str, float] = request.extra
    guided = max(request.guidance_scale, extra.get("audio_guidance_scale", 0)) > 1
    perturbed = max(extra.get("stg_scale", 0), extra.get("audio_stg_scale", 0)) > 0
    isolated = max(extra.get("modality_scale", 1), extra.get("audio_modality_scale", 1)) > 1
    return 1 + guided + perturbed + isolated


def _pixels(request: Request) -> int:
    return request.num_frames * request.height * request.width


def duration(seconds: float) -> str:
    """Hours and minutes, or seconds where it is less than two minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def size(number: float) -> str:
    """Bytes, in gigabytes or megabytes."""
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"
