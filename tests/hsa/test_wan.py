"""The Wan adapter on one transformer: subsets are exact, stale keys and values matter."""

from contextlib import contextmanager

import pytest
import torch

from hsa.allocation import Rows
from hsa.kv_cache import Branch, Forward
from hsa.wan import WanAdapter
from tests.pipelines import wan_i2v, wan_t2v

N = 48
ACTIVE = torch.arange(N) % 5 == 2


def t2v():
    return wan_t2v().transformer, model_inputs(channels=16, timestep=torch.tensor([700.0, 300.0]))


def per_token_timesteps():
    timestep = torch.full((2, N), 700.0)
    timestep[:, : N // 3] = 0
    timestep[:, -1] = 450
    return wan_t2v().transformer, model_inputs(channels=16, timestep=timestep)


def image_tokens():
    arguments = model_inputs(channels=36, timestep=torch.tensor([700.0, 300.0]), text_tokens=512)
    return wan_i2v().transformer, arguments | {"encoder_hidden_states_image": noise(2, 5, 4)}


def fused_projections():
    model, arguments = t2v()
    model.fuse_qkv_projections()
    return model, arguments


def bfloat16():
    model, arguments = t2v()
    arguments = {name: tensor.bfloat16() for name, tensor in arguments.items()}
    return model.to(torch.bfloat16), arguments


VARIANTS = [t2v, per_token_timesteps, image_tokens, fused_projections, bfloat16]


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def model_inputs(channels, timestep, text_tokens=7):
    return {
        "hidden_states": noise(2, channels, 3, 8, 8),
        "timestep": timestep,
        "encoder_hidden_states": noise(2, text_tokens, 32),
    }


def velocity(model, arguments):
    with torch.no_grad():
        return model(**arguments, return_dict=False)[0]


@contextmanager
def adapted(model):
    """Yields run(branch, rows, arguments) -> velocity (B, C, F, H, W)."""
    adapter = WanAdapter(model)

    def run(branch, rows, arguments):
        adapter.forward = Forward(branch, rows)
        return velocity(model, arguments)

    with adapter.installed():
        yield run


def of_tokens(active, video):
    """Values (2, C, n, 2, 2) of the marked tokens of a video (2, C, 3, 8, 8)."""
    patches = video.unfold(3, 2, 2).unfold(4, 2, 2).flatten(2, 4)
    return patches[:, :, active]


@pytest.mark.parametrize("build", VARIANTS)
def test_every_token_is_bit_identical(build):
    model, arguments = build()
    expected = velocity(model, arguments)
    with adapted(model) as run:
        assert torch.equal(run(Branch(), None, arguments), expected)
        everyone = Rows(torch.ones(2, N, dtype=torch.bool))
        branch = Branch()
        run(branch, None, arguments)
        assert torch.equal(run(branch, everyone, arguments), expected)
    assert torch.equal(velocity(model, arguments), expected)


@pytest.mark.parametrize("build", VARIANTS)
def test_subset_right_after_a_full_step_has_the_full_rows(build):
    model, arguments = build()
    with adapted(model) as run:
        branch = Branch()
        full = run(branch, None, arguments)
        branch.velocity = torch.zeros_like(branch.velocity)
        subset = run(branch, Rows(ACTIVE.expand(2, N)), arguments)
    assert torch.equal(of_tokens(ACTIVE, subset), of_tokens(ACTIVE, full))
    assert of_tokens(~ACTIVE, subset).eq(0).all()


@pytest.mark.parametrize("build", VARIANTS)
def test_samples_may_have_different_numbers_of_active_tokens(build):
    model, arguments = build()
    active = torch.stack([ACTIVE, torch.arange(N) < 3])
    with adapted(model) as run:
        branch = Branch()
        full = run(branch, None, arguments)
        branch.velocity = torch.zeros_like(branch.velocity)
        subset = run(branch, Rows(active), arguments)
    for sample in range(2):
        ours = of_tokens(active[sample], subset)[sample]
        assert torch.equal(ours, of_tokens(active[sample], full)[sample])
        assert of_tokens(~active[sample], subset)[sample].eq(0).all()


@pytest.mark.parametrize("build", VARIANTS)
@pytest.mark.parametrize("which", [0, 1], ids=["key", "value"])
def test_stale_keys_and_values_reach_the_active_tokens(build, which):
    model, arguments = build()
    with adapted(model) as run:
        branch = Branch()
        full = run(branch, None, arguments)
        for attention in (block.attn1 for block in model.blocks):
            branch.cache.layers[attention][which][:, ~ACTIVE] += 1
        subset = run(branch, Rows(ACTIVE.expand(2, N)), arguments)
    difference = of_tokens(ACTIVE, subset) - of_tokens(ACTIVE, full)
    assert difference.abs().max() > 1e-3


def test_partial_forward_updates_the_keys_of_its_rows_only():
    model, arguments = t2v()
    attention = model.blocks[1].attn1
    moved = arguments | {"hidden_states": arguments["hidden_states"] + 1}
    with adapted(model) as run:
        branch = Branch()
        run(branch, None, arguments)
        before = branch.cache.layers[attention][0].clone()
        run(branch, Rows(ACTIVE.expand(2, N)), moved)
        after = branch.cache.layers[attention][0]
    assert torch.equal(after[:, ~ACTIVE], before[:, ~ACTIVE])
    assert not torch.isclose(after[:, ACTIVE], before[:, ACTIVE]).all(dim=(2, 3)).any()


def test_foreign_attention_processor_is_refused():
    model, _ = t2v()

    class Custom:
        pass

    model.blocks[0].attn1.processor = Custom()
    with pytest.raises(ValueError, match="attn1.processor: Custom .* choices: WanAttnProcessor"):
        WanAdapter(model)
