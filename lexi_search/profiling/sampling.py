"""Text that a model writes by itself, from its weights alone: tokens to carry through it where there is no data.

Sampling one token after another would read the checkpoint once a token. Here every position of a sequence is sampled at
once, from the distribution that the last pass's tokens before it give, and that is repeated. The noise of a position
stays the same, so that the passes have a fixed point: the text that sampling in turn would give. After n passes its
first n tokens are there, and what follows settles from left to right, soon locally plausible.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Key

from lexi_search.models.decoder_stack import count_tokens, find_first_token
from lexi_search.models.loading import read_tensors
from lexi_search.profiling.forward import MODEL, Run, carry, read_log_probabilities, split_tokens

PASSES = 6  # of which each makes the text more like the model's own; `examples/fidelity` judges what comes of it


def draw_tokens(
    run: Run,
    *,
    sequences: int,
    length: int,
    seed: int,
    passes: int = PASSES,
    report: Callable[[int], None] = lambda layer: None,
) -> Int32[np.ndarray, "sequences length"]:
    """Sequences that begin with the config's `bos_token_id`, or a random token where there is none.

    Starts from uniformly random tokens and reads the checkpoint once a pass. The same on one kind of device, however
    many sequences it holds at once.
    """
    key = jax.random.key(seed)
    vocabulary = count_tokens(run.checkpoint, run.decoder)
    tokens = np.array(jax.random.randint(key, (sequences, length), 0, vocabulary, jnp.int32))
    first = find_first_token(run.checkpoint, run.model, vocabulary)
    if first is not None:
        tokens[:, 0] = first
    for _ in range(passes):
        ways = carry(run, tokens, report=report)
        ends = read_tensors(run.checkpoint, run.decoder.ends._replace(embedding=()))
        drawn = np.empty(tokens.size, np.int32)
        hidden = np.concatenate([np.asarray(way[MODEL]) for way in ways]).reshape(tokens.size, -1)
        for some in split_tokens(tokens.size, ends):
            own = read_log_probabilities(run.decoder, ends, jnp.asarray(hidden[some]))
            drawn[some] = _sample(own[:, :vocabulary], key, np.arange(some.start, some.stop, dtype=np.int32))
        tokens[:, 1:] = drawn.reshape(tokens.shape)[:, :-1]
    return tokens


@jax.jit
def _sample(
    own: Float[Array, "tokens vocabulary"], key: Key[Array, ""], numbers: Int[Array, " tokens"]
) -> Int[Array, " tokens"]:
    """One token for each row, with the noise that its number always has (the Gumbel-max trick)."""
    noise = jax.vmap(lambda number: jax.random.gumbel(jax.random.fold_in(key, number), own.shape[1:]))(numbers)
    return jnp.argmax(own + noise, axis=-1)
