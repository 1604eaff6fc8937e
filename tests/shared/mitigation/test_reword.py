"""One word is left out where one does it: the one that changes least of what controls add."""

from dataclasses import replace

import pytest
import torch
from scored import calibrated, scored_start
from toy import ToyDenoiser
from unmemorize.shared.mitigation import make_method
from unmemorize.shared.mitigation.embedding import UNMOVED
from unmemorize.shared.mitigation.ordinary import OrdinaryEmbedding
from unmemorize.shared.mitigation.reword import Reword
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.words.leaving_out import leave_out
from unmemorize.shared.words.phrases import without_words

PROMPTS = ("strawberry lighthouse, old cat", "red cat")
QUICK = OrdinaryEmbedding(iterations=2)


@pytest.fixture(scope="module")
def start():
    denoiser = ToyDenoiser()
    return scored_start(denoiser, PROMPTS, calibrated(denoiser))


def ranked(start, prompt: str) -> list[str]:
    """Return the prompt without each of its words, greatest change of D first."""
    words = prompt.split()
    shorter = {index: without_words(prompt, words, {index}) for index in range(len(words))}
    seeds = tuple(start.calibration.settings["seeds"][:1])
    found = leave_out(start.denoiser, prompt, words, shorter, DetectionConfig(seeds=seeds))
    return [each.prompt for each in found]


def at_threshold(start, below: set[str]):
    """Return the run with scores that are under the threshold for some prompts alone."""
    threshold = start.calibration.judge.threshold
    rows = start.denoiser.encode(sorted(below)).embeddings if below else torch.empty(0)
    asked = []

    def score(cond):
        asked.append(cond.embeddings)
        known = [any(torch.equal(row, other) for other in rows) for row in cond.embeddings]
        return tuple(threshold if one else 2 * threshold for one in known)

    return replace(start, score=score), asked


def least_inside_first(start, prompt: str) -> list[str]:
    """Return the prompt without each of its words, least change inside the controls' span first.

    Slowly, by the mean distance of what the controls' directions keep of D, seed after seed.
    """
    noises, words, found = start.noises, prompt.split(), {}
    texts = [without_words(prompt, words, {index}) for index in range(len(words))]

    def kept(text: str, seed: int) -> torch.Tensor:
        sigma, x = noises.sigmas[seed], noises.x[[seed]]
        x0 = start.denoiser.denoise(x, sigma, start.denoiser.encode([text]))
        added = ((noises.x0_uncond[[seed]] - x0) / sigma).flatten() - noises.basis.mean[seed]
        return noises.basis.directions[seed] @ added

    for text in texts:
        found[text] = sum(
            (kept(text, seed) - kept(prompt, seed)).norm() / noises.basis.median[seed].exp()
            for seed in range(len(noises.told))
        )
    return sorted(found, key=found.__getitem__)


def test_the_word_that_changes_least_is_left_out_of_those_that_do_it(start):
    order = least_inside_first(start, PROMPTS[0])
    assert order != ranked(start, PROMPTS[0])
    for below, expected in ((set(order), order[0]), (set(order[1:]), order[1]), ({order[-1]},) * 2):
        run, asked = at_threshold(start, below)
        found = Reword(otherwise=QUICK).start(run)
        (expected,) = expected if isinstance(expected, set) else (expected,)
        assert torch.equal(
            found.cond.embeddings[0], start.denoiser.encode([expected]).embeddings[0]
        )
        assert expected in found.changes[0]
        assert len(asked[0]) == len(order)  # all words in one go
        # The other prompt has no word that does it.
        assert "embedding" in found.changes[1]
        assert torch.equal(
            found.cond.embeddings[1], QUICK.start(start).cond.embeddings[1]
        )  # as if it were alone


def test_no_more_words_are_tried_than_asked_for(start):
    last = ranked(start, PROMPTS[0])[2]
    run, asked = at_threshold(start, {last})
    assert last in Reword(tried=3, otherwise=QUICK).start(run).changes[0]
    assert len(asked[0]) == 3
    assert "embedding" in Reword(tried=2, otherwise=QUICK).start(run).changes[0]


def test_embeddings_and_other_lengths_are_optimised(start):
    run, _ = at_threshold(start, set(ranked(start, PROMPTS[0])))
    given = Reword(otherwise=QUICK).start(replace(run, prompts=()))
    assert all("embedding" in change for change in given.changes)
    shorter = replace(run, cond=replace(run.cond, embeddings=run.cond.embeddings[:, :8]))
    found = Reword(otherwise=QUICK).start(shorter)
    assert found.cond.embeddings.shape == shorter.cond.embeddings.shape
    assert all("embedding" in change for change in found.changes)


def test_a_calibration_of_magnitudes_is_enough(start):
    calibration = calibrated(start.denoiser, residual=False)
    run = scored_start(start.denoiser, PROMPTS, calibration)
    run = replace(run, score=lambda cond: (calibration.threshold * 2,) * len(cond))
    found = Reword().start(run)
    alone = make_method("embedding").start(run)
    torch.testing.assert_close(found.cond.embeddings, alone.cond.embeddings)
    kept = [torch.equal(*rows) for rows in zip(alone.cond.embeddings, run.cond.embeddings,
                                               strict=True)]  # fmt: skip
    assert kept == [False, True]  # the second has its target already
    assert found.changes == ("the embedding", UNMOVED)


def test_it_says_so_where_nothing_changes(start):
    """The gate scores at noises of its own; at those of the run the target may be met already."""
    calibration = calibrated(start.denoiser, residual=False)
    high = replace(calibration, control_scores=((1e6,),) * len(calibration.control_scores))
    run = scored_start(start.denoiser, PROMPTS, calibration)
    run = replace(run, calibration=high, score=lambda cond: (2 * high.judge.threshold,) * len(cond))
    found = Reword().start(run)
    assert torch.equal(found.cond.embeddings, run.cond.embeddings)
    assert found.changes == (UNMOVED,) * len(PROMPTS)


def test_settings():
    with pytest.raises(ValueError, match="`tried` must be at least 0, got -1"):
        Reword(tried=-1)


def test_of_magnitudes_that_word_goes_that_lowers_least(start):
    calibration = calibrated(start.denoiser, residual=False)
    run = scored_start(start.denoiser, PROMPTS, calibration)
    words = PROMPTS[0].split()
    texts = [without_words(PROMPTS[0], words, {index}) for index in range(len(words))]
    scores = iter([(1.0, 3.0, 2.0, 9.0), (9.0, 9.0)])
    high = replace(calibration, threshold=4.0)
    run = replace(run, calibration=high, score=lambda cond: next(scores))
    assert texts[1] in Reword().start(run).changes[0]
