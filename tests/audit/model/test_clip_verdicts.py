"""The commands' work on a video model: content and motion with verdicts of their own controls."""

import json

import pytest
import tiny
import tiny_families
from unmemorize.audit.common.measure import silent
from unmemorize.audit.common.subject import Subject
from unmemorize.audit.model.parts import make_calibration, score_prompts
from unmemorize.shared.files.schema import digest_of
from unmemorize.shared.score.calibration_file import DIGEST
from unmemorize.shared.score.config import DetectionConfig

CONFIG = DetectionConfig(seeds=(0, 1))
CONTROLS = [f"a {word} {thing}" for word in ("red", "green", "old")
            for thing in ("cat", "dog", "house")]  # fmt: skip
TEXTS = ["a tall tree on the mat", "a red cat"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    folder = tmp_path_factory.mktemp("wan") / "model"
    tiny_families.wan().save_pretrained(folder)
    return Subject(
        str(folder), device="cpu", resolution=tiny.RESOLUTION, frames=tiny_families.FRAMES
    )


@pytest.fixture(scope="module")
def calibration(subject, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    (folder / "controls.txt").write_text("\n".join(CONTROLS))
    make_calibration(
        subject, controls=str(folder / "controls.txt"), config=CONFIG, rate=0.2, score=None,
        collapse=False, output=folder / "made.json", bars=silent,
    )  # fmt: skip
    return folder / "made.json"


def scored(subject, calibration, **settings) -> list[dict]:
    given = {"files": (), "texts": TEXTS, "config": CONFIG, "force": False, "sequential": False,
             "collapse": False, "output": None, "bars": silent}  # fmt: skip
    return score_prompts(subject, calibration=calibration, **given | settings)


def test_without_a_calibration_the_parts_are_numbers(subject):
    for row in scored(subject, None):
        clip = row["clip"]
        assert len(clip["frames"]) == 3
        total = clip["content"]["magnitude"] ** 2 + clip["motion"]["magnitude"] ** 2
        assert total == pytest.approx(row["magnitude"] ** 2, rel=0.05)  # means over two seeds
        assert clip["motion"]["memorized"] is None


@pytest.mark.parametrize("sequential", [False, True])
def test_each_part_is_compared_with_its_own_controls(subject, calibration, sequential):
    values = json.loads(calibration.read_text())
    plain = {row["prompt"]: row["clip"] for row in scored(subject, None)}
    for row in scored(subject, calibration, sequential=sequential):
        for part in ("content", "motion"):
            found = row["clip"][part]
            expected = plain[row["prompt"]][part]["magnitude"]
            assert found["magnitude"] == pytest.approx(expected, rel=1e-4)
            assert found["memorized"] == (expected > values[part]["threshold"])
            controls = [sum(seeds) / 2 for seeds in values[part]["control_scores"]]
            above = sum(score >= expected for score in controls)
            assert found["p_value"] == pytest.approx((1 + above) / (len(controls) + 1))


def test_a_calibration_without_controls_of_the_parts_says_so(subject, calibration, tmp_path):
    values = json.loads(calibration.read_text()) | {"content": None, "motion": None}
    values.pop(DIGEST)
    sealed = values | {DIGEST: digest_of(values, DIGEST)}
    (tmp_path / "older.json").write_text(json.dumps(sealed))
    bases = calibration.with_suffix(".safetensors")
    (tmp_path / "older.safetensors").write_bytes(bases.read_bytes())
    rows = scored(subject, tmp_path / "older.json")
    assert "No verdict on content and motion" in rows[0]["caveat"]
    assert rows[0]["clip"]["motion"]["memorized"] is None
    assert rows[0]["clip"]["motion"]["magnitude"] > 0
