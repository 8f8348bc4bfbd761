"""The normalised setting: whatever the knob says, the first 5 steps and the last one are whole."""

import pytest
from hydra.utils import instantiate
from torch import nn

from experiments.config import load_experiment
from tests.baselines.cases import pipe_of, request

FIRST, LAST = range(5), (39,)
SETTINGS = {
    setting.label.split(",")[0]: instantiate(setting.config.method)
    for setting in load_experiment(["experiment=methods_protected"]).settings
    if setting.config.target is not None
}
del SETTINGS["FM"]  # skips nothing and protects nothing: the line to beat


def work_of_steps(pipe, method, request) -> list[int]:
    """Numbers that entered a linear layer of a block, at each step."""
    work = [0] * request.steps

    def count(module, args, output):
        work[pipe.scheduler.step_index or 0] += args[0].numel()

    layers = [layer for layer in pipe.transformer.blocks.modules() if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        with method.attach(pipe, request):
            pipe(**request.kwargs(pipe))
    finally:
        for handle in handles:
            handle.remove()
    return work


@pytest.mark.parametrize("name", SETTINGS)
def test_protected_steps_are_whole(name):
    method = SETTINGS[name]
    pipe = pipe_of("wan_t2v")
    request_ = request(pipe, steps=40)
    _, least, most = method.knob
    works = [work_of_steps(pipe, method.turned(end), request_) for end in (least, most)]
    whole = max(map(max, works))
    protected = FIRST if "first 5" in name else [*FIRST, *LAST]
    for work in works:
        assert [step for step in protected if work[step] < whole] == []
    assert min(map(sum, works)) < 0.7 * 40 * whole
