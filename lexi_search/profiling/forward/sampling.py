"""Sample text by Jacobi (fixed-point) iteration: all positions at once, with fixed Gumbel noise.

Sampling one token after another would read the checkpoint once a token. Here every position of a sequence is sampled at
once, given the tokens that the last pass put before it, and that is repeated. The noise of a position stays the same,
so that the passes have a fixed point: the text that autoregressive sampling would give. After n passes its first n
tokens are there, and what follows settles from left to right, soon locally plausible.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Key

from lexi_search.layers.decoder import read_log_probabilities
from lexi_search.models.decoder_stack import count_tokens, find_first_token
from lexi_search.profiling.forward.losses import split_tokens
from lexi_search.profiling.forward.passes import forward
from lexi_search.profiling.forward.variants import MODEL, Run

PASSES = 6  # each makes the text more like the model's own; `examples/fidelity` judges the result


def draw_tokens(
    run: Run,
    *,
    sequences: int,
    length: int,
    seed: int,
    passes: int = PASSES,
    report: Callable[[int], None] = lambda layer: None,
) -> Int32[np.ndarray, "sequences length"]:
    """Sequences sampled from the model; each begins with the config's `bos_token_id`, or a random token without one.

    Iteration starts from uniformly random tokens and reads the checkpoint once a pass. The result is the same on one
    kind of device, however many sequences it holds at once.
    """
    key = jax.random.key(seed, impl="threefry2x32")
    vocabulary = count_tokens(run.checkpoint, run.model, run.decoder)
    tokens = np.array(jax.random.randint(key, (sequences, length), 0, vocabulary, jnp.int32))
    first = find_first_token(run.checkpoint, run.model, vocabulary)
    if first is not None:
        tokens[:, 0] = first
    residence = run.find_residence()
    for _ in range(passes):
        chunks = forward(run, tokens, report=report)
        ends = residence.read_ends(first=False)
        drawn = np.empty(tokens.size, np.int32)
        hidden = np.concatenate([np.asarray(states[MODEL]) for states in chunks])
        hidden = hidden.reshape(tokens.size, *hidden.shape[2:])
        for some in split_tokens(tokens.size, ends):
            logits = read_log_probabilities(run.decoder, ends, jnp.asarray(hidden[some]))
            drawn[some] = _sample(logits[:, :vocabulary], key, np.arange(some.start, some.stop, dtype=np.int32))
        tokens[:, 1:] = drawn.reshape(tokens.shape)[:, :-1]
    return tokens


@jax.jit
def _sample(
    logits: Float[Array, "tokens vocabulary"], key: Key[Array, ""], numbers: Int[Array, " tokens"]
) -> Int[Array, " tokens"]:
    """A token for each row by the Gumbel-max trick; the noise depends on the row's number alone."""
    noise = jax.vmap(lambda number: jax.random.gumbel(jax.random.fold_in(key, number), logits.shape[1:]))(numbers)
    return jnp.argmax(logits + noise, axis=-1)
