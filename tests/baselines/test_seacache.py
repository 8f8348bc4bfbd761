"""SeaCache against diffusers' hook where that works, and against the paper's filter by DFT."""

import numpy as np
import pytest
import torch
from diffusers import SeaCacheConfig

from baselines.policy import modulated_input
from baselines.seacache import DiffusersSeaCache, SeaCache, filtered
from hsa.schedulers import euler
from hsa.trace import Trace, blocks, experts, record_calls
from tests.baselines import cases
from tests.baselines.cases import PIPELINES, request, sample

STEPS = 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pipeline", ["wan_t2v", "wan22_t2v", "ti2v_t2v"])
@pytest.mark.parametrize(
    ("threshold", "order", "limit"),
    # The last lies between a first change in bf16 and the same in fp32.
    [(0.25, 1, 2), (0.8, 1, 0), (0.8, 0, 2), (0.5, 0, 0), (0.1624, 1, 0)],
)
def test_equals_the_hook_of_diffusers(pipeline, threshold, order, limit, dtype):
    pipe = PIPELINES[pipeline]()
    for transformer in experts(pipe).values():
        transformer.to(dtype)
    request_ = request(pipe, steps=STEPS)
    method = DiffusersSeaCache(threshold, residual_order=order, max_consecutive_cached=limit)
    ours = sample(method, pipe, request_)
    config = SeaCacheConfig(threshold, residual_order=order, max_consecutive_cached=limit)
    trace = Trace()
    with euler(pipe), record_calls(pipe, trace):
        for transformer in experts(pipe).values():
            transformer.enable_cache(config)
        theirs = pipe(**request_.kwargs(pipe)).frames
        for transformer in experts(pipe).values():
            transformer.disable_cache()
    assert torch.equal(ours, theirs)
    assert trace.active_fraction < 1


def dft(signal: np.ndarray, sigma: float, power: float) -> np.ndarray:
    """The filter on (F, H, W, D): Fourier matrices, no FFT; gains of S = 1 / |f|^p, mean 1."""
    spectrum, gain = signal.astype(complex), np.ones((1, 1, 1))
    for axis in range(3):
        size = signal.shape[axis]
        index = np.arange(size)
        frequency = np.abs(np.where(index < (size + 1) // 2, index, index - size)) / size
        alpha, along = 1 - sigma, np.ones(size)
        along[0] = 1 / alpha  # all signal
        clean = frequency[1:] ** -power
        along[1:] = alpha * clean / (alpha**2 * clean + sigma**2)
        gain = gain * along.reshape([-1 if at == axis else 1 for at in range(3)])
        matrix = np.exp(-2j * np.pi * np.outer(index, index) / size)
        spectrum = np.moveaxis(np.tensordot(matrix, spectrum, (1, axis)), 0, axis)
    spectrum = spectrum * (gain / gain.mean())[..., None]
    for axis in range(3):
        index = np.arange(signal.shape[axis])
        matrix = np.exp(2j * np.pi * np.outer(index, index) / len(index)) / len(index)
        spectrum = np.moveaxis(np.tensordot(matrix, spectrum, (1, axis)), 0, axis)
    return spectrum.real


@pytest.mark.parametrize("sigma", [0.999, 0.6, 0.05])
def test_filter_is_the_papers(sigma):
    signal = torch.randn(1, 3, 4, 5, 2, generator=torch.Generator().manual_seed(0))
    expected = dft(signal[0].numpy(), sigma, 3.0)
    np.testing.assert_allclose(filtered(signal, sigma, 3.0)[0], expected, atol=1e-4)


def released(signals, sigmas, threshold, first=1, last=1) -> list[bool]:
    """The authors' decisions: signals (F, H, W, D); those of protected steps are not filtered."""
    computed, accumulated, previous = [], 0.0, None
    for step, (signal, sigma) in enumerate(zip(signals, sigmas, strict=True)):
        free = first <= step < len(signals) - last
        now = dft(signal, sigma, 3.0) if free else signal
        if free:
            accumulated += np.abs(now - previous).mean() / np.abs(previous).mean()
        compute = not free or accumulated >= threshold
        accumulated = 0.0 if compute else accumulated
        computed.append(bool(compute))
        previous = now
    return computed


@pytest.mark.parametrize("pipeline", ["wan_t2v", "wan_i2v", "ti2v_i2v", "ltx2_t2v"])
@pytest.mark.parametrize(
    ("threshold", "first", "last"),
    [(0.2, 1, 1), (0.8, 1, 1), (0.8, 5, 0), (0.8, 2, 3)],  # 5 and 0: --use_ret_steps
)
def test_decides_as_released(pipeline, threshold, first, last):
    pipe = PIPELINES[pipeline]()
    signals = []

    def note(block, args, kwargs):
        names = ("hidden_states", "encoder_hidden_states", "temb")
        arguments = kwargs or dict(zip(names, args, strict=False))
        signals.append(modulated_input(block, arguments).double().numpy())

    request_ = request(pipe, steps=STEPS)
    hook = blocks(pipe.transformer)[0].register_forward_pre_hook(note, with_kwargs=True)
    method = SeaCache(threshold, retention_steps=first, cache_end_steps=last)
    with method.attach(pipe, request_) as trace:
        pipe(**request_.kwargs(pipe))
        sigmas = pipe.scheduler.sigmas.tolist()[:STEPS]
    hook.remove()
    grid = (3, 2, 2)
    every = len(cases.branches(pipe))
    sigmas = [min(sigma, 1 - 1e-6) for sigma in sigmas]
    for branch in range(every):
        of_branch = [
            np.concatenate(list(signal.reshape(len(signal), *grid, -1)), axis=-1)
            for signal in signals[branch::every]
        ]
        computed = [record.block_calls > 0 for record in trace.records][branch::every]
        assert computed == released(of_branch, sigmas, threshold, first, last)
        assert not all(computed)


@pytest.mark.parametrize("order", [0, 1])
def test_residual_is_kept_or_continued(order):
    rule = SeaCache(residual_order=order).policy(request(PIPELINES["wan_t2v"]()))
    history = [(2, torch.tensor([1.0, 5.0])), (4, torch.tensor([3.0, 4.0]))]
    kept, continued = torch.tensor([3.0, 4.0]), torch.tensor([6.0, 2.5])
    forecast = rule.forecast(7, history[-rule.memory :])
    assert torch.equal(forecast, (kept, continued)[order])


def test_the_authors_keep_the_last_residual():
    assert SeaCache().residual_order == 0


@pytest.mark.parametrize("method", [SeaCache(), DiffusersSeaCache()], ids=["own", "diffusers"])
def test_batch_is_refused(method):
    pipe = PIPELINES["wan_t2v"]()
    request_ = request(pipe, steps=4)
    with pytest.raises(ValueError, match="seacache: batch=2: choose 1, one video a call"):
        with method.attach(pipe, request_):
            pipe(**request_.kwargs(pipe) | {"num_videos_per_prompt": 2})


@pytest.mark.parametrize(
    ("method", "complaint"),
    [
        (SeaCache(threshold=-1), "seacache.threshold=-1: choose a number >= 0"),
        (SeaCache(signal="output"), "seacache.signal='output': choose modulated, latent"),
        (SeaCache(residual_order=2), "seacache.residual_order=2: choose 0 or 1"),
        (SeaCache(retention_steps=-1), "seacache.retention_steps=-1: choose a whole number"),
        (SeaCache(power_exp=0), "seacache.power_exp=0: choose a number > 0"),
    ],
    ids=repr,
)
def test_bad_setting_is_refused(method, complaint):
    with pytest.raises(ValueError, match=complaint):
        method.validate(request(PIPELINES["wan_t2v"]()))
