"""The page that compares methods, in a real browser."""

import dataclasses

import pytest
from PIL import Image
from unmemorize.audit.model.config import AuditConfig
from unmemorize.audit.model.mitigation_page import headline, render_mitigation
from unmemorize.audit.model.mitigation_result import (
    UNMITIGATED,
    MitigationConfig,
    MitigationEntry,
    MitigationResult,
    Probed,
    Rewording,
    Search,
    Trial,
)
from unmemorize.audit.model.result import GeneratedImage, NearestImage
from unmemorize.shared.score.calibration import Calibration

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"
METHODS = ("embedding", "delayed_guidance")


@pytest.fixture
def result(tmp_path):
    (tmp_path / "images").mkdir()
    for seed in (0, 1):
        Image.new("RGB", (64, 64), (200, 90 * seed, 40)).save(tmp_path / f"images/{seed}.png")
    images = tuple(
        GeneratedImage(path=f"images/{seed}.png", seed=seed, nearest=None) for seed in (0, 1)
    )
    sought = Search(
        loss_before=0.5, loss_after=0.1, images=("images/0.png", "images/1.png"),
        copied=(True, False),
    )  # fmt: skip
    entries = tuple(
        MitigationEntry(
            index=index, prompt=prompt, score=3.0 - 2 * index, memorized=index == 0,
            trials=tuple(
                Trial(method=way, acted=way != UNMITIGATED and index == 0, score_after=None,
                      change=f'{HOSTILE} dropped' if index == 0 and way != UNMITIGATED else '',
                      seconds=1.0 + number, images=images)
                for number, way in enumerate((UNMITIGATED, *METHODS))
            ),
            rewordings=(Rewording(prompt=HOSTILE, edit="drop", score=1.0, under_threshold=True),),
            residual=Probed(training=sought, mirror=None) if index == 0 else None,
        )
        for index, prompt in enumerate((HOSTILE, "a clean prompt"))
    )  # fmt: skip
    calibration = Calibration(
        model="abc", settings={}, controls="controls", controls_sha256="abc",
        control_scores=((1.0,), (1.5,)), false_positive_rate=0.5, threshold=2.0,
        interval=(0.1, 0.9),
    )  # fmt: skip
    model = {"name": HOSTILE, "lora": None, "dtype": "float32", "device": "cpu",
             "fingerprint": "abc"}  # fmt: skip
    methods = {
        name: {"acted_on": 1, "copies": None, "seconds_per_image": 1.0 + number}
        for number, name in enumerate((UNMITIGATED, *METHODS))
    }
    return MitigationResult(
        config=MitigationConfig(audit=AuditConfig(model="models/mine"), methods=METHODS),
        calibration=calibration, entries=entries, folder=tmp_path,
        summary={"schema_version": 1, "model": model, "prompts": 2, "memorized": 1,
                 "gate": "calibrated", "images": 2, "score": "residual", "threshold": 2.0,
                 "methods": methods, "training_images": 40,
                 "settings": {}, "caveats": [HOSTILE], "versions": {}},
    )  # fmt: skip


@pytest.mark.parametrize("width", [360, 1200])
def test_pictures_of_all_methods_and_nothing_runs(chromium, result, tmp_path, width):
    path = tmp_path / "mitigation.html"
    path.write_text(render_mitigation(result, result.folder), encoding="utf-8")
    context = chromium.new_context(offline=True, viewport={"width": width, "height": 800})
    try:
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message) or dialog.dismiss())
        page.goto(path.as_uri())
        assert page.title() == f"Mitigation on {HOSTILE}"
        assert said == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        loaded = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
        # Two seeds of three ways for two prompts, and two of the probe.
        assert loaded == [True] * (2 * 3 * 2 + 2)
        card = page.locator("article").first
        assert HOSTILE in card.inner_text()
        assert "1 of 2 copied" in card.inner_text()
        assert "so there is no control" in card.inner_text()
        assert page.locator("article").nth(1).get_by_text("gate shut").count() == len(METHODS)
        rows = page.locator("table tbody tr").all_inner_texts()
        assert [row.split("\t")[-1] for row in rows] == ["1", "2", "3"]
    finally:
        context.close()


def test_the_headline_counts_and_promises_nothing(result):
    assert headline(result) == "1 of 2 prompts scored above the threshold"
    clean = dataclasses.replace(result, summary=result.summary | {"memorized": 0})
    assert headline(clean) == "None of 2 prompts scored above the threshold"
    page = render_mitigation(result, result.folder).lower()
    assert "removed" not in page
    assert "is safe" not in page


@pytest.mark.parametrize(("after", "said"), [(2.5, 1), (2.0, 0), (None, 0)])
def test_a_prompt_that_is_still_above_the_threshold_is_marked(result, after, said):
    first, second = result.entries
    plain, acted, *rest = first.trials
    trials = (plain, dataclasses.replace(acted, score_after=after), *rest)
    entries = (dataclasses.replace(first, trials=trials), second)
    changed = dataclasses.replace(result, entries=entries)
    page = render_mitigation(changed, result.folder)
    assert page.count("still above the threshold") == said


def test_it_tells_what_was_acted_on_by_which_score_and_what_became_of_it(result):
    first, second = result.entries

    def seen(trial, similarity, copied):
        nearest = NearestImage(
            path="images/1.png", caption="a caption of another", similarity=similarity, ratio=0.2,
            own_ratio=None, is_own=False, copied=copied,
        )  # fmt: skip
        images = tuple(dataclasses.replace(image, nearest=nearest) for image in trial.images)
        return dataclasses.replace(trial, images=images)

    plain, acted, rest = first.trials
    acted = dataclasses.replace(acted, score_after=1.25, change="drop “owl”: “on dots”")
    trials = (seen(plain, 0.97, True), seen(acted, 0.61, False), rest)
    entries = (dataclasses.replace(first, trials=trials), second)
    page = render_mitigation(dataclasses.replace(result, entries=entries), result.folder)
    assert "The gate opened for 1 of 2" in page
    assert "by the residual score" in page
    assert "above the threshold 2" in page
    assert "score 3 before, <b>1.25</b> after" in page
    assert "drop “owl”: “on dots”" in page
    assert page.count("nearest of 40 training images") == 2  # before and after
    assert page.index("0.97") < page.index("0.61")
    assert page.count("a caption of another") == 2
