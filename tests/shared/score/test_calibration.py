"""Calibration: its statistics against slow references, its file, its refusals."""

import json
import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.score.calibration import (
    Calibration,
    CalibrationError,
    CalibrationMismatch,
    settings_of,
)
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import Detection
from unmemorize.shared.score.rates import NotEnoughControls, clopper_pearson, controls_needed

SETTINGS = {"dtype": "float32", "seeds": [0, 1], "steps": 1}


def detection_of(scores: torch.Tensor) -> Detection:
    """A detection with the given scores [prompt seed], one step."""
    scores = scores.to(torch.float64)
    return Detection(
        prompts=tuple(f"control {i}" for i in range(len(scores))),
        traces=scores[:, :, None],
        latent_elements=1,
        config=DetectionConfig(seeds=tuple(range(scores.shape[1]))),
    )


def calibrate(scores: torch.Tensor, rate: float = 0.01) -> Calibration:
    return Calibration.from_controls(
        detection_of(scores), model="abc", settings=SETTINGS, name="test", false_positive_rate=rate
    )


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tail(hits: int, n: int, rate: float) -> float:
    """Probability of at least `hits` of `n`, summed term by term."""
    return math.fsum(math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(hits, n + 1))


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (0, 30), (3, 30), (29, 30), (30, 30), (2, 250)])
def test_clopper_pearson_ends_have_tails_of_a_fortieth(hits, n):
    low, high = clopper_pearson(hits, n)
    assert low <= hits / n <= high
    if hits == 0:
        assert low == 0
    else:
        assert tail(hits, n, low) == pytest.approx(0.025, rel=1e-6)
    if hits == n:
        assert high == 1
    else:
        assert 1 - tail(hits + 1, n, high) == pytest.approx(0.025, rel=1e-6)


def test_clopper_pearson_covers():
    """At least 95 % for every rate: exact sum over all outcomes."""
    n = 25
    intervals = [clopper_pearson(hits, n) for hits in range(n + 1)]
    for rate in torch.linspace(0.01, 0.99, 40).tolist():
        covered = math.fsum(
            math.comb(n, hits) * rate**hits * (1 - rate) ** (n - hits)
            for hits, (low, high) in enumerate(intervals)
            if low <= rate <= high
        )
        assert covered >= 0.95


@pytest.mark.parametrize(("hits", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_clopper_pearson_refuses_nonsense(hits, n):
    with pytest.raises(ValueError, match="`hits`"):
        clopper_pearson(hits, n)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999), n=st.integers(99, 250), rate=st.sampled_from([0.01, 0.05, 0.1, 0.37]),
    digits=st.integers(0, 3),
)  # fmt: skip
def test_flagged_exactly_when_the_p_value_is_at_most_the_rate(seed, n, rate, digits):
    controls = normal(n, 2, seed=seed).mul(10**digits).round()  # with ties
    calibration = calibrate(controls, rate)
    scores = torch.cat([normal(50, seed=seed + 1).mul(10**digits), calibration.sorted_scores])
    p_values = calibration.p_values(scores)
    slow = [(1 + sum(c >= s for c in controls.mean(1).tolist())) / (n + 1) for s in scores.tolist()]
    assert p_values.tolist() == slow
    assert calibration.flags(scores).tolist() == [p <= rate + 1e-12 for p in slow]


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3])
def test_false_positive_rate_holds_for_further_controls(rate):
    """Exchangeable scores, many calibrations with as few controls as allowed."""
    n, flagged, total = controls_needed(rate), 0, 0
    for seed in range(300):
        scores = normal(n + 40, 1, seed=seed).exp()
        calibration = calibrate(scores[:n], rate)
        flagged += int(calibration.flags(scores[n:, 0]).sum())
        total += 40
    assert flagged / total <= rate + 4 * math.sqrt(rate / 300)
    assert flagged / total > rate / 3  # conservative, not blind


def test_p_values_are_uniform_under_the_null():
    values = []
    for seed in range(200):
        scores = normal(60, 1, seed=seed)
        values.append(calibrate(scores[:59], 0.05).p_values(scores[59:, 0]).item())
    for level in (0.1, 0.25, 0.5, 0.75, 0.9):
        share = sum(v <= level for v in values) / 200
        assert abs(share - level) < 4 * math.sqrt(level * (1 - level) / 200)
    shifted = calibrate(normal(59, 1), 0.05).p_values(normal(40, seed=1) + 2)
    assert shifted.mean() < 0.2  # another distribution does not look uniform


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(0, 30))
def test_adjusted_matches_a_slow_benjamini_hochberg(seed, count):
    calibration = calibrate(normal(99, 1, seed=seed))
    scores = 2 * normal(count, seed=seed + 1)
    p_values = calibration.p_values(scores).tolist()
    order = sorted(range(count), key=p_values.__getitem__)
    slow = [0.0] * count
    for rank, i in enumerate(order):
        slow[i] = min(
            1.0, *(count * p_values[j] / (r + 1) for r, j in enumerate(order) if r >= rank)
        )
    assert calibration.adjusted(scores).tolist() == pytest.approx(slow)


def test_q_values_that_cannot_be_small_are_said_to_be_so():
    scores = torch.tensor([*[0.5] * 58, 9.0, 9.0])

    def least(controls: int) -> tuple[float, str]:
        calibration = calibrate(torch.linspace(0, 1, controls)[:, None], 0.05)
        return calibration.adjusted(scores).min().item(), calibration.coarse(scores)

    q, told = least(100)
    assert q == pytest.approx(60 / (2 * 101))
    assert f"No q-value is below {q:.2g}" in told
    assert "2 of them score above all controls. 599 controls would resolve 0.05" in told
    assert least(598)[0] > 0.05
    assert "599 controls" in least(598)[1]
    assert least(599) == (pytest.approx(0.05), "")
    high = calibrate(torch.linspace(0, 10, 100)[:, None], 0.05)
    assert high.adjusted(scores).min() > 0.05
    assert high.coarse(scores) == ""  # no floor keeps q up: controls score as high


def test_interval_is_that_of_the_controls_above_the_threshold():
    calibration = calibrate(normal(250, 2))
    above = int((calibration.sorted_scores > calibration.threshold).sum())
    assert above == 1  # rank ceil(251 * .99) = 249 of 250
    assert calibration.interval == clopper_pearson(above, 250)


@pytest.mark.parametrize(("rate", "needed"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.3, 3)])
def test_too_few_controls_are_refused_and_counted(rate, needed):
    assert controls_needed(rate) == needed
    calibrate(normal(needed, 1), rate)
    with pytest.raises(
        NotEnoughControls, match=f"not enough controls.*{needed}.*found {needed - 1}"
    ):
        calibrate(normal(needed - 1, 1), rate)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, float("nan")])
def test_rates_outside_of_0_to_1_are_refused(rate):
    with pytest.raises(ValueError, match="`false_positive_rate`"):
        calibrate(normal(99, 1), rate)


def test_controls_with_seeds_not_drawn_are_refused():
    scores = normal(99, 2)
    scores[5, 1] = torch.nan
    with pytest.raises(ValueError, match="every seed"):
        calibrate(scores)


def test_saved_and_loaded_is_equal_bit_for_bit(tmp_path):
    calibration = calibrate(normal(120, 3) / 3)
    calibration.save(tmp_path / "new" / "c.json")
    loaded = Calibration.load(tmp_path / "new" / "c.json")
    assert loaded == calibration
    assert torch.equal(loaded.seed_scores, calibration.seed_scores)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["c.json"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v | {"schema_version": 4}, "schema_version 4, expected 7"),
        (lambda v: v | {"threshold": v["threshold"] / 2}, "Was it edited"),
        (lambda v: v | {"extra": 1}, r"\['extra'\]"),
        (lambda v: {k: x for k, x in v.items() if k != "model"}, r"\['model'\]"),
        (lambda v: [v], "schema_version None"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, edit, message):
    path = tmp_path / "c.json"
    calibrate(normal(99, 1)).save(path)
    path.write_text(json.dumps(edit(json.loads(path.read_text("utf-8")))), "utf-8")
    with pytest.raises(CalibrationError, match=message) as error:
        Calibration.load(path)
    assert "unmemorize calibrate" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"threshold: 3"])
def test_files_that_are_not_json_are_refused(tmp_path, content):
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"is not a calibration.*unmemorize calibrate"):
        Calibration.load(path)


def places(value, path=()):
    """Yield the way to every value inside of JSON."""
    yield path
    if isinstance(value, dict | list):
        inside = value.items() if isinstance(value, dict) else enumerate(value[:2])
        for key, inner in inside:
            yield from places(inner, (*path, key))


def test_a_value_of_another_kind_anywhere_is_told_as_damage(tmp_path):
    """Read as before, or refused by a message of this package: never a library's own error."""
    path = tmp_path / "c.json"
    calibrate(normal(99, 2)).save(path)
    text = path.read_text("utf-8")
    refused = 0
    strange = (None, "x", -1, 1e400, [], {}, [[]], {"a": 1}, True)
    for way in [way for way in places(json.loads(text)) if way]:
        for value in strange:
            values = json.loads(text)
            *above, last = way
            holder = values
            for key in above:
                holder = holder[key]
            holder[last] = value
            path.write_text(json.dumps(values), "utf-8")
            try:
                Calibration.load(path)
            except CalibrationError as error:
                refused += 1
                assert "unmemorize calibrate" in str(error)  # noqa: PT017
    assert refused > 100


def test_another_model_or_setting_is_refused_with_both_values_unless_forced():
    calibration = calibrate(normal(99, 2))
    assert calibration.check("abc", dict(SETTINGS)) == ""
    assert calibration.check("abc", dict(SETTINGS), force=True) == ""
    other = SETTINGS | {"dtype": "float16", "new": 3}
    with pytest.raises(CalibrationMismatch) as error:
        calibration.check("def", other)
    for part in (
        "model: calibrated abc, now def", "dtype: calibrated float32, now float16",
        "new: calibrated None, now 3", "unmemorize calibrate", "--force",
    ):  # fmt: skip
        assert part in str(error.value)
    assert "steps" not in str(error.value)
    caveat = calibration.check("def", other, force=True)
    assert "need not hold" in caveat
    assert "now def" in caveat


def test_settings_are_everything_that_moves_a_score():
    from toy import ToyDenoiser

    toy = ToyDenoiser()
    base = settings_of(toy, DetectionConfig(steps=2))
    assert json.loads(json.dumps(base)) == base
    assert settings_of(toy, DetectionConfig(steps=2, batch_size=3)) == base
    for change in ({"seeds": (1,)}, {"steps": 3}, {"schedule_steps": 20}, {"cond_scale": 5.0}):
        assert settings_of(toy, DetectionConfig(**({"steps": 2} | change))) != base
    # Guidance cannot act on the first step.
    assert settings_of(toy, DetectionConfig(cond_scale=5.0)) == settings_of(toy, DetectionConfig())
    toy.dtype = torch.float16
    assert settings_of(toy, DetectionConfig(steps=2)) != base


def test_another_first_noise_level_is_another_setting():
    pipelines = [tiny.stable_diffusion(beta_end=end) for end in (0.012, 0.012, 0.014)]
    first, same, other = (
        settings_of(PipelineDenoiser(pipeline), DetectionConfig()) for pipeline in pipelines
    )
    assert first == same
    assert {key for key in first if first[key] != other[key]} == {"sigmas"}
    assert len(first["sigmas"]) == 1


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999),
    drawn=st.integers(1, 5),
    rate=st.sampled_from([0.01, 0.05, 0.37]),
)
def test_threshold_of_the_first_seeds_is_that_of_a_calibration_of_them(seed, drawn, rate):
    controls = normal(120, 5, seed=seed).exp()
    calibration = calibrate(controls, rate)
    assert calibration.threshold_for(drawn) == calibrate(controls[:, :drawn], rate).threshold
    assert calibration.threshold_for(5) == calibration.threshold
    assert calibration.threshold_for(1) != calibration.threshold


@pytest.mark.parametrize("seeds", [0, 3, -1])
def test_threshold_of_seeds_that_were_not_drawn(seeds):
    with pytest.raises(ValueError, match="`seeds` must be between 1 and 2, the seeds of"):
        calibrate(normal(120, 2)).threshold_for(seeds)


def test_prompts_of_another_kind_than_the_controls_are_told():
    made = calibrate(normal(199, 1))
    high = made.sorted_scores[-5].item()
    assert "controls are of another kind" in made.unlike([high] * 8 + [0.0] * 7)
    assert made.unlike([high] * 7 + [0.0] * 8) == ""  # a memorized half
    assert made.unlike([high] * 9) == ""  # too few to say
    assert made.unlike(made.sorted_scores) == ""
