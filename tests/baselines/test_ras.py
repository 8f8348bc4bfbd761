"""RAS against its rule written once more over Python lists, and against a run that gathers nothing.

The naive rule sees what the released code ranks: how far the latents have moved in the last step.
"""

from contextlib import ExitStack
from math import exp
from statistics import fmean, stdev

import pytest
import torch

from baselines.base import Request
from baselines.ras import RAS, dropped
from hsa.schedulers import euler
from hsa.trace import experts
from tests import pipelines
from tests.hsa.reference import pixels, stale_rows_kept

STEPS = 10
N = 48  # tokens: 3 frames of 4 x 4
FIRST_FRAME = set(range(16))
REQUEST = Request("t2v", "a red circle", "", 0, STEPS, 4.0, 64, 64, 9, 32)
GIVEN = ("wan_ti2v", "ltx2_i2v", "ltx23_i2v", "ltx25_i2v", "ltx_i2v")
EXPERT_BEGINS = {"wan22_t2v": 4, "wan22_i2v": 3}  # step at which the second one takes over
SETTINGS = {
    "released": {},
    "fixed": {"starvation": "sign-fixed", "starvation_scale": 0.5},
    "norm": {"metric": "l2norm", "sample_ratio": 0.3},
    "both_ends": {"high_ratio": 0.3, "starvation_scale": 1.0},
    "both_ends_fixed": {"high_ratio": 0.3, "starvation_scale": 1.0, "starvation": "sign-fixed"},
    "low_end": {"high_ratio": 0.0, "sample_ratio": 0.8},
}


def ras(**settings) -> RAS:
    return RAS(**{"start_step": 2, "reset_steps": [6]} | settings)


def num_dropped(method: RAS, step: int) -> int:
    dense = step < method.start_step or step in method.reset_steps
    return 0 if dense else int((1 - method.sample_ratio) * N)


class Naive:
    """Token numbers that run at each step, and how often each was left out."""

    def __init__(self, method: RAS, given: set[int]) -> None:
        self.method, self.given = method, given
        self.drops = [0] * N

    def running(self, step: int, moved: torch.Tensor) -> set[int]:
        """`moved` is the last change of the latents, (1, C, F, H, W) or (1, N, C)."""
        method = self.method
        count = num_dropped(method, step)
        out = sorted(self.given)[:count]
        free = [token for token in range(N) if token not in self.given]
        metric = [self.metric(channels) for channels in token_pixels(moved)]
        factor = [exp(method.starvation_scale * drops) for drops in self.drops]
        grown = [m * f for m, f in zip(metric, factor, strict=True)]
        shrunk = [m / f for m, f in zip(metric, factor, strict=True)]
        rest = count - len(out)
        lowest = sorted(free, key=lambda token: grown[token])[: int(rest * (1 - method.high_ratio))]
        high = shrunk if method.starvation == "sign-fixed" else grown
        left = [token for token in free if token not in lowest]
        highest = sorted(left, key=lambda token: -high[token])[: int(rest * method.high_ratio)]
        for token in out + lowest + highest:
            self.drops[token] += 1
        return set(range(N)) - set(out + lowest + highest)

    def metric(self, pixels: list[list[float]]) -> float:
        if self.method.metric == "std":
            return fmean(stdev(channels) for channels in pixels)
        return fmean(sum(x * x for x in channels) ** 0.5 for channels in pixels)


def token_pixels(x: torch.Tensor) -> list[list[list[float]]]:
    """Channels of every latent pixel of every token, of the last video in x."""
    return as_tokens(x)[-1].tolist()


def as_tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, C, F, H, W) in patches of 1 x 2 x 2, or packed (B, N, C), as (B, N, pixels, C)."""
    if x.ndim == 3:
        return x[:, :, None]
    patches = x.unfold(3, 2, 2).unfold(4, 2, 2)  # (B, C, F, h, w, 2, 2)
    return patches.flatten(5).movedim(1, -1).flatten(1, 3)


def observed(pipe, method):
    """What ran by the velocities, {(step, call): tokens}; the latents after each step; the trace.

    A token that did not run returns the velocity that it had a step before, to the bit.
    """
    ran, last, path = {}, {}, []

    def velocity(module, args, output):
        step = pipe.scheduler.step_index or 0
        call = sum(at == step for at, _ in ran)
        new = as_tokens(output[0]).clone()
        old = last.get((module, call))
        changed = torch.ones(new.shape[:2]) if old is None else (new != old).any(3).any(2)
        assert (changed == changed[-1]).all()  # all samples of [uncond, cond]
        ran[step, call] = set(changed[-1].nonzero().flatten().tolist())
        last[module, call] = new

    def keep(pipe, step, timestep, tensors):
        path.append(tensors["latents"].clone())
        return {}

    with method.attach(pipe, REQUEST) as trace, ExitStack() as stack:
        for transformer in experts(pipe).values():
            stack.callback(transformer.register_forward_hook(velocity).remove)
        pipelines.sample(pipe, steps=STEPS, callback_on_step_end=keep)
    return ran, path, trace


CASES = [("wan_t2v", setting) for setting in SETTINGS]
CASES += [("ltx2_t2v", "both_ends_fixed"), ("ltx_i2v", "norm"), ("wan_ti2v", "both_ends")]
CASES += [(name, "released") for name in pipelines.ALL if name != "wan_t2v"]


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_tokens_that_run_are_those_of_the_rule(name, setting):
    pipe, method = pipelines.ALL[name](), ras(**SETTINGS[setting])
    given = FIRST_FRAME if name in GIVEN else set()
    naive = Naive(method, given)
    ran, path, trace = observed(pipe, method)
    calls = len(ran) // STEPS
    for step in range(STEPS):
        expected = set(range(N))
        if step >= method.start_step and step != EXPERT_BEGINS.get(name):
            expected = naive.running(step, path[step - 1] - path[step - 2])
        assert all(ran[step, call] == expected for call in range(calls)), step
        for record in trace.records[step * calls : (step + 1) * calls]:
            assert (record.step, record.active_tokens) == (step, len(expected))
    assert given.isdisjoint(ran[STEPS - 1, 0])


def naive_latents(pipe, method):
    """RAS on a Wan pipeline of its own loop: every token runs, stale rows are put back."""
    naive, memory, state = Naive(method, set()), {}, {"step": -1}

    def start(module, args, kwargs):
        step, x = pipe.scheduler.step_index or 0, kwargs["hidden_states"]
        if step != state["step"]:
            everyone = step < method.start_step or (module, 0) not in memory
            moved = None if everyone else x - state["x"]
            running = range(N) if everyone else naive.running(step, moved)
            active = torch.tensor([token in running for token in range(N)])
            state.update(step=step, call=0, x=x.clone(), active=active)
        kept = memory.setdefault((module, state["call"]), {})
        state["rows"] = stale_rows_kept(module, state["active"], kept)
        state["rows"].__enter__()

    def finish(module, args, output):
        state["rows"].__exit__(None, None, None)
        kept, new = memory[module, state["call"]], output[0]
        kept["velocity"] = torch.where(pixels(state["active"], new), new, kept.get("velocity", new))
        state["call"] += 1
        return (kept["velocity"],)

    with euler(pipe), ExitStack() as stack:
        for transformer in experts(pipe).values():
            stack.callback(transformer.register_forward_pre_hook(start, with_kwargs=True).remove)
            stack.callback(transformer.register_forward_hook(finish).remove)
        return pipelines.sample(pipe, steps=STEPS)


@pytest.mark.parametrize("name", ["wan_t2v", "wan22_t2v"])
@pytest.mark.parametrize("setting", ["released", "both_ends_fixed"])
def test_video_is_that_of_a_run_that_gathers_nothing(name, setting):
    pipe, method = pipelines.ALL[name](), ras(**SETTINGS[setting])
    with method.attach(pipe, REQUEST):
        latents = pipelines.sample(pipe, steps=STEPS)
    torch.testing.assert_close(latents, naive_latents(pipe, method), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["wan_t2v", "ltx_t2v", "ltx_i2v", "ltx25_t2v"])
def test_every_token_is_flow_matching(name):
    pipe = pipelines.ALL[name]()
    with euler(pipe):
        expected = pipelines.sample(pipe, steps=STEPS)
    with ras(sample_ratio=1.0).attach(pipe, REQUEST) as trace:
        assert torch.equal(pipelines.sample(pipe, steps=STEPS), expected)
    assert trace.active_fraction == 1


def updates(sign: int, scale: float, high_ratio: float, steps: int = 24) -> torch.Tensor:
    """How often each of 1024 tokens of lasting metrics runs when half of them do at each step."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1024, generator=generator)
    drops, given = torch.zeros(1024), torch.zeros(1024, dtype=torch.bool)
    for _ in range(steps):
        metric = (0.3 * (base + torch.randn(1024, generator=generator))).exp()
        low, high = metric * (scale * drops).exp(), metric * (sign * scale * drops).exp()
        drops += dropped(low, high, given, 512, high_ratio)
    return steps - drops


def test_released_term_starves_and_the_fixed_one_does_not():
    """At the high end. At the low end, where they are one and the same, the term protects."""

    def never(counts):
        return (counts == 0).float().mean().item()

    without = never(updates(1, 0.0, 1.0))
    assert 0 < without < 0.1
    assert never(updates(1, 0.1, 1.0)) > 2 * without
    assert never(updates(1, 1.0, 1.0)) > 0.45
    assert never(updates(-1, 0.1, 1.0)) == 0
    assert updates(-1, 1.0, 1.0).min() >= 10
    assert never(updates(1, 0.0, 0.0)) > 0 == never(updates(1, 0.1, 0.0))


def test_variants_differ_at_the_high_end_alone():
    pipe = pipelines.wan_t2v()
    videos = {}
    for high_ratio in (0.0, 1.0):
        for starvation in ("released", "sign-fixed"):
            method = ras(high_ratio=high_ratio, starvation=starvation, starvation_scale=0.5)
            with method.attach(pipe, REQUEST):
                videos[high_ratio, starvation] = pipelines.sample(pipe, steps=STEPS)
    assert torch.equal(videos[0.0, "released"], videos[0.0, "sign-fixed"])
    assert not torch.equal(videos[1.0, "released"], videos[1.0, "sign-fixed"])


def test_keys_and_values_are_kept_as_told():
    """Sign-fixed, so that tokens which were left out run again and need what was kept of them."""
    pipe, videos = pipelines.wan_t2v(), {}
    for policy in (("model", "model"), ("model", "host"), ("fp8", "model")):
        method = ras(starvation="sign-fixed", kv_dtype=policy[0], kv_device=policy[1])
        with method.attach(pipe, REQUEST):
            videos[policy] = pipelines.sample(pipe, steps=STEPS)
    exact, host, fp8 = videos.values()
    assert torch.equal(host, exact)
    assert 0 < (fp8 - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("count", [0, 7, 16, 30])
def test_given_tokens_are_left_out_first(count):
    metric = torch.rand(N, generator=torch.Generator().manual_seed(0))
    given = torch.arange(N) < 16
    drop = dropped(metric, metric, given, count, 1.0)
    assert drop.sum() == count
    assert drop[given].sum() == min(count, 16)
    assert (
        not drop.any() or count <= 16 or metric[~drop & ~given].max() < metric[drop & ~given].min()
    )


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"sample_ratio": 0}, "ras.sample_ratio=0: choose a number above 0, at most 1"),
        ({"sample_ratio": 1.5}, "ras.sample_ratio=1.5: choose"),
        ({"start_step": 0}, r"ras.start_step=0: choose a whole number in 1\.\.10"),
        ({"start_step": 11}, "ras.start_step=11: choose"),
        ({"reset_steps": [1]}, r"ras.reset_steps=\(1,\): choose whole numbers in 2\.\.9"),
        ({"reset_steps": [10]}, r"ras.reset_steps=\(10,\): choose"),
        ({"reset_steps": 6}, "ras.reset_steps=6: choose"),
        ({"metric": "l1"}, "ras.metric='l1': choose one of std, l2norm"),
        ({"high_ratio": -0.1}, r"ras.high_ratio=-0.1: choose a number in 0\.\.1"),
        ({"starvation": "none"}, "ras.starvation='none': choose one of released, sign-fixed"),
        ({"kv_dtype": "int8"}, "ras.kv_dtype='int8': choose one of model, fp8"),
        ({"starvation_scale": -1}, "ras.starvation_scale=-1: choose a number >= 0"),
    ],
    ids=repr,
)
def test_bad_setting_is_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint) as refusal:
        ras(**settings).validate(REQUEST)
    assert "\n" not in str(refusal.value)
