"""Directions of a contrast: the best of all subspaces, and a proof where none is good enough."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_text import seeded
from unmemorize.shared.training.concept.fitting import (
    COLLATERAL,
    PRICE,
    RESIDUAL,
    RetainedEnergy,
    collateral,
    residual,
    separable,
)
from unmemorize.shared.training.concept.subspace import contrast, leading

SHAPES = {
    "seed": st.integers(0, 2**16),
    "width": st.integers(2, 24),
    "count": st.integers(1, 30),
    "others": st.integers(0, 30),
    "price": st.sampled_from([0.0, 0.5, 2.0]),
}


@settings(max_examples=60, deadline=None)
@given(**SHAPES, rank=st.integers(1, 24))
def test_no_other_subspace_gains_more(seed, width, count, others, price, rank):
    concept, retained = seeded(count, width, seed=seed), seeded(others, width, seed=seed + 1)
    basis, energies = contrast(concept, retained, price)

    def gain(columns: torch.Tensor) -> float:
        return float((concept @ columns).square().sum()) - price * float(
            (retained @ columns).square().sum()
        )

    identity = torch.eye(basis.shape[1], dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, identity, rtol=0, atol=1e-9)
    torch.testing.assert_close(energies, (concept @ basis).square().sum(0))
    best = gain(basis)
    assert best >= -1e-9
    other = torch.linalg.qr(seeded(width, min(rank, width), seed=seed + 2)).Q
    assert gain(other) <= best + 1e-9
    if basis.shape[1]:
        assert gain(basis[:, 1:]) < best  # each direction is worth having
        turned = torch.linalg.qr(basis + 0.1 * seeded(*basis.shape, seed=seed + 3)).Q
        assert gain(turned) <= best + 1e-9


def test_without_retained_vectors_it_is_an_svd():
    concept = seeded(9, 6)
    basis, energies = contrast(concept, concept[:0], 2.0)
    _, values, vectors = torch.linalg.svd(concept)
    torch.testing.assert_close(energies, values.square())
    torch.testing.assert_close((basis.T @ vectors.T).abs(), torch.eye(6, dtype=torch.float64),
                               rtol=0, atol=1e-7)  # fmt: skip


def test_leading_stops_at_the_share_and_at_the_most():
    energies = torch.tensor([6.0, 3.0, 1.0])
    assert [leading(energies, share, 10.0, 9) for share in (0.5, 0.6, 0.61, 0.9, 1.0)] == [
        1, 1, 2, 2, 3,
    ]  # fmt: skip
    assert leading(energies, 1.0, 10.0, 2) == 2
    assert leading(energies[:0], 1.0, 10.0, 2) == 0


@pytest.mark.parametrize("seed", range(8))
def test_not_separable_is_a_proof(seed):
    """Where it says no, no subspace of many tried passes; where one passes, it says yes."""
    width = 10
    directions = torch.linalg.qr(seeded(width, width, seed=seed)).Q
    spread = torch.logspace(0, -3 if seed % 2 else -0.1, width, dtype=torch.float64)
    gram = (directions * spread) @ directions.T
    energy = RetainedEnergy(first=torch.zeros_like(gram), rest=gram / gram.trace())
    change = seeded(3 if seed % 2 else 40, width, seed=seed + 50)
    if seed % 2:  # a concept in directions of its own
        change = change @ directions[:, -3:] @ directions[:, -3:].T
    passing = False
    for price in (0.1, 0.5, 1.0, PRICE, 4.0):
        factor = (directions * (spread / gram.trace()).sqrt()).T
        basis, _ = contrast(change / change.norm(), factor, price)
        passing |= residual(change, basis) <= RESIDUAL and collateral(energy, basis) <= COLLATERAL
    assert separable(change, energy) == passing == bool(seed % 2)
