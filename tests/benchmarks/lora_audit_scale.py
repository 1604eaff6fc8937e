"""The index and the cache at the size of large training sets, for ``make bench``'s `lora_audit`."""

import tempfile
import time
from pathlib import Path

import psutil
import torch
from figures import Figure, count_of, plain
from unmemorize import demo
from unmemorize.audit.common.sscd import DIMENSIONS, Sscd
from unmemorize.audit.lora.feature_cache import FeatureCache
from unmemorize.audit.lora.neighbours import Index, find_duplicates

IMAGES, QUERIES, NEIGHBOURS = 100_000, 512, 10
PAIRED = 10_000
"""Images among which all pairs are searched for duplicates."""
FILES = 64


def units(count: int, seed: int) -> torch.Tensor:
    rows = torch.randn(count, DIMENSIONS, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, out=rows)


def seconds(start: float) -> float:
    return time.perf_counter() - start


def measure_scale(figures: dict[str, Figure]) -> None:
    """Note memory, cost of a query and whether it is exact, of 100,000 rows; then the cache."""
    rows, process = units(IMAGES, 0), psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    index = Index(rows)
    line = {
        "build_seconds": plain(seconds(start), 1),
        "megabytes": plain((process.memory_info().rss - before) / 1e6, 1),
    }
    # Edited copies of rows in the index, and as many rows that have nothing to do with it.
    queries = torch.nn.functional.normalize(rows[:QUERIES] + 0.5 * units(QUERIES, 1))
    queries = torch.cat([queries[::2], units(QUERIES // 2, 2)])
    start = time.perf_counter()
    for query in queries[:20]:
        index.search(query[None], NEIGHBOURS)
    line["single_query_ms"] = plain(1000 * seconds(start) / 20, 20)
    start = time.perf_counter()
    cosines, found = index.search(queries, NEIGHBOURS)
    line["query_ms"] = plain(1000 * seconds(start) / len(queries), len(queries))
    expected = (queries @ rows.T).topk(NEIGHBOURS)
    torch.testing.assert_close(cosines, expected.values, rtol=0, atol=1e-5)
    equal = found == expected.indices
    line["equal_to_full_search"] = count_of(int(equal.sum()), equal.numel())
    line |= measure_duplicates(rows[:PAIRED]) | measure_cache()
    figures |= {f"lora_audit.scale.{key}": figure for key, figure in line.items()}


def measure_duplicates(rows: torch.Tensor) -> dict[str, Figure]:
    """Return the time of finding 100 planted pairs among all pairs, and how many were found."""
    copies = torch.nn.functional.normalize(rows[:100] + 0.3 * units(100, 3))
    rows = torch.cat([rows[:-100], copies])
    start = time.perf_counter()
    groups = find_duplicates(rows, list(map(str, range(len(rows)))), threshold=0.85)
    took = seconds(start)
    planted = {(i, len(rows) - 100 + i) for i in range(100)}
    found = planted & {group.images for group in groups}
    return {
        "duplicates_10000_seconds": plain(took, 1),
        "duplicates_found": count_of(len(found), len(planted)),
        "duplicates_claimed": plain(len(groups), 1),
    }


def measure_cache() -> dict[str, Figure]:
    """Return milliseconds an image, embedded for the first time and read again."""
    captions = [caption.text for caption in demo.captions()]
    images = [image for text in captions if (image := demo.training_image(text)) is not None]
    figures = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        paths = [folder / f"{index}.png" for index in range(FILES)]
        for path, image in zip(paths, images, strict=False):
            image.save(path)
        cache = FeatureCache(Sscd(), folder / "cache")
        for key in ("embed_ms", "cached_ms"):
            start = time.perf_counter()
            cache.rows(paths)
            figures[key] = plain(1000 * seconds(start) / FILES, FILES)
    return figures
