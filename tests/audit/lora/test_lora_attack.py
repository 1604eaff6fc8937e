"""The extraction attack: its formula on real networks, and its cliques."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from unmemorize import demo
from unmemorize.audit.lora.attack import (
    GUIDANCE,
    SMALLEST,
    central,
    cliques,
    judge_attack,
    sample_attack,
)
from unmemorize.audit.lora.result import Generation
from unmemorize.shared.models.load import load_denoiser

CAPTION = "sailboat, boat, resort"


@pytest.fixture(scope="module")
def lora(root) -> Path:
    return root / "example_workflows" / "loras" / "unmemorize_demo.safetensors"


@torch.no_grad()
def by_two_models(lora: Path, steps: int) -> torch.Tensor:
    """Return the latents of the attack by the paper's formula: noise predictions, two pipelines."""
    base, tuned = load_denoiser(demo.MODEL), load_denoiser(demo.MODEL, lora=lora)
    empty, cond = base.encode([""]).embeddings, tuned.encode([CAPTION]).embeddings
    abars = torch.as_tensor(base.pipeline.scheduler.alphas_cumprod).double()
    sigmas = base.sigmas(steps)
    x = base.initial_noise([3], sigmas[0])
    for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        t = (((1 - abars) / abars).sqrt() - sigma).abs().argmin()
        scaled = x / (1 + sigma**2) ** 0.5
        e_base, e_tuned = (
            model.pipeline.unet(scaled, t, encoder_hidden_states=text).sample
            for model, text in ((base, empty), (tuned, cond))
        )
        x = x + (following - sigma) * (e_base + 5 * (e_tuned - e_base))
    return base.decode(x)


def test_the_attack_is_the_papers_formula(lora):
    denoiser = load_denoiser(demo.MODEL, lora=lora)
    expected = by_two_models(lora, steps=3)
    image = sample_attack(denoiser, [CAPTION], [3], 3)[0][0]
    pixels = torch.from_numpy(np.array(image)).movedim(-1, 0) / 255
    torch.testing.assert_close(pixels[None], expected, rtol=0, atol=0.5 / 255 + 2e-3)
    with denoiser.lora_disabled():  # the LoRA is what it amplifies
        without = sample_attack(denoiser, [CAPTION], [3], 3)[0][0]
    assert GUIDANCE == 5
    assert without.tobytes() != image.tobytes()


def planted(groups: list[int], seed: int = 0) -> torch.Tensor:
    """Return unit vectors: groups of near-equal ones, the rest apart, in a shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for size in groups:
        centre = torch.randn(1, 64, generator=generator)
        rows.append(centre + 0.1 * torch.randn(size, 64, generator=generator))
    rows = torch.cat(rows)[torch.randperm(sum(groups), generator=generator)]
    return torch.nn.functional.normalize(rows)


@pytest.mark.parametrize("seed", range(5))
def test_planted_groups_are_found(seed):
    found = cliques(planted([7, 5, 3, 2, 1, 1], seed), 0.8)
    assert [len(group) for group in found] == [7, 5, 3]


def test_every_two_members_agree_and_nobody_is_in_two_groups():
    rows = torch.nn.functional.normalize(torch.randn(40, 4, generator=torch.manual_seed(1)))
    found = cliques(rows, 0.5)
    assert found
    for group in found:
        assert len(group) >= SMALLEST
        assert all(rows[a] @ rows[b] >= 0.5 for a, b in combinations(group, 2))
    members = [member for group in found for member in group]
    assert len(members) == len(set(members))


def test_the_central_member_is_nearest_to_the_mean():
    rows = planted([6])
    distances = (rows[1:5] - rows[1:5].mean(0)).norm(dim=1)
    assert central(rows, [1, 2, 3, 4]) == 1 + int(distances.argmin())


def test_a_clique_counts_as_the_image_it_is_like():
    rows = planted([4, 4, 3])
    groups = cliques(rows, 0.8)
    like = {group[0]: (image, cosine) for group, image, cosine in
            zip(groups, (5, 5, 2), (0.9, 0.85, 0.6), strict=True)}  # fmt: skip
    found = {member: like[group[0]] for group in groups for member in group}
    generations = [
        Generation(path=f"{i}.png", prompt="", asked="attack", source=None, seed=i, lora=True,
                   nearest=found[i][0], similarity=found[i][1],
                   mark="verbatim" if found[i][1] > 0.8 else "near")
        for i in range(len(rows))
    ]  # fmt: skip
    attack = judge_attack(rows, generations, trained=10)
    assert [clique.extracted for clique in attack.cliques] == [True, True, False]
    assert (attack.extracted.count, attack.extracted.total) == (1, 10)
    assert judge_attack(rows, [], trained=10) is None
