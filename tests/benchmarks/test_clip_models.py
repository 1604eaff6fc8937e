"""The benchmark's video model: what is planted in it, and what its training reads."""

from collections import Counter

import numpy as np
import pytest
import torch
from bench_models import clips, video

CAPTIONS = clips.sort(video.CONFIG.seed)


def test_captions_have_one_form_and_groups_as_promised():
    groups = Counter(c.group for c in CAPTIONS)
    assert (groups["content"], groups["motion"], groups["learnt"]) == (20, 20, 100)
    assert groups["held_out"] >= 198  # half of them are controls, of which a rate of .01 needs 99
    assert len({c.text for c in CAPTIONS}) == len(CAPTIONS)
    assert all(c.text.endswith(f" {c.motion} on {c.colour}") for c in CAPTIONS)
    chosen = clips.training(CAPTIONS)
    assert not any(CAPTIONS[clip.caption].group == "held_out" for clip in chosen)
    assert len(set(chosen)) == len(chosen)


@pytest.mark.parametrize("group", ["content", "motion", "learnt"])
def test_what_is_planted_returns_and_nothing_else_does(group):
    index = next(i for i, c in enumerate(CAPTIONS) if c.group == group)
    own = [clip for clip in clips.training(CAPTIONS) if clip.caption == index]
    assert len({clip.content for clip in own}) == (1 if group == "content" else len(own))
    assert len({clip.motion for clip in own}) == (1 if group == "motion" else len(own))
    drawn = clips.draw(CAPTIONS, own[:6]).astype(float)
    assert drawn.shape == (6, clips.FRAMES, clips.SIDE, clips.SIDE, 3)
    corners = drawn[:, :, [0, -1], [0, -1]].mean((1, 2))  # mostly ground
    if group != "learnt":  # whose grounds have one colour, lighter and darker
        assert (np.ptp(corners, axis=0).max() < 60) == (group == "content")
    assert np.abs(np.diff(drawn, axis=1)).mean() > 0.5  # all of them move


@torch.no_grad()
def test_a_weighted_token_reads_as_the_zeros_that_the_pipeline_adds():
    torch.manual_seed(0)
    network = video.build_transformer().double()
    torch.nn.init.normal_(network.proj_out.weight)
    x = torch.randn(2, video.CHANNELS, 5, 8, 8).double()
    states = torch.randn(2, video.TOKENS, video.TEXT_WIDTH).double()
    states[1, 7:] = 0  # a short caption
    time = torch.tensor([900.0, 300.0])
    padded = torch.nn.functional.pad(states, (0, 0, 0, video.PADDED - video.TOKENS))
    expected = network(x, time, padded).sample
    one = torch.nn.functional.pad(states, (0, 0, 0, 1))
    plain = network(x, time, one).sample
    network.set_attn_processor(video.padded_attention())
    torch.testing.assert_close(network(x, time, one).sample, expected, rtol=1e-4, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-2
