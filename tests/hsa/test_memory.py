"""Where keys and values are kept: fp8, host memory, and the announced size."""

import logging
import math

import accelerate
import pytest
import torch

from hsa import HSAConfig, apply_hsa
from hsa.kv_cache import HostTensor
from hsa.memory import KVMemory, pinned
from hsa.schedulers import euler
from hsa.trace import blocks
from tests.pipelines import ALL, TOKENS, guidance, inputs, sample

SETTING = {"budgets": (8, 4, 2), "fractions": (0.1, 0.3, 0.6), "warmup_steps": 2}
N = TOKENS[0] * TOKENS[1] * TOKENS[2]
some_pipelines = pytest.mark.parametrize(
    "name", ["wan_t2v", "wan_i2v", "wan22_t2v", "ti2v_t2v", "ltx_i2v", "ltx2_t2v", "ltx23_i2v"]
)


def hsa(pipe, **setting):
    with apply_hsa(pipe, HSAConfig(**SETTING | setting)):
        return sample(pipe)


@some_pipelines
def test_host_memory_changes_nothing(name):
    pipe = ALL[name]()
    assert torch.equal(hsa(pipe, kv_device="host"), hsa(pipe))
    assert torch.equal(hsa(pipe, kv_device="host", kv_dtype="fp8"), hsa(pipe, kv_dtype="fp8"))


@some_pipelines
@pytest.mark.parametrize("kv_device", ["model", "host"])
def test_every_token_active_is_flow_matching_whatever_the_cache_holds(name, kv_device):
    pipe = ALL[name]()
    everyone = {"fractions": None, "thresholds": (0.0, 0.0), "kv_device": kv_device}
    with euler(pipe):
        expected = sample(pipe)
    assert torch.equal(hsa(pipe, kv_dtype="fp8", **everyone), expected)


@some_pipelines
def test_fp8_is_close(name):
    pipe = ALL[name]()
    exact, fp8 = hsa(pipe), hsa(pipe, kv_dtype="fp8")
    error = (fp8 - exact).norm() / exact.norm()
    assert 0 < error < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_keeps_three_bits_of_mantissa(dtype):
    """Half a step of e4m3 is 2**-4 of the value; small values lose more, relative to the scale."""
    from hsa.kv_cache import LayerCache

    x = torch.randn(2, 9, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype) * 50
    cache = LayerCache(fp8=True)
    back = cache._decode(*cache._encode(x)).float()
    largest = x.float().abs().amax(-1, keepdim=True)
    smallest_normal = largest / 440 * 2.0**-6
    error = (back - x.float()).abs()
    assert (error <= x.float().abs() * 2.0**-4 * 1.05 + smallest_normal * 2.0**-4).all()
    assert back.isfinite().all()
    assert cache._decode(*cache._encode(torch.zeros(1, 1, 1, 4, dtype=dtype))).eq(0).all()


def stored_bytes(pipe, **setting):
    """Bytes kept after the first and after a later step, and the announced line's total."""
    sizes = []

    def count(pipe, step, timestep, tensors):
        sizes.append(sum(cache_bytes(cache) for cache in caches))
        return {}

    caches = set()
    with apply_hsa(pipe, HSAConfig(**SETTING | setting)):
        handles = [
            module.register_forward_hook(lambda layer, *_: caches.add(layer.kv_cache))
            for module in pipe.transformer.modules()
            if hasattr(module, "kv_cache")
        ]
        pipe(**inputs(pipe, **guidance(pipe, on=False), callback_on_step_end=count))
        for handle in handles:
            handle.remove()
    return sizes


def cache_bytes(cache):
    return sum(x.numel() * x.element_size() for x in cache.stored)


@pytest.mark.parametrize("kv_dtype", ["model", "fp8"])
@pytest.mark.parametrize("name", ["wan_t2v", "ltx_t2v", "ltx2_t2v"])
def test_announced_size_is_what_is_kept_and_does_not_grow(name, kv_dtype, caplog):
    pipe = ALL[name]()
    with caplog.at_level(logging.INFO, logger="hsa"):
        sizes = stored_bytes(pipe, kv_dtype=kv_dtype)
    assert len(set(sizes)) == 1
    (record,) = caplog.records
    assert f"{sizes[0] / 1e9:.3g} GB on cpu" in record.message
    assert record.levelno == logging.INFO


class Weights(accelerate.hooks.ModelHook):
    """Says into the log when model CPU offload would move them in."""

    def pre_forward(self, module, *args, **kwargs):
        logging.getLogger("hsa").info("weights")
        return args, kwargs


@pytest.mark.parametrize("offload_first", [True, False])
@pytest.mark.parametrize("name", ["wan_t2v", "wan_ti2v", "ltx_t2v", "ltx23_t2v"])
def test_room_is_measured_once_for_a_video_and_when_the_weights_are_in(name, offload_first, caplog):
    pipe = ALL[name]()
    if offload_first:
        accelerate.hooks.add_hook_to_module(pipe.transformer, Weights())
    with caplog.at_level(logging.INFO, logger="hsa"), apply_hsa(pipe, HSAConfig(**SETTING)):
        if not offload_first:
            accelerate.hooks.add_hook_to_module(pipe.transformer, Weights())
        for _ in range(2):
            caplog.clear()
            sample(pipe)
            forwards = caplog.messages.count("weights")
            assert forwards == len(caplog.messages) - 1
            assert caplog.messages[0] == "weights" and caplog.messages[1].startswith("K/V of ")


def pinned_bytes(pieces):
    """torch rounds every pinned block up to a power of two."""
    return sum(2 ** math.ceil(math.log2(len(piece))) for piece in pieces)


@pytest.mark.parametrize("kv_dtype", ["model", "fp8"])
@pytest.mark.parametrize("name", ["wan_t2v", "ltx_t2v"])
def test_announced_host_memory_is_what_is_pinned(name, kv_dtype, caplog):
    pipe, caches, taken = ALL[name](), set(), []
    layers = [block.attn1 for block in blocks(pipe.transformer)]

    def count(pipe, step, timestep, tensors):
        tensors = [kept for cache in caches for kept in cache.stored]
        taken.append(pinned_bytes(x for kept in tensors for x in kept.pieces))
        return {}

    config = HSAConfig(**SETTING, kv_dtype=kv_dtype, kv_device="host")
    with caplog.at_level(logging.INFO, logger="hsa"), apply_hsa(pipe, config):
        for layer in layers:
            layer.register_forward_hook(lambda layer, *_: caches.add(layer.kv_cache))
        sample(pipe, prompt=["a star"] * 3, negative_prompt=[""] * 3, callback_on_step_end=count)
    assert f", {taken[0] / 1e9:.3g} GB on the host" in caplog.messages[0]


@pytest.mark.parametrize("shape", [(1, 48, 2, 12), (3, 47, 5, 7), (2, 5, 3, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_pieces_take_what_is_counted_and_little_more_than_the_tensor(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(50).to(dtype)
    kept = HostTensor(x, pinned=False)
    kept.copy_(x)
    assert torch.equal(kept.to("cpu"), x)
    kept.copy_(x.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(kept.to("cpu"), x)
    size = x[0].numel() * x.element_size()
    assert pinned_bytes(kept.pieces) == len(x) * pinned(size)
    assert size <= pinned(size) < size * (1 + 1 / 16)


def test_size_on_the_host_by_hand():
    """A14B: K of a pass has 335,462,400 bytes, 10 pieces of 32 MiB where one block had 512 MiB."""
    a14b = wan_1_3b(layers=((5120, 40),) * 40, passes=1)
    assert a14b.needed("model", "host")[1] == 2 * 40 * 10 * 2**25
    # one byte a channel: 10 pieces of 16 MiB; scales: 9 of 256 KiB and one of 261,504 bytes
    assert a14b.needed("fp8", "host")[1] == 2 * 40 * (10 * 2**24 + 10 * 2**18)


def wan_1_3b(**changes):
    """Wan2.1-1.3B at 480 x 832 x 81 with guidance, in bfloat16."""
    arguments = {
        "tokens": 32760,
        "passes": 2,
        "layers": ((1536, 12),) * 30,
        "itemsize": 2,
        "device": torch.device("cpu"),
    }
    return KVMemory(**arguments | changes)


def test_size_on_wan():
    """2 tensors x 32760 tokens x 1536 channels x 2 bytes x 30 layers = 6.04 GB a pass."""
    assert wan_1_3b().total() == 2 * 2 * 32760 * 1536 * 2 * 30
    assert wan_1_3b().total() / 2e9 == pytest.approx(6.04, abs=0.01)
    a14b = wan_1_3b(layers=((5120, 40),) * 40, passes=1)
    assert a14b.total() / 1e9 == pytest.approx(26.8, abs=0.1)
    assert wan_1_3b().total("fp8") / wan_1_3b().total() == pytest.approx(0.5 + 1 / 128)


def test_policy_that_fits_is_named(monkeypatch):
    memory = wan_1_3b()
    line = {}
    for room in (13e9, 7e9, 12.5e9, 1e9):
        monkeypatch.setattr("hsa.memory.free", lambda device, room=room: int(room))
        line[room] = memory.describe("model", "model")
    assert line[13e9].endswith("kv_dtype=model, kv_device=model")
    assert line[7e9].endswith("does not fit; kv_dtype=fp8, kv_device=model does")
    assert "12.1 GB on cpu" in line[12.5e9] and "does not fit" not in line[12.5e9]
    assert line[1e9].endswith("nor does any other: smaller or shorter videos would")


@pytest.mark.parametrize("name, value", [("kv_dtype", "int8"), ("kv_device", "disk")])
def test_unknown_policy_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: '{value}'; choices: model"):
        HSAConfig(**SETTING, **{name: value})
