"""Masks and weights against the obvious twins."""

from __future__ import annotations

import pytest
import reference
import torch

from reconkit import criteria

PATTERNS = [None, (2, 4), (4, 8), (1, 3)]


def statistics(inputs: torch.Tensor, dtype: torch.dtype = torch.float32) -> criteria.Statistics:
    found = criteria.Statistics(inputs.shape[1], hessian=True, dtype=dtype)
    for part in inputs.split(50):
        found.add(part)
    return found


def tied(rows: int, columns: int) -> torch.Tensor:
    """Weights of few distinct values, as 4 bits give."""
    return torch.randint(-3, 4, (rows, columns), generator=torch.Generator().manual_seed(1)).float()


def correlated(tokens: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    return (torch.randn(tokens, columns, generator=generator) @ mix).to(dtype)


@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_lowest_takes_exactly_count_and_the_lower_index_of_ties(count: int) -> None:
    scores = torch.tensor([[3.0, 1, 1, 2, 1, 3, 0, 0, 1, 2, 2, 1], [1.0] * 12])
    found = criteria.lowest(scores, count)
    assert found.tolist() == [reference.lowest(row, count) for row in scores.tolist()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lowest_without_and_with_ties_in_every_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for scores in (torch.rand(3, 41), torch.randint(0, 4, (3, 41))):
        scores = scores.to(dtype)
        assert criteria.lowest(scores, 17).tolist() == [reference.lowest(row, 17) for row in scores.tolist()]


@pytest.mark.parametrize("nm", PATTERNS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("ties", [False, True])
def test_magnitude_and_wanda_equal_brute_force(nm: tuple[int, int] | None, sparsity: float, ties: bool) -> None:
    torch.manual_seed(0)
    weight = tied(7, 24) if ties else torch.randn(7, 24)
    inputs = torch.randint(-2, 3, (60, 24)).float() if ties else torch.randn(60, 24)
    assert torch.equal(criteria.magnitude_mask(weight, sparsity, nm), reference.magnitude_mask(weight, sparsity, nm))
    assert torch.equal(criteria.wanda_mask(weight, statistics(inputs), sparsity, nm), reference.wanda_mask(weight, inputs, sparsity, nm))


@pytest.mark.parametrize("nm", PATTERNS)
def test_sparsegpt_equals_optimal_brain_surgeon_in_float64(nm: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    inputs = correlated(400, 96, torch.float64)
    weight = torch.randn(12, 96, dtype=torch.float64)
    [new], [mask], notes = criteria.sparsegpt([weight], statistics(inputs, torch.float64), [0.5], nm, column_block=40)
    block = 40 if nm is None else -(-40 // nm[1]) * nm[1]
    expected, expected_mask = reference.sparsegpt(weight, inputs, 0.5, nm, column_block=block)
    assert torch.equal(mask, expected_mask)
    assert torch.allclose(new, expected, atol=1e-9, rtol=0)
    assert not notes and (new[~mask] == 0).all()


@pytest.mark.parametrize(
    ("rows", "columns", "block", "sparsity", "nm"),
    [
        (1, 50, 19, 0.5, None),
        (5, 45, 128, 0.37, None),
        (3, 33, 33, 0.0, None),
        (4, 30, 1, 0.5, None),
        (2, 54, 20, 0.5, (5, 18)),
        (1, 42, 5, 0.5, (2, 6)),
    ],
)
def test_sparsegpt_of_odd_sizes_equals_its_twin(rows: int, columns: int, block: int, sparsity: float, nm: tuple[int, int] | None) -> None:
    """Columns that neither the block nor its parts divide, one row, one column a block, groups wider than a part."""
    torch.manual_seed(0)
    inputs, weight = correlated(200, columns, torch.float64), torch.randn(rows, columns, dtype=torch.float64)
    [new], [mask], _ = criteria.sparsegpt([weight], statistics(inputs, torch.float64), [sparsity], nm, column_block=block)
    expected, expected_mask = reference.sparsegpt(weight, inputs, sparsity, nm, column_block=block)
    assert torch.equal(mask, expected_mask)
    assert torch.allclose(new, expected, atol=1e-9, rtol=0)
    assert torch.equal(torch.signbit(new[~mask]), torch.zeros_like(new[~mask], dtype=torch.bool)), "no minus zeros"


@pytest.mark.slow
@pytest.mark.parametrize("nm", [None, (2, 4)])
def test_sparsegpt_in_fp32_is_as_good_as_in_float64(nm: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    inputs = correlated(2000, 384)
    weight = torch.randn(512, 384)
    [new], [mask], _ = criteria.sparsegpt([weight], statistics(inputs), [0.5], nm)
    [exact], [exact_mask], _ = criteria.sparsegpt([weight.double()], statistics(inputs.double(), torch.float64), [0.5], nm)
    assert (mask != exact_mask).float().mean() <= 1e-5
    error, exact_error = ((inputs.double() @ (w.double() - weight.double()).t()).square().sum() for w in (new, exact))
    assert abs(error / exact_error - 1) < 1e-3


@pytest.mark.parametrize("nm", PATTERNS)
def test_layers_that_share_an_input_are_pruned_as_if_alone(nm: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    inputs, sparsities = correlated(300, 48), [0.25, 0.5, 0.75]
    weights = [torch.randn(rows, 48) for rows in (8, 5, 11)]
    new, masks, _ = criteria.sparsegpt(weights, statistics(inputs), sparsities, nm, column_block=24)
    for weight, share, w, mask in zip(weights, sparsities, new, masks, strict=True):
        [alone], [alone_mask], _ = criteria.sparsegpt([weight], statistics(inputs), [share], nm, column_block=24)
        assert torch.equal(mask, alone_mask)
        assert torch.allclose(w, alone, atol=1e-5)
        for start in range(0, 48, 24):
            group = mask[:, start : start + 24]
            if nm is None:
                assert int((~group).sum()) == round(share * group.numel())
        if nm:
            assert (mask.view(len(mask), -1, nm[1]).sum(-1) == nm[0]).all()


@pytest.mark.parametrize("nm", [None, (2, 4)])
def test_ties_go_to_the_lower_flat_index_in_sparsegpt_too(nm: tuple[int, int] | None) -> None:
    weight = torch.ones(4, 8)
    found = criteria.Statistics(8, hessian=True)
    found.add(torch.eye(8))
    _, [mask], _ = criteria.sparsegpt([weight], found, [0.5], nm)
    expected = torch.tensor([0, 0, 1, 1] * 8).bool().view(4, 8) if nm else torch.tensor([0] * 16 + [1] * 16).bool().view(4, 8)
    assert torch.equal(mask, expected)


def test_nothing_pruned_is_nothing_changed() -> None:
    weight = torch.randn(6, 32)
    [new], [mask], _ = criteria.sparsegpt([weight], statistics(correlated(100, 32)), [0.0])
    assert torch.equal(new, weight) and mask.all()


def test_statistics_do_not_depend_on_how_the_tokens_come() -> None:
    inputs = torch.randint(-5, 6, (90, 16)).float()
    whole = criteria.Statistics(16, hessian=True)
    whole.add(inputs)
    parts = statistics(inputs)
    assert whole.count == parts.count == 90
    assert torch.equal(whole.hessian, parts.hessian)
    squares = criteria.Statistics(16)
    squares.add(inputs[:30])
    squares.add(inputs[30:])
    assert torch.equal(whole.square_sum, squares.square_sum.float()) and squares.hessian is None
    assert torch.equal(whole.hessian, inputs.t() @ inputs)


def test_raised_damping_is_said() -> None:
    broken = criteria.Statistics(8, hessian=True)
    broken.add(torch.randn(20, 8))
    broken.hessian -= 0.2 * broken.hessian.diagonal().mean() * torch.eye(8) + torch.diag(torch.linalg.eigvalsh(broken.hessian)[0].expand(8))
    [new], _, notes = criteria.sparsegpt([torch.randn(4, 8)], broken, [0.5])
    assert torch.isfinite(new).all()
    assert len(notes) == 1 and "raised" in notes[0] and "from 0.01 to" in notes[0]
    broken.hessian.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not positive definite"):
        criteria.sparsegpt([torch.randn(4, 8)], broken, [0.5])


def test_an_input_that_is_always_zero_is_no_failure() -> None:
    found = criteria.Statistics(8, hessian=True)
    found.add(torch.zeros(10, 8))
    [new], [mask], notes = criteria.sparsegpt([torch.arange(1.0, 17).view(2, 8)], found, [0.5])
    assert torch.isfinite(new).all() and mask.sum() == 8 and not notes


@pytest.mark.parametrize("columns", [1, criteria.BAND, 2 * criteria.BAND + 1])
def test_factor_of_bands_is_that_of_the_whole(columns: int) -> None:
    inputs = torch.randn(columns + 50, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hessian = inputs.t() @ inputs
    found, notes = criteria._factor(hessian.clone(), 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    torch.testing.assert_close(found.tril(), torch.linalg.cholesky(damped.flip(0, 1)).t().flip(0, 1))
    assert notes == []


def test_no_factor_where_a_later_band_is_not_positive() -> None:
    matrix = torch.eye(criteria.BAND + 2)
    matrix[0, 0] = -1
    assert not criteria._reversed_cholesky(matrix)
