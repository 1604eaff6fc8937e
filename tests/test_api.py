"""The public interface: cheap to import, found by name, and used as the README uses it."""

import ast
import contextlib
import functools
import importlib.util
import io
import re
import sys

import pytest
import torch
import unmemorize
from unmemorize import demo


def examples(root):
    readme = (root / "README.md").read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def used(root):
    """The names that the README's Python leaves behind, run from top to bottom.

    Where it leaves the number of steps open, there are 8: what is looked at happens at the first.
    Controls are as many as a false-positive rate of 1 % needs, and none is near a planted prompt.
    """
    from diffusers import StableDiffusionPipeline

    names: dict = {"printed": io.StringIO()}
    controls = demo.controls()[-99:]
    few = functools.partialmethod(StableDiffusionPipeline.__call__, num_inference_steps=8)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(names["printed"]):
        patch.setattr(StableDiffusionPipeline, "__call__", few)
        patch.setattr(demo, "controls", lambda: controls)
        torch.manual_seed(0)  # the README's calls draw their own noise
        for example in examples(root):
            exec(compile(example, "README.md", "exec"), names)
    return names


def test_the_readme_scores_prompts_and_gives_verdicts(used):
    assert used["detection"].scores[0] > 1.5 * used["detection"].scores[1]
    assert used["judge"].flags(used["detection"].scores).tolist() == [True, False]


def test_the_readme_guards_a_pipeline(used):
    (image,) = used["guarded"].runs[0].images
    assert image.fired
    assert image.score_after < image.threshold < image.score_before
    with (
        pytest.raises(ValueError, match="There is no method 'gone'"),
        unmemorize.guard(used["pipeline"], method="gone", gate="always"),
    ):
        pytest.fail("was entered")


def test_the_readme_observes_a_pipeline(used):
    (run,) = used["observed"].runs
    assert run.l2.shape[0] == 1
    assert run.comparable
    assert run.residual is None  # with 50 steps, the pipeline's own, there is one
    assert run.residual_reason.startswith("sampling began at noise level")
    assert used["printed"].getvalue().count("tensor(") == 3


def test_the_readme_needs_three_lines_for_each(root):
    calls = [example for example in examples(root) if "unmemorize." in example]
    assert [len(example.splitlines()) for example in calls] == [3, 4, 2, 3]


def test_importing_is_cheap_until_a_name_is_used(loaded_after):
    before = loaded_after("import importlib.util")
    after = loaded_after("import unmemorize; dir(unmemorize); hasattr(unmemorize, 'gone')")
    assert {name for name in after - before if not name.startswith("_")} == {"unmemorize"}
    after = loaded_after("import unmemorize; unmemorize.detect")
    assert {"torch", "unmemorize.shared.score.detection"} <= after
    assert not {"diffusers", "transformers", "unmemorize.nodes"} & after


@pytest.mark.parametrize("name", unmemorize.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(unmemorize, name)
    assert value.__module__.startswith("unmemorize.")
    assert value.__doc__
    assert name in dir(unmemorize)


def test_type_checkers_see_the_same_names(root):
    tree = ast.parse((root / "__init__.py").read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: f"{node.module}.{alias.name}" for node in block.body
            for alias in node.names}  # fmt: skip
    assert seen == unmemorize._PUBLIC


def test_other_names_are_missing_as_ever():
    with pytest.raises(AttributeError, match=r"no attribute 'gone'"):
        unmemorize.gone  # noqa: B018
    with pytest.raises(ImportError):
        from unmemorize import gone  # noqa: F401
    # ComfyUI would take it and never ask for `comfy_entrypoint`.
    assert not hasattr(unmemorize, "NODE_CLASS_MAPPINGS")
    assert unmemorize.comfy_entrypoint
    assert unmemorize.WEB_DIRECTORY == "web"


def test_names_are_found_under_any_name_of_the_package(root):
    """ComfyUI registers a pack under its path."""
    name = str(root).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, root / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        assert module.detect.__module__ == f"{name}.shared.score.detection"
    finally:
        for loaded in [each for each in sys.modules if each.split(".")[0] == name]:
            del sys.modules[loaded]


def test_a_pipeline_in_memory_is_known_by_its_tensors():
    loaded = unmemorize.load(demo.MODEL, device="cpu")
    taken = unmemorize.load(loaded.pipeline)
    assert taken.pipeline is loaded.pipeline
    assert taken.fingerprint == unmemorize.load(loaded.pipeline).fingerprint
    with torch.no_grad():
        loaded.pipeline.unet.conv_in.bias[0] += 1
    assert unmemorize.load(loaded.pipeline).fingerprint != taken.fingerprint
    with pytest.raises(ValueError, match="leave out dtype"):
        unmemorize.load(loaded.pipeline, dtype=torch.float16)


def test_a_model_of_files_is_known_by_its_files():
    from unmemorize.shared.models.load import model_fingerprint

    assert unmemorize.load(demo.MODEL).fingerprint == model_fingerprint(demo.MODEL)
