"""How many flagged prompts are explained, and which."""

import pytest
import torch
from unmemorize.audit.common.measure import silent
from unmemorize.audit.common.subject import Subject
from unmemorize.audit.model import explain
from unmemorize.audit.model.config import AuditConfig
from unmemorize.shared.files.storage import Journal
from unmemorize.shared.words.explanation import Explanation


@pytest.mark.parametrize(
    ("wanted", "expected"), [(None, [3, 0, 2]), (0, []), (1, [3]), (2, [3, 0]), (9, [3, 0, 2])]
)
def test_so_many_flagged_prompts_are_explained_highest_first(
    wanted, expected, monkeypatch, tmp_path
):
    asked, subject = [], Subject()
    vars(subject)["denoiser"] = None  # as if it were loaded

    def short(denoiser, prompt, config):
        asked.append(prompt)
        return Explanation(
            prompt=prompt, words=(prompt,), significance=(1.0,), tokens=(), token_significance=(),
            occlusions=(), difference_map=torch.zeros(2, 2),
        )  # fmt: skip

    monkeypatch.setattr(explain, "explain", short)
    found = explain.explain_flagged(
        subject, AuditConfig(explain=wanted), ("a", "b", "c", "d"), (5.0, 9.0, 4.0, 6.0),
        (True, False, True, True), Journal(tmp_path / "journal.jsonl"), job_key="", rows=1,
        bars=silent,
    )  # fmt: skip
    assert list(found) == expected
    assert asked == ["abcd"[index] for index in expected]
