"""Train a small mixture-of-experts language model from random weights and save it in the Hugging Face layout.

Run it as `python train.py tiny-olmoe --seconds 240`, or `python train.py my-moe --preset olmoe-45m --corpus my-corpus
--seconds 100` with a corpus from domains.py.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import torch
from corpus import END_OF_TEXT, InputError, encode, read_texts, standard_library
from domains import Corpus, read_corpus, train_tokenizer
from evaluate import held_out_loss, next_token_loss, spread_windows
from families import AUX_LOSS_COEFFICIENT, FAMILIES, PRESETS, Preset, Shape, build_config
from routers import find_biases, record_logits
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

WARMUP = 0.02  # of the whole run
WEIGHT_DECAY = 0.1
REPORT_SECONDS = 10
RECORD_STEPS = 20
BIAS_STEP = 1e-3  # of selection biases, at every training step
HELD_OUT_SEQUENCES = 64  # of each domain, for the losses in the log


def balance_loss(router_logits: list[torch.Tensor], *, top_k: int) -> torch.Tensor:
    """Load-balancing loss (Switch Transformer, arXiv 2101.03961, eq. 4), summed over layers; each layer's least is 1.

    Layer by layer: balance over all layers at once, as in transformers' own loss, would let a layer drop an expert.
    """
    logits = torch.stack(router_logits)  # [layers, tokens, experts]
    experts = logits.shape[-1]
    chosen = logits.topk(top_k, dim=-1).indices.flatten(1)
    ones = torch.ones_like(chosen, dtype=torch.float32)
    load = torch.zeros(len(logits), experts, device=logits.device).scatter_add_(1, chosen, ones) / chosen.shape[1]
    return experts * (load * F.softmax(logits, dim=-1).mean(1)).sum()


def even_out(biases: Sequence[torch.Tensor], logits: Sequence[torch.Tensor], *, top_k: int) -> None:
    """Move each router's selection bias, in place, towards an even load of its experts (arXiv 2408.15664).

    Loads are counted with sigmoid scores, whatever the family scores by.
    """
    for bias, given in zip(biases, logits, strict=True) if biases else ():
        chosen = (given.sigmoid() + bias.flatten()).topk(top_k, dim=-1).indices.flatten()
        load = torch.bincount(chosen, minlength=given.shape[-1]).float()
        bias += BIAS_STEP * torch.sign(load.mean() - load).to(bias.dtype).reshape(bias.shape)


def learning_rate_at(progress: float, *, peak: float) -> float:
    """Linear warm-up, then linear decay to zero at progress 1."""
    return peak * min(progress / WARMUP, (1 - progress) / (1 - WARMUP))


def train(
    model,
    stream: torch.Tensor,
    *,
    batch: int,
    length: int,
    peak: float,
    steps: int | None,
    seconds: float | None,
    seed: int,
) -> list[dict[str, float]]:
    """Train in place for `steps` steps, or for `seconds` where steps is None; returns the loss curve, last step last.

    stream: token ids [tokens] on the model's device. The model computes in its own dtype, and float32 master weights
    take the updates.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    masters = [weight.detach().float().clone() for weight in weights]
    matrices = [master for master in masters if master.ndim > 1]
    gains = [master for master in masters if master.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(length, device=stream.device)
    curve, step, started, reported = [], 0, time.monotonic(), 0.0
    biases = find_biases(model)
    with record_logits(model) as logits:
        while (progress := (time.monotonic() - started) / seconds if steps is None else step / steps) < 1:
            starts = torch.randint(len(stream) - length + 1, (batch, 1), generator=generator).to(stream.device)
            tokens = stream[starts + window].long()
            logits.clear()
            hidden = model.model(tokens, use_cache=False).last_hidden_state
            loss = next_token_loss(model.lm_head(hidden), tokens)
            balance = balance_loss(logits, top_k=model.config.num_experts_per_tok)
            (loss + AUX_LOSS_COEFFICIENT * balance).backward()

            for master, weight in zip(masters, weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(progress, peak=peak)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)
                even_out(biases, logits, top_k=model.config.num_experts_per_tok)
            step += 1
            if step % RECORD_STEPS == 0:
                curve.append(take_note(step, time.monotonic() - started, loss, balance / len(logits)))
                if curve[-1]["seconds"] - reported > REPORT_SECONDS:
                    reported = curve[-1]["seconds"]
                    click.echo("  ".join(f"{name} {value:.4g}" for name, value in curve[-1].items()))
    return [*curve, take_note(step, time.monotonic() - started, loss, balance / len(logits))]


def take_note(step: int, seconds: float, loss: torch.Tensor, balance: torch.Tensor) -> dict[str, float]:
    """A point of the loss curve; `balance` is the mean over layers, 1 where all experts are loaded evenly."""
    return {"step": step, "seconds": round(seconds, 3), "loss": loss.item(), "balance": balance.item()}


def save(folder: Path, model, tokenizer: Tokenizer, held_out: Mapping[str, np.ndarray], log: Mapping) -> None:
    """Write the checkpoint in bfloat16, held-out tokens and the log; the folder appears whole or not at all."""
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    try:
        model.to(torch.bfloat16).save_pretrained(unfinished)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            pad_token=END_OF_TEXT,
            model_max_length=model.config.max_position_embeddings,
        ).save_pretrained(unfinished)
        np.savez(unfinished / "held_out.npz", **held_out)
        (unfinished / "training.json").write_text(json.dumps(log, indent=1) + "\n")
        unfinished.chmod(0o755)
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def read_plain(folders: tuple[Path, ...], *, vocab: int) -> Corpus:
    """A corpus of one domain, `text`, from folders of files, with a tokenizer of its own."""
    training, held_out = read_texts(folders)
    tokenizer = train_tokenizer(training, vocab=vocab)
    streams = [{"text": encode(tokenizer, texts)} for texts in (training, held_out)]
    counts = {"text": {"files": len(training) + len(held_out), "characters": sum(map(len, training + held_out))}}
    return Corpus(tokenizer, *streams, counts=counts)


def choose(preset: str | None, family: str | None, corpus: Corpus | None, **given: float | None) -> Preset:
    """The preset, or the default shape, with what was given instead; the corpus decides the vocabulary."""
    if preset and family:
        raise InputError(f"--preset {preset} has a family: leave --family out")
    base = PRESETS[preset] if preset else Preset(family or "olmoe", Shape(), batch=32, learning_rate=3e-3)
    given = {name: value for name, value in given.items() if value is not None}
    if corpus is not None:
        given["vocab"] = corpus.tokenizer.get_vocab_size()
    shape = base.shape._replace(**{name: given.pop(name) for name in list(given) if name in Shape._fields})
    return base._replace(shape=shape, **given)


def check(output: Path, chosen: Preset, *, steps: int | None, seconds: float | None, device: str) -> None:
    """Raise InputError for what would fail only after minutes."""
    shape = chosen.shape
    if os.path.lexists(output):
        raise InputError(f"{output} exists: name a new folder, or remove it first")
    if not os.access(parent := output.absolute().parent, os.W_OK):
        raise InputError(f"{parent} is no writable folder: create it, or name OUTPUT elsewhere")
    if (steps is None) == (seconds is None):
        raise InputError("give either --steps or --seconds")
    if shape.hidden % (2 * shape.heads):
        raise InputError(f"--hidden {shape.hidden} is not an even number times --heads {shape.heads}")
    if shape.top_k > shape.experts:
        raise InputError(f"--top-k {shape.top_k} is above --experts {shape.experts}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"PyTorch cannot use --device {device} here: try --device cpu") from None


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--preset", type=click.Choice(sorted(PRESETS)), help="A family, its shape and schedule.")
@click.option("--family", type=click.Choice(sorted(FAMILIES)), help="Without a preset: olmoe.")
@click.option("--layers", type=click.IntRange(1), help="Without a preset: 8.")
@click.option("--hidden", type=click.IntRange(1), help="Without a preset: 128.")
@click.option("--heads", type=click.IntRange(1), help="Without a preset: 4.")
@click.option("--experts", type=click.IntRange(2), help="Without a preset: 32.")
@click.option("--top-k", type=click.IntRange(1), help="Without a preset: 8.")
@click.option("--width", type=click.IntRange(1), help="Hidden units of one expert. Without a preset: 32.")
@click.option("--vocab", type=click.IntRange(257, 2**16), help="Without a preset: 2048. A corpus has its own.")
@click.option("--length", type=click.IntRange(2), help="Tokens per sequence. Without a preset: 1024.")
@click.option("--batch", type=click.IntRange(1), help="Sequences per step. Without a preset: 32.")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), help="At its peak. Without a preset: 3e-3.")
@click.option("--steps", type=click.IntRange(1), help="Train this many steps (the reproducible choice).")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="Train this long instead.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default="cuda if there, or cpu")
@click.option("--corpus", type=click.Path(path_type=Path), help="Folder that domains.py made.")
@click.option("--text", type=click.Path(path_type=Path), multiple=True, help="Text folder; default: standard library.")
def main(
    output: Path,
    preset: str | None,
    family: str | None,
    corpus: Path | None,
    text: tuple[Path, ...],
    steps: int | None,
    seconds: float | None,
    seed: int,
    device: str,
    **given: float | None,
) -> None:
    """Train a small MoE language model on text and save it in the new folder OUTPUT.

    OUTPUT also gets the held-out tokens of each domain (held_out.npz) and the run's log (training.json).
    """
    if corpus is not None and text:
        raise InputError("give either --corpus or --text")
    held = None if corpus is None else read_corpus(corpus)
    chosen = choose(preset, family, held, **given)
    check(output, chosen, steps=steps, seconds=seconds, device=device)
    family, shape, batch, peak = chosen
    held = held or read_plain(text or (standard_library(),), vocab=shape.vocab)
    stream = torch.from_numpy(np.concatenate(list(held.training.values())).astype(np.int32))
    if len(stream) < shape.length:
        raise InputError(f"{len(stream)} training tokens are fewer than --length {shape.length}: give more text")
    held_out = {domain: torch.from_numpy(tokens.astype(np.int32)) for domain, tokens in held.held_out.items()}
    spread = partial(spread_windows, sequences=HELD_OUT_SEQUENCES, length=shape.length)
    windows = {domain: spread(tokens) for domain, tokens in held_out.items() if len(tokens) >= shape.length}

    torch.manual_seed(seed)
    # Experts as one grouped matrix product, whose fast path on a GPU is bfloat16's.
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_config(
        build_config(family, shape), dtype=dtype, experts_implementation="grouped_mm"
    ).to(device)
    click.echo(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(stream) / 1e6:.2f} M training tokens")
    limit = {"steps": steps, "seconds": seconds}
    curve = train(model, stream.to(device), batch=batch, length=shape.length, peak=peak, seed=seed, **limit)
    last = curve[-1]
    tokens = last["step"] * batch * shape.length
    losses = {domain: held_out_loss(model, each) for domain, each in windows.items()}
    log = {
        "preset": preset,
        "family": family,
        "shape": shape._asdict(),
        "parameters": model.num_parameters(),
        "seed": seed,
        "batch": batch,
        "learning_rate": peak,
        "tokens": tokens,
        "seconds": last["seconds"],
        "held_out_loss": losses,
        "corpus": held.counts,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "curve": curve,
    }
    save(output, model, held.tokenizer, held.held_out, log)
    told = ", ".join(f"{domain} {loss:.4f}" for domain, loss in losses.items())
    speed = f"{tokens / 1e6:.1f} M tokens, {tokens / last['seconds'] / 1e3:.0f} k tokens/s"
    click.echo(f"{last['step']} steps, {speed}; held-out loss, nats per token: {told}")


if __name__ == "__main__":
    main()
