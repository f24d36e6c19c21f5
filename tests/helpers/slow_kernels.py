"""What kernels compute, slowly."""

import jax
import jax.numpy as jnp

from lexi_search.layers.kernels.blocks import BLOCK_ROWS


def multiply_slowly(x, weights, block_experts, num_blocks, *, gated, interpret):
    """`hopper.multiply_blocks`, block by block; the rows behind the last block hold NaN, as memory may."""
    blocks = x.reshape(-1, BLOCK_ROWS, x.shape[1]).astype(jnp.float32)
    product = jnp.einsum("bmk,bnk->bmn", blocks, weights[block_experts].astype(jnp.float32))
    if gated:
        gate, up = jnp.moveaxis(product.reshape(*product.shape[:2], -1, 2, 128), 3, 0)
        product = (jax.nn.silu(gate) * up).reshape(*product.shape[:2], -1)
    beyond = jnp.arange(block_experts.size) >= num_blocks[0]
    return jnp.where(beyond[:, None, None], jnp.nan, product).reshape(x.shape[0], -1).astype(x.dtype)
