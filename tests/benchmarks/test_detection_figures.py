"""The benchmark of detection: whom it compares, what it keeps, and that its figures are right."""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bench_models import MODELS
from bench_models.recipes import RECIPES
from bench_models.truth import sort
from detection import coordinates, text_alone
from scores import grid, rivals, stages
from scores.case import Case, magnitudes, over_seeds, residuals
from scores.groups import Groups, foreign_controls, groups_of
from scores.ranking import BOOTSTRAPS, Draw, _picks, flagged, ranked, tpr_at
from scores.speed import median_of
from sklearn.metrics import roc_auc_score, roc_curve
from toy import ToyDenoiser, prompts
from unmemorize import demo
from unmemorize.shared.score.calibration import Calibration, settings_of
from unmemorize.shared.score.collapse import collapses
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.control_basis import directions_for
from unmemorize.shared.score.denoiser import Conditioning
from unmemorize.shared.score.detection import control_differences, detect

CONTROLS, OTHERS = 112, 40
CONFIG = DetectionConfig(seeds=(0, 1), schedule_steps=6)


@dataclass
class Loaded:
    """Stands for the `Subject` of a network that is there already."""

    denoiser: Any
    fingerprint: str = "0" * 64
    dtype: str = "float32"
    is_demo: bool = False


@dataclass
class Unloaded:
    """The same network, not loaded yet; whoever asks for it is told so."""

    fingerprint: str = "0" * 64
    dtype: str = "float32"

    @property
    def denoiser(self):
        raise LookupError("the network was asked for")


def toy_groups() -> Groups:
    texts = [f"{text} {number}" for number, text in enumerate(prompts(CONTROLS + OTHERS))]
    numbers = [*range(len(texts))]
    return Groups(
        texts=texts, controls=numbers[:CONTROLS], planted=numbers[CONTROLS : CONTROLS + 10],
        negatives=numbers[CONTROLS + 10 :], near=[], template=[],
    )  # fmt: skip


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    model = SimpleNamespace(name="toy", model="toy")
    work = tmp_path_factory.mktemp("work")
    return Case(model, Loaded(ToyDenoiser()), toy_groups(), work, CONFIG)


def made(name: str, folder, pairs: int | None = None):
    """Return a model of the benchmarks with its captions and without its weights."""
    recipe = RECIPES[name]
    captions = sort(recipe.art(folder), recipe.config.seed, pairs or recipe.pairs)
    return replace(MODELS[name], folder=folder, read_captions=lambda: captions)


@pytest.mark.parametrize("name", ["scenes", "scenes-flow"])
def test_controls_and_negatives_are_many_alike_and_no_twins(name, tmp_path):
    model = made(name, tmp_path)
    groups, captions = groups_of(model), model.captions()
    assert len(groups.controls) == 400
    assert len(groups.negatives) >= 300
    assert len(groups.planted) == len(groups.near) == 60
    assert not {*groups.controls} & {*groups.negatives, *groups.near, *groups.planted}
    shares = [np.mean([captions[i].group == "learnt" for i in of])
              for of in (groups.controls, groups.negatives)]  # fmt: skip
    assert shares[0] == pytest.approx(shares[1], abs=0.02)
    patterns = [
        {(*s[:k], None, *s[k + 1 :]) for i in of for s in (captions[i].slots,) for k in range(6)}
        for of in (groups.controls, groups.negatives)
    ]
    assert not patterns[0] & patterns[1]


def test_the_demos_controls_are_its_own_and_near_captions_are_nobodys_negatives():
    groups = groups_of(MODELS["demo"])
    assert sorted(groups.of(groups.controls)) == sorted(demo.controls())
    assert len(groups.negatives) >= 300
    near = {c.text for c in MODELS["demo"].captions() if c.near}
    assert near & {*groups.of(groups.near)}
    assert not near & {*groups.of(groups.negatives)}


@pytest.mark.parametrize("name", ["demo", "scenes"])
def test_controls_of_other_domains_share_no_caption_with_the_model(name, tmp_path):
    model = MODELS["demo"] if name == "demo" else made(name, tmp_path)
    own = {c.text for c in model.captions()}
    for texts in foreign_controls(model).values():
        assert len({*texts}) == 400
        assert not own & {*texts}


def slow_tpr(positives, negatives) -> float:
    truth = [1] * len(positives) + [0] * len(negatives)
    fpr, tpr, _ = roc_curve(truth, [*positives, *negatives], drop_intermediate=False)
    return tpr[fpr <= 0.01 + 1e-12].max()


@pytest.mark.parametrize(("high", "low"), [(30, 300), (17, 99), (5, 250), (40, 100)])
@pytest.mark.parametrize("values", [8, 10_000])  # many ties, and hardly any
def test_auc_and_tpr_are_those_of_a_slow_reference(high, low, values):
    draw = np.random.default_rng([high, low, values])
    positives = draw.integers(values, size=high) + 0.3 * values
    negatives = draw.integers(values, size=low).astype(float)
    scores = torch.from_numpy(np.concatenate([positives, negatives]).round())
    positives, negatives = scores[:high].numpy(), scores[high:].numpy()
    found = ranked([Draw(scores)], range(high), range(high, high + low))
    expected = roc_auc_score([1] * high + [0] * low, scores.numpy())
    assert found["auc"].value == pytest.approx(expected, abs=1e-12)
    assert found["tpr_at_1pct_fpr"].value == pytest.approx(slow_tpr(positives, negatives))
    for figure in found.values():
        assert figure.low <= figure.value <= figure.high


def test_intervals_are_those_of_resampling_one_by_one():
    draw = np.random.default_rng(5)
    positives, negatives = draw.normal(2, 1, 25), draw.normal(0, 1, 110)
    found = ranked([Draw(torch.from_numpy(np.concatenate([positives, negatives])))],
                   range(25), range(25, 135))  # fmt: skip
    picks = zip(*_picks(25, 110), strict=True)
    again = [(positives[p], negatives[n]) for p, n in picks]
    aucs = [(p[:, None] > n).mean() for p, n in again]
    assert len(aucs) == BOOTSTRAPS
    assert found["auc"][1:3] == pytest.approx(np.quantile(aucs, [0.025, 0.975]).tolist())
    tprs = np.quantile([tpr_at(0.01, p, n) for p, n in again], [0.025, 0.975])
    tpr = found["tpr_at_1pct_fpr"]
    assert tpr.low <= tprs[0] <= tprs[1] <= tpr.high


def test_where_all_are_found_the_interval_still_says_how_many_were_tried():
    scores = torch.cat([torch.ones(20), torch.zeros(100)])
    found = ranked([Draw(scores)], range(20), range(20, 120))["tpr_at_1pct_fpr"]
    assert found.value == found.high == 1
    assert found.low == pytest.approx(0.8316, abs=1e-3)  # Clopper-Pearson of 20 of 20


def test_figures_of_several_draws_are_their_means():
    scores = torch.randn(3, 80, generator=torch.Generator().manual_seed(0))
    scores[:, :20] += torch.tensor([1.5, 2.0, 2.5])[:, None]
    draws = [Draw(one) for one in scores]
    each = [ranked([one], range(20), range(20, 80)) for one in draws]
    for name, figure in ranked(draws, range(20), range(20, 80)).items():
        assert figure.value == pytest.approx(np.mean([one[name].value for one in each]))
        assert len({one[name].value for one in each}) > 1


def test_a_rate_needs_controls_that_support_it():
    generator = torch.Generator().manual_seed(0)
    scores, controls = (torch.randn(n, generator=generator) for n in (20_000, 999))
    rate = flagged([Draw(scores, controls)], range(20_000))
    assert rate.value == pytest.approx(0.01, abs=0.006)
    assert rate.value == (scores > controls.sort().values[-10]).double().mean().item()
    assert flagged([Draw(scores, controls[:98])], range(20_000)) is None
    assert flagged([Draw(scores)], range(20_000)) is None


def test_the_median_lies_between_order_statistics_of_95_percent():
    assert median_of([3, 1, 2, 6, 5, 4])[:3] == (3.5, 1, 6)
    found = median_of(range(24))
    outside = 2 * sum(math.comb(24, k) for k in range(found.low + 1)) / 2**24
    assert outside <= 0.05 < outside + 2 * math.comb(24, found.low + 1) / 2**24
    with pytest.raises(ValueError, match="at least 6"):
        median_of([1.0] * 5)


@pytest.fixture(scope="module")
def calibration(case) -> Calibration:
    toy, controls = case.subject.denoiser, case.groups.of(case.groups.controls)
    return Calibration.from_controls(
        detect(toy, controls, CONFIG), model="toy", settings=settings_of(toy, CONFIG), name="toy"
    ).with_residual(
        control_differences(toy, controls, CONFIG, case.told), settings_of(toy, CONFIG, case.told)
    )


def test_a_record_gives_what_detection_and_calibration_give(case, calibration):
    toy, groups = case.subject.denoiser, case.groups
    first, told = case.differences(0), case.shipped()
    count = directions_for(CONTROLS)
    by_method = (
        (calibration, magnitudes(first, groups.controls)),
        (calibration.judge, residuals(told, told[:, groups.controls], count)),
    )
    for part, by_seed in by_method:
        own = torch.stack([draw.controls for draw in by_seed], 1)
        torch.testing.assert_close(own, part.seed_scores, rtol=1e-4, atol=0)
        scores = detect(toy, groups.texts[CONTROLS:], CONFIG, basis=part.basis).traces[..., 0]
        kept = torch.stack([draw.scores[CONTROLS:].double() for draw in by_seed], 1)
        torch.testing.assert_close(kept, scores, rtol=1e-4, atol=0)
        (mean,) = over_seeds(by_seed, 2)
        assert torch.equal(mean.scores[CONTROLS:] > part.threshold, part.flags(scores.mean(1)))


def test_what_was_computed_is_read_and_other_captions_are_not(case):
    told = case.shipped()
    again = replace(case, subject=Unloaded())
    assert torch.equal(again.shipped(), told)
    for other in (
        replace(again, subject=Unloaded(fingerprint="1" * 64)),
        replace(again, subject=Unloaded(dtype="bfloat16")),
        replace(again, config=replace(CONFIG, seeds=(0, 2))),
        replace(again, groups=replace(case.groups, texts=case.groups.texts[1:])),
    ):
        with pytest.raises(LookupError):
            other.shipped()
    with pytest.raises(LookupError):
        again.differences(case.told[0] + 1)


def test_the_pair_of_stages_flags_what_the_calibration_flags(case, calibration, monkeypatch):
    monkeypatch.setattr(stages, "draw_planted", lambda case, texts: [False] * len(texts))
    case.__dict__["calibration"] = calibration  # `calibrate` takes a pipeline, not a toy
    toy, groups = case.subject.denoiser, case.groups
    found = stages.measure_two_stage(case)

    def sampled(texts, scores):
        chosen = {*calibration.judge.suspicious(scores)}
        return [
            collapses(toy, [text])[0] if i in chosen else math.nan for i, text in enumerate(texts)
        ]

    own = calibration.judge.seed_scores.mean(1)
    of_controls = enumerate(sampled(groups.of(groups.controls), own))
    both = calibration.with_second({i: c for i, c in of_controls if not math.isnan(c)}).judge
    for name, members in (("false_positive_rate", groups.negatives), ("recall", groups.planted)):
        scores = detect(toy, groups.of(members), CONFIG, basis=both.basis).scores
        flags = both.flags(scores, sampled(groups.of(members), scores))
        assert found[f"detection_two_stage.toy.{name}"].value == flags.double().mean().item()
    tried = groups.of(groups.negatives)
    scores = detect(toy, tried, CONFIG, basis=both.basis).scores
    rows = 2 + stages.FORWARDS * len(both.suspicious(scores)) / len(tried)
    assert found["detection_two_stage.toy.forwards"].value == pytest.approx(rows)


def test_ranks_put_the_sampled_above_all_others(calibration):
    both = calibration.with_second({i: 0.1 * (i + 1) for i in range(20)}).judge
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0], dtype=torch.float64)
    collapses = torch.tensor([math.nan, 0.5, math.nan, 0.7], dtype=torch.float64)
    assert stages.ranks(both, scores, collapses).argsort().tolist() == [2, 0, 1, 3]


def test_the_grid_holds_the_shipped_setting(case, monkeypatch):
    monkeypatch.setattr(grid, "SHARES", (0.0,))
    monkeypatch.setattr(grid, "DIRECTIONS", (1, directions_for(CONTROLS)))
    monkeypatch.setattr(grid, "CONTROLS", (20, 100))
    monkeypatch.setattr(grid, "SETS", 2)
    monkeypatch.setattr(grid, "DTYPES", ())
    monkeypatch.setattr(grid, "foreign_controls", lambda model: {"other_art": prompts(110, 5)})
    found = grid.measure_grid(case)
    groups, told = case.groups, case.shipped()
    draws = over_seeds(residuals(told, told[:, groups.controls], directions_for(CONTROLS)), 2)
    expected = ranked(draws, groups.planted, groups.negatives)
    level = f"grid.detection.toy.shipped.directions_{directions_for(CONTROLS)}"
    for name, figure in expected.items():
        assert found[f"{level}.seeds_2.{name}"] == figure
    assert found["grid.detection.toy.same_controls_100.shipped.auc"].n == OTHERS
    assert "grid.detection.toy.same_controls_100.shipped.false_positive_rate" in found
    assert "grid.detection.toy.same_controls_20.shipped.false_positive_rate" not in found
    assert "grid.detection.toy.other_art_controls_100.directions_1.auc" in found
    assert "grid.detection.toy.told_0.magnitude.seeds_1.tpr_at_1pct_fpr" in found


def test_rivals_are_measured_with_their_cost(case, monkeypatch):
    monkeypatch.setattr(
        rivals, "TRAJECTORY", DetectionConfig(seeds=(0,), steps=6, schedule_steps=6)
    )
    found = rivals.measure_rivals(case)
    costs = {key.split(".")[3]: figure.value for key, figure in found.items()
             if key.endswith("forwards")}  # fmt: skip
    assert costs["trajectory"] == 11
    assert costs["weighted_seeds_1"] == 1
    assert costs["four_levels_maximum"] == 4
    assert {f"rivals.detection.toy.{name}.auc" for name in costs} < {*found}


def test_what_lies_inside_and_outside_of_the_controls_adds_up():
    rows = torch.randn(2, 30, 50, generator=torch.Generator().manual_seed(0))
    outside, inside = rivals.apart(rows, rows[:, :20], 4)
    for seed in range(2):
        controls = rows[seed, :20].double().numpy()
        vectors = np.linalg.svd(controls - controls.mean(0))[2][:4]
        centred = rows[seed].double().numpy() - controls.mean(0)
        projected = centred @ vectors.T @ vectors
        np.testing.assert_allclose(inside[seed].numpy(), projected, atol=1e-4)
        np.testing.assert_allclose(outside[seed].numpy(), centred - projected, atol=1e-4)


def test_sharpness_is_a_derivative_and_dsm_a_change():
    toy, texts = ToyDenoiser(torch.float64), ["a red cat", "an old boat"]
    cond, empty, sigmas = toy.encode(texts), toy.unconditional(), toy.sigmas(6)
    x = toy.initial_noise([0], sigmas[0])
    got = rivals.sharpness_of(toy, 6)(cond)
    changes = rivals.step_change_of(toy, 6)(cond)
    for i in range(2):

        def added(x, row=cond[[i]]):
            both = [toy.denoise(x, sigmas[0], c) for c in (empty, row)]
            return (both[0] - both[1]) / sigmas[0]

        text = added(x)
        derivative = (added(x + 1e-5 * text) - added(x - 1e-5 * text)) / 2e-5
        assert got[i].item() == pytest.approx(derivative.norm().item(), rel=0.05)
        first = (x - toy.denoise(x, sigmas[0], cond[[i]])) / sigmas[0]
        moved = x + (sigmas[1] - sigmas[0]) * first
        second = (moved - toy.denoise(moved, sigmas[1], cond[[i]])) / sigmas[1]
        torch.testing.assert_close(changes[i], (second - first).square().sum())


class Encoder:
    """A text encoder alone: every caption is a row of numbers."""

    def __init__(self, rows: torch.Tensor, texts: list[str]):
        self.rows = dict(zip(texts, rows, strict=True)) | {"": torch.ones_like(rows[0])}

    def encode(self, texts) -> Conditioning:
        return Conditioning(embeddings=torch.stack([self.rows[text] for text in texts]))


@pytest.mark.parametrize("leak", ["none", "length", "direction"])
def test_text_that_was_trained_along_is_found_out(case, leak):
    groups = toy_groups()
    rows = torch.randn(len(groups.texts), 7, 40, generator=torch.Generator().manual_seed(0))
    rows[..., 0] *= 20  # what all captions have: it hides the rest from the magnitude
    if leak == "length":
        rows[groups.planted] *= 5
    if leak == "direction":
        rows[groups.planted, :, 1:] *= 2
    subject = Loaded(Encoder(rows, groups.texts))
    found = text_alone(replace(case, subject=subject, groups=groups))
    value = found["detection.toy.text_alone_auc"].value
    both = [found[f"grid.detection.toy.text_alone.{name}.auc"].value
            for name in ("magnitude", "residual")]  # fmt: skip
    assert value == max(both)
    assert value > 0.95 if leak != "none" else value < 0.7


def test_coordinates_keep_norms_and_residuals():
    rows = torch.randn(30, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points = coordinates(rows)
    assert points.shape == (30, 30)
    torch.testing.assert_close(points @ points.T, rows @ rows.T)
    few, all_of_it = (residuals(m[None], m[None, :20], 3)[0].scores for m in (points, rows))
    torch.testing.assert_close(few, all_of_it, rtol=1e-3, atol=0)
