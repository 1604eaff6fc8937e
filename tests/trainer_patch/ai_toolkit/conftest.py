"""Real trainings by ai-toolkit on the demo model, all in one process.

They need a checkout, which stays as it is, and the Python that runs it:

    AI_TOOLKIT_DIR=~/ai-toolkit AI_TOOLKIT_PYTHON=~/ai-toolkit/venv/bin/python \
        pytest tests/trainer_patch/ai_toolkit
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from ai_toolkit_lora import JOBS, REFUSED, USUAL
from checkouts import folder_of, make_concept, make_images, python_of
from unmemorize.shared.training.concept.subspace import ConceptSubspace

EXTENSION = "from unmemorize.trainer_patch.ai_toolkit import AI_TOOLKIT_EXTENSIONS\n"


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """ai-toolkit with our file among its extensions: a folder of links; skips without one."""
    folder = tmp_path_factory.mktemp("ai_toolkit")
    for path in folder_of("ai-toolkit", "AI_TOOLKIT").iterdir():
        if path.name != "extensions":
            (folder / path.name).symlink_to(path)
    (folder / "extensions").mkdir()
    (folder / "extensions" / "unmemorize.py").write_text(EXTENSION)
    return folder


@pytest.fixture(scope="session")
def room(tmp_path_factory) -> Path:
    """A folder with the images and subspaces, and later with what is trained."""
    folder = tmp_path_factory.mktemp("ai_toolkit_runs")
    make_images(folder / "images")
    ConceptSubspace.empty(128).save(folder / "empty.safetensors")
    ConceptSubspace.empty(64).save(folder / "narrow.safetensors")
    return folder


@pytest.fixture(scope="session")
def concept(root, room) -> Path:
    """The concept's subspace."""
    return make_concept(root / "demo" / "model", room / "concept.safetensors")


@pytest.fixture(scope="session")
def run(root, room, concept, package_env, checkout):
    """Function that does jobs of a table in one process, one after the other; returns the log."""
    places = {
        "EMPTY": room / "empty.safetensors", "FILE": concept, "LOGS": room / "logs",
        "NARROW": room / "narrow.safetensors", "PLAIN": room / "plain" / "plain.safetensors",
    }  # fmt: skip

    def write(title: str, asked: dict | None, changed: dict) -> Path:
        sections = {
            key: usual if key not in changed else changed[key] and usual | changed[key]
            for key, usual in USUAL.items()
        }
        rest = {key: changed[key] for key in changed if key not in USUAL}
        name = rest.pop("name", title)
        images = room / f"{title} images"  # ai-toolkit keeps its caches among them
        shutil.copytree(room / "images", images)
        process = {
            "type": "sd_trainer" if asked is None else "unmemorize",
            "training_seed": 1, "training_folder": str(room), "device": "cpu",
            "datasets": [sections.pop("dataset") | {"folder_path": str(images)}],
            **sections, **rest, "unmemorize": asked,
        }  # fmt: skip
        process["model"] = {"name_or_path": str(root / "demo" / "model")} | process["model"]
        job = {"job": "extension", "config": {"name": name, "process": [process]}}
        text = json.dumps(job)
        for short, place in places.items():
            text = text.replace(f'"{short}"', json.dumps(str(place)))
        path = room / f"{title}.json"
        path.write_text(text)
        return path

    def run(jobs: dict[str, tuple[dict | None, dict]]) -> str:
        paths = [write(title, *each) for title, each in jobs.items()]
        done = subprocess.run(
            [python_of("AI_TOOLKIT"), "run.py", "-r", *paths],
            cwd=checkout, capture_output=True, text=True, encoding="utf-8", errors="replace",
            env=package_env | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="session")
def trained(run, room):
    """Function that returns the LoRA of a job."""
    said = run(JOBS)
    assert "Error running job" not in said, said[said.index("Error running job") :][:3000]
    return lambda name: room / name / f"{name}.safetensors"


@pytest.fixture(scope="session")
def refused(run):
    """What was said to all the jobs that are not supported."""
    return run({f"refused {number}": job for number, job in enumerate(REFUSED.values())})
