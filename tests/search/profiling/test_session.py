"""A profile made from Python: the bytes of the command, its events in order, and runs that were cut short go on."""

import os
from pathlib import Path

import command_line
import pytest
import tiny

import lexi_search
from lexi_search.errors import InputError
from lexi_search.models.loading.residence import Residence, Room
from lexi_search.profiling import session
from lexi_search.profiling.distributed import Group

SETTINGS = {"input": "paper", "batch": 2, "length": 32, "relative_error": 0.2}
OPTIONS = ["--input", "paper", "--batch", "2", "--length", "32", "--relative-error", "0.2"]


class Recorder:
    """An observer that keeps what it hears, and stops the run after `layers` layers."""

    def __init__(self, layers=None):
        self.layers, self.events, self.planned = layers, [], None

    def open(self, partials, layers):
        self.events.append(("open", sorted(partials.layers), tuple(layers)))

    def plan(self, plan):
        self.planned = plan

    def advance_pass(self, layer):
        self.events.append(("pass", layer))

    def finish_layer(self, layer):
        self.events.append(("layer", layer))
        if self.layers == sum(kind == "layer" for kind, *_ in self.events):
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.make_checkpoint("olmoe", tmp_path_factory.mktemp("checkpoint") / "olmoe")


def test_it_is_the_profile_of_the_command_also_after_a_run_that_was_cut_short(folder, checkpoint):
    assert command_line.run("profile", checkpoint, *OPTIONS, "-o", "command.json").exit_code == 0
    with pytest.raises(KeyboardInterrupt):
        lexi_search.profile_checkpoint(checkpoint, "python.json", observer=Recorder(layers=2), **SETTINGS)
    assert not Path("python.json").exists()
    recorder = Recorder()
    profile = lexi_search.profile_checkpoint(checkpoint, "python.json", observer=recorder, **SETTINGS)
    assert recorder.events == [("open", [0, 1], (0, 1, 2)), ("layer", 2)]
    assert recorder.planned.work == () and recorder.planned.memory_bytes > recorder.planned.weights_bytes > 0
    assert profile == lexi_search.read_profile("python.json")
    assert Path("python.json").read_bytes() == Path("command.json").read_bytes()
    assert sorted(os.listdir()) == ["command.json", "python.json"]


def test_a_finished_profile_of_the_same_run_is_taken_and_no_other(folder, checkpoint):
    made = lexi_search.profile_checkpoint(checkpoint, "profile.json", **SETTINGS)
    recorder = Recorder()
    assert lexi_search.profile_checkpoint(checkpoint, "profile.json", reuse=True, observer=recorder, **SETTINGS) == made
    assert recorder.events == []
    before = Path("profile.json").read_bytes()
    with pytest.raises(
        InputError, match=r"profile.json is the profile of another run, whose settings.seed is 0, not 3"
    ):
        lexi_search.profile_checkpoint(checkpoint, "profile.json", reuse=True, seed=3, **SETTINGS)
    lexi_search.profile_checkpoint(checkpoint, "part.json", layers=[0, 2], **SETTINGS)
    with pytest.raises(InputError, match="part.json lacks layers, the first is 1; choose another place"):
        lexi_search.profile_checkpoint(checkpoint, "part.json", reuse=True, **SETTINGS)
    assert Path("profile.json").read_bytes() == before


def test_on_sampled_text_every_pass_and_the_exponent_are_told(folder, checkpoint):
    recorder = Recorder()
    settings = {"batch": 2, "length": 16, "samples": 64, "compensation": "exponent", "layers": [1]}
    profile = lexi_search.profile_checkpoint(checkpoint, "profile.json", observer=recorder, **settings)
    kinds = [kind for kind, *_ in recorder.events]
    assert kinds[0] == "open" and kinds[-1] == "layer"
    passes = [layer for kind, layer in recorder.events[1:] if kind == "pass"]
    assert passes == [0, 1, 2] * 8  # six for the text, one for the exponent, one for the losses
    work = recorder.planned.work
    assert len(work) == len(passes) and work[:18] == (1,) * 18
    others = profile.model.top_k - 1
    assert work[18:] == (1 + 5 * others,) * 3 + (2, 2 + others, 2 + others)  # the model, and the background
    size = sum(path.stat().st_size for path in Path(checkpoint).glob("*.safetensors"))
    assert 0.9 * size < recorder.planned.read_bytes <= size  # they stay in memory
    assert recorder.planned.phases == (("text", 6), ("compensation", 1), ("losses", 1))
    assert tuple(profile.layers) == (1,)
    recorder = Recorder()
    profile = lexi_search.profile_checkpoint(
        checkpoint, "full.json", observer=recorder, room=Room(0, 0), **settings | {"compensation": "full"}
    )
    assert 0.9 * 10 * size < recorder.planned.read_bytes <= 10 * size  # nothing stays
    assert recorder.planned.staying == (0, 0, recorder.planned.read_bytes // 10)
    assert recorder.planned.phases == (("text", 6), ("compensation", 2), ("corrections", 1), ("losses", 1))
    assert recorder.planned.work == (
        (1,) * 18  # the text
        + (1,) * 3  # corrections with four exponents
        + (1 + 2 * others,) * 3  # each tried at three k, on half of the text
        + (1,) * 3  # corrections with the best of them
        + (2, 2 + others, 2 + others)
    )
    assert [layer for kind, layer in recorder.events[1:] if kind == "pass"] == [0, 1, 2] * 10
    assert profile.settings.compensation_rank == profile.compensation.rank == 32


@pytest.mark.parametrize("settings, stages", [({"samples": 64, "length": 32, "batch": 1}, [range(3)]), (SETTINGS, [])])
def test_a_process_begins_to_read_before_it_waits_for_process_0(folder, checkpoint, monkeypatch, settings, stages):
    """For the text, which process 0 writes; on the paper's input it reads its own layers alone."""
    begun, begin = [], Residence.begin

    def keep(self, layers, replica=0):
        begun.append(layers)
        begin(self, layers, replica)

    def wait(group, name, make):
        raise InterruptedError

    monkeypatch.setattr(Residence, "begin", keep)
    monkeypatch.setattr(session, "share", wait)
    with pytest.raises(InterruptedError):
        lexi_search.profile_checkpoint(checkpoint, "profile.json", group=Group(1, 2), **settings)
    assert begun == stages
    assert os.listdir() == []


def test_a_model_of_several_residual_streams_goes_on_where_it_was_cut_short(folder):
    """DeepSeek-V4, whose first layer looks experts up by token."""
    checkpoint = tiny.make_checkpoint("deepseek_v4", folder / "weights")
    settings = {"batch": 2, "length": 16, "samples": 64, "compensation": "full", "rank": 4}
    recorder = Recorder()
    for place in ("whole", "cut"):
        Path(place).mkdir()
    profile = lexi_search.profile_checkpoint(checkpoint, "whole/profile.json", observer=recorder, **settings)
    assert tuple(profile.layers) == (1, 2) and all(loss.divergence[0] > 0 for loss in profile.layers.values())
    tokens, copies, streams = 64, 2 + 2 * (profile.model.top_k - 1), 4  # copies of the model, the background, layers
    assert recorder.planned.memory_bytes - recorder.planned.weights_bytes == tokens * copies * streams * 64 * 4
    with pytest.raises(KeyboardInterrupt):
        lexi_search.profile_checkpoint(checkpoint, "cut/profile.json", observer=Recorder(layers=1), **settings)
    recorder = Recorder()
    lexi_search.profile_checkpoint(checkpoint, "cut/profile.json", observer=recorder, **settings)
    assert recorder.events[0] == ("open", [1], (1, 2))
    for name in ("profile.json", "profile.safetensors"):
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"input": "text"}, "input text needs a file; name it by --text"),
        ({"control_variate": 4}, "--control-variate is for --input paper"),
        ({"input": "paper", "gate_exponent": "auto"}, "leave --input paper out"),
        ({"gate_exponent": "half"}, "--gate-exponent 'half' is neither a number nor auto"),
        ({"gate_exponent": 2.5}, "gate_exponent is 2.5"),
        ({"layers": [7]}, "layer 7 is no MoE layer; those are 0, 1, 2"),
        ({"samples": 3}, "3 samples are fewer than two sequences"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_a_plan_and_leave_nothing(folder, checkpoint, settings, words):
    recorder = Recorder()
    with pytest.raises(InputError, match=words):
        lexi_search.profile_checkpoint(checkpoint, "profile.json", observer=recorder, **settings)
    assert os.listdir() == [] and recorder.planned is None
