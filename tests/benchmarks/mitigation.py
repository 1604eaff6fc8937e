"""What each way of mitigating buys and costs on the demo model: ``make bench NAME=mitigation``.

Draws captions of every group as they are and with each method always on, keeps the pictures in
--work (killed anywhere, it continues), and judges them afterwards; the gate's decisions then give
the gated figures, as an image on which a method does not act is bit-identical. The plot of
similarity against fidelity stands in --work. Needs npm for the other vendors' drawings.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from figures import Figure, command_of, plain, record, share_of
from mitigation_pictures import (
    COND_SCALE,
    NONE,
    STEPS,
    VARIANTS,
    Critic,
    Drawn,
    Studio,
    figures,
    gated,
    ways,
)
from tqdm.auto import tqdm
from unmemorize import demo
from unmemorize.demo import data
from unmemorize.shared.mitigation import DEFAULT, METHODS, make_method
from unmemorize.shared.mitigation.embedding import EmbeddingOptimisation
from unmemorize.shared.mitigation.method import Start
from unmemorize.shared.models.load import load_denoiser, model_fingerprint
from unmemorize.shared.sampling.guard import guard
from unmemorize.shared.score.calibration import Calibration, settings_of
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import detect


def measure_table(denoiser, calibration, work: Path, count: int, found: dict[str, Figure]) -> None:
    """Draw and judge all methods and groups, print the table, and plot it."""
    studio = Studio(denoiser, calibration, work / model_fingerprint(demo.MODEL)[:12])
    critic = Critic(data.Art(data.fetch(Path("build/demo/art"))), denoiser)
    threshold, made = calibration.threshold_for(1), ways(denoiser)
    columns = ("similarity", "fidelity", "change", "seconds", "ratio")
    print(f"\n{'method':<22}{'group':<10}{'reproduced':>12}{'95 % interval':>17}"
          + "".join(f"{name:>12}" for name in columns)
          + "   (.always: whatever the gate says)")  # fmt: skip
    for group in data.GROUPS:
        number = count if group in ("verbatim", "template") else count // 2
        captions = [c for c in demo.audited() if c.group == group][:number]
        usual: list[Drawn] = []
        for way, make in made.items():
            bar = tqdm(captions, f"{group}: {way}", leave=False)
            always = [studio.draw(way, make(), caption) for caption in bar]
            if way == NONE:
                usual = always
            through = always if way == NONE else gated(always, usual, threshold)
            for suffix, drawn in (("", through), (".always", always)):
                if way != NONE or not suffix:
                    line = figures(critic, drawn, usual)
                    key = f"{key_of(way, group, gated=not suffix)}{suffix}"
                    found |= {f"{key}.{name}": figure for name, figure in line.items()}
                    back = line["reproduced"]
                    cells = (f"{line[k].value:.3f}" if k in line else "" for k in columns)
                    print(f"{way + suffix:<22}{group:<10}{back.value:>12.3f}"
                          f"{f'{back.low:.3f} to {back.high:.3f}':>17}"
                          + "".join(f"{cell:>12}" for cell in cells), flush=True)  # fmt: skip
    plot_table(found, work / "similarity_and_fidelity.png")


def key_of(way: str, group: str, *, gated: bool = True) -> str:
    """Return where the figures of a method begin: the default through its gate is what ships."""
    start = "grid." if not gated else "" if way == DEFAULT else "rivals."
    return f"{start}mitigation.{way}.{group}"


def plot_table(found: Mapping[str, Figure], path: Path) -> None:
    """Draw similarity against fidelity: one panel a group, one point a way, gated."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    groups = ("verbatim", "template")
    figure, panels = pyplot.subplots(1, len(groups), figsize=(9.6, 4.2), sharex=True, sharey=True,
                                     layout="constrained")  # fmt: skip
    ways = (NONE, *METHODS, *VARIANTS)
    for group, panel in zip(groups, panels, strict=True):
        for way, colour in zip(ways, pyplot.colormaps["tab10"].colors, strict=False):
            back, near, fidelity = (
                found[f"{key_of(way, group)}.{name}"].value
                for name in ("reproduced", "similarity", "fidelity")
            )
            panel.scatter(
                near, fidelity, s=70, zorder=2, label=way, edgecolors=[colour],
                facecolors=[colour] if back > 0.05 else "none", linewidths=2,
            )  # fmt: skip
        panel.set(title=group, xlabel="similarity to the training image (SSCD)")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("fidelity to the caption (.5 is chance)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False,
                  title="filled: more than 5 %\nof captions reproduced")  # fmt: skip
    figure.savefig(path, dpi=150)
    print(f"\nThe plot: {path}")


def measure_gated(denoiser, calibration, work: Path, found: dict[str, Figure]) -> None:
    """Print what the default changes in learnt captions through the gate: all of them are scored.

    Where the gate stays shut, images are bit-identical; so only those it fires on are drawn.
    """
    captions = [c for c in demo.audited() if c.group == "learnt"]
    config = replace(DetectionConfig(), seeds=DetectionConfig().seeds[:1])  # as the gate's probe
    scores = detect(denoiser, [c.text for c in captions], config).scores
    above = (scores > calibration.threshold_for(1)).tolist()
    fired = [caption for caption, flag in zip(captions, above, strict=True) if flag]
    studio = Studio(denoiser, calibration, work / model_fingerprint(demo.MODEL)[:12])
    critic = Critic(data.Art(data.fetch(Path("build/demo/art"))), denoiser)
    spared = [c for c in captions if c not in fired][: len(fired)]
    usual = {
        c.text: critic.judge(studio.draw(NONE, None, c))["fidelity"] for c in [*fired, *spared]
    }
    method = make_method(DEFAULT)
    acted = {c.text: critic.judge(studio.draw(DEFAULT, method, c))["fidelity"] for c in fired}
    change = sum(acted[text] - usual[text] for text in acted) / len(captions)
    found |= {
        "mitigation.gate_fires_on_learnt": share_of(above),
        "mitigation.gated_fidelity_change": plain(
            change / statistics.mean(usual.values()), len(captions)
        ),
    }


def measure_gate(denoiser, calibration, found: dict[str, Figure]) -> None:
    """Print what the gate costs clean prompts, one image each: one guard around all of them."""
    prompts = [c.text for c in demo.audited() if c.group == "learnt"][:12]
    method = make_method("delayed_guidance")
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(9):  # in turns, so that a slow moment is everybody's; the first warms up
        guarded = turn % 4 in (1, 2)
        sampling = guard(denoiser.pipeline, method=method, calibration=calibration)
        start = time.perf_counter()
        with sampling if guarded else nullcontext():
            for prompt in prompts:
                denoiser.generate([prompt], [0], STEPS, COND_SCALE)
        if turn:
            times[guarded].append(time.perf_counter() - start)
    ratio = statistics.median(times[True]) / statistics.median(times[False])
    found["mitigation.gate_over_clean_sampling"] = plain(ratio, len(times[True]))


def measure_embedding(denoiser, found: dict[str, Figure]) -> None:
    """Print how much faster an iteration is than one that back-propagates through both rows."""
    sigma, images = denoiser.sigmas(50)[0], 16
    x, cond = denoiser.initial_noise(range(images), sigma), denoiser.encode(["owl"])[[0] * images]
    empty, network = denoiser.unconditional()[[0] * images], denoiser.pipeline.unet
    with torch.no_grad():
        x0_uncond = denoiser.denoise(x, sigma, empty)
    start = Start(
        denoiser=denoiser, cond=cond, x=x, sigma=sigma, x0_uncond=x0_uncond, network=network,
        generator=torch.Generator(),
    )  # fmt: skip

    def ours(iterations: int) -> None:
        EmbeddingOptimisation(target=0.0, iterations=iterations, batch_size=images).start(start)

    def both_rows(iterations: int) -> None:
        leaf = cond.embeddings.clone().requires_grad_()
        optimizer = torch.optim.AdamW([leaf], lr=0.05)
        both = torch.cat([x, x])
        for _ in range(iterations):
            rows = type(cond)(embeddings=torch.cat([empty.embeddings, leaf]))
            uncond, text = denoiser.denoise(both, sigma, rows).chunk(2)
            loss = ((uncond - text) / sigma).flatten(1).norm(dim=1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def seconds(work: Callable[[int], None], iterations: int) -> float:
        start = time.perf_counter()
        work(iterations)
        return time.perf_counter() - start

    ratios = []
    for _ in range(6):  # the difference of two lengths leaves out what happens once
        times = [seconds(work, 6) - seconds(work, 2) for work in (both_rows, ours)]
        ratios.append(times[0] / times[1])
    found["mitigation.embedding_speedup"] = plain(statistics.median(ratios[1:]), len(ratios) - 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the chosen parts, print and record the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("table", "gated", "gate", "embedding")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument(
        "--captions", type=int, default=24, help="of verbatim and template, half as many others"
    )
    parser.add_argument("--work", type=Path, default=Path("build/bench-mitigation"))
    parser.add_argument("--output", type=Path, help="of a trial, instead of docs/figures.json")
    args = parser.parse_args(argv)
    denoiser = load_denoiser(demo.MODEL)
    config = DetectionConfig()
    calibration = Calibration.from_controls(
        detect(denoiser, demo.controls(), config), model=model_fingerprint(demo.MODEL),
        settings=settings_of(denoiser, config), name="demo",
    )  # fmt: skip
    works = {
        "table": lambda found: measure_table(
            denoiser, calibration, args.work, args.captions, found
        ),
        "gated": lambda found: measure_gated(denoiser, calibration, args.work, found),
        "gate": lambda found: measure_gate(denoiser, calibration, found),
        "embedding": lambda found: measure_embedding(denoiser, found),
    }
    for part in args.only:
        found: dict[str, Figure] = {}
        works[part](found)
        record(found, command_of("mitigation", argv), output=args.output)


if __name__ == "__main__":
    main()
