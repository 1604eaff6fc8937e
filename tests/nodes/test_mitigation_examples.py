"""The example workflows that mitigate: the memorized image goes, an ordinary one stays."""

import numpy as np
import pytest
from comfyui import node
from mitigated_prompts import ordinary
from test_examples import OLDEST_AND_NEWEST, load, of_type

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


def first_encoder(graph: dict) -> str:
    """Return the id of the node with the prompt."""
    return next(i for i in of_type(graph, "CLIPTextEncode") if graph[i]["inputs"]["text"])


@OLDEST_AND_NEWEST
def test_before_and_after_on_one_seed(comfy, root):
    graph = load(comfy, root, "Before and after mitigation")
    reports, images = of_type(graph, "UnmemorizeReport"), of_type(graph, "VAEDecode")
    (mitigate,) = of_type(graph, "UnmemorizeMitigate")
    keep = {"acted": [mitigate, 2], "after": [mitigate, 4]}
    keep |= {i: [i, 4] for i in reports} | {i: [i, 0] for i in images}
    run = comfy.run(graph, keep=keep)
    assert [run[i] for i in reports] == [True, False]
    assert run["acted"]
    # The images of several seeds are one copy before, and differ afterwards.
    spread = [run[i].std(0).mean() for i in images]
    assert spread[1] > 1.5 * spread[0]

    graph[first_encoder(graph)]["inputs"]["text"] = ordinary()
    run = comfy.run(graph, keep=keep)
    assert not run["acted"]
    np.testing.assert_array_equal(*(run[i] for i in images))


@OLDEST_AND_NEWEST
def test_gate_and_resample_samples_again_only_if_memorized(comfy, root):
    graph = load(comfy, root, "Sample again if memorized")
    (report,), (switch,) = of_type(graph, "UnmemorizeReport"), of_type(graph, "UnmemorizeSwitch")
    (watch,), (mitigate,) = of_type(graph, "UnmemorizeWatch"), of_type(graph, "UnmemorizeMitigate")
    samplers = of_type(graph, "KSampler")
    again = next(i for i in samplers if graph[i]["inputs"]["positive"][0] == mitigate)
    keep = {"memorized": [report, 4], "first": [report, 0], "kept": [switch, 0]}

    watched = graph | {again: node("KSampler", **graph[again]["inputs"] | {"model": [watch, 0]})}
    inputs = graph[report]["inputs"] | {"latent": [switch, 0]}
    watched["second"] = node("UnmemorizeReport", **inputs)
    run = comfy.run(watched, keep=keep | {"after": ["second", 4]})
    assert run["memorized"] is True
    assert run["after"] is False
    assert not np.array_equal(run["first"]["samples"], run["kept"]["samples"])
    assert {mitigate, again} <= set(run.ran)

    graph[first_encoder(graph)]["inputs"]["text"] = ordinary()
    run = comfy.run(graph, keep=keep)
    assert run["memorized"] is False
    np.testing.assert_array_equal(run["first"]["samples"], run["kept"]["samples"])
    assert report in run.ran
    assert not {mitigate, again} & set(run.ran)
