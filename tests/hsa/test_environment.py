"""HSA under what else people do to a pipeline: compile, offload, other backends, fusing, LoRA."""

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from peft import LoraConfig

from hsa import HSAConfig, apply_hsa
from hsa.schedulers import euler
from hsa.trace import blocks, experts
from tests.pipelines import ALL, guidance, sample

CONFIG = HSAConfig((8, 4, 2), fractions=(0.1, 0.3, 0.6), warmup_steps=2)
families = pytest.mark.parametrize("name", ["wan_t2v", "wan22_i2v", "ltx_t2v", "ltx23_t2v"])


def hsa(pipe):
    with apply_hsa(pipe, CONFIG):
        return sample(pipe)


def plain(pipe):
    with euler(pipe):
        return sample(pipe)


class GraphCounter:
    """A torch.compile backend that runs each graph as it is and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


def test_compiled_blocks_share_their_graphs():
    """As many graphs as there are kinds of step, however many layers; none for another video."""
    config = HSAConfig((4, 1), fractions=(0.4, 0.6), warmup_steps=2)
    graphs = []
    for layers in (2, 3):
        pipe, counter = ALL["wan_t2v"](), GraphCounter()
        del blocks(pipe.transformer)[layers:]
        arguments = {"steps": 4, **guidance(pipe, on=False)}
        with apply_hsa(pipe, config):
            expected = sample(pipe, **arguments)
        torch._dynamo.reset()
        pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=counter)
        with apply_hsa(pipe, config):
            torch.testing.assert_close(sample(pipe, **arguments), expected, rtol=0, atol=1e-4)
            graphs.append(counter.graphs)
            sample(pipe, seed=1, **arguments)
        assert counter.graphs == graphs[-1]
    torch._dynamo.reset()
    assert graphs[0] == graphs[1] <= torch._dynamo.config.recompile_limit


def test_compiled_blocks_with_keys_and_values_on_the_host():
    """The exchange is outside the graphs; where they must not break, the line says what would."""
    config = HSAConfig((4, 1), fractions=(0.4, 0.6), warmup_steps=2, kv_device="host")
    arguments = {"steps": 4, **guidance(ALL["wan_t2v"](), on=False)}

    def video(**compilation):
        pipe = ALL["wan_t2v"]()
        torch._dynamo.reset()
        if compilation:
            pipe.transformer.compile_repeated_blocks(**compilation, dynamic=True, backend="eager")
        with apply_hsa(pipe, config):
            return sample(pipe, **arguments)

    torch.testing.assert_close(video(fullgraph=False), video(), rtol=0, atol=1e-4)
    line = 'kv_device="host" breaks graphs: compile with fullgraph=False'
    with pytest.raises(torch._dynamo.exc.Unsupported, match=line):
        video(fullgraph=True)
    torch._dynamo.reset()


@families
@pytest.mark.parametrize("offload_first", [True, False])
def test_model_cpu_offload(name, offload_first):
    """`enable_model_cpu_offload` puts these hooks on and renews them after every call."""
    pipe = ALL[name]()
    expected = hsa(pipe)

    def offload():
        for transformer in experts(pipe).values():
            accelerate.hooks.remove_hook_from_module(transformer, recurse=True)
            accelerate.cpu_offload_with_hook(transformer, execution_device="cpu")

    if offload_first:
        offload()
    with apply_hsa(pipe, CONFIG):
        for _ in range(2):
            offload()
            assert torch.equal(sample(pipe), expected)
    assert torch.equal(hsa(pipe), expected)


@families
@pytest.mark.parametrize("offload_first", [True, False])
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(name, offload_first, offload_type):
    pipe = ALL[name]()
    expected = hsa(pipe)

    def offload():
        for transformer in experts(pipe).values():
            apply_group_offloading(
                transformer,
                onload_device=torch.device("cpu"),
                offload_type=offload_type,
                num_blocks_per_group=1 if offload_type == "block_level" else None,
            )

    if offload_first:
        offload()
    with apply_hsa(pipe, CONFIG):
        if not offload_first:
            offload()
        for _ in range(2):
            assert torch.equal(sample(pipe), expected)


@families
@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash", "flex"])
def test_attention_backends(name, backend):
    """Every token active is the plain pipeline under that backend."""
    if backend == "_native_flash" and name.startswith("ltx"):
        pytest.skip("diffusers' native flash backend takes no text mask")
    pipe = ALL[name]()
    everyone = HSAConfig((8, 4, 2), thresholds=(0.0, 0.0), warmup_steps=2)
    with attention_backend(AttentionBackendName(backend)):
        with apply_hsa(pipe, everyone):
            latents = sample(pipe)
        torch.testing.assert_close(hsa(pipe), hsa(pipe), rtol=0, atol=0)
    torch.testing.assert_close(latents, plain(pipe), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["wan_t2v", "wan_i2v"])
def test_fused_projections(name):
    pipe = ALL[name]()
    expected = hsa(pipe)
    pipe.transformer.fuse_qkv_projections()
    torch.testing.assert_close(hsa(pipe), expected, rtol=0, atol=1e-5)


@families
def test_lora(name):
    """A loaded adapter changes the video, and every token active is still flow matching with it."""
    pipe = ALL[name]()
    before = hsa(pipe)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.transformer.add_adapter(
        LoraConfig(r=2, target_modules=targets, init_lora_weights="gaussian")
    )
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    everyone = HSAConfig((8, 4, 2), thresholds=(0.0, 0.0), warmup_steps=2)
    with apply_hsa(pipe, everyone):
        latents = sample(pipe)
    assert torch.equal(latents, plain(pipe))
    assert not torch.allclose(hsa(pipe), before, atol=1e-3)


def test_parallelism_is_refused():
    pipe = ALL["wan_t2v"]()
    pipe.transformer._parallel_config = object()  # what enable_parallelism leaves on the model
    with (
        pytest.raises(ValueError, match="transformer: parallelism is enabled"),
        apply_hsa(pipe, CONFIG),
    ):
        pass


def test_compiling_the_whole_transformer_is_refused():
    pipe = ALL["wan_t2v"]()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ValueError, match="compile_repeated_blocks"):
        hsa(pipe)
    pipe = ALL["wan_t2v"]()
    pipe.transformer.compile(backend="eager")
    with pytest.raises(ValueError, match="compile_repeated_blocks"):
        hsa(pipe)
