"""What compensation leaves of uniform k's loss, by the settings of its fit: rank, tokens, ridge, gate exponent, text.

    python examples/fidelity/sweep.py MODEL_DIR --tokens held_out.npz -o sweep.csv

Each row is one fit with one setting changed from the default, judged by the increase of the cross-entropy on held-out
text with the same k in every layer, relative to that without compensation.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
from records import describe_run
from windows import cut_what_fits, read_streams

from lexi_adapter.files import write_atomically
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.layers.decoder import read_log_probabilities
from lexi_search.models.model import describe
from lexi_search.profiling.compensation import RIDGES, choose_ks, find_rank, fit_layers
from lexi_search.profiling.divergence import open_run
from lexi_search.profiling.forward.losses import split_tokens
from lexi_search.profiling.forward.passes import forward
from lexi_search.profiling.forward.sampling import draw_tokens
from lexi_search.profiling.forward.variants import MODEL, Run, Variant

RANKS, TOKENS, EXPONENTS = (4, 8, 16, 64, 10_000), (1, 2, 4, 32), (0.0, 0.25, 0.5, 0.75, 1.0)  # tokens: sequences
DEFAULT_SEQUENCES, LENGTH = 8, 512


class Setting(NamedTuple):
    """The settings of one fit; `rank` 10,000 stands for the full one, and `ridges` are those to choose from."""

    exponent: float = 0.25
    rank: int = 32
    sequences: int = DEFAULT_SEQUENCES
    ridges: tuple[float, ...] = RIDGES
    text: str = "own"


def list_settings() -> Iterator[tuple[str, Setting]]:
    """(what is changed, the setting), the default first."""
    yield "default", Setting()
    yield from ((f"exponent {value:g}", Setting(exponent=value)) for value in EXPONENTS)
    yield from ((f"rank {'full' if value == RANKS[-1] else value}", Setting(rank=value)) for value in RANKS)
    yield from ((f"{value * LENGTH} tokens", Setting(sequences=value)) for value in TOKENS)
    yield from ((f"ridge {value:g}", Setting(ridges=(value,))) for value in RIDGES)
    yield "real text", Setting(text="real")


@jax.jit
def _pick(log_probabilities: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take_along_axis(log_probabilities, ids[:, None], axis=1)[:, 0]


def measure_increase(run: Run, tokens: np.ndarray, variants: Sequence[Variant]) -> list[float]:
    """The increase of the cross-entropy on `tokens` [sequences, length] under each variant, in nats per token."""
    chunks = forward(run, tokens, variants)
    ends = run.find_residence().read_ends(first=False)
    found = np.zeros((len(variants) + 1, len(chunks)))
    for index, states in enumerate(chunks):
        size = len(tokens) // len(chunks)
        ids = tokens[index * size : (index + 1) * size, 1:].reshape(-1).astype(np.int32)
        for number in range(-1, len(variants)):
            hidden = np.asarray(states.get(number, states[MODEL]))[:, :-1].reshape(len(ids), -1)
            parts = [
                np.asarray(_pick(read_log_probabilities(run.decoder, ends, jnp.asarray(hidden[some])), ids[some]))
                for some in split_tokens(len(ids), ends)
            ]
            found[number, index] = -np.concatenate(parts).astype(np.float64).mean()
    return (found[:-1] - found[-1]).mean(axis=1).tolist()


def fit(run: Run, text: np.ndarray, setting: Setting) -> Mapping[tuple[int, int], Any]:
    """The corrections of all layers at `choose_ks`, fitted by a setting."""
    model = run.model
    rank = find_rank(model.hidden_size, model.identity.num_experts, setting.rank)
    settings = {"exponents": [setting.exponent], "rank": rank, "ridges": setting.ridges}
    [maps] = fit_layers(run, text[: setting.sequences], dict.fromkeys(model.layers, choose_ks(model.top_k)), **settings)
    return maps


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--tokens", type=click.Path(exists=True, path_type=Path), help="[default: MODEL/held_out.npz]")
@click.option("--judge", type=click.IntRange(2), default=16, show_default=True, help="Windows of each domain.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("sweep.csv"), show_default=True)
def main(model: Path, tokens: Path | None, judge: int, output: Path) -> None:
    """Sweep the settings of the fit on MODEL and write a row for each to OUTPUT."""
    started = time.monotonic()
    checkpoint = open_checkpoint(model)
    described = describe(checkpoint)
    run, layers, ks = open_run(checkpoint, described, "float32"), len(described.layers), choose_ks(described.top_k)
    most = max(TOKENS)
    real, judged, _ = cut_what_fits(
        read_streams(tokens or model / "held_out.npz"), measure=most // 2, judge=judge, least=2, length=LENGTH
    )
    windows = judged.tokens.numpy().astype(np.int32)
    texts = {"own": draw_tokens(run, sequences=most, length=LENGTH, seed=0)}
    texts["real"] = real.tokens.numpy().astype(np.int32)
    facts = {"model": model.resolve().name, "judged_tokens": windows.size, "top_k": described.top_k}
    facts |= describe_run("cuda" if jax.default_backend() == "gpu" else "cpu")
    lines = [f"# {name}: {value}" for name, value in facts.items()] + [",".join(["setting", *(f"k={k}" for k in ks)])]
    plain = measure_increase(run, windows, [Variant((k,) * layers) for k in ks])
    alone = measure_increase(run, windows, [Variant((k,) * layers, 0.5) for k in ks])
    lines += [_format("without", plain), _format("exponent 0.5 alone", alone)]
    for name, setting in list_settings():
        maps = fit(run, texts[setting.text], setting)
        losses = measure_increase(run, windows, [Variant((k,) * layers, setting.exponent, maps) for k in ks])
        lines.append(_format(name, losses))
        write_atomically(output, ("\n".join(lines) + "\n").encode())
        shares = " ".join(f"{loss / base:.3f}" for loss, base in zip(losses, plain, strict=True))
        click.echo(f"{name:18s} {shares}   {time.monotonic() - started:.0f} s")


def _format(name: str, losses: Sequence[float]) -> str:
    return ",".join([name, *(f"{loss:.6g}" for loss in losses)])


if __name__ == "__main__":
    main()
