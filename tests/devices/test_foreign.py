"""The stand-in itself: it would notice what a GPU refuses."""

import pytest
import torch

GPU = "cuda:1"


def test_numbers_go_there_and_come_back_and_mix_with_no_others(foreign):
    foreign()
    here = torch.arange(6.0).view(2, 3)
    there = here.to(GPU)
    assert there.device == torch.device(GPU)
    assert torch.equal((there @ there.T).cpu(), here @ here.T)
    with pytest.raises(RuntimeError, match="one device"):
        there + here
    layer = torch.nn.Linear(3, 2).to(GPU)
    with pytest.raises(RuntimeError, match="one device"):
        layer(here)
    assert torch.equal(layer(there).cpu(), layer.to("cpu")(here))


def test_a_device_without_float64_says_so(foreign):
    foreign(float64=False)
    there = torch.ones(3).to("mps:0")
    with pytest.raises(TypeError, match="float64"):
        there.double()
    assert there.cpu().double().sum() == 3


def test_it_counts_what_lies_on_it(foreign):
    device = foreign()
    there = torch.zeros(1000).to(GPU)
    views = there[:10], there.view(10, 100)
    assert device.held == 4000
    del there, views
    assert device.held == 0
    assert device.peak >= 4000
