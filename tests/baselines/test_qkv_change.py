"""The probe's arrays against Q, K and V made anew from what enters each attention."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from baselines.flow_matching import FlowMatching
from baselines.qkv_change import QKVChange
from hsa.trace import blocks, experts
from tests.baselines.cases import branches, latents, pipe_of, request, sample
from tests.pipelines import wan_t2v

STEPS = 5


def projected(pipe, run) -> dict[tuple[str, int, int], list[np.ndarray]]:
    """(expert, row, block) -> Q, K or V (N, width) of the conditional sample at each step.

    The first call of a step has it, at the end of its batch: alone in Wan, after the unconditional
    sample in LTX-2.
    """
    found, calls = {}, 0

    def count(*_):
        nonlocal calls
        calls += 1

    def project(attention, args, kwargs, expert, block):
        if (calls - 1) % len(branches(pipe)):
            return
        entering = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        for row, layer in enumerate((attention.to_q, attention.to_k, attention.to_v)):
            output = linear(entering[-1], layer.weight, layer.bias)
            found.setdefault((expert, row, block), []).append(output.double().numpy())

    with ExitStack() as stack:
        for expert, transformer in experts(pipe).items():
            stack.callback(transformer.register_forward_pre_hook(count).remove)
            for i, block in enumerate(blocks(transformer)):
                hook = block.attn1.register_forward_pre_hook(
                    lambda *of, at=(expert, i): project(*of, *at), with_kwargs=True
                )
                stack.callback(hook.remove)
        run()
    return found


def change(before: np.ndarray, after: np.ndarray) -> float:
    return np.mean(np.abs(after - before).sum(1) / np.abs(before).sum(1))


@pytest.mark.parametrize("pipeline", ["wan_t2v", "wan22_t2v", "ltx2_t2v"])
def test_changes_are_those_of_what_enters_the_attention(pipeline):
    pipe = pipe_of(pipeline)
    request_ = request(pipe, steps=STEPS)
    with QKVChange().attach(pipe, request_) as trace:
        pipe(**request(pipe, seed=1, steps=STEPS).kwargs(pipe))  # the last video alone counts
        outputs = projected(pipe, lambda: pipe(**request_.kwargs(pipe)))
    recorded = trace.arrays["qkv_change"]
    assert recorded.shape == (1, 3, len(blocks(pipe.transformer)), STEPS - 1)
    start = 0
    for expert in experts(pipe):
        steps = len(outputs[expert, 0, 0])
        for row in range(3):
            for block in range(recorded.shape[2]):
                of = outputs[expert, row, block]
                expected = [change(*pair) for pair in zip(of[:-1], of[1:], strict=True)]
                found = recorded[0, row, block, start : start + steps - 1]
                np.testing.assert_allclose(found, expected, rtol=1e-4)
        start += steps
    assert start == STEPS  # every step belongs to one expert
    switches = recorded.isnan().all(dim=(0, 1, 2))
    assert switches.sum() == recorded.isnan().any(dim=(0, 1, 2)).sum() == len(experts(pipe)) - 1


def test_a_batch_records_each_video():
    pipe = pipe_of("wan_t2v")
    alone = []
    for seed in (0, 1):
        one = request(pipe, seed=seed, steps=3)
        with QKVChange().attach(pipe, one) as trace:
            pipe(**one.kwargs(pipe))
        alone.append(trace.arrays["qkv_change"])
    both = request(pipe, steps=3).kwargs(pipe)
    for key in ("prompt", "negative_prompt", "generator"):
        both[key] = [request(pipe, seed=seed, steps=3).kwargs(pipe)[key] for seed in (0, 1)]
    with QKVChange().attach(pipe, request(pipe, steps=3)) as trace:
        latents(pipe(**both))
    torch.testing.assert_close(trace.arrays["qkv_change"], torch.cat(alone), rtol=1e-3, atol=1e-5)


def test_the_video_is_that_of_flow_matching():
    pipe = pipe_of("wan22_t2v")
    request_ = request(pipe, steps=STEPS)
    assert torch.equal(sample(QKVChange(), pipe, request_), sample(FlowMatching(), pipe, request_))


def test_one_expert_is_in_memory_at_a_time():
    pipe, counts = pipe_of("wan22_t2v"), []

    def count(pipe, step, timestep, tensors):
        counts.append(len(probe.last))
        return {}

    request_ = request(pipe, steps=STEPS, callback_on_step_end=count)
    with QKVChange().attach(pipe, request_):
        projection = blocks(pipe.transformer)[0].attn1.to_q
        (note,) = projection._forward_hooks.values()
        probe = note.func.__self__
        pipe(**request_.kwargs(pipe))
        assert not probe.last
    assert counts == [3 * len(blocks(pipe.transformer))] * STEPS


def test_fused_projections_are_refused():
    """The layers that it listens to are never called."""
    pipe = wan_t2v()
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="qkv_change: projections='fused': choose separate ones"):
        with QKVChange().attach(pipe, request(pipe, steps=STEPS)):
            pass
