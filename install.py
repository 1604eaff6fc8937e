"""What ComfyUI-Manager runs after cloning: looks, says what is missing, installs nothing."""

import importlib.util
import sys

OLDEST = (3, 10)
NEEDED = ("torch", "safetensors", "numpy", "tqdm")


def problems() -> list[str]:
    """Return what keeps this Python from running the pack, each with what to type."""
    found = []
    if sys.version_info[:2] < OLDEST:
        found.append(
            f"Python {sys.version.split()[0]} was found, {'.'.join(map(str, OLDEST))} or newer is "
            "needed: install one and start ComfyUI with it"
        )
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        found.append(f"missing packages: {sys.executable} -m pip install {' '.join(missing)}")
    return found


def main() -> int:
    """Print the problems, or that there are none; return the exit code."""
    found = problems()
    for problem in found:
        print(f"Unmemorize: {problem}", file=sys.stderr)
    if not found:
        print("Unmemorize: nothing to install, ComfyUI's own packages are enough.")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
