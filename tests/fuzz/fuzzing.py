"""Mutated inputs, read one by one: equal to the original, one clear line, or neither.

    python tests/fuzz/fuzzing.py --count 920      # of each kind; fills docs/reliability.md

The oracle: a mutated file loads as the original did, or as it states itself where other programs
write such files, or ends in one line of this package's own error that names the file. All else
counts as other: a library's own error, a wrong value, more than `SECONDS`, or memory beyond
twice the file and `ALLOWANCE`.
"""

import argparse
import random
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 5
ALLOWANCE = 64 << 20
"""Bytes by which the process may grow besides: of allocators, not of the file."""
LONGEST = 2000
"""Characters of one clear line."""


class TooLong(BaseException):
    """Reading took longer than `SECONDS`; no reader catches it."""


@dataclass
class Tally:
    """What became of the inputs of one kind."""

    equal: int = 0
    clear: int = 0
    other: list[tuple[int, str]] = field(default_factory=list)
    """Seed of the mutation, and what happened."""

    @property
    def inputs(self) -> int:
        """Return how many there were."""
        return self.equal + self.clear + len(self.other)


def fuzz(kind: Any, seeds: Sequence[int], folder: Path) -> Tally:
    """Return what became of one mutation of a kind's file per seed; files lie in `folder`."""
    from mutations import mutate

    path = folder / kind.file
    kind.make(path)
    data, original, tally = path.read_bytes(), kind.read(path), Tally()
    for seed in seeds:
        spoilt = mutate(data, random.Random(f"{kind.name} {seed}"))
        path.write_bytes(spoilt)
        fault = _judge(kind, path, original, len(spoilt), tally)
        if fault:
            tally.other.append((seed, fault))
    return tally


def _judge(kind: Any, path: Path, original: Any, size: int, tally: Tally) -> str | None:
    """Count a file that is read rightly; of another return what happened."""
    before = _peak()
    try:
        with _limited():
            read = kind.read(path)
    except TooLong:
        return f"took longer than {SECONDS} s"
    except kind.errors as error:
        if type(error).__module__.split(".")[0] not in ("unmemorize", "kinds", "builtins"):
            return f"{type(error).__name__}: {str(error)[:200]}"
        message = str(error)
        clear = message.strip() and "\n" not in message and len(message) <= LONGEST
        tally.clear += bool(clear)
        return None if clear else f"not one clear line: {message[:200]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    if (grown := _peak() - before) > 2 * size + ALLOWANCE:
        return f"took {grown >> 20} MiB for {size} bytes"
    try:
        right = read == original or (kind.stated is not None and read == kind.stated(path))
    except Exception as error:
        return f"was read, and not by the plainest reader: {type(error).__name__}: {error}"[:200]
    tally.equal += right
    return None if right else f"read as another value: {str(read)[:200]}"


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(arguments: Sequence[str]) -> int:
    """Fuzz every kind, print the table, record the figures; 1 where something is other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=920, help="inputs of each kind")
    parser.add_argument("--kinds", nargs="*", default=[])
    parser.add_argument("--trial", action="store_true", help="record nothing")
    options = parser.parse_args(arguments)
    from kinds import KINDS

    figures, failed = {}, 0
    print("class, number, loaded equal, clear, other")
    for kind in KINDS:
        if options.kinds and kind.name not in options.kinds:
            continue
        with tempfile.TemporaryDirectory() as folder:
            tally = fuzz(kind, range(options.count), Path(folder))
        print(f"{kind.name}, {tally.inputs}, {tally.equal}, {tally.clear}, {len(tally.other)}",
              flush=True)  # fmt: skip
        for seed, fault in tally.other[:3]:
            print(f"    seed {seed}: {fault}", flush=True)
        failed += len(tally.other)
        values = (tally.inputs, tally.equal, tally.clear, len(tally.other))
        figures |= {
            f"fuzz.{kind.name}.{name}": value
            for name, value in zip(("inputs", "equal", "clear", "other"), values, strict=True)
        }
    if not options.trial and not options.kinds:
        _record(figures)
    return 1 if failed else 0


def _record(counts: dict[str, int]) -> None:
    from figures import plain, record

    totals = {
        f"fuzz.all.{name}": sum(v for key, v in counts.items() if key.endswith(f".{name}"))
        for name in ("inputs", "equal", "clear", "other")
    }
    inputs = {key: counts.get(f"{key.rpartition('.')[0]}.inputs", 0) for key in counts}
    figures = {key: plain(value, inputs[key]) for key, value in counts.items()}
    figures |= {key: plain(value, totals["fuzz.all.inputs"]) for key, value in totals.items()}
    record(figures, "make fuzz")


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here), str(here.parent / "benchmarks"), str(here.parent)]
    import conftest  # noqa: F401  # the checkout as `unmemorize`

    sys.exit(main(sys.argv[1:]))
