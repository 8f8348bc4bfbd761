"""What rules inside the transformer leave in memory."""

from weakref import WeakSet

import pytest

from baselines.blocks import ruled_modules
from baselines.rule import Rule
from hsa.schedulers import euler
from hsa.trace import blocks
from tests import pipelines


@pytest.mark.parametrize("interrupted", [False, True])
def test_expert_that_is_done_is_forgotten(interrupted):
    """Its cache takes memory that the other one needs."""
    alive, counts = WeakSet(), []

    class Counted(Rule):
        def __init__(self, branch):
            alive.add(self)

        def run(self, key, tokens, compute):
            return compute()

    def count(pipe, step, timestep, tensors):
        counts.append(len(alive))
        if step == 5 and interrupted:
            raise KeyboardInterrupt
        return {}

    def stack(transformer):
        return dict(enumerate(blocks(transformer)))

    pipe = pipelines.wan22_t2v()
    with euler(pipe), ruled_modules(pipe, Counted, stack):
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                pipelines.sample(pipe, steps=8, callback_on_step_end=count)
            interrupted = False
        pipelines.sample(pipe, steps=8, callback_on_step_end=count)
        assert not alive
    assert set(counts) == {2}  # a rule for each guidance branch of one expert
