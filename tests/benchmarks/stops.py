"""How many stops a reader makes on the way from a door of the product to its result.

    make bench NAME=stops                 # writes docs/stops.md, and records the figures
    make bench NAME=stops ARGS="--only lora --root ../another-checkout --list"

A stop: another function in another file is entered for the first time. The program runs, and every
call between files of the product is noted, so nothing depends on somebody's reading. Properties
count as well, what `len(x)` or `x[i]` enter does not; functions inside functions and lambdas belong
to the function around them. What models and files call in turn is not followed: a reader takes
"load the model" and "write the file" at their word. The way to a guarded sampler needs a real
ComfyUI: it is walked where `make test-comfyui` has made its environment.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
WAYS = {
    "score": "a prompt to its score (`detect`, with a model that is loaded)",
    "guard": "a MODEL to a guarded sampler (the node Memorization Guard, until it returns)",
    "weight": "a batch to the weight of its loss (`protect`, one step of a loop)",
    "lora": "a LoRA file to its verdict (`unmemorize audit --lora --images`, until the headline)",
    "audit": "`unmemorize audit` of a model, until the network is asked once",
}
TAKEN_AT_THEIR_WORD = (
    "shared/models", "shared/files", "shared/wording", "demo/",
    # Where the first version kept the same.
    "shared/autoencoder", "shared/diffusers_adapter", "shared/families", "shared/flow_families",
    "shared/lora", "shared/lycoris", "shared/predictions", "shared/prompts", "shared/quiet",
    "shared/schedules", "shared/single_file", "shared/storage", "shared/tokens", "shared/weights",
)  # fmt: skip
"""Files whose own calls are not followed."""
ENTERED = ("__init__", "__call__", "__enter__")
"""Of the methods that Python calls, those that a reader has to enter."""
ENDS = {"lora": "summarize", "audit": "PipelineDenoiser.denoise"}
"""The function at whose first call a way has arrived; the others end when their call returns."""


class Arrived(BaseException):
    """The way is at its end; nothing in between may take it for an error."""


class Way:
    """Notes calls between files of the product while the block lasts."""

    def __init__(self, root: Path, end: str | None = None):
        self.root, self.end = f"{root}{os.sep}", end
        self.stops: list[tuple[str, str]] = []
        self._files: dict[str, str | None] = {}

    def __enter__(self) -> "Way":
        threading.setprofile(self._called)
        sys.setprofile(self._called)
        return self

    def __exit__(self, kind: type | None, *_: Any) -> bool:
        sys.setprofile(None)
        threading.setprofile(None)
        return kind is Arrived

    def _file(self, code: CodeType) -> str | None:
        """Return the file of the product that holds the code, None for everybody else's."""
        name = code.co_filename
        if name not in self._files:
            below = name.removeprefix(self.root) if name.startswith(self.root) else ""
            ours = below and not below.startswith(("tests", ".", "build"))
            self._files[name] = below if ours else None
        return self._files[name]

    def _called(self, frame: FrameType, event: str, argument: Any) -> None:
        file = self._file(frame.f_code) if event == "call" else None
        name = frame.f_code.co_name
        if file is None or name.startswith("<") or (name.startswith("__") and name not in ENTERED):
            return
        caller = frame.f_back
        while caller is not None and self._file(caller.f_code) is None:
            caller = caller.f_back
        name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # 3.10 has none
        stop = (file, name.partition(".<locals>")[0])
        calling = self._file(caller.f_code) if caller is not None else None
        followed = calling not in (None, file) and not calling.startswith(TAKEN_AT_THEIR_WORD)
        if followed and stop not in self.stops:
            self.stops.append(stop)
        if name == self.end:
            raise Arrived


def load(root: Path) -> None:
    """Make the checkout importable as `unmemorize`."""
    spec = importlib.util.spec_from_file_location("unmemorize", root / "__init__.py")
    sys.modules["unmemorize"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def command(root: Path, way: str, *arguments: str) -> Way:
    """Run a command of the command line until the way has arrived."""
    load(root)
    from unmemorize.cli import main

    sys.argv = ["unmemorize", *arguments]
    with Way(root, ENDS[way]) as walked:
        main()
    return walked


def walk_score(root: Path, folder: Path) -> Way:
    """Score one prompt."""
    load(root)
    from unmemorize import demo

    new = (root / "shared" / "score").is_dir()
    load_denoiser = find("shared.models.load" if new else "shared.models").load_denoiser
    detect = find("shared.score.detection" if new else "shared.detection").detect
    model = load_denoiser(demo.MODEL)
    with Way(root) as walked:
        detect(model, ["a cat"])
    return walked


def walk_audit(root: Path, folder: Path) -> Way:
    """Begin an audit of the demo model."""
    return command(root, "audit", "audit", "demo", "--output", str(folder / "audit"))


def walk_lora(root: Path, folder: Path) -> Way:
    """Audit the LoRA of the example workflow with the drawings that it was trained on."""
    sys.path.insert(0, str(ROOT / "tests" / "audit" / "lora"))
    load(root)
    from small_audit import example_lora, write_drawings, write_others

    return command(
        root, "lora", "audit", "demo", "--lora", str(example_lora(root)),
        "--images", str(write_drawings(root, folder / "images")),
        "--held-out", str(write_others(folder / "others")),
        "--generation-steps", "2", "--no-attack", "--output", str(folder / "audit"),
    )  # fmt: skip


def walk_weight(root: Path, folder: Path) -> Way:
    """Take one step of a small loop with the filter on."""
    load(root)
    import torch
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from peft import LoraConfig
    from unmemorize import demo

    new = (root / "shared" / "score").is_dir()
    loop_module = "trainer_patch.diffusers.loop" if new else "trainer_patch.diffusers_loop"
    protect = find(loop_module).protect
    pipeline = StableDiffusionPipeline.from_pretrained(demo.MODEL)
    scheduler, unet = DDPMScheduler.from_config(pipeline.scheduler.config), pipeline.unet
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad])
    captions = ["a red apple on a table", "a blue car in the snow"]
    latents, noise = torch.randn(2, 2, 4, 16, 16)
    with torch.no_grad():
        text, _ = pipeline.encode_prompt(captions, "cpu", 1, False)
    timesteps = torch.tensor([500, 100])
    walked = Way(root)
    with protect(pipeline, optimizer, output=folder / "lora.safetensors", captions=captions,
                 mem_filter="0.1") as loop:  # fmt: skip
        loop.samples = ["apple.png", "car.png"]
        with walked:
            prediction = unet(
                scheduler.add_noise(latents, noise, timesteps), timesteps, text
            ).sample
        torch.nn.functional.mse_loss(prediction, noise).backward()
        optimizer.step()
    return walked


def find(module: str) -> ModuleType:
    """Return a module of the checkout."""
    return importlib.import_module(f"unmemorize.{module}")


def walk_guard(root: Path, folder: Path) -> Way:
    """Put a guard around the demo model, inside ComfyUI."""
    sys.path.insert(0, str(ROOT / "tests" / "nodes"))
    from comfyui import NEWEST, make_base, tree
    from comfyui_worker import start

    base = folder / "base"
    pack = make_base(base)
    pack.unlink()
    pack.symlink_to(root, target_is_directory=True)
    nodes = start(str(tree(NEWEST)), str(base), str(pack)).NODE_CLASS_MAPPINGS
    model = nodes["UnmemorizeLoadDemoModel"].execute().args[0]
    guard = nodes["UnmemorizeGuard"]
    with Way(pack) as walked:
        guard.execute(model=model, gate="always", method={"method": "opposite guidance"})
    return walked


def table(stops: list[tuple[str, str]]) -> str:
    """Return the stops as a numbered list."""
    return "\n".join(f"{n}. `{file}` {name}" for n, (file, name) in enumerate(stops, 1))


def measure(way: str, root: Path) -> list[tuple[str, str]] | None:
    """Return the stops of a way, walked in a Python of its own; None where it cannot be walked."""
    python = sys.executable
    if way == "guard":
        made = ROOT / ".venv-comfyui"
        python = str(made / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
        if not Path(python).is_file():
            return None
    done = subprocess.run(
        [python, str(HERE), "--walk", way, "--root", str(root)],
        capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr[-2000:]}")
    return [tuple(stop) for stop in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    """Walk all ways, or one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--root", type=Path, default=ROOT, help="Checkout that is walked.")
    parser.add_argument("--list", action="store_true", help="Print the stops as well.")
    parser.add_argument("--walk", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    root = options.root.resolve()
    if options.walk:
        with tempfile.TemporaryDirectory() as folder:
            walked = globals()[f"walk_{options.walk}"](root, Path(folder))
        print(json.dumps(walked.stops))
        return
    from figures import command_of, plain, record  # not where a way is walked: it loads the package

    found, pages = {}, []
    for way in options.only:
        stops = measure(way, root)
        if stops is None:
            print(f"{way}: needs `make test-comfyui` first")
            continue
        files = len({file for file, _ in stops})
        found[f"stops.{way}"] = plain(len(stops), 1)
        found[f"stops.{way}.files"] = plain(files, 1)
        print(f"{way}: {len(stops)} stops in {files} files")
        if options.list:
            print(table(stops))
        pages.append(
            f"## From {WAYS[way]}\n\n{len(stops)}<!--stops.{way}--> stops in "
            f"{files}<!--stops.{way}.files--> files.\n\n{table(stops)}\n"
        )
    if root == ROOT and set(options.only) == set(WAYS):
        head = (
            "# Stops\n\nA stop: another function in another file is entered for the first time, on "
            "the way from a door\nto its result. `make bench NAME=stops` made this page.\n"
        )
        (ROOT / "docs" / "stops.md").write_text("\n".join([head, *pages]), "utf-8")
        record(found, command_of("stops"))


if __name__ == "__main__":
    main()
