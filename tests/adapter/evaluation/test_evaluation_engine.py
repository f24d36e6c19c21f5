"""`lexi-adapter eval` in a real vLLM engine, judged by the same model in transformers."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from engine import allocate
from transformers import AutoTokenizer

import lexi_adapter
from lexi_adapter.allocation import read_allocation
from lexi_adapter.cli.main import main
from lexi_adapter.engines.process import EngineError
from lexi_adapter.evaluation import transformers_backend, vllm_backend
from lexi_adapter.model.variants import Variant
from lexi_adapter.tasks import passkey
from lexi_search.artifacts.serialisation import to_document

MODEL = Path(lexi_adapter.__file__).parent.parent / "examples" / "tiny-olmoe"
LONGEST = 1024  # all positions of the model: a window may fill them
COMMON = {"dtype": "float32", "batch_size": 3, "trust_remote_code": False}


def test_vllm_scores_and_answers_as_transformers_does(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    variant = Variant("mixed", str(MODEL), allocation=read_allocation(to_document(allocate(MODEL, (1, 5, 2)))))
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(1, 2048, (length,), generator=generator).tolist() for length in (40, 40, 40, 7, LONGEST)]
    trials = passkey.make_trials(tokenizer, length=150, depths=2, trials=1, seed=0)
    prompts = [*(list(trial.prompt) for trial in trials), "def read_lines(path):\n"]
    with transformers_backend.open_model(variant, tokenizer, device="cpu", **COMMON) as model:
        expected = [model.score([window])[0] for window in windows]
        answers = model.generate(prompts, 6)
    options = {"load_format": "auto", "parallel": {}, "enforce_eager": True}
    with vllm_backend.open_model(variant, str(MODEL), longest=LONGEST, engine=options, **COMMON) as model:
        found = model.score(windows)
        assert model.generate(prompts, 6) == answers
        with pytest.raises(
            EngineError, match="prompt 1 of .* tokens and its answer of 6 are more than --max-length 20"
        ):
            model.generate(prompts, 6, 20)
    assert len(set(answers)) > 1
    for one, other, window in zip(found, expected, windows, strict=True):
        assert len(one) == len(window) - 1
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=1e-4)


def test_the_command_opens_engines_as_it_was_told(folder, monkeypatch):
    opened = []

    class Fake:
        def __init__(self, *arguments, **options):
            opened.append((arguments, options))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def score(self, windows):
            return [[-1.0 - len(opened)] * (len(window) - 1) for window in windows]

    monkeypatch.setattr(vllm_backend, "open_model", Fake)
    Path("text.txt").write_text("def f(self): pass\n" * 30)
    (folder / "allocation.json").write_text(json.dumps(to_document(allocate(MODEL))))
    shape = ("--text", "text.txt", "--window", "16", "--batch-size", "3", "--dtype", "float32")
    engine = ("--backend", "vllm", "--engine", '{"enforce_eager": true}', "--tensor-parallel-size", "2")
    arguments = ("eval", str(MODEL), "--task", "perplexity", *shape, *engine, "--allocation", "allocation.json")
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert [variant.name for (variant,), _ in opened] == ["base", "allocation.json"]
    parallel = {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "enable_expert_parallel": False}
    expected = {"load_format": "auto", "parallel": parallel, "enforce_eager": True}
    assert opened[1][1] == COMMON | {"tokenizer": str(MODEL), "longest": 16, "engine": expected}
    lines = json.loads(Path("eval.json").read_text())["summary"]
    assert [line["difference"] for line in lines if line["metric"] == "loss"] == [None, 1.0]
