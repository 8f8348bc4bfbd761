"""DBCache is cache-dit's own, run as its rule says, and gone afterwards."""

import sys

import pytest
import torch
from diffusers.hooks import ModelHook

from baselines.base import Request
from baselines.dbcache import DBCache
from baselines.flow_matching import FlowMatching
from hsa.registry import registered
from hsa.schedulers import euler
from tests import pipelines
from tests.baselines.cases import fingerprint
from tests.baselines.forwards import forwards

SIZE = {"steps": 16, "height": 32, "width": 32, "num_frames": 9}
REQUEST = Request("t2v", "a red circle", "", 0, 16, 4.0, 32, 32, 9, 16)
SETTINGS = {"threshold": 0.1, "max_warmup_steps": 3}

needs_cache_dit = pytest.mark.skipif(
    not DBCache().installed, reason="needs cache-dit: pip install 'hsa-bench[cache-dit]'"
)


@needs_cache_dit
@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 1.0}], ids=["guided", "unguided"])
@pytest.mark.parametrize(
    ("family", "front", "back", "order"),
    [
        ("wan_t2v", 1, 0, None),
        ("wan_t2v", 2, 0, 2),
        ("wan_i2v", 1, 0, 1),
        ("wan22_t2v", 1, 1, None),
        ("wan22_t2v", 1, 0, 1),
    ],
)
def test_is_what_cache_dit_does_to_a_whole_pipe(family, front, back, order, guidance):
    """Its pipeline mode makes new contexts for every call by itself, for one expert or two; it has
    to be told that there is no guidance.
    """
    import cache_dit
    from cache_dit.caching.cache_adapters import CachedAdapter

    pipe, inputs = getattr(pipelines, family)(), SIZE | guidance
    method = DBCache(**SETTINGS, front_blocks=front, back_blocks=back, taylorseer_order=order)
    with method.attach(pipe, REQUEST):
        ours = pipelines.sample(pipe, **inputs)
    calibrator = order and cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
    with euler(pipe):
        plain = pipelines.sample(pipe, **inputs)
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=front,
            Bn_compute_blocks=back,
            residual_diff_threshold=0.1,
            max_warmup_steps=3,
            max_continuous_cached_steps=3,
            enable_separate_cfg=not guidance,
        )
        CachedAdapter.apply(pipe, cache_config=config, calibrator_config=calibrator)
        try:
            theirs = pipelines.sample(pipe, **inputs)
        finally:
            cache_dit.disable_cache(pipe)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, plain)


@needs_cache_dit
@pytest.mark.parametrize("family", ["wan_t2v", "wan22_i2v"])
@pytest.mark.parametrize("limits", [{}, {"max_continuous_cached_steps": 1, "max_cached_steps": 3}])
def test_computes_what_the_rule_says(family, limits):
    method = DBCache(**SETTINGS, **limits)
    total = 0
    for calls in forwards(method, getattr(pipelines, family)(), 16).values():
        reference, run, skips = None, 0, 0
        for index, call in enumerate(calls):
            residual = call.outputs[0][0] - call.entered[0]
            skip = (
                index >= method.max_warmup_steps
                and (residual - reference).abs().mean() / reference.abs().mean() < method.threshold
                and run < method.max_continuous_cached_steps
                and (method.max_cached_steps < 0 or skips < method.max_cached_steps)
            )
            assert call.ran == [True] + [not skip] * 2
            reference = reference if skip else residual
            run, skips = (run + 1, skips + 1) if skip else (0, skips)
        total += skips
    assert total > 0


@needs_cache_dit
def test_longer_video_after_a_shorter_one_starts_with_nothing():
    """The second expert of the longer one begins later than the shorter one ended."""
    pipe, method = pipelines.wan22_t2v(), DBCache(10.0, max_warmup_steps=2)
    with method.attach(pipe, REQUEST):
        expected = pipelines.sample(pipe, **SIZE)
    with method.attach(pipe, REQUEST):
        pipelines.sample(pipe, **SIZE | {"steps": 4})
        assert torch.equal(pipelines.sample(pipe, **SIZE), expected)


@needs_cache_dit
@pytest.mark.parametrize("order", [None, 1])
def test_interrupted_video_leaves_nothing_to_the_next(order):
    def interrupt(pipe, step, timestep, tensors):
        if step == 7:
            raise KeyboardInterrupt
        return tensors

    pipe = pipelines.wan22_t2v()
    with DBCache(**SETTINGS, taylorseer_order=order).attach(pipe, REQUEST):
        expected = pipelines.sample(pipe, **SIZE)
        assert torch.equal(pipelines.sample(pipe, **SIZE), expected)
        with pytest.raises(KeyboardInterrupt):
            pipelines.sample(pipe, **SIZE, seed=1, callback_on_step_end=interrupt)
        pipelines.sample(pipe, **SIZE, guidance_scale=1.0)  # another number of branches
        assert torch.equal(pipelines.sample(pipe, **SIZE), expected)


@needs_cache_dit
def test_leaves_modules_in_their_order_and_no_attribute_behind():
    pipe = pipelines.wan22_t2v()
    with FlowMatching().attach(pipe, REQUEST):
        pipelines.sample(pipe, **SIZE)

    def everything():
        found = {"class": dict(vars(type(pipe))), "pipe": set(vars(pipe))}
        for transformer in (pipe.transformer, pipe.transformer_2):
            for module in transformer.modules():
                found[module] = set(vars(module)), list(module._modules)
        return found

    before, marks = everything(), fingerprint(pipe)
    with DBCache(**SETTINGS).attach(pipe, REQUEST):
        pipelines.sample(pipe, **SIZE)
        assert everything() != before
    assert everything() == before
    assert fingerprint(pipe) == marks


@needs_cache_dit
def test_runs_under_the_hooks_of_others():
    pipe = pipelines.wan_t2v()
    with DBCache(**SETTINGS).attach(pipe, REQUEST):
        expected = pipelines.sample(pipe, **SIZE)
    with registered(pipe.transformer, ModelHook(), "another"):
        marks = fingerprint(pipe)
        with DBCache(**SETTINGS).attach(pipe, REQUEST):
            assert torch.equal(pipelines.sample(pipe, **SIZE), expected)
        assert fingerprint(pipe) == marks


@needs_cache_dit
def test_what_it_cannot_serve_is_refused():
    pipe = pipelines.wan_t2v()
    with pytest.raises(ValueError, match="dbcache: batch=2: choose 1, one video a call"):
        with DBCache().attach(pipe, REQUEST):
            pipelines.sample(pipe, **SIZE, num_videos_per_prompt=2)
    with pytest.raises(ValueError, match="front_blocks.*=3: choose less than the model's 3 blocks"):
        with DBCache(front_blocks=2, back_blocks=1).attach(pipe, REQUEST):
            pass
    for family in ("ltx2_t2v", "ltx_t2v"):
        with pytest.raises(ValueError, match="dbcache: transformer=.*choose WanTransformer3DModel"):
            with DBCache().attach(getattr(pipelines, family)(), REQUEST):
                pass


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    with pytest.raises(ValueError, match=r"cache-dit: not installed; .*hsa-bench\[cache-dit\]"):
        DBCache().validate(REQUEST)


@needs_cache_dit
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -1}, "dbcache.threshold=-1: choose a number >= 0"),
        ({"front_blocks": 0}, "dbcache.front_blocks=0: choose a whole number >= 1"),
        ({"taylorseer_order": 5}, "dbcache.taylorseer_order=5: choose 1, 2 or null"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DBCache(**settings).validate(REQUEST)
