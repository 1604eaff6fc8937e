"""Two processes decide as one does, and learn the same."""

import json
import statistics

import diffusers_parallel
import pytest
import torch
from demo_subspaces import WIDTH, make_regions, make_subspace
from diffusers_runs import anew, header_of, records_of, residual, weights_of
from unmemorize import demo
from unmemorize.shared.training.concept.subspace import ConceptSubspace


def decisions(output, processes):
    found = [record for process in range(processes) for record in records_of(output, process)]
    # A sample at a timestep: no two of the training are the same.
    return sorted(found, key=lambda each: (each["file"], each["timestep"]))


@pytest.fixture
def train(tmp_path, run_python):
    """Function that trains in this process or in two others and returns the output folder."""

    def trained(name, processes, *options):
        arguments = (str(demo.MODEL), str(tmp_path / name), *options)
        if processes == 1:
            with anew():
                diffusers_parallel.main(*arguments)
        else:
            launch = ("-m", "torch.distributed.run", "--nproc_per_node", str(processes))
            run_python(*launch, diffusers_parallel.__file__, *arguments)
        return tmp_path / name

    return trained


@pytest.mark.parametrize(
    "more", [(), pytest.param(("mem_filter_recall=3",), marks=pytest.mark.slow)]
)
def test_two_processes_are_one(tmp_path, train, more):
    subspace = make_subspace(tmp_path, WIDTH)
    projected = f"project_concepts={subspace}"
    scores = [
        record["score"] for record in records_of(train("all", 1, "mem_filter=inf", projected))
    ]
    asked = (f"mem_filter={statistics.median(scores)}", projected, *more)
    one, two = train("one", 1, *asked), train("two", 2, *asked)
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


@pytest.mark.slow
def test_two_processes_spare_the_same_places(tmp_path, train):
    asked = (f"project_concepts={make_subspace(tmp_path, WIDTH)}",
             f"project_layers={make_regions(tmp_path, 1.7)}")  # fmt: skip
    without = weights_of(train("without", 1, *asked))
    one, two = (train(name, processes, *asked, "project_regions=true")
                for name, processes in (("one", 1), ("two", 2)))  # fmt: skip
    told = json.loads(header_of(one)["unmemorize.projection"])["regions"]
    assert told["named"] == told["with_regions"] > 0
    assert 0 < told["share_of_places"] < 1
    weights = weights_of(two)
    for key, value in weights_of(one).items():
        torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(without[key], weights[key], atol=1e-4) for key in weights)
