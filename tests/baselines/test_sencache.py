"""SenCache: its rule replayed on what the transformer was given, its norms measured again."""

import pytest
import torch

from baselines.sencache import SenCache, calibrate
from hsa.schedulers import euler
from hsa.trace import experts
from tests.baselines.cases import PIPELINES, branches, fingerprint, request

STEPS = 10
TABLES = {
    "sigmas": [1.0, 0.7, 0.3],
    "latent_norms": [0.2, 0.5, 1.5],
    "time_norms": [0.4, 0.1, 2.0],
}


def inputs_of(pipe, run) -> list[tuple[str, dict, torch.Tensor]]:
    """Expert, arguments and output of the first call of every step while `run()` samples."""
    seen, calls, handles = [], [0], []
    per_step = len(branches(pipe))
    for name, transformer in experts(pipe).items():

        def note(module, args, kwargs, output, name=name):
            if calls[0] % per_step == 0:
                seen.append((name, kwargs, output[0]))
            calls[0] += 1

        handles.append(transformer.register_forward_hook(note, with_kwargs=True))
    run()
    for handle in handles:
        handle.remove()
    return seen


def noisy(kwargs: dict, channels: int) -> torch.Tensor:
    latents = kwargs["hidden_states"].double()
    return latents[:, :channels] if latents.ndim == 5 else latents


def rms(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double()) / x.numel() ** 0.5)


@pytest.mark.parametrize("pipeline", ["wan_t2v", "wan_i2v", "wan22_t2v", "ltx2_i2v"])
@pytest.mark.parametrize(
    ("threshold", "start", "skips"), [(0.3, 0.1, 3), (0.5, 0.0, 1), (9.0, 9.0, 4)]
)
def test_decides_as_the_paper(pipeline, threshold, start, skips):
    pipe = PIPELINES[pipeline]()
    one = request(pipe, steps=STEPS)
    method = SenCache(threshold, start, skips, **TABLES)
    with method.attach(pipe, one) as trace:
        seen = inputs_of(pipe, lambda: pipe(**one.kwargs(pipe)))
        sigmas = pipe.scheduler.sigmas.tolist()
    channels = getattr(pipe.transformer.config, "out_channels", 0)

    expected, cached, in_row = [], None, 0
    for step, (expert, kwargs, _) in enumerate(seen):
        skip = False
        if cached is not None and cached[0] == expert and in_row < skips:
            c = cached[1]
            row = min(range(3), key=lambda i: abs(TABLES["sigmas"][i] - sigmas[c]))
            score = TABLES["latent_norms"][row] * rms(
                noisy(kwargs, channels) - noisy(seen[c][1], channels)
            )
            score += TABLES["time_norms"][row] * (sigmas[c] - sigmas[step])
            skip = score <= (start if step < 2 else threshold)  # a fifth of 10 steps
        in_row = in_row + 1 if skip else 0
        if not skip:
            cached = expert, step
        expected.append(not skip)
    for branch in branches(pipe):
        ran = [record.block_calls > 0 for record in trace.records if record.branch == branch]
        assert ran == expected
    assert not all(expected)


@pytest.mark.parametrize("pipeline", ["wan_i2v", "ti2v_i2v", "wan22_t2v", "ltx2_t2v"])
def test_sensitivities_are_finite_differences(pipeline):
    pipe = PIPELINES[pipeline]()
    before = fingerprint(pipe)
    one = request(pipe, steps=STEPS)
    found = calibrate(pipe, [one])
    assert fingerprint(pipe) == before
    with euler(pipe) as scheduler:
        seen = inputs_of(pipe, lambda: pipe(**one.kwargs(pipe)))
        sigmas = scheduler.sigmas.tolist()
    pairs = [c for c in range(STEPS - 1) if seen[c][0] == seen[c + 1][0]]
    assert found["sigmas"] == [sigmas[c] for c in pairs]
    channels = getattr(pipe.transformer.config, "out_channels", 0)
    for place, c in enumerate(pairs):
        (expert, then, velocity), (_, now, _) = seen[c : c + 2]
        v = experts(pipe)[expert]
        with torch.no_grad():
            moved = v(**then | {"hidden_states": now["hidden_states"]})[0]
            times = {name: now[name] for name in ("timestep", "sigma") if name in now}
            later = v(**then | times)[0]
        distance = rms(noisy(now, channels) - noisy(then, channels))
        assert found["latent_norms"][place] == pytest.approx(rms(moved - velocity) / distance)
        assert found["time_norms"][place] == pytest.approx(
            rms(later - velocity) / (sigmas[c] - sigmas[c + 1])
        )


def test_norms_are_means_over_requests():
    pipe = PIPELINES["wan_t2v"]()
    requests = [request(pipe, seed, steps=4) for seed in (0, 1)]
    both = calibrate(pipe, requests)
    singles = [calibrate(pipe, [one]) for one in requests]
    for name in ("latent_norms", "time_norms"):
        means = [(a + b) / 2 for a, b in zip(*(found[name] for found in singles), strict=True)]
        assert both[name] == pytest.approx(means)
    assert both["sigmas"] == singles[0]["sigmas"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threshold": -1}, ["sencache.threshold=-1"]),
        ({"max_skips": 0}, ["sencache.max_skips=0"]),
        ({"time_norms": [1.0]}, ["time_norms", "one length"]),
        ({"sigmas": [], "latent_norms": [], "time_norms": []}, ["sencache.sigmas", "calibrate"]),
    ],
)
def test_refusals(settings, words):
    with pytest.raises(ValueError) as refusal:
        SenCache(**TABLES | settings).validate(request(PIPELINES["wan_t2v"]()))
    assert [word for word in words if word not in str(refusal.value)] == []
