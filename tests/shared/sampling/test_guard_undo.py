"""Whatever happens inside a guard, the pipeline comes out as it went in."""

import diffusers
import pytest
import tiny
import torch
from guards import Scripted, network_of, parted, renoising, run, trace_of, unguided
from unmemorize.shared.mitigation.method import Mitigation
from unmemorize.shared.sampling.guard import guard
from unmemorize.shared.sampling.observer import observe

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")


@pytest.fixture(params=tiny.PIPELINES, scope="module")
def pipeline(request):
    return tiny.PIPELINES[request.param]()


@pytest.fixture
def sd1():
    return tiny.stable_diffusion()


class Stop(Exception):
    """Of the tests."""


def fail(error):
    def raising(*_, **__):
        raise error

    return raising


class Deep(Scripted):
    """Changes the noise and the attention, and undoes the latter on closing."""

    def __init__(self, pipeline, **kwargs):
        self.network, self.undone = network_of(pipeline), 0
        super().__init__(**kwargs)

    def start(self, start):
        own, method = dict(self.network.attn_processors), self
        first, *rest = own.items()

        class Patched(Mitigation):
            def guide(self, step):
                return method.guide(step) if method.guide else None

            def close(self):
                method.network.set_attn_processor(dict(own))
                method.undone += 1

        mine = type(first[1])()
        self.network.set_attn_processor({first[0]: mine, **dict(rest)})
        return Patched(x=start.x.flip(-1))


def test_nothing_is_left_after_the_block(pipeline):
    before, plain = trace_of(pipeline), run(pipeline)
    method = Deep(pipeline)
    with guard(pipeline, method=method, gate="always"):
        assert trace_of(pipeline) != before
        inside = trace_of(pipeline)
        run(pipeline)
        assert method.undone == 1  # at the end of its run, not of the block
        assert trace_of(pipeline) == inside
        run(pipeline)
    assert method.undone == 2
    assert trace_of(pipeline) == before
    assert torch.equal(run(pipeline), plain)


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(pipeline, error):
    before = trace_of(pipeline)
    for method, kwargs, closed in (
        (Deep(pipeline), {"callback_on_step_end": fail(error())}, 1),
        (Deep(pipeline, guide=fail(error())), {}, 1),
        (Scripted(begin=fail(error())), {}, 0),
        (Scripted(guide=fail(error())), {}, 1),
    ):
        with pytest.raises(error), guard(pipeline, method=method, gate="always") as record:
            run(pipeline, **kwargs)
        assert trace_of(pipeline) == before
        assert (method.undone if isinstance(method, Deep) else method.closed) == closed
        assert [image.fired for image in record.runs[0].images] == [True, True]  # what was decided
    with pytest.raises(error), guard(pipeline, method=unguided(), gate="always"):
        raise error
    assert trace_of(pipeline) == before


def test_nothing_is_left_when_the_network_fails_before_the_first_step(sd1):
    """The scheduler is then still prepared to start from other noise."""
    noise = torch.zeros(2, 4, 16, 16)
    before, plain = trace_of(sd1), run(sd1)
    with guard(sd1, method=renoising(noise), gate="always"):
        inside, calls = trace_of(sd1), []

        def second(*_):
            calls.append(trace_of(sd1))
            if len(calls) == 2:  # after the pass for `Start.x0_uncond`
                raise Stop

        handle = sd1.unet.register_forward_hook(second)
        with pytest.raises(Stop):
            run(sd1)
        handle.remove()
        assert calls[1] != calls[0]  # the scheduler was patched
        assert trace_of(sd1) == inside
    assert trace_of(sd1) == before
    assert torch.equal(run(sd1), plain)


def test_an_error_in_closing_does_not_keep_the_rest(sd1):
    before = trace_of(sd1)

    class Stuck(Mitigation):
        def guide(self, step):  # before the first step: the scheduler is still prepared
            raise ZeroDivisionError

        def close(self):
            raise Stop

    with (
        pytest.raises(Stop),
        guard(sd1, method=Scripted(lambda s: Stuck(x=s.x * 0.5)), gate="always"),
    ):
        run(sd1)
    assert trace_of(sd1) == before


@pytest.mark.parametrize("name", ["check_inputs", "encode_prompt", "progress_bar"])
def test_entering_that_fails_halfway(sd1, monkeypatch, name):
    before = trace_of(sd1)
    monkeypatch.setattr(
        f"unmemorize.shared.sampling.follower.Follower._around_{AROUND[name]}",
        fail(KeyboardInterrupt()),
    )
    with pytest.raises(KeyboardInterrupt):
        guard(sd1, method=unguided(), gate="always").__enter__()
    assert trace_of(sd1) == before


AROUND = {"check_inputs": "check", "encode_prompt": "encode", "progress_bar": "loop"}


def test_hooks_that_fail_to_register(sd1, monkeypatch):
    before = trace_of(sd1)
    monkeypatch.setattr(sd1.unet, "register_forward_hook", fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        guard(sd1, method=unguided(), gate="always").__enter__()
    monkeypatch.undo()
    assert trace_of(sd1) == before


def test_what_the_user_had_wrapped_stays(sd1):
    original, seen = sd1.encode_prompt, []

    def mine(*args, **kwargs):
        seen.append(args or kwargs)
        return original(*args, **kwargs)

    sd1.encode_prompt = mine
    hook = sd1.unet.register_forward_hook(lambda m, a, o: seen.append(len(o[0])))
    before, plain = trace_of(sd1), run(sd1)
    with guard(sd1, method=Scripted(), gate="never"):
        assert torch.equal(run(sd1), plain)
    assert trace_of(sd1) == before
    assert sd1.encode_prompt is mine
    hook.remove()


def test_a_guard_inside_a_guard_is_refused_and_leaves_the_outer_one(sd1):
    plain = run(sd1)
    with guard(sd1, method=unguided(), gate="always"):
        inside = trace_of(sd1)
        with pytest.raises(ValueError, match="guarded already"):
            guard(sd1, method=unguided(), gate="always").__enter__()
        assert trace_of(sd1) == inside
        found = run(sd1)
    assert not torch.equal(found, plain)
    with guard(sd1, method=unguided(), gate="always"):  # one after the other is fine
        assert torch.equal(run(sd1), found)


def test_another_pipeline_on_the_same_network_is_left_alone(sd1):
    other = diffusers.StableDiffusionPipeline(**sd1.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    plain = run(other)
    with guard(sd1, method=unguided(), gate="always") as record, observe(sd1) as seen:
        found = run(sd1)
        assert torch.equal(run(other), plain)
    assert not torch.equal(found, plain)
    assert len(record.runs) == len(seen.runs) == 1
    assert seen.runs[0].l2.shape == (2, 3)


def test_one_guard_serves_many_calls(sd1):
    prompts, calibration = parted(sd1, [False, True])
    calls = [
        {"prompts": prompts},
        {"prompts": prompts[1], "seeds": [4]},
        {"prompts": prompts, "num_inference_steps": 2, "guidance_scale": 3.0},
        {"prompts": prompts[::-1]},
        {"prompts": prompts[0], "seeds": [4]},
    ]
    alone = []
    for kwargs in calls:
        with guard(sd1, method=unguided(), calibration=calibration) as record:
            alone.append(run(sd1, **kwargs))
        assert len(record.runs) == 1
    with guard(sd1, method=unguided(), calibration=calibration) as record:
        for kwargs, expected in zip(calls, alone, strict=True):
            assert torch.equal(run(sd1, **kwargs), expected)
    assert [[image.fired for image in run.images] for run in record.runs] == [
        [False, True], [True], [False, True], [True, False], [False],
    ]  # fmt: skip
    run(sd1)
    assert len(record.runs) == len(calls)  # after the block nothing is seen
