import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from hsa.schedulers import EulerFlowMatch, euler
from tests.pipelines import sample, wan_t2v


@pytest.mark.parametrize("steps", [1, 8, 40])
def test_grid_is_that_of_the_shipped_scheduler(steps):
    shipped = wan_t2v().scheduler
    ours = EulerFlowMatch.like(shipped)
    shipped.set_timesteps(steps)
    ours.set_timesteps(steps)
    torch.testing.assert_close(ours.sigmas, shipped.sigmas, rtol=0, atol=2e-6)
    assert torch.equal(ours.timesteps, ours.sigmas[:-1] * 1000)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_shift_is_applied_once(shift):
    source = FlowMatchEulerDiscreteScheduler()
    source.set_shift(shift)
    scheduler = EulerFlowMatch.like(source)
    scheduler.set_timesteps(4)
    grid = [1, 0.75025, 0.5005, 0.25075]  # linspace(1, 1/1000, 5) without its end
    shifted = [shift * s / (1 + (shift - 1) * s) for s in grid]
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([*shifted, 0.0]))


def test_named_sigmas_are_used():
    scheduler = EulerFlowMatch.like(FlowMatchEulerDiscreteScheduler())
    scheduler.set_timesteps(sigmas=[1.0, 0.4])
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.4, 0.0]))


def test_straight_flow_is_solved_exactly():
    scheduler = EulerFlowMatch.like(wan_t2v().scheduler)
    scheduler.set_timesteps(7)
    noise, clean = torch.randn(2, 1, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(noise - clean, t, x, return_dict=False)[0]
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-5)


def test_latents_stay_fp32_for_a_bfloat16_model():
    scheduler = EulerFlowMatch.like(wan_t2v().scheduler)
    scheduler.set_timesteps(3)
    velocity = torch.full((1, 1), 1 / 3, dtype=torch.bfloat16)
    latents = torch.full((1, 1), 1.001)
    moved = scheduler.step(velocity, scheduler.timesteps[0], latents).prev_sample
    dt = scheduler.sigmas[1] - scheduler.sigmas[0]
    assert moved.dtype == torch.float32
    assert torch.equal(moved, latents + dt * velocity.float())


def test_pipeline_gets_its_own_scheduler_back():
    pipe = wan_t2v()
    original, config = pipe.scheduler, dict(pipe.config)
    with pytest.raises(RuntimeError), euler(pipe):
        assert isinstance(pipe.scheduler, EulerFlowMatch)
        sample(pipe, steps=2)
        raise RuntimeError
    assert pipe.scheduler is original
    assert dict(pipe.config) == config
    assert original.num_inference_steps is None  # never run


def test_other_schedulers_are_refused():
    with pytest.raises(ValueError, match="scheduler: DDIMScheduler .* choices: FlowMatchEuler"):
        EulerFlowMatch.like(DDIMScheduler())
