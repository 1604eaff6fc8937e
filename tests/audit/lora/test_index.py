"""The index finds what comparing everything with everything finds."""

import pytest
import torch
from needs import need_package
from unmemorize.audit.lora.neighbours import Index

need_package("faiss")


def units(count: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows)


def test_search_is_exact():
    rows, queries = units(500), units(40, seed=1)
    similarity, positions = Index(rows).search(queries, 7)
    expected = (queries.double() @ rows.double().T).topk(7)
    torch.testing.assert_close(similarity.double(), expected.values, rtol=0, atol=1e-6)
    assert torch.equal(positions, expected.indices)


def test_more_neighbours_than_rows_are_all_there_are():
    similarity, positions = Index(units(3)).search(units(2, seed=1), 10)
    assert similarity.shape == positions.shape == (2, 3)


@pytest.mark.parametrize("threshold", [-1.0, 0.2, 0.5, 1.0])
def test_pairs_are_those_of_the_full_table(threshold):
    rows = units(80, width=6)
    rows[[70, 7]] = rows[[3, 3]]
    cosines = rows.double() @ rows.double().T
    table = cosines.triu(1) + torch.full_like(cosines, -9).tril()
    pairs, found = Index(rows).pairs(threshold)
    # float32 places equal rows a rounding below 1.
    expected = (table >= threshold - 1e-6).nonzero()
    if threshold < 1:
        assert torch.equal(pairs, expected)
    else:
        assert {tuple(pair) for pair in pairs.tolist()} <= {(3, 7), (3, 70), (7, 70)}
    torch.testing.assert_close(found.double(), cosines[pairs[:, 0], pairs[:, 1]], rtol=0, atol=1e-6)


def test_a_pair_on_the_threshold_is_found():
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    pairs, _ = Index(rows).pairs(rows[0].dot(rows[1]).item())
    assert pairs.tolist() == [[0, 1], [1, 2]]


def test_an_empty_index_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        Index(torch.zeros(0, 4))


def test_without_faiss_it_says_what_to_type(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match=r'pip install --editable "[^"]+\[sscd\]"'):
        Index(units(3))
