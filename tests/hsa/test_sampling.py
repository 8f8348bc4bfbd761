"""Whole pipelines under HSA against plain diffusers and against the naive reference."""

import copy
import gc
import weakref
from contextlib import nullcontext
from dataclasses import replace

import accelerate
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from hsa import HSAConfig, apply_hsa
from hsa.schedulers import EulerFlowMatch, euler
from hsa.trace import experts
from tests.hsa import packed_reference, reference
from tests.pipelines import (
    ALL,
    TOKENS,
    guidance,
    inputs,
    is_ltx2,
    ltx2_i2v,
    ltx2_t2v,
    ltx23_i2v,
    ltx23_t2v,
    ltx25_i2v,
    ltx_i2v,
    ltx_t2v,
    sample,
    sample_av,
    wan22_t2v,
    wan_t2v,
    wan_ti2v,
)

PIPELINES = list(ALL.values())
CONFIG = HSAConfig((8, 4, 2), fractions=(0.1, 0.3, 0.6), warmup_steps=2, cooldown_steps=1)
EVERY_TOKEN = HSAConfig((8, 4, 2), thresholds=(0.0, 0.0), warmup_steps=2)
N = TOKENS[0] * TOKENS[1] * TOKENS[2]


def plain(pipe, **overrides):
    with euler(pipe):
        return sample(pipe, **overrides)


def hsa(pipe, config=CONFIG, **overrides):
    with apply_hsa(pipe, config) as trace:
        return sample(pipe, **overrides), trace


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("build", PIPELINES)
def test_every_token_active_is_flow_matching(build, guided):
    pipe = build()
    terms = guidance(pipe, on=guided)
    latents, trace = hsa(pipe, EVERY_TOKEN, **terms)
    assert torch.equal(latents, plain(pipe, **terms))
    assert trace.active_fraction == 1
    assert trace.allocation.count_nonzero() == 0


@pytest.mark.parametrize("build", [ltx2_t2v, ltx23_i2v])
def test_every_token_active_leaves_the_audio_as_it_is(build):
    pipe = build()
    with apply_hsa(pipe, EVERY_TOKEN):
        latents, audio = sample_av(pipe)
    with euler(pipe):
        expected, expected_audio = sample_av(pipe)
    assert torch.equal(latents, expected) and torch.equal(audio, expected_audio)


@pytest.mark.parametrize("build", [wan_t2v, wan_ti2v, wan22_t2v, ltx_t2v, ltx2_t2v])
def test_every_token_active_is_flow_matching_in_bfloat16(build):
    pipe = copy.deepcopy(build())  # tiny pipelines share text encoder and VAE
    pipe.to(torch.bfloat16)
    latents, _ = hsa(pipe, EVERY_TOKEN)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, plain(pipe))
    assert hsa(pipe)[0].isfinite().all()


@pytest.mark.parametrize("cut", [{"fractions": (0.1, 0.3, 0.6)}, {"thresholds": (0.14, 0.11)}])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("build", [wan_t2v, wan_ti2v, wan22_t2v])
def test_pipeline_equals_naive_reference(build, guidance_scale, cut):
    pipe = build()
    config = HSAConfig((8, 4, 1), **cut, warmup_steps=3, cooldown_steps=1)
    latents, trace = hsa(pipe, config, guidance_scale=guidance_scale)
    expected, groups = reference.wan_latents(
        pipe, config, inputs(pipe, guidance_scale=guidance_scale)
    )
    assert set(groups.tolist()) == {0, 1, 2}
    assert torch.equal(trace.allocation.flatten(), groups)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("by", ["fractions", "thresholds"])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(
    "build", [ltx_t2v, ltx_i2v, ltx2_t2v, ltx2_i2v, ltx23_t2v, ltx23_i2v, ltx25_i2v]
)
def test_ltx_pipeline_equals_naive_reference(build, guided, by):
    """Guidance rescale is on: only a cached guided velocity makes the cached Euler update exact."""
    pipe = build()
    terms = guidance(pipe, on=guided)
    if guided and not is_ltx2(pipe):
        terms["guidance_rescale"] = 0.7
    config = HSAConfig((8, 4, 1), fractions=(0.1, 0.3, 0.6), warmup_steps=3, cooldown_steps=1)
    if by == "thresholds":
        change = hsa(pipe, config, **terms)[1].velocity_change.flatten().sort().values
        between = (change[1:] + change[:-1]) / 2
        thresholds = between[-len(between) // 8].item(), between[len(between) // 2].item()
        config = replace(config, fractions=None, thresholds=thresholds)
    with apply_hsa(pipe, config) as trace:
        output = pipe(**inputs(pipe, **terms))
    expected, groups = packed_reference.sample(pipe, config, **terms)
    assert set(groups.tolist()) == {0, 1, 2}
    assert torch.equal(trace.allocation.flatten(), groups)
    torch.testing.assert_close(output.frames, expected.frames, rtol=0, atol=1e-5)
    if is_ltx2(pipe):
        torch.testing.assert_close(output.audio, expected.audio, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cut", [{"fractions": (0, 0.4, 0.6)}, {"thresholds": (9.0, 0.11)}])
def test_steps_on_which_no_token_is_active(cut):
    pipe = wan_t2v()
    config = HSAConfig((8, 4, 2), **cut, warmup_steps=2)
    latents, trace = hsa(pipe, config)
    expected, groups = reference.wan_latents(pipe, config, inputs(pipe))
    assert set(groups.tolist()) == {1, 2}
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    assert trace.records[2 * 3].active_tokens == 1  # padding: one row always runs


def test_skipped_token_moves_by_one_large_euler_step():
    pipe, path, velocities = wan_t2v(), [], []

    def keep_latents(pipe, step, timestep, tensors):
        path.append(tensors["latents"])
        return {}

    with apply_hsa(pipe, CONFIG) as trace:
        handle = pipe.transformer.register_forward_hook(lambda m, a, out: velocities.append(out[0]))
        sample(pipe, guidance_scale=1.0, callback_on_step_end=keep_latents)
        handle.remove()
        sigmas = pipe.scheduler.sigmas
    skipped = reference.pixels(trace.allocation.flatten() == 2, path[0]).expand_as(path[0])
    # the group of budget 2 runs at steps 0, 1 (warm-up), 4 and 7 (cool-down)
    one_step = path[3] + (sigmas[7] - sigmas[4]) * velocities[4]
    torch.testing.assert_close(path[6][skipped], one_step[skipped], rtol=0, atol=1e-6)
    assert not torch.allclose(path[6][~skipped], one_step[~skipped], atol=1e-3)


@pytest.mark.parametrize("build", PIPELINES)
def test_hsa_changes_the_video_and_repeats_itself(build):
    pipe = build()
    first, trace = hsa(pipe)
    again, trace_again = hsa(pipe)
    assert torch.equal(first, again)
    assert trace.to_dict() == trace_again.to_dict()
    assert not torch.equal(first, plain(pipe))


def test_videos_made_in_one_block_do_not_touch_each_other():
    pipe = wan_t2v()
    alone = [hsa(pipe, seed=seed)[0] for seed in (0, 1)]
    with apply_hsa(pipe, CONFIG):
        for seed in (0, 1, 0):
            assert torch.equal(sample(pipe, seed=seed), alone[seed])
        assert sample(pipe, seed=0, height=32).shape[-2:] == (4, 8)


@pytest.mark.parametrize("cut", [{"fractions": (0.1, 0.3, 0.6)}, {"thresholds": (0.14, 0.11)}])
@pytest.mark.parametrize("build", [wan_t2v, wan_ti2v, ltx_t2v, ltx2_i2v, ltx23_t2v])
def test_batch_equals_single_videos(build, cut):
    pipe = build()
    config = HSAConfig((8, 4, 2), **cut, warmup_steps=2)
    prompts = ["a red circle moves left", "a large green star"]
    together, trace = hsa(
        pipe,
        config,
        prompt=prompts,
        negative_prompt=["blurry"] * 2,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
    )
    for i, prompt in enumerate(prompts):
        alone, trace_alone = hsa(pipe, config, prompt=prompt, seed=i)
        assert torch.equal(trace.allocation[i], trace_alone.allocation[0])
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-5)
    counts = [(groups == 0).sum().item() for groups in trace.allocation]
    if build in (wan_t2v, wan_ti2v):
        assert (counts[0] != counts[1]) == ("thresholds" in cut)


def test_measured_share_of_tokens_is_the_expected_one():
    config = HSAConfig((8, 4, 2), fractions=(0.25, 0.25, 0.5), warmup_steps=2)  # N divides evenly
    _, trace = hsa(wan_t2v(), config)
    assert trace.active_fraction == pytest.approx(config.expected_fraction)
    assert trace.expected_fraction == pytest.approx(config.expected_fraction)
    by_threshold = HSAConfig((8, 4, 2), thresholds=(0.14, 0.11), warmup_steps=2)
    _, trace = hsa(wan_t2v(), by_threshold)
    assert by_threshold.expected_fraction is None
    assert 0.5 < trace.expected_fraction < 1
    assert trace.active_fraction == pytest.approx(trace.expected_fraction)


def test_allocation_is_made_before_the_first_partial_step_of_both_branches():
    _, trace = hsa(wan_t2v())
    columns = trace.to_dict()["records"]
    assert columns["branch"] == ["cond", "uncond"] * 8
    # shares .1, .3, .6 of 48 tokens are 5, 14, 29; budgets 8, 4, 2 of 8 steps
    assert columns["active_tokens"][::2] == [48, 48, 19, 5, 48, 5, 19, 48]
    assert columns["active_tokens"][1::2] == columns["active_tokens"][::2]
    assert set(columns["block_calls"]) == {3}


def test_second_expert_starts_with_a_full_step():
    _, trace = hsa(wan22_t2v())
    second = [record for record in trace.records if record.expert == "transformer_2"]
    assert [record.active_tokens for record in second[:2]] == [N, N]
    assert second[0].step == 3  # not a step on which CONFIG runs every token
    assert min(record.active_tokens for record in second) < N


def test_expert_switch_inside_the_warm_up():
    config = HSAConfig((8, 4, 2), fractions=(0.1, 0.3, 0.6), warmup_steps=5)
    latents, trace = hsa(wan22_t2v(), config)  # switches at step 3: changes of steps 1, 2, 4
    assert trace.allocation is not None and latents.isfinite().all()
    short = HSAConfig((8, 4, 2), fractions=(0.1, 0.3, 0.6), warmup_steps=2)
    pipe = wan22_t2v()
    pipe.register_to_config(boundary_ratio=0.96)  # switches at step 1
    with pytest.raises(ValueError, match="warmup_steps: 2 .* expert took over"):
        hsa(pipe, short)


def test_given_tokens_get_the_smallest_budget():
    _, trace = hsa(wan_ti2v())
    assert trace.velocity_change[:, 0].eq(0).all()
    assert trace.velocity_change[:, 1:].gt(0).all()
    assert trace.allocation[:, 0].eq(2).all()


def parts(pipe):
    """Everything HSA touches, by identity."""
    models = experts(pipe).values()
    return [
        pipe.scheduler,
        dict(pipe.config),
        *(
            (
                [set(vars(module)) for module in model.modules()],
                [getattr(module, "processor", None) for module in model.modules()],
                [len(module._forward_hooks) for module in model.modules()],
                [len(module._forward_pre_hooks) for module in model.modules()],
                dict(model._diffusers_hook.hooks),
            )
            for model in models
        ),
    ]


class Stop(Exception):
    pass


def stop_at(step):
    def callback(pipe, i, timestep, tensors):
        if i == step:
            raise Stop
        return {}

    return callback


@pytest.mark.parametrize("build", [wan_t2v, wan_ti2v, wan22_t2v, ltx_t2v, ltx23_i2v])
def test_pipeline_is_restored(build):
    pipe = build()
    latents = plain(pipe)
    before = parts(pipe)
    scheduler_state = copy.deepcopy(vars(pipe.scheduler))
    hsa(pipe)
    assert parts(pipe) == before
    with pytest.raises(Stop):
        hsa(pipe, callback_on_step_end=stop_at(4))
    assert parts(pipe) == before
    assert str(vars(pipe.scheduler)) == str(scheduler_state)
    assert torch.equal(plain(pipe), latents)


@pytest.mark.parametrize("step", [0, 1, 4, 6])
@pytest.mark.parametrize("build", [wan_t2v, wan22_t2v])
def test_unfinished_video_is_forgotten(build, step):
    pipe = build()
    expected, _ = hsa(pipe, seed=1)
    with apply_hsa(pipe, CONFIG):
        with pytest.raises(Stop):
            sample(pipe, height=32, callback_on_step_end=stop_at(step))
        assert torch.equal(sample(pipe, seed=1), expected)


def test_error_inside_the_model_is_forgotten():
    pipe = wan_t2v()
    expected, _ = hsa(pipe)

    def fail(module, args):
        raise Stop

    with apply_hsa(pipe, CONFIG):
        handle = pipe.transformer.blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(Stop):
            sample(pipe, height=32)
        handle.remove()
        assert torch.equal(sample(pipe), expected)


def remembered(pipe):
    """Fills with weak references to the K/V caches of the first layer, one a branch."""
    caches = weakref.WeakSet()
    attention = pipe.transformer.blocks[0].attn1
    return caches, attention.register_forward_hook(lambda *_: caches.add(attention.kv_cache))


@pytest.mark.parametrize("ending", [None, Stop, FloatingPointError, MemoryError])
def test_keys_and_values_are_freed_with_their_video(ending):
    pipe = wan_t2v()

    def at_step_5(pipe, step, timestep, tensors):
        if step != 5 or ending is None:
            return {}
        assert len(caches) == 2
        if ending is MemoryError:
            pipe.transformer.blocks[1].register_forward_pre_hook(fail)
        if ending is Stop:
            raise Stop
        return {"latents": tensors["latents"] * float("nan")}

    def fail(module, args):
        raise MemoryError

    with apply_hsa(pipe, CONFIG):
        caches, handle = remembered(pipe)
        with nullcontext() if ending is None else pytest.raises(ending):
            sample(pipe, callback_on_step_end=at_step_5)
        handle.remove()
        if ending is Stop:  # raised outside the model: seen when the next video begins
            sample(pipe, steps=8, guidance_scale=1.0)
        gc.collect()
        assert len(caches) == 0


def test_keys_and_values_are_freed_before_decoding():
    pipe, alive = wan_t2v(), []

    def count(pipe, step, timestep, tensors):
        alive.append(len(caches))
        return {}

    with apply_hsa(pipe, CONFIG):
        caches, _ = remembered(pipe)
        sample(pipe, callback_on_step_end=count)
    assert alive == [2] * 7 + [0]


def test_keys_and_values_of_the_first_expert_are_freed_when_the_second_takes_over():
    pipe, alive = wan22_t2v(), []

    def count(pipe, step, timestep, tensors):
        alive.append(len(caches))
        return {}

    with apply_hsa(pipe, CONFIG):
        caches, _ = remembered(pipe)
        sample(pipe, callback_on_step_end=count)
    assert alive == [2] * 3 + [0] * 5  # switches at step 3


@pytest.mark.parametrize("hsa_first", [True, False])
def test_offload_hooks_that_come_and_go_do_not_displace_hsa(hsa_first):
    """Model CPU offload re-installs accelerate's hooks after every pipeline call."""
    pipe = wan_t2v()
    expected, _ = hsa(pipe)
    before = plain(pipe)
    offload = accelerate.hooks.ModelHook
    if not hsa_first:
        accelerate.hooks.add_hook_to_module(pipe.transformer, offload())
    with apply_hsa(pipe, CONFIG):
        for _ in range(2):
            accelerate.hooks.remove_hook_from_module(pipe.transformer)
            accelerate.hooks.add_hook_to_module(pipe.transformer, offload())
            assert torch.equal(sample(pipe), expected)
    assert torch.equal(plain(pipe), before)
    assert torch.equal(hsa(pipe)[0], expected)
    accelerate.hooks.remove_hook_from_module(pipe.transformer)
    assert torch.equal(plain(pipe), before)


def test_nan_velocity_names_step_and_branch():
    def poison(pipe, step, timestep, tensors):
        latents = tensors["latents"]
        return {"latents": latents * float("nan") if step == 2 else latents}

    with pytest.raises(FloatingPointError, match="step 3, branch 'cond', transformer"):
        hsa(wan_t2v(), callback_on_step_end=poison)


def test_number_of_steps_must_be_the_full_budget():
    with pytest.raises(ValueError, match=r"budgets: \(8, 4, 2\) .* num_inference_steps is 6"):
        hsa(wan_t2v(), steps=6)


def test_scheduler_set_inside_the_block_is_refused():
    """Wan's own UniPC looks back over several velocities: a cached one would be silently wrong."""
    pipe = wan_t2v()
    shipped = pipe.scheduler
    with apply_hsa(pipe, CONFIG), pytest.raises(ValueError, match="UniPC.* was set after HSA"):
        pipe.scheduler = UniPCMultistepScheduler.from_config(shipped.config)
        sample(pipe)
    assert pipe.scheduler is shipped


def test_hsa_twice_is_refused():
    pipe = wan_t2v()
    with apply_hsa(pipe, CONFIG), pytest.raises(ValueError, match="cache 'hsa' is installed"):
        hsa(pipe)
    hsa(pipe)


def test_other_cache_is_refused():
    from diffusers import FirstBlockCacheConfig

    pipe = wan_t2v()
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="transformer: the cache .* is installed"):
        hsa(pipe)
    assert not isinstance(pipe.scheduler, EulerFlowMatch)
    pipe.transformer.disable_cache()
    hsa(pipe)


def test_unknown_transformer_is_refused():
    from diffusers import SD3Transformer2DModel

    pipe = wan_t2v()
    pipe.transformer = SD3Transformer2DModel(
        num_layers=1, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16
    )
    with pytest.raises(ValueError, match="SD3Transformer2DModel .* choices: WanTransformer3DModel"):
        hsa(pipe)
    pipe.transformer = None
    with pytest.raises(ValueError, match="pipe: WanPipeline has no transformer"):
        hsa(pipe)
