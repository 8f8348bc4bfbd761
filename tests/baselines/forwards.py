"""Every forward of one video as plain torch hooks see it, whatever a method does inside."""

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field

from torch import Tensor

from baselines.base import Method, Request
from hsa.trace import blocks, experts
from tests import pipelines

Streams = tuple[Tensor, ...]  # video tokens (B, N, D), and those of audio on LTX-2

# Wan text, two experts, a timestep a token; LTX-2 with audio and three guidance passes; LTX-Video.
PIPELINES = ("wan_t2v", "wan22_i2v", "wan_ti2v", "ltx2_t2v", "ltx23_i2v", "ltx_t2v")


@dataclass
class Forward:
    """`entered` the first block, `outputs` of each block, and what `left` for the heads."""

    step: int
    entered: Streams
    outputs: list[Streams]
    left: Streams
    ran: list[bool] = field(default_factory=list)  # each block: did its attention really run?


def request(steps: int) -> Request:
    return Request("t2v", "a red circle", "", 0, steps, 4.0, 32, 32, 9, 16)


def forwards(method: Method, pipe, steps: int) -> dict[tuple[str, str], list[Forward]]:
    """The forwards of each (expert, branch), in order, of a video of `steps` steps."""
    seen: list[Forward] = []
    with ExitStack() as stack:
        for transformer in experts(pipe).values():
            for handle in _watch(transformer, seen):
                stack.callback(handle.remove)
        trace = stack.enter_context(method.attach(pipe, request(steps)))
        pipe(**pipelines.inputs(pipe, steps=steps, height=32, width=32, num_frames=9))
    found = defaultdict(list)
    for forward, record in zip(seen, trace.records, strict=True):
        assert sum(forward.ran) == record.block_calls
        forward.step = record.step
        found[record.expert, record.branch].append(forward)
    return dict(found)


def _watch(transformer, seen):
    stack = blocks(transformer)

    def enter(module, args, kwargs):
        names = ("hidden_states", "audio_hidden_states")
        entered = tuple(kwargs[name] for name in names if name in kwargs) or args[:1]
        seen.append(Forward(-1, entered, [], (), [False] * len(stack)))

    def leave(module, args, output):
        seen[-1].outputs.append(output if isinstance(output, tuple) else (output,))

    def head(module, args):
        seen[-1].left += args[:1]

    def attend(index):
        return lambda *_: seen[-1].ran.__setitem__(index, True)

    yield stack[0].register_forward_pre_hook(enter, with_kwargs=True)
    for index, block in enumerate(stack):
        yield block.register_forward_hook(leave)
        yield block.attn1.to_out[0].register_forward_hook(attend(index))
    for name in ("norm_out", "audio_norm_out"):
        if hasattr(transformer, name):
            yield getattr(transformer, name).register_forward_pre_hook(head)
