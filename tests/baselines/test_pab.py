"""PAB against diffusers' hook where that is right, and a counting model of the published rule."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig

from baselines.base import Request
from baselines.pab import PyramidAttentionBroadcast
from hsa.schedulers import current_step, euler
from hsa.trace import blocks, experts
from tests import pipelines

STEPS = 12
REQUEST = Request("t2v", "a red circle", "", 0, STEPS, 4.0, 32, 32, 9, 16)
ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2")
STREAMS = ("audio_to_video_attn", "video_to_audio_attn")


def evenly(step: int) -> float:
    """Timestep of a model without shift: that of the official windows."""
    return float(np.linspace(1000, 0, STEPS + 1)[step])


def sample(pipe, **overrides):
    size = {"steps": STEPS, "height": 32, "width": 32, "num_frames": 9}
    return pipelines.sample(pipe, **size | overrides)


# The hook takes every attention of LTX for spatial.
@pytest.mark.parametrize(
    ("family", "text_interval"),
    [("wan_t2v", 4), ("wan_i2v", 4), ("wan22_t2v", 4), ("ltx_t2v", 2), ("ltx23_t2v", 2)],
)
def test_is_the_hook_of_diffusers_without_guidance(family, text_interval):
    pipe = getattr(pipelines, family)()
    off = pipelines.guidance(pipe, on=False)
    with PyramidAttentionBroadcast(2, text_interval, (100, 800)).attach(pipe, REQUEST):
        ours = sample(pipe, **off)
    with euler(pipe):
        plain = sample(pipe, **off)
        for transformer in experts(pipe).values():
            config = PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                cross_attention_block_skip_range=text_interval,
                current_timestep_callback=lambda: evenly(current_step(pipe.scheduler)),
            )
            transformer.enable_cache(config)
        theirs = sample(pipe, **off)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, plain)


def watched(method, pipe):
    """[(record, {(block, attention): (was it computed, its output)})], one a transformer call."""
    calls, computed = [], set()

    def watch(transformer):
        def start(module, args, kwargs):
            computed.clear()
            calls.append({})

        yield transformer.register_forward_pre_hook(start, with_kwargs=True)
        for index, block in enumerate(blocks(transformer)):
            for name in ATTENTIONS + STREAMS:
                if hasattr(block, name):
                    key, attention = (index, name), getattr(block, name)
                    yield attention.to_out[0].register_forward_hook(
                        lambda *_, key=key: computed.add(key)
                    )
                    yield attention.register_forward_hook(
                        lambda m, a, output, key=key: calls[-1].update(
                            {key: (key in computed, output)}
                        )
                    )

    with ExitStack() as stack:
        for transformer in experts(pipe).values():
            for handle in watch(transformer):
                stack.callback(handle.remove)
        trace = stack.enter_context(method.attach(pipe, REQUEST))
        sample(pipe)
    return list(zip(trace.records, calls, strict=True))


@pytest.mark.parametrize("family", ["wan_t2v", "wan22_i2v", "ti2v_t2v", "ltx23_i2v"])
def test_computes_what_the_rule_says_and_reuses_its_own_branch(family):
    low, high = window = 416, 750  # steps 4 to 6: at 3 the timestep is 750, at 7 a third above 416
    pipe = getattr(pipelines, family)()
    calls = watched(PyramidAttentionBroadcast(2, 3, window), pipe)
    begun, last = {}, {}
    skipped = 0
    for record, attentions in calls:
        branch = record.expert, record.branch
        index = record.step - begun.setdefault(branch, record.step)
        for key, (computed, output) in attentions.items():
            interval = 3 if key[1].endswith("attn2") else 2
            expected = index % interval == 0 or not low < int(evenly(record.step)) < high
            assert computed == expected, (record, key)
            if computed:
                last[branch, key] = output
            assert torch.equal(output, last[branch, key])
            skipped += not computed
    assert skipped > 0
    inside = {
        record.step for record, attentions in calls for ran, _ in attentions.values() if not ran
    }
    assert inside <= {4, 5, 6}
    names = ATTENTIONS + STREAMS if family.startswith("ltx2") else ATTENTIONS[:2]
    count = len(blocks(pipe.transformer))
    assert set(calls[0][1]) == {(index, name) for index in range(count) for name in names}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"self_interval": 0}, "pab.self_interval=0: choose a whole number >= 1"),
        ({"text_interval": 1.5}, "pab.text_interval=1.5: choose a whole number >= 1"),
        ({"window": (850, 100)}, r"pab.window=\(850, 100\): choose two timesteps"),
        ({"window": (100,)}, r"pab.window=\(100,\): choose two timesteps"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PyramidAttentionBroadcast(**settings).validate(REQUEST)
