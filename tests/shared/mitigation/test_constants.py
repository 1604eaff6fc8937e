"""What a search leaves alone is computed once, and nothing else is."""

import pytest
import tiny
import torch
from torch import nn
from unmemorize.shared.mitigation.constants import Constants
from unmemorize.shared.mitigation.embedding import EmbeddingOptimisation
from unmemorize.shared.mitigation.method import Start
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.score.denoiser import Denoiser

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")


class Part(nn.Module):
    """x times a weight; counts its calls."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.weight


class Pair(nn.Module):
    """Two parts one after the other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Part(), Part()

    def forward(self, x):
        return self.second(self.first(x)), x + 1


class Network(nn.Module):
    """Constant parts of every kind, and one that reads the text."""

    def __init__(self):
        super().__init__()
        self.pair, self.twice, self.overwritten, self.reading = Pair(), Part(), Part(), Part()

    def forward(self, x, text):
        product, more = self.pair(x)
        noise = self.overwritten(x)
        noise += 1
        return product + more + self.twice(self.twice(x)) + noise + self.reading(text)


@pytest.fixture
def network():
    return Network()


def counts(network):
    parts = (network.pair.first, network.twice, network.overwritten, network.reading)
    return [part.calls for part in parts]


def test_only_what_is_called_once_and_stays_is_remembered(network):
    constants, x = Constants(network), torch.arange(3.0)
    expected, found = [], []
    for number in range(4):
        text = torch.full((3,), float(number), requires_grad=True)
        expected.append(Network()(x, text))
        with constants.of("same"):
            found.append(network(x, text))
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    # A part called twice could mean two different things, one that is written into did change.
    assert counts(network) == [1, 8, 4, 4]
    assert not any("forward" in vars(module) for module in network.modules())


def test_another_key_computes_again(network):
    constants, text = Constants(network), torch.ones(3, requires_grad=True)
    for key, x in (("a", torch.zeros(3)), ("b", torch.ones(3)), ("b", torch.ones(3))):
        with constants.of(key):
            assert torch.equal(network(x, text), Network()(x, text))
    assert counts(network)[0] == 2


def test_without_a_graph_nothing_is_learnt_but_what_is_known_serves(network):
    constants, text = Constants(network), torch.ones(3, requires_grad=True)
    with torch.no_grad(), constants.of("a"):
        network(torch.zeros(3), text)
    with constants.of("a"):
        network(torch.zeros(3), text)
    assert counts(network)[0] == 2
    with torch.no_grad(), constants.of("a"):
        assert torch.equal(network(torch.zeros(3), 2 * text), Network()(torch.zeros(3), 2 * text))
    assert counts(network) == [2, 6, 3, 3]


def test_what_others_put_in_place_of_forward_comes_back(network):
    constants, text = Constants(network), torch.ones(3, requires_grad=True)
    own = vars(network.pair)["forward"] = network.pair.forward
    for _ in range(2):
        with constants.of("a"):
            network(torch.zeros(3), text)
    with pytest.raises(KeyboardInterrupt), constants.of("a"):
        raise KeyboardInterrupt
    assert counts(network)[0] == 1
    assert vars(network.pair)["forward"] is own
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_embeddings_are_the_same_bit_for_bit_with_fewer_calls(name):
    pipeline = tiny.PIPELINES[name]()
    denoiser: Denoiser = PipelineDenoiser(pipeline)
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    sigma = denoiser.sigmas(50)[0]
    x, cond = denoiser.initial_noise((0, 1, 2), sigma), denoiser.encode(["a red cat"])[[0] * 3]
    with torch.no_grad():
        x0_uncond = denoiser.denoise(x, sigma, denoiser.unconditional()[[0] * 3])
    calls = []
    linear = (nn.Linear, nn.Conv2d)
    layers = [module for module in network.modules() if isinstance(module, linear)]
    for layer in layers:
        forward = layer.forward
        layer.forward = lambda *args, forward=forward: (calls.append(1), forward(*args))[1]

    def optimise(network, target):
        calls.clear()
        start = Start(
            denoiser=denoiser, cond=cond, x=x, sigma=sigma, x0_uncond=x0_uncond, network=network,
            generator=torch.Generator(),
        )  # fmt: skip
        method = EmbeddingOptimisation(
            target=target, learning_rate=1e-4, iterations=4, batch_size=3
        )
        return method.start(start), len(calls)

    target = optimise(None, 0.0)[0].before.median().item()  # so that not all stop together
    (expected, all_calls), (found, fewer_calls) = optimise(None, target), optimise(network, target)
    assert len(set(found.iterations.tolist())) > 1
    assert torch.equal(found.cond.embeddings, expected.cond.embeddings)
    assert torch.equal(found.after, expected.after)
    assert fewer_calls < all_calls
