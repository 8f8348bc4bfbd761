"""Counted memory against tensors of known size."""

import torch

from experiments.execute import sample
from experiments.memory import held
from tests.harness.helpers import tiny_plan
from tests.harness.tiny import load


def test_counts_what_came_alive_and_each_storage_once():
    before = torch.zeros(1000)
    with held() as memory:
        memory.note()
        nothing = memory.peak
        kept = torch.zeros(1000)
        views = [kept[:10], kept.view(10, 100)]
        memory.note()
        assert memory.peak - nothing == 4000 + 0 * len(views)
        hidden = {"closure": lambda: torch.zeros(500, dtype=torch.float64), "made": torch.ones(500)}
        memory.note()
        assert memory.peak - nothing == 6000
        del kept, views, hidden
        memory.note()
        assert memory.peak - nothing == 6000
    assert before.sum() == 0


def test_a_cache_holds_one_residual_a_branch():
    """Of the uniform mask on the tiny model: cond and uncond, (1, N, D) float32."""
    model, peaks = load(), {}
    cells = {cell.label: cell for cell in tiny_plan("limit=1").cells}
    for label in ("FM T=4", "uniform"):
        with held() as memory:
            sample(model, cells[label], output_type="latent", each_step=memory.note)
        peaks[label] = memory.peak
    transformer = model.pipeline("t2v").transformer
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    tokens = 3 * 4 * 4
    assert peaks["uniform"] - peaks["FM T=4"] == 2 * tokens * width * 4
