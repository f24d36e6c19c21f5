"""Profiles on a user's text: its tokens are those of transformers, its losses those of brute force on them."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from command_line import refuse, run, succeed, write
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import lexi_adapter
import lexi_search
from lexi_search.artifacts.allocation import Allocation
from lexi_search.artifacts.serialisation import read_allocation, read_profile
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.errors import InputError
from lexi_search.models.decoder_stack import describe_decoder
from lexi_search.models.model import describe
from lexi_search.profiling.forward import text as texts
from lexi_search.profiling.forward.text import read_text

TEXT = Path(lexi_search.__file__).parent.parent / "CONTRIBUTING.md"
FAST = ("--batch", 2, "--length", 16, "--samples", 64)
PLAIN = ("--compensation", "none")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Sharper routers and heads than fresh weights have, or every divergence would be next to nothing."""
    folder = tiny.make_checkpoint("olmoe", tmp_path_factory.mktemp("checkpoint") / "olmoe")
    weights = load_file(folder / "model.safetensors")
    factors = {name: 6 if name.endswith(("gate.weight", "lm_head.weight")) else 2 for name in weights}
    scaled = {name: array * factors[name] if array.ndim > 1 else array for name, array in weights.items()}
    save_file(scaled, folder / "model.safetensors", {"format": "pt"})
    tiny.write_tokenizer(folder, TEXT.read_text())
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    """The checkpoint in a folder of its own, to be changed."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def read(folder, file=TEXT, *, sequences=3, length=16):
    opened = open_checkpoint(folder)
    model = describe(opened)
    return read_text(opened, model, describe_decoder(opened, model), file, sequences=sequences, length=length)


def cut_by_transformers(folder, file=TEXT, *, sequences, length, bos):
    """The beginning of the text in transformers' own tokens, each sequence after `bos`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(file.read_text(), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    room = length - len(bos)
    return [[*bos, *ids[start * room : (start + 1) * room]] for start in range(sequences)]


def find_divergences(folder, rows, allocations):
    """The mean KL divergence on these tokens, by transformers, of each allocation's predictions from the model's."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def predict():
        return model(torch.tensor(rows), use_cache=False).logits.double().log_softmax(-1)

    own, found = predict(), []
    for allocation in allocations:
        write(Path("applied.json"), allocation)
        lexi_adapter.apply(model, "applied.json")
        found.append(float((own.exp() * (own - predict())).sum(-1).mean()))
    return found


def open_tokenizer(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    return tokenizer


def test_losses_are_those_of_brute_force_on_the_same_tokens(folder, checkpoint):
    succeed("profile", checkpoint, "--text", TEXT, *FAST, *PLAIN, "-o", "profile.json")
    profile = read_profile("profile.json")
    rows = cut_by_transformers(checkpoint, sequences=4, length=16, bos=[0])
    whole = {layer: profile.model.top_k for layer in profile.model.moe_layers}
    every = [
        Allocation(profile.model, ks := whole | {layer: k}, sum(ks.values()), 0.0, 0.0, {"lexi_search": "0"})
        for layer in whole
        for k in range(1, profile.model.top_k + 1)
    ]
    found, expected = np.ravel(profile.losses("divergence")), find_divergences(checkpoint, rows, every)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-7)
    assert found.max() > 1e-2
    assert profile.settings.input == "text" and profile.layers[0].samples == 64
    assert profile.made_by["tokens_sha256"] == hashlib.sha256(np.array(rows, "<i8").tobytes()).hexdigest()
    assert profile.made_by["text_sha256"] == hashlib.sha256(TEXT.read_bytes()).hexdigest()


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("adds", [None, True, False])
def test_tokens_are_those_of_transformers(copy, bos, adds):
    tiny.write_tokenizer(copy, TEXT.read_text(), bos=bos)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    if adds is not None:
        (copy / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": adds}))
    start = [0] if adds or (bos and adds is None) else []
    assert read(copy).tokens.tolist() == cut_by_transformers(copy, sequences=3, length=16, bos=start)


def test_no_more_of_a_text_is_read_than_is_needed(copy, monkeypatch):
    monkeypatch.setattr(texts, "CHARACTERS", 1)  # fewer than a token has: what is read grows
    tokenizer, text = open_tokenizer(copy), TEXT.read_text()
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    for needed in (1, 50, 400, len(whole) - 1, len(whole), len(whole) + 1):
        found = texts.encode(tokenizer, text, needed)
        assert found == whole[: len(found)] and len(found) >= min(needed, len(whole))
    assert len(texts.encode(tokenizer, text, 50)) < len(whole) / 4


def test_the_same_text_gives_the_same_bytes_with_corrections_too(folder, checkpoint):
    Path("other.txt").write_bytes(TEXT.read_bytes())
    said = run("profile", checkpoint, "--text", TEXT, *FAST, "--compensation", "full", "-o", "one.json")
    assert said.exit_code == 0 and "in 4 passes" in said.stderr  # none of them writes a text
    made = lexi_search.profile_checkpoint(
        checkpoint, "two.json", text="other.txt", batch=2, length=16, samples=64, compensation="full"
    )
    one, two = (json.loads(Path(name).read_text()) for name in ("one.json", "two.json"))
    assert one.pop("compensation")["sha256"] == two.pop("compensation")["sha256"]
    assert one == two and made.settings.compensation_rank is not None
    succeed("profile", checkpoint, *FAST, *PLAIN, "-o", "own.json")
    assert read_profile("own.json").losses("divergence") != made.losses("divergence")


def test_a_run_that_was_cut_short_goes_on_with_the_same_text_only(folder, checkpoint, monkeypatch):
    arguments = ("profile", checkpoint, "--text", "mine.txt", *FAST, "--compensation", "exponent")
    shutil.copy(TEXT, "mine.txt")
    succeed(*arguments, "-o", "whole.json")
    with monkeypatch.context() as patch:
        patch.setattr("lexi_search.profiling.session.profile_layers", interrupt)
        assert run(*arguments, "-o", "profile.json").exit_code != 0
    assert [name.partition("-")[0] for name in os.listdir("profile.json.partial")].count("compensation") == 1
    Path("mine.txt").write_text("Another text. " * 100)
    assert "made_by.text_sha256 is" in refuse(*arguments, "-o", "profile.json")
    shutil.copy(TEXT, "mine.txt")
    assert run(*arguments, "-o", "profile.json").exit_code == 0
    assert Path("profile.json").read_bytes() == Path("whole.json").read_bytes()


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_parts_on_one_text_are_merged_and_on_two_refused(folder, checkpoint):
    Path("other.txt").write_text(TEXT.read_text()[100:])
    part = ("profile", checkpoint, *FAST, *PLAIN)
    succeed(*part, "--text", TEXT, "--layers", "0", "-o", "a.json")
    succeed(*part, "--text", TEXT, "--layers", "1:2", "-o", "b.json")
    succeed(*part, "--text", "other.txt", "--layers", "1:2", "-o", "c.json")
    succeed("merge", "a.json", "b.json", "-o", "whole.json")
    assert "on 64 tokens of a given text, SHA-256 " in run("show", "whole.json").stderr
    assert "b.json" not in refuse("merge", "a.json", "c.json", "-o", "wrong.json")
    compared = run("compare", "whole.json", "whole.json")
    assert f"on 64 tokens of a given text, SHA-256 {hashlib.sha256(TEXT.read_bytes()).hexdigest()[:12]}" in " ".join(
        compared.stdout.split()
    )


def test_allocations_are_judged_on_another_text(folder, checkpoint):
    Path("other.txt").write_text(TEXT.read_text()[2000:])
    succeed("profile", checkpoint, "--text", TEXT, *FAST, *PLAIN, "-o", "profile.json")
    assert run("search", "profile.json", "--budget", "6", "-o", "allocation.json").exit_code == 0  # it calls it noisy
    judge = ("judge", checkpoint, "allocation.json", *FAST, "--json")
    judged = {row["name"]: row for row in json.loads(succeed(*judge, "--text", "other.txt"))}
    rows = cut_by_transformers(checkpoint, Path("other.txt"), sequences=4, length=16, bos=[0])
    [expected] = find_divergences(checkpoint, rows, [read_allocation("allocation.json")])
    assert judged["allocation.json"]["divergence"] == pytest.approx(expected, rel=1e-3)
    said = refuse(*judge, "--text", TEXT)
    assert said == f"allocation.json was found on {TEXT} itself; judge on another text, such as one that follows it"


def test_auto_judges_on_what_follows_the_profiles_text(folder, checkpoint):
    options = ("--text", TEXT, *FAST, *PLAIN, "--no-paper", "--budget", "6", "-o", "served")
    assert run("auto", checkpoint, *options).exit_code == 0
    report = Path("served.lexi/report.md").read_text()
    assert f"on 64 tokens of {TEXT}, which follow those of the profile" in report and "that it wrote" not in report
    rows = cut_by_transformers(checkpoint, sequences=8, length=16, bos=[0])[4:]
    judged = json.loads(Path("served.lexi/judged.json").read_text())["judged"]
    [expected] = find_divergences(checkpoint, rows, [read_allocation("served.lexi/allocation.json")])
    assert judged[0]["divergence"] == pytest.approx(expected, rel=1e-3)
    before = Path("served.lexi/judged.json").stat().st_mtime_ns
    assert run("auto", checkpoint, *options).exit_code == 0
    assert Path("served.lexi/judged.json").stat().st_mtime_ns == before


def test_auto_says_at_once_that_a_text_is_too_short_to_judge_on(folder, checkpoint):
    Path("short.txt").write_text(TEXT.read_text()[:200])
    options = ("--text", "short.txt", *FAST, "--budget", "6", "-o", "served")
    count = len(texts.encode(open_tokenizer(checkpoint), Path("short.txt").read_text(), 1000))
    assert 60 <= count < 120  # enough for the profile alone
    assert refuse("auto", checkpoint, *options) == (
        f"short.txt has {count} tokens, and 8 sequences of 16 take 120; give more text, or lower --samples, or take "
        "--no-judge, which needs half as much"
    )


def refuse_text(checkpoint, file, *options):
    return refuse("profile", checkpoint, "--text", file, *FAST, *options, "-o", "profile.json")


def test_texts_that_cannot_be_used_are_refused(folder, checkpoint, monkeypatch):
    Path("empty.txt").write_text(" \n")
    Path("latin.txt").write_bytes("Gr\xfc\xdfe".encode("latin-1") * 100)
    Path("short.txt").write_text("a b c")
    os.mkfifo("pipe")
    assert refuse_text(checkpoint, "none.txt").startswith("cannot read none.txt: No such file or directory; name a")
    assert refuse_text(checkpoint, "empty.txt") == "empty.txt is empty; name a text file, or a part of it"
    assert refuse_text(checkpoint, "latin.txt") == "latin.txt is not UTF-8 (byte 2); convert it, as with iconv"
    assert refuse_text(checkpoint, "pipe") == "cannot read pipe: not a regular file; name a text file, or a part of it"
    assert refuse_text(checkpoint, ".").startswith("cannot read .: Is a directory; name a text")
    count = len(texts.encode(open_tokenizer(checkpoint), "a b c", 100))
    assert refuse_text(checkpoint, "short.txt") == (
        f"short.txt has {count} tokens, and 4 sequences of 16 take 60; give more text, or lower --samples, --batch or "
        "--length"
    )
    monkeypatch.setattr(texts, "MOST_TEXT", 2**20)
    Path("large.txt").write_bytes(b"a" * (2**20 + 1))
    assert refuse_text(checkpoint, "large.txt").startswith("cannot read large.txt: larger than 1 MiB; name")
    output = ("--text", "short.txt", *FAST, "-o", "short.txt")
    assert refuse("profile", checkpoint, *output).startswith("cannot write short.txt: the same command reads or writes")


def test_options_that_have_no_part_in_a_text_are_refused(folder, checkpoint):
    assert "--input paper does not" in refuse_text(checkpoint, TEXT, "--input", "paper")
    assert refuse_text(checkpoint, TEXT, "--seed", "1").startswith("--seed is of random input")
    assert refuse_text(checkpoint, TEXT, "--iterations", "1") == (
        "--iterations is for --input paper; add that, or leave --iterations out"
    )
    with pytest.raises(InputError, match="input text needs a file; name it by --text"):
        lexi_search.profile_checkpoint(checkpoint, "profile.json", input="text")


def test_tokenizers_that_do_not_fit_are_refused(folder, copy):
    tiny.write_tokenizer(copy, TEXT.read_text(), size=300)  # the model has 256
    said = refuse_text(copy, TEXT)
    assert re.fullmatch(r".*: the text has token 2\d\d, and the model has 256, from 0; use the model's own .*", said)
    (copy / "tokenizer.json").write_text('{"version": "1.0"}')
    assert refuse_text(copy, TEXT).startswith(f"{copy / 'tokenizer.json'}: the tokenizers library cannot read it (")
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.model").write_bytes(b"of sentencepiece")
    assert refuse_text(copy, TEXT).startswith(f"{copy} has no tokenizer.json, which --text needs; save one there (tr")
    tiny.write_tokenizer(copy, TEXT.read_text())
    (copy / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "<other>"}')
    assert refuse_text(copy, TEXT) == (
        f"{copy / 'tokenizer_config.json'}: bos_token '<other>' is not in tokenizer.json; make the two fit"
    )
    with pytest.raises(InputError, match="--length 1 leaves no room behind the 1 tokens of the tokenizer's own"):
        tiny.write_tokenizer(copy, TEXT.read_text())
        read(copy, length=1)
