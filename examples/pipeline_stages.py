"""A fitness of your own: an allocation that keeps pipeline stages balanced, which no sum over layers can say.

    python examples/pipeline_stages.py profile.json --budget 40 --stages 4

With pipeline parallelism the slowest stage sets the pace, so experts saved in one stage alone save nothing. The search
minimises the profile's loss plus a price on every expert by which a stage exceeds its even share. Written as a function
of the loss table and a population of allocations in JAX, it is compiled into the search. The exact method cannot take
it: the price of a layer's k depends on the other layers of its stage.
"""

import click
import jax
import jax.numpy as jnp
import numpy as np

from lexi_search import pose, read_profile, search, solve


def make_fitness(num_layers, budget, stages, price):
    """Loss summed over layers, plus `price` for each expert of a stage above its share of the budget."""
    stage = np.arange(num_layers) * stages // num_layers
    share = np.ceil(budget * np.bincount(stage) / num_layers).astype(np.int32)

    def fitness(losses, top_k):
        loss = jax.vmap(lambda row, k: row[k - 1], (0, 1), 1)(losses, top_k).sum(axis=1)
        in_stage = jnp.stack([top_k[:, stage == index].sum(axis=1) for index in range(stages)], axis=1)
        excess = jnp.maximum(in_stage - share[None, :], 0).sum(axis=1)
        return loss + price * excess.astype(losses.dtype)

    return fitness, stage


@click.command(help=__doc__.splitlines()[0])
@click.argument("profile")
@click.option("--budget", type=int, required=True, help="Experts per token, summed over layers.")
@click.option("--stages", default=2, help="Pipeline stages of consecutive layers.")
def main(profile, budget, stages):
    losses = np.array(read_profile(profile).losses("squared"))
    problem = pose(losses, np.array([budget]))
    # A price above every loss there is: a stage exceeds its share only where no allocation could help it.
    fitness, stage = make_fitness(len(losses), budget, stages, price=float(losses.max()))
    for name, found in (("the optimum", solve(problem)), ("balanced", search(problem, fitness=fitness))):
        [top_k], [loss] = found.top_k, found.loss
        sums = [int(top_k[stage == index].sum()) for index in range(stages)]
        click.echo(f"{name:12s} loss {loss:.6g}  experts in each stage {sums}  k {' '.join(map(str, top_k))}")


if __name__ == "__main__":
    main()
