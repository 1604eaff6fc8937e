"""Two processes decide as one does, and learn the same."""

import statistics
from pathlib import Path

import pytest
import torch
from diffusers_runs import WIDTH, header_of, make_subspace, records_of, residual, weights_of
from unmemorize import demo
from unmemorize.shared.training.subspace import ConceptSubspace

SCRIPT = Path(__file__).with_name("diffusers_parallel.py")


def decisions(output, processes):
    found = [record for process in range(processes) for record in records_of(output, process)]
    # A sample at a timestep: no two of the training are the same.
    return sorted(found, key=lambda each: (each["file"], each["timestep"]))


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("mem_filter_recall=3",)])
def test_two_processes_are_one(tmp_path, run_python, more):
    def train(name, processes, limit, *more):
        launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2") if processes > 1 else ()
        run_python(
            *launch, str(SCRIPT), str(demo.MODEL), str(tmp_path / name),
            f"mem_filter={limit}", f"project_concepts={subspace}", *more,
        )  # fmt: skip
        return tmp_path / name

    subspace = make_subspace(tmp_path, WIDTH)
    scores = [record["score"] for record in records_of(train("all", 1, "inf"))]
    limit = statistics.median(scores)
    one, two = train("one", 1, limit, *more), train("two", 2, limit, *more)
    first, second = decisions(one, 1), decisions(two, 2)
    assert len(first) == len(second) == len(scores)
    for mine, theirs in zip(first, second, strict=True):
        # Sums over batches of two and four round differently.
        assert mine.pop("score") == pytest.approx(theirs.pop("score"), rel=1e-4)
        assert mine == theirs
    assert 0 < sum(record["flagged"] for record in first) < len(first)
    weights = weights_of(two)
    for key, value in weights_of(one).items():
        torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-6)
    assert any(value.abs().max() > 1e-3 for key, value in weights.items() if "lora_B" in key)
    assert residual(weights, ConceptSubspace.load(subspace).basis) < 1e-6
    assert header_of(one)["unmemorize.filter"] == header_of(two)["unmemorize.filter"]
    everything = weights_of(tmp_path / "all")
    assert any(not torch.allclose(everything[key], weights[key], atol=1e-4) for key in weights)
