"""How many flagged prompts are explained, and which."""

import pytest
import torch
from unmemorize.audit.common.job import Job
from unmemorize.audit.common.measure import Measured, silent
from unmemorize.audit.common.result import ModelInfo
from unmemorize.audit.common.subject import Facts, Subject
from unmemorize.audit.model import explain
from unmemorize.audit.model.config import AuditConfig
from unmemorize.audit.model.inputs import Inputs
from unmemorize.audit.model.work import Scored, Work
from unmemorize.shared.files.prompts import PromptSet
from unmemorize.shared.score.calibration import Calibration
from unmemorize.shared.score.detection import Detection, DetectionConfig
from unmemorize.shared.words.explanation import Explanation

PROMPTS, SCORES = ("a", "b", "c", "d"), (5.0, 9.0, 4.0, 6.0)
FLAGS = (True, False, True, True)


def scored() -> Scored:
    info = ModelInfo(
        name="m", fingerprint="", lora=None, parametrization="epsilon", dtype="float32",
        device="cpu", latent_shape=(1, 1, 1), guidance_distilled=False,
    )  # fmt: skip
    traces = torch.tensor(SCORES, dtype=torch.float64)[:, None, None]
    detection = Detection(prompts=PROMPTS, traces=traces, latent_elements=1,
                          config=DetectionConfig(seeds=(0,)))  # fmt: skip
    calibration = Calibration(
        model="", settings={}, controls="", controls_sha256="", control_scores=((1.0,),),
        false_positive_rate=0.5, threshold=2.0, interval=(0.1, 0.9),
    )  # fmt: skip
    return Scored(
        facts=Facts(info=info, settings={}, residual={}, rows=1, caveats=()),
        calibration=calibration,
        measured=Measured(detection=detection, cuts=("",) * 4), scores=SCORES, flags=FLAGS,
        caveats=(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "expected"), [(None, [3, 0, 2]), (0, []), (1, [3]), (2, [3, 0]), (9, [3, 0, 2])]
)
def test_so_many_flagged_prompts_are_explained_highest_first(
    wanted, expected, monkeypatch, tmp_path
):
    explained, subject = [], Subject()
    vars(subject)["denoiser"] = None  # as if it were loaded

    def short(denoiser, prompts, config):
        explained.extend(prompts)
        assert config.seeds == (0,)
        return [
            Explanation(
                prompt=prompt,
                words=(prompt,),
                significance=(1.0,),
                occlusions=(),
                difference_map=torch.zeros(2, 2),
            )
            for prompt in prompts
        ]

    monkeypatch.setattr(explain, "explain_each", short)
    prompts = PromptSet(
        prompts=PROMPTS, sources=(("a.txt:1",),) * 4, images=((),) * 4, read=4, empty=0
    )
    work = Work(
        config=AuditConfig(explain=wanted), subject=subject, calibration=None,
        inputs=Inputs(prompts=prompts, groups=(None,) * 4, controls_name="", controls=()),
        job=Job(tmp_path, ""), bars=silent,
    )  # fmt: skip
    assert list(explain.explain_flagged(work, scored())) == expected
    assert explained == ["abcd"[index] for index in expected]
