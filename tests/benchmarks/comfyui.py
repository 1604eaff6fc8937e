"""Figures of the ComfyUI nodes on the demo model: ``make bench NAME=comfyui``.

Prints and records the figures. Overheads are of processor time within this one run, so that
other programs on the machine do not count.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "nodes"))
from comfyui import ComfyUI, make_base, missing, pack  # noqa: E402  in the folder added above
from comfyui_trees import NEWEST, VERSIONS, tree  # noqa: E402

PAIRS, STEPS, IMPORTS = 40, 20, 3
TURNS, ITERATIONS = 8, 10
PART = 25  # prompts of one request, which may take as long as a test's
IMPORT = """
import asyncio, os, sys, time
folder, tree, pack, base = sys.argv[1:]
sys.path.insert(0, folder)
from cpu_torch import tolerate_cpu_torch
tolerate_cpu_torch()
sys.path[0] = tree
os.chdir(tree)
sys.argv = ["main.py", "--cpu", "--base-directory", base]
import comfy.options
comfy.options.enable_args_parsing()
import utils.install_util
import nodes
asyncio.run(nodes.init_builtin_extra_nodes())
start = time.process_time()
assert asyncio.run(nodes.load_custom_node(pack, module_parent="custom_nodes"))
print(time.process_time() - start)
"""


def watched_and_plain(pairs: int, steps: int) -> dict:
    """Sample in turns with and without the watch; return seconds of each run, and if images differ.

    Runs inside ComfyUI. One image of 128 pixels on a small network: the watch costs the same on
    large ones, where a step takes longer.
    """
    import nodes as comfyui_nodes

    model, clip, _ = pack("nodes.engine.demo_model").load_model()
    watched, _ = pack("nodes.engine.watching").watch(model)
    times: dict[str, list[float]] = {"plain": [], "watched": []}
    images = {}
    with torch.inference_mode():
        positive, negative = (
            clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a cat", "")
        )
        for pair in range(pairs + 1):
            # Each goes first in half of the pairs, so that a slow change of the machine cancels.
            for name in ("plain", "watched") if pair % 2 else ("watched", "plain"):
                start = time.process_time()
                images[name] = comfyui_nodes.common_ksampler(
                    watched if name == "watched" else model, pair, steps, 7.5, "euler", "normal",
                    positive, negative, {"samples": torch.zeros(1, 4, 16, 16)},
                )[0]["samples"]  # fmt: skip
                if pair:  # the first loads the model
                    times[name].append(time.process_time() - start)
            if not torch.equal(images["plain"], images["watched"]):
                return {**times, "identical": False}
    return {**times, "identical": True}


def mitigation_and_forward(turns: int, iterations: int) -> dict:
    """Optimise an embedding in turns with plain forward passes; return seconds of each.

    Runs inside ComfyUI, on one image of 128 pixels. Of a search only its iterations are counted:
    one without any is subtracted.
    """
    mitigating, embedding = pack("nodes.engine.mitigating"), pack("shared.mitigation.embedding")
    model, clip, _ = pack("nodes.engine.demo_model").load_model()
    gate = pack("nodes.inputs").gate_of("always", None)
    times: dict[str, list[float]] = {"forward": [], "iterations": []}

    def seconds(function, *arguments) -> float:
        start = time.process_time()
        function(*arguments)
        return time.process_time() - start

    def search(start, made: int) -> None:
        embedding.EmbeddingOptimisation(target=0.0, iterations=made).start(start)

    def work(denoiser) -> None:
        sigma = denoiser.sigmas(50)[0]
        x, cond = denoiser.initial_noise([0], sigma), denoiser.encode([mitigating.PROMPT])
        for _ in range(turns):
            forward = sum(seconds(denoiser.denoise, x, sigma, cond) for _ in range(iterations))
            with denoiser.with_gradients() as ours:
                start = mitigating.start_of(ours, gate, x / denoiser.noise_scale(sigma))
                without, whole = (seconds(search, start, made) for made in (0, iterations))
            times["forward"].append(forward)
            times["iterations"].append(whole - without)

    with torch.inference_mode():
        encode = pack("nodes.engine.measuring").encoded
        prompt = pack("nodes.engine.comfy_denoiser").Prompt(entries=encode(clip, "a cat"))
        pack("nodes.engine.measuring").with_denoiser(
            model, {mitigating.PROMPT: prompt}, encode(clip, ""),
            {"samples": torch.zeros(1, 4, 16, 16)}, work, forward_rows=1,
        )  # fmt: skip
    return times


def heatmap_and_step(turns: int) -> dict:
    """Explain a prompt by its gradient in turns with plain guided steps; return seconds of each.

    Runs inside ComfyUI, on one image of 128 pixels: one seed and one step, no word left out.
    """
    explaining, measuring = pack("nodes.engine.explaining"), pack("nodes.engine.measuring")
    model, clip, _ = pack("nodes.engine.demo_model").load_model()
    times: dict[str, list[float]] = {"step": [], "heatmap": []}
    text, config = "a cat", pack("nodes.inputs").config_of(1, 1)

    def seconds(function, *arguments, **settings) -> float:
        start = time.process_time()
        function(*arguments, **settings)
        return time.process_time() - start

    def work(denoiser) -> None:
        sigma, both = denoiser.sigmas(50)[0], denoiser.encode([text, ""])
        x = denoiser.initial_noise([0, 0], sigma)
        for turn in range(turns + 1):
            step = seconds(denoiser.denoise, x, sigma, both)
            whole = seconds(explaining.explain, denoiser, text, config,
                            method="encoder_gradient", occlude=0)  # fmt: skip
            if turn:  # the first warms up
                times["step"].append(step)
                times["heatmap"].append(whole)

    with torch.inference_mode():
        own, empty = (measuring.encoded(clip, prompt) for prompt in (text, ""))
        words, _ = explaining.prompt_words(clip.tokenizer, text)
        tokens = explaining.read_tokens(clip.tokenizer, text, words, own[0][0].shape[1])
        prompts = {
            text: explaining.Prompt(entries=own, tokens=tokens, words=words),
            "": explaining.Prompt(entries=empty),
        }
        measuring.with_denoiser(
            model, prompts, empty, {"samples": torch.zeros(1, 4, 16, 16)}, work, forward_rows=2,
            gradients=True,
        )  # fmt: skip
    return times


def import_seconds(version: str, base: Path) -> float:
    """Return the processor time that ComfyUI takes to load the pack in a fresh process, median."""
    folder, loaded = ROOT / "tests" / "nodes", make_base(base)
    command = [sys.executable, "-c", IMPORT, folder, tree(version), loaded, base]
    runs = [
        subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(IMPORTS)
    ]
    return statistics.median(float(run.stdout.split()[-1]) for run in runs)


def measure(version: str, base: Path) -> dict:
    """Return the figures of one version."""
    from figures import Figure, plain, share_of  # ComfyUI imports this file and lacks that one

    comfy = ComfyUI(version, base / "watch")
    try:
        found = comfy.call(watched_and_plain, PAIRS, STEPS)
        search = comfy.call(mitigation_and_forward, TURNS, ITERATIONS)
        explained = comfy.call(heatmap_and_step, 2 * TURNS)
    finally:
        comfy.close()
    ratios = sorted(w / p - 1 for w, p in zip(found["watched"], found["plain"], strict=True))
    middle, reach = len(ratios) / 2, len(ratios) ** 0.5
    return {
        # What the median of so many pairs may be, with 95 %: ranks n/2 -+ sqrt(n).
        "watch_overhead": Figure(
            statistics.median(ratios), ratios[max(0, int(middle - reach))],
            ratios[min(len(ratios) - 1, int(middle + reach))], len(ratios),
        ),
        "bit_identical": share_of([found["identical"]]),
        # The quickest runs: whatever else the machine does only adds.
        "heatmap_over_step": plain(min(explained["heatmap"]) / min(explained["step"]), 2 * TURNS),
        "mitigation_over_forward": plain(
            min(search["iterations"]) / min(search["forward"]), TURNS
        ),
        "import_seconds": plain(import_seconds(version, base / "import"), IMPORTS),
    }  # fmt: skip


def verdicts(base: Path) -> Iterator[dict]:
    """Yield how many ordinary captions are flagged, setting by setting, of the newest version."""
    from comfyui_verdicts import NUMBER, SETTINGS, flagged
    from figures import share_of

    comfy = ComfyUI(NEWEST, base)
    try:
        for name in ("normal_20", "check", *list(SETTINGS)[1:]):
            told = [flag for first in range(0, NUMBER, PART)
                    for flag in comfy.call(flagged, name, first, first + PART)]  # fmt: skip
            start = f"comfyui.verdict.{name}"
            yield {
                f"{start}.false_positive_rate": share_of([flag is True for flag in told]),
                f"{start}.with_verdict": share_of([flag is not None for flag in told]),
            }
    finally:
        comfy.close()


def main() -> None:
    """Measure every version, print and record; keys without a version are the newest one's."""
    from figures import command_of, record

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*VERSIONS, "verdicts"],
                        help="one version of ComfyUI, or the newest one's verdicts")  # fmt: skip
    parser.add_argument("--output", type=Path, help="of a trial, instead of docs/figures.json")
    arguments = parser.parse_args()
    if arguments.only in (None, "verdicts"):
        with tempfile.TemporaryDirectory() as base:
            for found in verdicts(Path(base)):
                record(found, command_of("comfyui"), output=arguments.output)
        if arguments.only:
            return
    for version in [arguments.only] if arguments.only else VERSIONS:
        if reason := missing(version):
            sys.exit(reason)
        with tempfile.TemporaryDirectory() as base:
            found = measure(version, Path(base))
        start = "comfyui" if version == NEWEST else f"grid.comfyui.{version.replace('.', '_')}"
        record({f"{start}.{name}": figure for name, figure in found.items()},
               command_of("comfyui"), output=arguments.output)  # fmt: skip


if __name__ == "__main__":
    main()
