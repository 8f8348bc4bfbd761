"""Each attention context against the same thing done naively, on every token."""

from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch

from baselines.hsa import HSA
from baselines.hsa_context import CONTEXTS, HSAContext
from tests.baselines import cases
from tests.baselines.cases import latents, pipe_of, request
from tests.hsa import reference

SETTING = {"budgets": (8, 4, 1), "fractions": (0.1, 0.3, 0.6), "warmup_steps": 3}


def run(method, pipeline, seed=0):
    pipe = pipe_of(pipeline)
    asked = request(pipe, seed, steps=method.budgets[0])
    with method.attach(pipe, asked) as trace:
        return latents(pipe(**asked.kwargs(pipe))), trace


@contextmanager
def hooked(modules, hook, pre=False):
    """`hook(index, value)` replaces what goes into, or comes out of, each module."""
    with ExitStack() as stack:
        for index, module in enumerate(modules):
            if pre:
                handle = module.register_forward_pre_hook(
                    lambda module, args, index=index: (hook(index, args[0]), *args[1:])
                )
            else:
                handle = module.register_forward_hook(
                    lambda module, args, output, index=index: hook(index, output)
                )
            stack.callback(handle.remove)
        yield


def keys_and_values(model):
    return [layer for block in model.blocks for layer in (block.attn1.norm_k, block.attn1.to_v)]


def frozen(model, active, memory):
    def keep(index, output):
        if active.all():
            memory[index] = output
        return torch.where(active[None, :, None], output, memory[index])

    return hooked(keys_and_values(model), keep)


@contextmanager
def invisible(model, active, memory):
    def masked(module, args):
        return (*args[:2], active[None, None, None], *args[3:])

    with ExitStack() as stack:
        for block in model.blocks:
            stack.callback(block.attn1.register_forward_pre_hook(masked).remove)
        yield


def extrapolated(model, active, memory):
    sigma = memory["sigma"]

    def keep(index, output):
        runs = memory.setdefault(index, [[] for _ in active])  # of each token: (sigma, row)
        seen = output.clone()
        for token, computed in enumerate(active):
            if computed:
                runs[token].append((sigma, output[:, token].clone()))
            elif len(runs[token]) == 1:
                seen[:, token] = runs[token][0][1]
            else:
                (before, older), (last, newer) = runs[token][-2:]
                slope = (newer - older) / (last - before)
                seen[:, token] = newer + (sigma - last) * slope
        return seen

    return hooked(keys_and_values(model), keep)


def refreshed(model, active, memory):
    def keep(index, tokens):
        if index in memory:
            tokens = torch.where(active[None, :, None], tokens, memory[index])
        memory[index] = tokens
        return tokens

    return hooked(model.blocks, keep, pre=True)


NAIVE = {
    "synchronised": reference.stale_rows_kept,
    "frozen": frozen,
    "invisible": invisible,
    "extrapolated": extrapolated,
    "refreshed": refreshed,
    "fresh": lambda model, active, memory: nullcontext(),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("pipeline", ["wan_t2v", "ti2v_i2v", "wan22_t2v"])
def test_context_is_the_naive_one(pipeline, context):
    method = HSAContext(**SETTING, context=context)
    pipe = pipe_of(pipeline)
    arguments = request(pipe, steps=8).kwargs(pipe)
    expected, groups = reference.wan_latents(pipe, method.config, arguments, NAIVE[context])
    found, trace = run(method, pipeline)
    assert torch.equal(trace.allocation.flatten(), groups)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_contexts_differ():
    found = [run(HSAContext(**SETTING, context=context), "wan_t2v")[0] for context in CONTEXTS]
    for index, one in enumerate(found):
        assert all((one - other).abs().max() > 1e-4 for other in found[:index])


@pytest.mark.parametrize("pipeline", ["ti2v_i2v", "ltx2_t2v"])
def test_default_is_hsa(pipeline):
    assert torch.equal(run(HSAContext(**SETTING), pipeline)[0], run(HSA(**SETTING), pipeline)[0])


@pytest.mark.parametrize("pipeline", ["ltx2_t2v", "ltx2_i2v"])
def test_with_two_groups_the_last_run_is_the_last_full_step(pipeline):
    two = {"budgets": (8, 2), "fractions": (0.4, 0.6), "warmup_steps": 2}
    expected = run(HSA(**two), pipeline)[0]
    assert torch.equal(run(HSAContext(**two, context="frozen"), pipeline)[0], expected)
    for context in ("invisible", "extrapolated", "fresh"):
        found = run(HSAContext(**two, context=context), pipeline)[0]
        assert found.isfinite().all() and not torch.equal(found, expected)


def test_fresh_costs_a_full_run():
    found = run(HSAContext(**SETTING, context="fresh"), "wan_t2v")[1]
    usual = run(HSA(**SETTING), "wan_t2v")[1]
    assert found.active_fraction == 1
    assert found.expected_fraction == pytest.approx(usual.active_fraction)


def test_invisible_refuses_a_batch_of_unequal_samples():
    pipe = pipe_of("wan_t2v")
    change = run(HSA(**SETTING), "wan_t2v")[1].velocity_change
    method = HSAContext(
        budgets=(8, 4), thresholds=(change.median().item(),), warmup_steps=3, context="invisible"
    )
    asked = request(pipe, steps=8)
    both = asked.kwargs(pipe) | {
        "prompt": [asked.prompt, "another"],
        "negative_prompt": [asked.negative_prompt] * 2,
        "generator": [torch.Generator().manual_seed(seed) for seed in (0, 1)],
    }
    with method.attach(pipe, asked), pytest.raises(ValueError, match="one video at a time"):
        pipe(**both)


def test_refreshed_refuses_other_transformers_than_wans():
    method, pipe = HSAContext(**SETTING, context="refreshed"), pipe_of("ltx2_t2v")
    with (
        pytest.raises(ValueError, match="hsa_context: context=refreshed"),
        method.attach(pipe, cases.request(pipe, steps=8)),
    ):
        pass
