"""DDiT on the embedded model, whose coarse patches it has; its rule and its layers by other means.

The layers are held to diffusers' own transformer, built with coarse patches from the start.
"""

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from baselines.base import Request
from baselines.ddit import DDiT
from baselines.flow_matching import FlowMatching
from baselines.patches import CoarsePatches, identity, load_patches
from experiments.embedded import load, prompts
from tests.baselines.cases import fingerprint, observe, pipe_of, request, sample

STEPS = 8
N = 9 * 8 * 8
TASKS = ("t2v", "i2v")


@pytest.fixture(scope="module")
def pipes():
    return load().pipelines


def video(task, index=0, **extra):
    prompt = prompts("heldout", index + 1)[index]
    image = {"image": prompt.image} if task == "i2v" else {}
    sizes = {"height": 64, "width": 64, "num_frames": 9, "max_sequence_length": 16}
    extra = {"output_type": "latent", **extra}
    return Request(task, prompt.text, "", index, STEPS, 6.0, **sizes, **image, extra=extra)


def trajectory(task, pipe, method):
    """Latents before every step and after the last, and the tokens that ran, of each step."""
    latents = []

    def keep(pipe, step, timestep, tensors):
        latents.append(tensors["latents"])
        return tensors

    one = video(task, callback_on_step_end=keep)
    kwargs = one.kwargs(pipe)
    shape = (1, 16, 9, 16, 16)
    latents.append(torch.randn(shape, generator=torch.Generator().manual_seed(one.seed)))
    with method.attach(pipe, one) as trace:
        pipe(**kwargs, latents=latents[0])
    tokens = [record.active_tokens for record in trace.records if record.branch == "cond"]
    assert tokens == [r.active_tokens for r in trace.records if r.branch == "uncond"]
    return latents, tokens


def expected_detail(latents, percentile):
    """Over numpy, patch by patch; of (1, C, F, 16, 16) without a given frame."""
    displacement = [b - a for a, b in zip(latents[:-1], latents[1:], strict=True)]
    velocity = [b - a for a, b in zip(displacement[:-1], displacement[1:], strict=True)]
    (change,) = (b - a for a, b in zip(velocity[:-1], velocity[1:], strict=True))
    change = change[0].numpy().astype(np.float64)
    spreads = [
        np.std(change[:, frame, y : y + 4, x : x + 4])
        for frame in range(change.shape[1])
        for y in range(0, 16, 4)
        for x in range(0, 16, 4)
    ]
    return np.quantile(spreads, percentile)


@pytest.mark.parametrize("task", TASKS)
def test_coarse_steps_are_those_of_the_rule(pipes, task):
    def detail(latents, step):
        denoised = [x[:, :, 1:] if task == "i2v" else x for x in latents[step - 3 : step + 1]]
        return expected_detail(denoised, 0.6)

    plain, _ = trajectory(task, pipes[task], FlowMatching())
    details = [detail(plain, step) for step in range(3, STEPS)]
    method = DDiT(threshold=1.5 * float(np.median(details)), percentile=0.6)
    latents, tokens = trajectory(task, pipes[task], method)
    coarse = [step >= 3 and detail(latents, step) < method.threshold for step in range(STEPS)]
    assert tokens == [N / 4 if chosen else N for chosen in coarse]
    assert 0 < sum(coarse) < STEPS - 3


@pytest.mark.parametrize("task", TASKS)
def test_neutral_setting_is_flow_matching(pipes, task):
    one = video(task)
    neutral = DDiT().neutral(one)
    plain = sample(FlowMatching(), pipes[task], one)
    assert torch.equal(sample(neutral, pipes[task], one), plain)


@pytest.mark.parametrize("task", TASKS)
def test_run_keeps_the_contract(pipes, task):
    pipe, method = pipes[task], DDiT(threshold=1.0)
    before = fingerprint(pipe)
    run = observe(method, pipe, video(task), video(task, 1), video(task))
    assert fingerprint(pipe) == before
    first, other, again = run.latents
    assert torch.equal(again, first) and not torch.equal(other, first)
    assert run.trace.block_calls == run.block_calls == 2 * STEPS * 6
    assert run.trace.active_fraction == pytest.approx((3 + (STEPS - 3) / 4) / STEPS)
    for step in range(STEPS):
        assert not torch.equal(run.velocities[step, "cond"], run.velocities[step, "uncond"])


def test_batch_is_refused(pipes):
    pipe, method = pipes["t2v"], DDiT(threshold=1.0)
    kwargs = video("t2v").kwargs(pipe)
    kwargs |= {"prompt": [kwargs["prompt"]] * 2, "generator": None}
    with pytest.raises(ValueError, match="batch=2: choose 1, one video a call"):
        with method.attach(pipe, video("t2v")):
            pipe(**kwargs)


@pytest.mark.parametrize("pipeline", ["wan_t2v", "wan22_t2v", "ltx2_t2v"])
def test_other_models_are_refused(pipeline):
    pipe = pipe_of(pipeline)
    before = fingerprint(pipe)
    with pytest.raises(ValueError, match="ddit: .* another transformer .* model=embedded"):
        with DDiT().attach(pipe, request(pipe)):
            pass
    assert fingerprint(pipe) == before


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=32,
        num_layers=2,
    )
    patches = CoarsePatches(model)
    with torch.no_grad():
        for parameter in patches.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False), patches.requires_grad_(False)


def born_coarse(model, patches):
    """diffusers' transformer with patches of 4x4, the low-rank branches merged into its weights."""
    coarse = WanTransformer3DModel.from_config(model.config, patch_size=(1, 4, 4)).eval()
    weights = model.state_dict() | {
        "patch_embedding.weight": patches.embed.weight,
        "patch_embedding.bias": patches.embed.bias,
    }
    for name, new in (("weight", patches.unembed.weight), ("bias", patches.unembed.bias)):
        # ours: fine patches, then pixels in each; diffusers': rows and columns of the whole
        pixels = new.unflatten(0, (2, 2, 2, 2, 4)).transpose(1, 2)
        weights[f"proj_out.{name}"] = pixels.reshape(new.shape)
    layers = [f"blocks.{i}.ffn.net.{part}.weight" for i in (0, 1) for part in ("0.proj", "2")]
    for name, branch in zip(layers, patches.lora, strict=True):
        weights[name] = weights[name] + branch.up.weight @ branch.down.weight
    coarse.load_state_dict(weights)
    rope, middles = coarse.rope, 2 * torch.arange(8) + 0.5  # positions between two fine tokens
    tables = [
        get_1d_rotary_pos_embed(dim, positions, use_real=True, repeat_interleave_real=True)
        for dim, positions in (
            (rope.t_dim, torch.arange(8).float()),
            (rope.h_dim, middles),
            (rope.w_dim, middles),
        )
    ]
    rope.freqs_cos, rope.freqs_sin = (torch.cat(parts, 1) for parts in zip(*tables, strict=True))
    return coarse


def inputs(per_token):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((2, 4, 3, 8, 12), generator=generator)
    text = torch.randn((2, 5, 8), generator=generator)
    timestep = torch.tensor([900.0, 300.0])
    if per_token:
        timestep = timestep[:, None].repeat(1, 3 * 4 * 6)
        timestep[:, : 4 * 6] = 0
    return latents, timestep, text


@pytest.mark.parametrize("per_token", [False, True])
def test_forward_is_that_of_a_transformer_born_coarse(small, per_token):
    model, patches = small
    latents, timestep, text = inputs(per_token)
    with torch.no_grad():
        with patches.installed(model, lambda: True):
            velocity = model(latents, timestep, text, return_dict=False)[0]
        if per_token:
            timestep = timestep[:, : 3 * 2 * 3].clone()
            timestep[:, 2 * 3 :] = torch.tensor([[900.0], [300.0]])
        expected = born_coarse(model, patches)(latents, timestep, text, return_dict=False)[0]
        embedder = model.condition_embedder
        time = embedder.time_embedder(embedder.timesteps_proj(timestep.flatten()))
        scale = patches.detail(time).unflatten(0, (2, 3, 2, 3) if per_token else (2, 1, 1, 1))
        scale = scale.expand(2, 3, 2, 3, 4).movedim(-1, 1)  # (B, C, F, and coarse patches)
        scale = scale.repeat_interleave(4, 3).repeat_interleave(4, 4)
    blurred = latents.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).mean((4, 6), keepdim=True)
    blurred = blurred.expand(-1, -1, -1, -1, 2, -1, 2).flatten(5, 6).flatten(3, 4)
    expected += scale * (latents - blurred)
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)


def test_forward_on_fine_patches_is_untouched(small):
    model, patches = small
    with torch.no_grad():
        plain = model(*inputs(True), return_dict=False)[0]
        with patches.installed(model, lambda: False):
            assert torch.equal(model(*inputs(True), return_dict=False)[0], plain)


def test_embedder_begins_blind_to_bilinear_enlargement(small):
    model, _ = small
    fine = torch.randn(1, 4, 1, 2, 2)
    coarse = torch.nn.functional.interpolate(fine[:, :, 0], scale_factor=2, mode="bilinear")
    embedded = CoarsePatches(model).embed(coarse[:, :, None])
    torch.testing.assert_close(embedded, model.patch_embedding(fine), atol=1e-5, rtol=1e-5)


def test_weights_come_back_and_only_to_their_transformer(small, tmp_path):
    model, patches = small
    path = tmp_path / "patches.safetensors"
    patches.save(path, model)
    for name, tensor in load_patches(path, model).state_dict().items():
        assert torch.equal(tensor, patches.state_dict()[name].bfloat16().float())
    other = WanTransformer3DModel.from_config(model.config)
    assert identity(other) != identity(model)
    with pytest.raises(ValueError, match="patches.safetensors was trained for another"):
        load_patches(path, other)


@pytest.mark.parametrize(
    ("method", "size", "complaint"),
    [
        (DDiT(threshold=-1), 64, "ddit.threshold=-1: choose a number"),
        (DDiT(percentile=1.5), 64, r"ddit.percentile=1.5: choose a number in 0\.\.1"),
        (DDiT(), 56, "ddit: height=56: choose a multiple of 16"),
    ],
    ids=repr,
)
def test_bad_setting_is_refused(method, size, complaint):
    with pytest.raises(ValueError, match=complaint):
        method.validate(Request("t2v", "", "", 0, 8, 4.0, size, 64, 9, 16))
