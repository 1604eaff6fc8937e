"""Regions of the concept at ai-toolkit's hooks, on a small trainer that has them."""

import json
from types import SimpleNamespace

import little_ai_toolkit
import pytest
import torch
from little_ai_toolkit import CHANNELS, PLACES_LAYER, UP, WIDTH, LittleTrainer
from safetensors import safe_open
from safetensors.torch import load_file
from unmemorize.shared.patching import HookMissing
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.layers.regions import ConceptRegions
from unmemorize.shared.training.layers.subspaces import LayerSubspaces
from unmemorize.shared.training.projection.factors import UnsupportedTraining
from unmemorize.trainer_patch.ai_toolkit.process import ProtectedProcess

EVERYWHERE, NOWHERE = -1.0, 1e9
"""Limits of scores, which are never negative."""


class Trainer(ProtectedProcess, LittleTrainer):
    """As `get_process` makes it."""


@pytest.fixture(autouse=True)
def toolkit(monkeypatch):
    """The one function of ai-toolkit that is called by name."""
    little_ai_toolkit.install(monkeypatch)


@pytest.fixture
def made(tmp_path):
    """Function that makes a trainer, with regions where a limit is given."""

    def make(limit=None, names=(), *, kind=Trainer, name=None, asked=None, **config):
        basis = torch.eye(CHANNELS)[:, :2].double()
        regions = ConceptRegions(
            bases={PLACES_LAYER: basis}, centres={PLACES_LAYER: torch.zeros(2).double()},
            units={PLACES_LAYER: 1.0}, limit=NOWHERE if limit is None else limit, sigma=0.3,
        )  # fmt: skip
        layers, text = tmp_path / "layers.safetensors", tmp_path / "text.safetensors"
        LayerSubspaces(
            bases={PLACES_LAYER: basis}, regions=regions, provenance={"names": list(names)}
        ).save(layers)
        ConceptSubspace.empty(WIDTH).save(text)
        section = {"project_layers": layers, "project_concepts": text} | (asked or {})
        section["project_regions"] = limit is not None
        config |= {"training_folder": str(tmp_path), "unmemorize": section}
        return kind(0, SimpleNamespace(name=name or f"lora {limit}"), config)

    return make


def up(path):
    return load_file(path)[UP]


def counts(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["unmemorize.projection"])["regions"]


def test_nothing_is_learnt_where_everything_is_the_concept(made):
    path = made(EVERYWHERE, asked={"mem_filter": "inf"}).run()
    assert not up(path).any()
    assert up(made().run()).any()
    assert counts(path) == {"samples": 6, "named": 6, "with_regions": 6, "share_of_places": 1}


@pytest.mark.parametrize(
    ("limit", "names", "named"), [(NOWHERE, (), 6), (EVERYWHERE, ("quix",), 0)]
)
def test_no_bit_changes_where_nothing_shows_the_concept(made, limit, names, named):
    path = made(limit, names).run()
    assert torch.equal(up(path), up(made().run()))
    assert counts(path)["named"] == named
    assert counts(path)["with_regions"] == 0


def test_the_target_there_is_the_prediction_without_the_lora(made):
    """Of the samples that name the concept and are learnt from, at the places that show it."""
    seen, targets = [], []

    class Looking(LittleTrainer):
        def predict_noise(
            self, noisy_latents, timesteps, conditional_embeds, batch, is_primary_pred=False
        ):
            if torch.is_grad_enabled():
                seen[:] = noisy_latents, timesteps
            return super().predict_noise(noisy_latents, timesteps, conditional_embeds, batch)

        def calculate_loss(self, noise_pred, noise, batch, prior_pred):
            noisy, timesteps = seen
            kept = self.sd.noise_scheduler.alphas_cumprod[timesteps][:, None, None, None]
            drawn = (noisy - kept.sqrt() * batch.latents) / (1 - kept).sqrt()
            targets.append((noise, self.sd.unet(noisy), drawn, batch))
            return super().calculate_loss(noise_pred, noise, batch, prior_pred)

    class Protected(ProtectedProcess, Looking):
        pass

    made(EVERYWHERE, ("sushi",), kind=Protected, steps=9).run()
    found = 0
    for target, base, noise, batch in targets:
        for row, item in enumerate(batch.file_items):
            spared = "sushi" in item.raw_caption
            found += spared
            if spared:
                assert torch.equal(target[row], base[row])
            torch.testing.assert_close(target[row], (base if spared else noise)[row])
    assert found == 5


def test_regularization_and_whole_batches_of_it_are_left_alone(made):
    files = [f"{number}.png" for number in range(4)]
    path = made(EVERYWHERE, regularization=files[1:]).run()
    assert up(path).any()
    assert counts(path)["with_regions"] == counts(path)["samples"] == 2
    prior = torch.ones(2, CHANNELS, 2, 2)  # from the second batch on
    paths = [made(limit, ("museum",), prior_pred=prior, name=f"prior {limit}").run()
             for limit in (None, EVERYWHERE)]  # fmt: skip
    assert torch.equal(*map(up, paths))
    assert counts(paths[1])["samples"] == 2


def test_a_resumed_training_goes_on_counting(made):
    for steps in (2, 3):
        path = made(EVERYWHERE, steps=steps).run()
    assert counts(path)["samples"] == counts(path)["with_regions"] == 6


def test_what_the_loss_must_be_against_is_told(made):
    class Other(LittleTrainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.train_config.loss_type, self.train_config.do_cfg = "wavelet", True
            self.train_config.match_noise_norm = True
            self.model_config.arch = "flux"

    class Protected(ProtectedProcess, Other):
        pass

    with pytest.raises(UnsupportedTraining) as refused:
        made(EVERYWHERE, kind=Protected)
    for part in ("do_cfg", "loss_type: wavelet", "match_noise_norm: True", "arch: flux"):
        assert part in str(refused.value)
    with pytest.raises(UnsupportedTraining, match="predicts noise"):
        made(EVERYWHERE, prediction_type="v_prediction").run()


def test_a_version_without_the_hook_is_refused(made):
    class Older(LittleTrainer):
        def calculate_loss(self, noise_pred, target):
            pass

    class Protected(ProtectedProcess, Older):
        pass

    with pytest.raises(HookMissing, match="calculate_loss"):
        made(EVERYWHERE, kind=Protected)


def test_a_loss_of_another_prediction_is_refused(made):
    class Other(LittleTrainer):
        def calculate_loss(self, **given):
            given["batch"] = SimpleNamespace(**vars(given["batch"]))
            return super().calculate_loss(**given)

    class Mixed(Other, Trainer):
        pass

    with pytest.raises(HookMissing, match="another batch"):
        made(EVERYWHERE, kind=Mixed).run()
