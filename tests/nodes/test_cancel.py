"""Cancel: before the next forward pass, the model as it was, nothing lost that was done."""

import pytest
from comfyui import pack

pytestmark = pytest.mark.comfy
CONTROLS = [f"a {thing}" for thing in "cat house tree boat cup hat road dog bird".split()]


def demo(stop: int | None = None):
    """Return the demo's MODEL and CLIP; the user cancels at the end of forward pass `stop`."""
    import comfy.model_management

    model, clip, _ = pack("nodes.engine.demo_model").load_model()
    passes = []

    def forward(apply_model, given):
        passes.append(len(given["timestep"]))
        output = apply_model(given["input"], given["timestep"], **given["c"])
        if len(passes) == stop:
            comfy.model_management.interrupt_current_processing()
        return output

    model = model.clone()
    model.set_model_unet_function_wrapper(forward)
    return model, clip, passes


def cancel(node: str, stop: int, inputs: dict) -> dict:
    """Run a node, cancel it at the end of forward pass `stop`, and run it again."""
    import torch
    from comfy.model_management import InterruptProcessingException

    node_class = getattr(pack(f"nodes.{node.lower()}"), inputs.pop("class"))
    inputs["latent"] = {"samples": torch.zeros(1, 4, 16, 16)}
    outcome = {}
    with torch.inference_mode():
        for name, at in (("cancelled", stop), ("after", None)):
            model, clip, passes = demo(at)
            weights = [id(w) for w in model.model.state_dict(keep_vars=True).values()]
            if name == "cancelled":
                first = model, weights
            encode = pack("nodes.engine.measuring").encoded
            try:
                result = node_class.execute(
                    model=model, clip=clip, negative=encode(clip, ""), **inputs
                ).result
            except InterruptProcessingException:
                result = None
            outcome[name] = {"result": result, "passes": len(passes)}
        model, weights = first
        now = list(model.model.state_dict(keep_vars=True).values())
        outcome["undone"] = [id(weight) for weight in now] == weights
        outcome["inference"] = all(weight.is_inference() for weight in now)
    return outcome


# Empty and whole prompt, then three shortened ones; or a gradient of both,
# then both again and one shortened prompt.
@pytest.mark.parametrize(("method", "passes"), [("leave_out", 2 + 3), ("encoder_gradient", 5)])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_heatmap(comfy, stop, method, passes):
    inputs = {"class": "TokenHeatmap", "text": "a red cat", "seeds": 1, "steps": 1, "most": 1,
              "method": method}  # fmt: skip
    done = comfy.call(cancel, "heatmap", stop, inputs)
    assert done["cancelled"] == {"result": None, "passes": stop}
    assert done["after"]["passes"] == passes
    assert "a red cat" in done["after"]["result"][3]
    assert done["undone"]
    assert done["inference"]


def test_calibrate_goes_on_where_it_stopped(comfy):
    inputs = {
        "class": "Calibrate", "name": "cancelled", "controls": "art", "seeds": 2, "steps": 1,
        "prompts": "\n".join(CONTROLS), "false_positive_rate": 0.1,
    }  # fmt: skip
    done = comfy.call(cancel, "calibrate", 4, inputs)
    assert done["cancelled"] == {"result": None, "passes": 4}
    # The empty prompt once more; of the controls the first two, which filled a batch, are known.
    # Then all of them and the empty prompt for the residual, at each seed's own told level.
    residual = inputs["seeds"] * (1 + len(CONTROLS))
    assert done["after"]["passes"] == 1 + len(CONTROLS) - 2 + residual
    whole = comfy.call(cancel, "calibrate", 1000, dict(inputs, name="whole"))
    assert whole["cancelled"]["passes"] == 1 + len(CONTROLS) + residual
    calibration, _ = whole["cancelled"]["result"]
    assert done["after"]["result"][0] == calibration
