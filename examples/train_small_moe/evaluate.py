"""Held-out cross-entropy of a MoE checkpoint with every layer at the same top-k, and the load of its experts.

Run it as `python evaluate.py ../tiny-olmoe`.
"""

from pathlib import Path

import click
import torch
from corpus import InputError, encode, read_texts, standard_library
from routers import record_logits
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def spread_windows(stream: torch.Tensor, *, sequences: int, length: int) -> torch.Tensor:
    """Windows [sequences, length] at even distances over a stream [tokens]."""
    if len(stream) < length:
        raise InputError(f"{len(stream)} held-out tokens are fewer than one sequence of {length}: give more text")
    starts = torch.linspace(0, len(stream) - length, sequences).long()
    return stream[starts[:, None] + torch.arange(length)].long()


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per predicted token; logits [batch, length, vocab], tokens [batch, length]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.inference_mode()
def held_out_loss(model, windows: torch.Tensor, *, batch: int = 8) -> float:
    """Mean cross-entropy in nats per predicted token of windows [sequences, length]."""
    total = 0.0
    for tokens in windows.split(batch):
        tokens = tokens.to(model.device)
        total += len(tokens) * next_token_loss(model(tokens, use_cache=False).logits, tokens).item()
    return total / len(windows)


@torch.inference_mode()
def expert_shares(model, windows: torch.Tensor, *, batch: int = 8) -> torch.Tensor:
    """Each expert's share of its layer's routed tokens, as a multiple of an even share: [layers, experts]."""
    counts = 0
    for tokens in windows.split(batch):
        with record_logits(model) as recorded:
            model.model(tokens.to(model.device), use_cache=False)
        logits = torch.stack(recorded)  # [layers, tokens, experts]
        chosen = logits.topk(model.config.num_experts_per_tok, dim=-1).indices.flatten(1)
        counts = counts + F.one_hot(chosen, logits.shape[-1]).sum(1)
    return counts / counts.float().mean(1, keepdim=True)


def load(folder: Path, **config):
    """The checkpoint in float32 with entries of its config replaced."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config).eval()


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), multiple=True, help="Text folder; default: standard library.")
@click.option("--sequences", type=click.IntRange(1), default=64, show_default=True)
@click.option("--length", type=click.IntRange(2), help="Tokens per sequence; default: the model's context.")
@click.option("--top-k", "top_ks", type=click.IntRange(1), multiple=True, help="Default: every k up to the model's.")
def main(checkpoint: Path, text: tuple[Path, ...], sequences: int, length: int | None, top_ks: tuple[int, ...]) -> None:
    """Print the held-out loss of CHECKPOINT at uniform top-k, and how its routers load the experts."""
    if not (checkpoint / "config.json").is_file():
        raise InputError(f"{checkpoint} holds no config.json: name a checkpoint folder")
    config = AutoConfig.from_pretrained(checkpoint)
    if bad := [k for k in top_ks if k > config.num_experts_per_tok]:
        raise InputError(f"top-k {bad[0]} is above the model's own {config.num_experts_per_tok}")
    _, held_out = read_texts(text or (standard_library(),))
    stream = torch.from_numpy(encode(AutoTokenizer.from_pretrained(checkpoint).backend_tokenizer, held_out).astype(int))
    windows = spread_windows(stream, sequences=sequences, length=length or config.max_position_embeddings)

    click.echo(f"{len(held_out)} held-out files, {len(stream)} tokens; {windows.numel()} tokens evaluated")
    click.echo("top-k  loss (nats per token)")
    for k in top_ks or range(1, config.num_experts_per_tok + 1):
        click.echo(f"{k:5d}  {held_out_loss(load(checkpoint, num_experts_per_tok=k), windows):.4f}")
    click.echo("layer  least and most loaded expert (even share: 1)  unused")
    for layer, shares in enumerate(expert_shares(load(checkpoint), windows)):
        click.echo(f"{layer:5d}  {shares.min():.2f} {shares.max():.2f}  {(shares == 0).sum()}")


if __name__ == "__main__":
    main()
