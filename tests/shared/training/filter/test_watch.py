"""Images that are being memorized stand above what the base does with the same images."""

import json
import math

import numpy as np
import pytest
import torch
from unmemorize.shared.score.rates import clopper_pearson
from unmemorize.shared.training.filter.sample_log import Record, Sample
from unmemorize.shared.training.filter.watch import EVERY, IMAGES, SHARE, VISITS, Watch, _chance

SPAN = (0.0, 1000.0)


def seen(
    watch: Watch, louder: dict[int, float], *, images: int = 20, seed: int = 0, one_caption=False
) -> Watch:
    """Show a watch all visits of a set, the first with the base, the others with a LoRA.

    Scores fall with the timestep, differ between captions, and are noisy as measured on the demo.

    Args:
        watch: That has seen nothing.
        louder: By image, factor of its scores with the LoRA; the others stay as they were.
        images: In the set.
        seed: Of everything drawn.
        one_caption: All images share it.
    """
    draw = np.random.default_rng(seed)
    captions = draw.normal(0, 0.4, images)

    def score(image: int, timestep: float) -> float:
        return float(np.exp(-timestep / 300 + captions[image] + draw.normal(0, 0.3)))

    names = [
        Sample(file=f"{n}.png", caption="zorp" if one_caption else f"caption {n}")
        for n in range(images)
    ]
    for visit in range(VISITS):
        for image in draw.permutation(images):
            timesteps = draw.uniform(0, 1000, 2)
            base = torch.tensor([score(image, timesteps[0])], dtype=torch.float64)
            watch.learn_base([names[image]], torch.tensor(timesteps[:1]), base)
            record = Record(sample=names[image], timestep=timesteps[1], measured=True,
                            score=louder.get(image, 1.0) * score(image, timesteps[1]),
                            flagged=False, kept=1.0)  # fmt: skip
            watch.learn(1 + visit, [record])
    return watch


def test_a_lora_that_does_nothing_is_inside_the_controls_interval():
    findings = [seen(Watch(SPAN), {}, seed=seed).judge() for seed in range(80)]
    assert np.mean([not finding.inside for finding in findings]) <= 0.025
    # Of each image it is said in error less often than the share that lies above the limit.
    assert np.mean([finding.share for finding in findings]) <= 1 - SHARE


def test_images_that_the_text_moves_further_are_named_and_the_set_is_outside():
    loud = dict.fromkeys((2, 5, 7, 11, 13, 17), 8.0)
    findings = [seen(Watch(SPAN), loud, seed=seed).judge() for seed in range(20)]
    named = [{int(file.removesuffix(".png")) for file in finding.memorized} for finding in findings]
    assert all(not finding.inside for finding in findings)
    assert np.mean([len(each & loud.keys()) / len(loud) for each in named]) >= 0.9
    assert np.mean([len(each - loud.keys()) for each in named]) <= 20 * (1 - SHARE)


def test_one_image_is_named_before_the_set_is_outside():
    finding = seen(Watch(SPAN), {3: 20.0}).judge()
    assert finding.memorized[0] == "3.png"
    assert finding.inside


def test_no_interval_is_left_where_clopper_and_pearson_would_not():
    for images in (IMAGES, 12, 37, 200):
        for count in range(images + 1):
            low, _ = clopper_pearson(count, images)
            assert (_chance(count, images) < 0.025) == (low > 1 - SHARE), (count, images)


def test_shared_captions_and_few_visits_give_no_verdict_but_a_reason():
    shared = seen(Watch(SPAN), {3: 20.0}, one_caption=True)
    assert shared.judge() is None
    assert "share 1 captions" in shared.missing
    few = seen(Watch(SPAN), {}, images=IMAGES - 1)
    assert few.judge() is None
    assert f"{IMAGES - 1} of {IMAGES - 1} images" in few.missing
    assert Watch(SPAN).judge() is None


def test_from_when_on_is_said_once_and_taken_back():
    watch = seen(Watch(SPAN), {3: 20.0})
    assert watch.learn(EVERY + 1, []) == []  # between two verdicts
    assert watch.learn(EVERY, []) == ["3.png"]
    assert watch.learn(2 * EVERY, []) == []
    assert watch.since == {"3.png": EVERY}
    quiet = Record(sample=Sample(file="3.png", caption="caption 3"), timestep=500.0, score=1e-4,
                   measured=True, flagged=False, kept=1.0)  # fmt: skip
    watch.learn(3 * EVERY, [quiet] * VISITS)
    assert watch.since == {}


def test_scores_that_say_nothing_are_not_learnt():
    watch, sample = Watch(SPAN), Sample(file="a.png", caption="a")
    for score in (0.0, math.nan, math.inf):
        watch.learn_base([sample], torch.tensor([5.0]), torch.tensor([score]))
        record = Record(sample=sample, timestep=5.0, score=score, measured=True, flagged=False,
                        kept=1.0)  # fmt: skip
        watch.learn(1, [record])
    guessed = Record(sample=sample, timestep=5.0, score=1.0, measured=False, flagged=False,
                     kept=1.0)  # fmt: skip
    watch.learn(1, [guessed])
    assert watch.due([sample]) == [True]
    assert "0 of 0" in watch.missing


def test_a_resumed_watch_says_the_same():
    watch = seen(Watch(SPAN), {3: 20.0, 4: 9.0})
    watch.learn(EVERY, [])
    again = Watch(SPAN)
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert again.judge() == watch.judge()
    assert again.since == watch.since
    assert again.learn(2 * EVERY, []) == []


def test_a_span_must_rise():
    with pytest.raises(ValueError, match="rising"):
        Watch((5.0, 5.0))
