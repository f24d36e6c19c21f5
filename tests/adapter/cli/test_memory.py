"""Options that ask for more memory than there is are refused with the estimate, before it is asked for."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import lexi_adapter
from lexi_adapter.cli.main import main
from lexi_adapter.errors import AdapterError
from lexi_adapter.evaluation.transformers_backend import TransformersModel, load_model

MODEL = Path(lexi_adapter.__file__).parent.parent / "examples" / "tiny-olmoe"
PASSKEY = f"eval {MODEL} --task passkey --passkey-length 128"


@pytest.mark.parametrize(
    ("command", "what", "lower"),
    [
        (
            f"bench {MODEL} --workload 1000000000x512x512",
            "the token ids of workload 1000000000x512x512",
            "take a smaller",
        ),
        (
            f"latency {MODEL} --workload 16x10000000000x1",
            "the token ids of workload 16x10000000000x1",
            "take a smaller",
        ),
        (f"latency {MODEL} --checks 10000000000", "10000000000 allocations", "lower --checks"),
        (f"{PASSKEY} --trials 1000000000", "10000000000 passkey prompts", "lower --trials, --depths or --passkey"),
        (f"{PASSKEY} --depths 1000000000", "10000000000 passkey prompts", "lower --trials, --depths or --passkey"),
        (
            f"sensitivity {MODEL} --generate --length 64 --sequences 100000000000 --batch 1",
            "100000000000 sequences of tokens",
            "lower --sequences or --length",
        ),
        (
            f"sensitivity {MODEL} --generate --length 64 --sequences 1000000 --batch 1000000000",
            "the logits of 1000000 sequences at once",
            "lower --batch or --length",
        ),
    ],
)
def test_options_that_fit_no_memory(folder, command, what, lower):
    result = CliRunner().invoke(main, command.split(), catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(rf"Error: {what} take [\d.]+ GB, this machine has [\d.]+ GB; {lower}.*\n", result.stderr)
    assert not list(folder.iterdir())


def test_a_batch_that_fits_no_memory():
    """Of a task's own size: fewer windows or prompts than the batch takes are no reason to refuse it."""
    model = TransformersModel(load_model(MODEL, device="cpu"), None, 10**9)
    assert len(model.score([[1, 2, 3]] * 2)[0]) == 2

    class Many(list):
        def __len__(self):
            return 10**10

    for ask in (model.score, lambda prompts: model._check_memory(prompts, 64, "hidden states")):
        with pytest.raises(AdapterError, match=r"of 1000000000 prompts at once take .* GB; lower --batch-size"):
            ask(Many([[1] * 64]))


def test_a_batch_as_large_as_there_is_text_is_no_reason_to_refuse(folder):
    Path("t.json").write_text(json.dumps([list(range(3, 11))] * 2))
    command = f"sensitivity {MODEL} --tokens t.json --length 8 --local --batch 1000000000"
    result = CliRunner().invoke(main, command.split(), catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
