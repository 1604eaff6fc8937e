"""Mitigation on a live server: Cancel within a search, and everything as it was afterwards."""

import pytest
from comfyui import node
from comfyui_server import messages
from test_live_server import graph, text

pytestmark = [pytest.mark.comfy, pytest.mark.slow]
BY_NORM = {"target_from": "norm", "target_quantile": 0.5, "target_norm": 0.0}


def mitigating(name: str, iterations: int) -> dict:
    """Return a graph that samples with one of the nodes at work."""
    made = graph(seed=5)
    sampler = made["sampler"]["inputs"]
    if name == "UnmemorizeMitigate":
        made["mitigate"] = node(
            name, model=["1", 0], positive=["2", 0], negative=["3", 0], latent=["4", 0], seed=5,
            gate="always", learning_rate=0.05, iterations=iterations, **BY_NORM,
        )  # fmt: skip
        sampler["positive"] = ["mitigate", 0]
    else:
        parameters = BY_NORM | {"iterations": iterations, "learning_rate": 0.01}
        made["guard"] = node(
            name, model=["1", 0], gate="always", method="initial noise",
            **{f"method.{key}": value for key, value in parameters.items()},
        )  # fmt: skip
        sampler["model"] = ["guard", 0]
        made["report"]["inputs"]["record"] = ["guard", 1]
    return made


@pytest.mark.parametrize("name", ["UnmemorizeMitigate", "UnmemorizeGuard"])
def test_cancel_within_a_search(server, name):
    before = text(server.run(mitigating(name, iterations=2))[0])
    told = []

    def cancel(kind: str, data: object) -> None:
        if kind == "progress":
            told.append(data["value"])
            if len(told) == 5:
                server.post("/interrupt", {})

    (entry,) = server.run(mitigating(name, iterations=500), on_event=cancel)
    assert "execution_interrupted" in messages(entry)
    assert len(told) <= 5 + 2  # a pass that was under way, and one already announced
    server.post("/free", {"unload_models": True, "free_memory": True})
    assert text(server.run(mitigating(name, iterations=2))[0]) == before
