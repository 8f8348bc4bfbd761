"""The adapters on one transformer: subsets are exact, stale keys and values matter.

Arguments are what each pipeline really passes, captured from its first step: one call a guidance
branch.
"""

from contextlib import contextmanager
from functools import cache

import pytest
import torch

from hsa.adapter import Branch, Forward
from hsa.allocation import Rows
from hsa.engine import ADAPTERS
from tests import pipelines

CPU = torch.device("cpu")


@cache
def calls(name: str) -> list[dict]:
    """Keyword arguments of the transformer in the first step of two videos."""
    pipe, found = pipelines.ALL[name](), []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs), with_kwargs=True
    )

    def stop(pipe, step, timestep, tensors):
        raise StopIteration

    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    prompts = {"prompt": ["a red circle", "a star"], "negative_prompt": [pipelines.NEGATIVE] * 2}
    with pytest.raises(StopIteration):
        pipelines.sample(pipe, **prompts, generator=generators, callback_on_step_end=stop)
    handle.remove()
    return found


def plain(name, call):
    return pipelines.ALL[name]().transformer, calls(name)[call]


def fused(name, call):
    model, arguments = plain(name, call)
    model.fuse_qkv_projections()
    return model, arguments


def bfloat16(name, call):
    model, arguments = plain(name, call)
    lower = {
        key: value.bfloat16() if torch.is_tensor(value) and "coords" not in key else value
        for key, value in arguments.items()
    }
    return model.to(torch.bfloat16), lower


def passes(name: str) -> int:
    """Calls a step that differ in more than the prompt."""
    return 3 if name.startswith("ltx2") else 1


CASES = [
    *((plain, name, call) for name in pipelines.ALL for call in range(passes(name))),
    (fused, "wan_t2v", 0),
    (fused, "wan_i2v", 0),
    (bfloat16, "wan_t2v", 0),
    (bfloat16, "ltx2_t2v", 0),
    (bfloat16, "ltx23_i2v", 0),
]
of_cases = pytest.mark.parametrize(
    "build, name, call", CASES, ids=lambda value: getattr(value, "__name__", str(value))
)


@contextmanager
def adapted(model):
    """Yields run(branch, rows, arguments) -> outputs of the model, videos as tokens (B, N, C)."""
    adapter = ADAPTERS[type(model).__name__](model)

    def run(branch, rows, arguments):
        _, kwargs = adapter.begin(Forward(branch, rows), (), arguments)
        output = adapter.scatter(outputs(model, kwargs))
        adapter.end()
        return tokens(output)

    with adapter.installed():
        yield run


def outputs(model, arguments):
    with torch.no_grad():
        return model(**arguments)


def tokens(output: tuple) -> tuple:
    """The video, (B, C, F, H, W) in patches of 1 x 2 x 2 or packed, as (B, N, C); the rest."""
    video, *rest = output
    if video.ndim == 5:
        patches = video.unfold(3, 2, 2).unfold(4, 2, 2)  # (B, C, F, h, w, 2, 2)
        video = patches.flatten(5).movedim(1, 4).flatten(1, 3).flatten(2)
    return video.clone(), *rest


def fresh() -> Branch:
    return Branch(CPU)


def some(model_output, every: int = 5) -> torch.Tensor:
    """(B, N) bool, other tokens in the last sample than in the others, and fewer."""
    active = torch.arange(model_output.shape[1]) % every == 2
    active = active.repeat(len(model_output), 1)
    active[-1] = torch.arange(model_output.shape[1]) < 3
    return active


def kept(branch) -> list[tuple[torch.Tensor, ...]]:
    """The stored tensors of each layer that has any, in the order of the layers."""
    return [cache.stored for cache in branch.caches.values() if cache.stored]


@of_cases
def test_every_token_is_bit_identical(build, name, call):
    model, arguments = build(name, call)
    expected = tokens(outputs(model, arguments))
    everyone = torch.ones(expected[0].shape[:2], dtype=torch.bool)
    with adapted(model) as run:
        branch = fresh()
        for rows in (None, Rows(everyone), None):
            for got, wanted in zip(run(branch, rows, arguments), expected, strict=True):
                assert torch.equal(got, wanted)
    again = tokens(outputs(model, arguments))
    assert all(torch.equal(got, wanted) for got, wanted in zip(again, expected, strict=True))


@of_cases
def test_subset_right_after_a_full_step_has_the_full_rows(build, name, call):
    model, arguments = build(name, call)
    with adapted(model) as run:
        branch = fresh()
        full, *others = run(branch, None, arguments)
        branch.velocity = torch.zeros_like(branch.velocity)
        active = some(full)
        subset, *others_again = run(branch, Rows(active), arguments)
    # BLAS may take another kernel for another number of rows: rounding, no more
    torch.testing.assert_close(subset[active], full[active], rtol=0, atol=1e-6)
    assert subset[~active].eq(0).all()
    for audio, before in zip(others_again, others, strict=True):
        torch.testing.assert_close(audio, before, rtol=0, atol=1e-6)


@of_cases
@pytest.mark.parametrize("which", [0, 1], ids=["key", "value"])
def test_stale_keys_and_values_reach_the_active_tokens(build, name, call, which):
    model, arguments = build(name, call)
    with adapted(model) as run:
        branch = fresh()
        full, *others = run(branch, None, arguments)
        active = some(full)
        for stored in kept(branch):
            stored[which][~active] += 1
        subset, *others_again = run(branch, Rows(active), arguments)
    assert (subset - full)[active].abs().max() > 1e-3
    for audio, before in zip(others_again, others, strict=True):
        if not arguments["isolate_modalities"]:
            assert (audio - before).abs().max() > 1e-4


def test_partial_forward_updates_the_keys_of_its_rows_only():
    model, arguments = plain("wan_t2v", 0)
    moved = arguments | {"hidden_states": arguments["hidden_states"] + 1}
    with adapted(model) as run:
        branch = fresh()
        full, *_ = run(branch, None, arguments)
        key = branch.cache(model.blocks[1].attn1).stored[0]
        before, address = key.clone(), key.data_ptr()
        active = some(full)
        run(branch, Rows(active), moved)
        assert branch.cache(model.blocks[1].attn1).stored[0].data_ptr() == address
    assert torch.equal(key[~active], before[~active])
    assert not torch.isclose(key[active], before[active]).all(dim=(1, 2)).any()


def test_caches_of_each_guidance_pass_of_ltx2():
    """Full passes keep K/V of self-attention and v2a in each block; STG has none where attention
    is replaced by its values; isolated modalities do not meet."""
    model, _ = plain("ltx23_t2v", 0)
    blocks = len(model.transformer_blocks)
    found = []
    for arguments in calls("ltx23_t2v"):
        branch = fresh()
        with adapted(model) as run:
            run(branch, None, arguments)
        found.append(len(kept(branch)))
    assert found == [2 * blocks, 2 * blocks - 1, blocks]


def test_foreign_attention_processor_is_refused():
    model, _ = plain("wan_t2v", 0)

    class Custom:
        pass

    model.blocks[0].attn1.processor = Custom()
    with pytest.raises(ValueError, match="processor: Custom .* choices: WanAttnProcessor"):
        ADAPTERS["WanTransformer3DModel"](model)


def test_tokens_appended_to_the_video_are_refused():
    model, arguments = plain("ltx2_t2v", 0)
    with adapted(model) as run, pytest.raises(ValueError, match="hidden_states: .* tokens for a"):
        run(fresh(), None, arguments | {"num_frames": 1})
