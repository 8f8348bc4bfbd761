import pytest
import torch

from hsa.allocation import Rows, groups_by_fraction, groups_by_threshold, velocity_change


def test_velocity_change_by_hand():
    previous = torch.tensor([[[1.0, -1.0], [2.0, 0.0], [0.0, 0.0]]])
    velocity = torch.tensor([[[1.0, -2.0], [0.0, 1.0], [0.0, 0.0]]])
    assert torch.equal(velocity_change(velocity, previous), torch.tensor([[0.5, 1.5, 0.0]]))


def test_velocity_change_is_measured_in_fp32():
    previous = torch.full((1, 1, 4096), 1.0, dtype=torch.bfloat16)
    velocity = torch.full((1, 1, 4096), 1.0078125, dtype=torch.bfloat16)  # next after 1
    change = velocity_change(velocity, previous)
    assert change.dtype == torch.float32
    assert change.item() == pytest.approx(2**-7)


def test_thresholds_are_reached_from_below():
    change = torch.tensor([[0.31, 0.30, 0.2, 0.15, 0.1, 0.0]])
    assert groups_by_threshold(change, (0.3, 0.15)).tolist() == [[0, 0, 1, 1, 2, 2]]
    assert groups_by_threshold(change, (0.0, 0.0)).tolist() == [[0] * 6]
    assert groups_by_threshold(change, (float("inf"), 0.15)).tolist() == [[1, 1, 1, 1, 2, 2]]


def test_fractions_cut_each_sample_by_rank():
    change = torch.tensor([[5.0, 1, 4, 2, 3], [0.1, 0.2, 0.3, 0.4, 0.5]])
    groups = groups_by_fraction(change, (0.2, 0.4, 0.4))
    assert groups.tolist() == [[0, 2, 1, 2, 1], [2, 2, 1, 1, 0]]


@pytest.mark.parametrize("fractions", [(0.1, 0.3, 0.6), (0, 0.5, 0.5), (1, 0, 0), (1.0,)])
@pytest.mark.parametrize("num_tokens", [1, 7, 48])
def test_fractions_give_every_sample_the_same_sizes(fractions, num_tokens):
    change = torch.rand(3, num_tokens, generator=torch.Generator().manual_seed(0))
    groups = groups_by_fraction(change, fractions)
    sizes = torch.stack([(groups == k).sum(1) for k in range(len(fractions))])
    assert sizes.sum(0).eq(num_tokens).all()
    for k, fraction in enumerate(fractions):
        assert sizes[k].unique().numel() == 1
        assert abs(sizes[k, 0].item() - fraction * num_tokens) <= 1
    for sample, group in zip(change, groups, strict=True):
        for lower in range(1, len(fractions)):
            if (group == lower).any() and (group < lower).any():
                assert sample[group < lower].min() >= sample[group == lower].max()


def test_ties_go_to_the_earlier_token():
    groups = groups_by_fraction(torch.zeros(1, 400), (0.5, 0.5))
    assert groups.tolist() == [[0] * 200 + [1] * 200]


ACTIVE = torch.tensor(
    [
        [False, True, False, True, True],
        [True, False, False, False, False],
        [False, False, False, False, False],
    ]
)


def test_rows_are_padded_to_the_longest_sample():
    rows = Rows(ACTIVE)
    assert rows.index.tolist() == [[1, 3, 4], [0, 0, 0], [0, 0, 0]]
    full = torch.arange(15.0).view(3, 5, 1)
    assert rows.take(full).squeeze(-1).tolist() == [[1, 3, 4], [5, 5, 5], [10, 10, 10]]


@pytest.mark.parametrize("samples", [[0], [1], [2], [0, 1], [0, 1, 2]])
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_put_writes_the_active_rows_and_nothing_else(samples, shape):
    active = ACTIVE[samples]
    rows = Rows(active)
    full = torch.zeros(*active.shape, *shape)
    memory = full.data_ptr()
    rows.put(full, torch.ones(*rows.index.shape, *shape))
    marked = full.flatten(2).amin(-1) if shape else full
    assert torch.equal(marked.bool(), active)
    assert full.data_ptr() == memory


def test_put_undoes_take():
    active = ACTIVE[:2]
    rows = Rows(active)
    full = torch.rand(2, 5, 3)
    copy = torch.zeros_like(full)
    rows.put(copy, rows.take(full))
    assert torch.equal(copy, full * active[..., None])
