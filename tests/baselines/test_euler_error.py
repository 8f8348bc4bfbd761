"""The probe of cached updates against updates done by hand along the stored path."""

import pytest
import torch

from baselines.euler_error import EulerError
from baselines.flow_matching import FlowMatching
from hsa.schedulers import euler
from tests import pipelines
from tests.baselines import cases

STEPS, LONGEST = 6, 3


def run(method, build):
    pipe = build()
    request = cases.request(pipe, steps=STEPS)
    with method.attach(pipe, request) as trace:
        return cases.latents(pipe(**request.kwargs(pipe))), trace


def path_of(build):
    """Guided velocity of each step from a scheduler that shows it, latents after it, sigmas."""
    pipe = build()
    request = cases.request(pipe, steps=STEPS)
    path = []

    def note(pipe, step, timestep, tensors):
        path.append(tensors["latents"].clone().double())
        return {}

    with euler(pipe):
        pipe(**request.kwargs(pipe) | {"callback_on_step_end": note})
        sigmas = pipe.scheduler.sigmas.double()
    return path, sigmas


@pytest.mark.parametrize("build", [pipelines.wan_t2v, pipelines.wan_ti2v, pipelines.ltx23_i2v])
def test_error_is_that_of_one_long_update(build):
    latents, trace = run(EulerError(longest=LONGEST), build)
    assert torch.equal(latents, run(FlowMatching(), build)[0])
    errors = trace.arrays["euler_error"]
    assert errors.shape == (1, LONGEST, STEPS)
    path, sigmas = path_of(build)
    shown = path
    if build is pipelines.wan_ti2v:  # the first frame is given
        shown = [x[:, :, 1:] for x in path]
    elif build is pipelines.ltx23_i2v:  # likewise, in packed latents
        shown = [x[:, x.shape[1] // 3 :] for x in path]
    for begin in range(1, STEPS):
        slope = (shown[begin] - shown[begin - 1]) / (sigmas[begin + 1] - sigmas[begin])
        for length in range(1, LONGEST + 1):
            end = begin + length
            found = errors[0, length - 1, begin].item()
            if end > STEPS:
                assert found != found
                continue
            long = shown[begin - 1] + slope * (sigmas[end] - sigmas[begin])
            expected = (long - shown[end - 1]).norm() / shown[-1].norm()
            assert found == pytest.approx(expected.item(), rel=1e-2, abs=1e-6)
    assert errors[0, 1:, 1 : STEPS - LONGEST].gt(0).all()


@pytest.mark.parametrize("longest", [0, 1.5])
def test_longest_is_a_number_of_steps(longest):
    request = cases.request(pipelines.wan_t2v(), steps=STEPS)
    with pytest.raises(ValueError, match="euler_error.longest=.*: choose a whole number"):
        EulerError(longest=longest).validate(request)
