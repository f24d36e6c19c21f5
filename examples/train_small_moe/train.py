"""Train a small mixture-of-experts language model from random weights and save it in the Hugging Face layout.

Run it as `python train.py tiny-olmoe --seconds 240`.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from corpus import END_OF_TEXT, InputError, encode, read_texts, standard_library
from evaluate import held_out_loss, next_token_loss, spread_windows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """The config keys in which a transformers `model_type` differs from the others."""

    num_experts: str
    width: str
    fixed: Mapping[str, object] = field(default_factory=dict)


FAMILIES = {
    "olmoe": Family("num_experts", "intermediate_size", {"norm_topk_prob": False}),
    "mixtral": Family("num_local_experts", "intermediate_size"),
    "qwen3_moe": Family("num_experts", "moe_intermediate_size", {"norm_topk_prob": True}),
}
WARMUP = 0.02  # of the whole run
WEIGHT_DECAY = 0.1
AUX_LOSS_COEFFICIENT = 0.01
REPORT_SECONDS = 10


def build_config(
    family: str, *, layers: int, hidden: int, heads: int, experts: int, top_k: int, width: int, vocab: int, length: int
) -> PreTrainedConfig:
    """A transformers config of the family; END_OF_TEXT is token 0."""
    keys = FAMILIES[family]
    return AutoConfig.for_model(
        family,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        num_experts_per_tok=top_k,
        vocab_size=vocab,
        max_position_embeddings=length,
        tie_word_embeddings=False,  # as on the hub; vLLM reads no tied OLMoE output layer
        router_aux_loss_coef=AUX_LOSS_COEFFICIENT,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **{keys.num_experts: experts, keys.width: width, **keys.fixed},
    )


def train_tokenizer(texts: list[str], *, vocab: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocab` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise InputError(f"the text gives {tokenizer.get_vocab_size()} tokens, not {vocab}: give more text or --vocab")
    return tokenizer


def balance_loss(router_logits: tuple[torch.Tensor, ...], *, top_k: int) -> torch.Tensor:
    """Load-balancing loss (Switch Transformer, arXiv 2101.03961, eq. 4), summed over layers; each layer's least is 1.

    Layer by layer: balance over all layers at once, as in transformers' own loss, would let a layer drop an expert.
    """
    logits = torch.stack(router_logits).float()  # [layers, tokens, experts]
    experts = logits.shape[-1]
    chosen = logits.topk(top_k, dim=-1).indices.flatten(1)
    ones = torch.ones_like(chosen, dtype=torch.float32)
    load = torch.zeros(len(logits), experts, device=logits.device).scatter_add_(1, chosen, ones) / chosen.shape[1]
    return experts * (load * F.softmax(logits, dim=-1).mean(1)).sum()


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
) -> int:
    """Train in place for `steps` steps, or for `seconds` where steps is None; returns the number of steps made.

    stream: token ids [tokens] on the model's device. The model computes in its own dtype, and float32 master weights
    take the updates.
    """
    weights = list(model.parameters())
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
    step, started, reported = 0, time.monotonic(), 0.0
    while (progress := (time.monotonic() - started) / seconds if steps is None else step / steps) < 1:
        starts = torch.randint(len(stream) - length + 1, (batch, 1), generator=generator).to(stream.device)
        tokens = stream[starts + window].long()
        outputs = model.model(tokens, output_router_logits=True, use_cache=False)
        loss = next_token_loss(model.lm_head(outputs.last_hidden_state), tokens)
        balance = balance_loss(outputs.router_logits, top_k=model.config.num_experts_per_tok)
        (loss + AUX_LOSS_COEFFICIENT * balance).backward()

        for master, weight in zip(masters, weights, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(progress, peak=peak)
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)
        step += 1
        if (elapsed := time.monotonic() - started) - reported > REPORT_SECONDS:
            reported, layers = elapsed, len(outputs.router_logits)
            click.echo(f"{elapsed:5.0f} s  step {step}  loss {loss:.4f}  balance {balance / layers:.3f} (even: 1)")
    return step


def save(folder: Path, model, tokenizer: Tokenizer) -> None:
    """Write the checkpoint in bfloat16; the folder appears whole or not at all."""
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.to(torch.bfloat16).save_pretrained(partial)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            pad_token=END_OF_TEXT,
            model_max_length=model.config.max_position_embeddings,
        ).save_pretrained(partial)
        partial.chmod(0o755)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--family", type=click.Choice(sorted(FAMILIES)), default="olmoe", show_default=True)
@click.option("--layers", type=click.IntRange(1), default=8, show_default=True)
@click.option("--hidden", type=click.IntRange(1), default=128, show_default=True)
@click.option("--heads", type=click.IntRange(1), default=4, show_default=True)
@click.option("--experts", type=click.IntRange(2), default=32, show_default=True)
@click.option("--top-k", type=click.IntRange(1), default=8, show_default=True)
@click.option("--width", type=click.IntRange(1), default=32, show_default=True, help="Hidden units of one expert.")
@click.option("--vocab", type=click.IntRange(257), default=2048, show_default=True)
@click.option("--length", type=click.IntRange(2), default=1024, show_default=True, help="Tokens per sequence.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Sequences per step.")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=3e-3, show_default=True)
@click.option("--steps", type=click.IntRange(1), help="Train this many steps (the reproducible choice).")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="Train this long instead.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default="cuda if there, or cpu")
@click.option("--text", type=click.Path(path_type=Path), multiple=True, help="Text folder; default: standard library.")
def main(
    output: Path,
    family: str,
    text: tuple[Path, ...],
    batch: int,
    learning_rate: float,
    steps: int | None,
    seconds: float | None,
    seed: int,
    device: str,
    **shape: int,
) -> None:
    """Train a small MoE language model on text folders and save it in the new folder OUTPUT."""
    if os.path.lexists(output):
        raise InputError(f"{output} exists: name a new folder, or remove it first")
    if not os.access(parent := output.absolute().parent, os.W_OK):
        raise InputError(f"{parent} is no writable folder: create it, or name OUTPUT elsewhere")
    if (steps is None) == (seconds is None):
        raise InputError("give either --steps or --seconds")
    if shape["hidden"] % (2 * shape["heads"]):
        raise InputError(f"--hidden {shape['hidden']} is not an even number times --heads {shape['heads']}")
    if shape["top_k"] > shape["experts"]:
        raise InputError(f"--top-k {shape['top_k']} is above --experts {shape['experts']}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"PyTorch cannot use --device {device} here: try --device cpu") from None
    training, held_out = read_texts(text or (standard_library(),))
    click.echo(f"{len(training)} training files, {sum(map(len, training)) / 1e6:.1f} M characters")
    tokenizer = train_tokenizer(training, vocab=shape["vocab"])
    stream = encode(tokenizer, training)
    windows = spread_windows(encode(tokenizer, held_out), sequences=64, length=shape["length"])
    if len(stream) < shape["length"]:
        raise InputError(f"{len(stream)} training tokens are fewer than --length {shape['length']}: give more text")

    torch.manual_seed(seed)
    # Experts as one grouped matrix product, which PyTorch has on a GPU in bfloat16 alone.
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_config(
        build_config(family, **shape), dtype=dtype, experts_implementation="grouped_mm"
    ).to(device)
    click.echo(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(stream) / 1e6:.2f} M training tokens")
    budget = {"steps": steps, "seconds": seconds}
    done = train(model, stream.to(device), batch=batch, length=shape["length"], peak=learning_rate, seed=seed, **budget)
    click.echo(f"{done} steps, {done * batch * shape['length'] / 1e6:.1f} M tokens")
    click.echo(f"held-out loss {held_out_loss(model, windows):.4f} nats per token")
    save(output, model, tokenizer)


if __name__ == "__main__":
    main()
