"""Kernels for Hopper GPUs (compute capability 9.0): the products of all experts in one launch, and the steps around it.

This module is imported only where it runs: Pallas' GPU side takes a second to load. With `interpret`, settings of
Mosaic's interpreter, a kernel runs on a CPU, for tests.

Rows are sorted by expert, in blocks of `BLOCK_ROWS` rows of one expert each. The last block of an expert has rows
without a token, whose values are arbitrary and never used.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from lexi_search.layers.kernels.blocks import BLOCK_COLUMNS, BLOCK_ROWS, GATED_COLUMNS, GRAM_ROWS

# One tile of a product: BLOCK_ROWS x BLOCK_COLUMNS in steps of STEP, loaded ahead into STAGES buffers by a warpgroup
# and multiplied by two, 64 rows each. Shared memory holds no more stages.
STEP, STAGES, STORE = 64, 4, 64
# Tiles run down the rows in bands of columns, as wide as keeps the band's weights in the L2 cache; measured.
BAND_BYTES = 15 << 20
GRAM_STEP = 128  # columns loaded at once


def spread(
    x: Float[Array, "tokens hidden"], places: Int[Array, "tokens K"], *, rows: int, interpret: Any = None
) -> Float[Array, "rows hidden"]:
    """Copy each token to its K places. A token is read once; a gather by place would read it K times."""
    (tokens, hidden), top_k = x.shape, places.shape[1]
    step = min(hidden & -hidden, 2048)  # a power of two that divides the row

    def kernel(x, places, out):
        token = pl.program_id(0)
        for start in range(0, hidden, step):
            part = triton.load(x.at[token, pl.ds(start, step)])
            for rank in range(top_k):
                place = triton.load(places.at[token * top_k + rank])
                triton.store(out.at[place, pl.ds(start, step)], part)

    return pl.pallas_call(
        kernel,
        grid=(tokens,),
        out_shape=jax.ShapeDtypeStruct((rows, hidden), x.dtype),
        compiler_params=triton.CompilerParams(num_warps=min(max(step // 256, 1), 8)),
        interpret=interpret is not None,
    )(x, places.reshape(-1))


def multiply_blocks(
    x: Float[Array, "rows inner"],
    weights: Float[Array, "experts outer inner"],
    block_experts: Int[Array, " blocks"],
    num_blocks: Int[Array, "1"],
    *,
    gated: bool,
    interpret: Any = None,
) -> Float[Array, "rows columns"]:
    """x @ weights[e].T for the rows of each of the first `num_blocks` blocks, in `x`'s type, accumulated in float32.

    If `gated`, every BLOCK_COLUMNS rows of `weights` are GATED_COLUMNS of the gate, then as many of the up projection,
    and the result is silu(gate) * up, computed in float32.

    One persistent program per multiprocessor: one warpgroup loads tiles, already those of the next product while the
    other two finish the last.
    """
    (rows, inner), (_, outer, _) = x.shape, weights.shape
    bands, steps = outer // BLOCK_COLUMNS, inner // STEP
    width = GATED_COLUMNS if gated else BLOCK_COLUMNS
    band = max(BAND_BYTES // (BLOCK_COLUMNS * inner * x.dtype.itemsize), 1)
    band = 1 << (min(band, bands).bit_length() - 1)

    def kernel(x, weights, block_experts, num_blocks, out, x_tiles, weight_tiles, out_tiles, loaded, free):
        warpgroup, program, programs = jax.lax.axis_index("wg"), jax.lax.axis_index("sm"), jax.lax.axis_size("sm")
        blocks = num_blocks[0]
        tiles = jax.lax.div(blocks * bands - program + (programs - 1), jnp.int32(programs))

        def find_tile(number):
            return mgpu.planar_snake(program + number * programs, (blocks, bands), 1, band)

        def slot_of(step):
            return jax.lax.rem(step, jnp.int32(STAGES))

        @pl.when(warpgroup == 2)
        def _load():
            mgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, tiles)
            def _tile(number):
                block, column = find_tile(number)
                expert = block_experts[block]

                @pl.loop(0, steps)
                def _step(i):
                    step = number * steps + i
                    slot, columns = slot_of(step), pl.ds(i * STEP, STEP)

                    @pl.when(step >= STAGES)
                    def _wait():
                        mgpu.barrier_wait(free.at[slot])

                    mgpu.copy_gmem_to_smem(
                        x.at[pl.ds(block * BLOCK_ROWS, BLOCK_ROWS), columns], x_tiles.at[slot], loaded.at[slot]
                    )
                    mgpu.copy_gmem_to_smem(
                        weights.at[expert, pl.ds(column * BLOCK_COLUMNS, BLOCK_COLUMNS), columns],
                        weight_tiles.at[slot],
                        loaded.at[slot],
                    )

            @pl.loop(jax.lax.max(tiles * steps - STAGES, jnp.int32(0)), tiles * steps)
            def _drain(step):
                mgpu.barrier_wait(free.at[slot_of(step)])

        @pl.when(warpgroup < 2)
        def _multiply():
            mgpu.set_max_registers(232, action="increase")

            @pl.loop(0, tiles)
            def _tile(number):
                block, column = find_tile(number)

                def accumulate(sums):
                    @pl.loop(0, steps)
                    def _step(i):
                        step = number * steps + i
                        slot = slot_of(step)
                        mgpu.barrier_wait(loaded.at[slot])
                        mine = x_tiles.at[slot].at[pl.ds(warpgroup * 64, 64)]
                        mgpu.wgmma(sums, mine, weight_tiles.at[slot].transpose((1, 0)))
                        mgpu.wgmma_wait(1)  # the step before this one is done with its tiles

                        @pl.when(i > 0)
                        def _release():
                            mgpu.barrier_arrive(free.at[slot_of(step - 1)])

                    return sums[...]

                sums = pl.run_scoped(accumulate, mgpu.ACC((64, BLOCK_COLUMNS), jnp.float32))
                mgpu.barrier_arrive(free.at[slot_of(number * steps + steps - 1)])
                for part in range(width // STORE):
                    values = sums[:, part * STORE : (part + 1) * STORE]
                    if gated:
                        start = GATED_COLUMNS + part * STORE
                        values = values / (1.0 + jnp.exp(-values)) * sums[:, start : start + STORE]
                    buffer = out_tiles.at[warpgroup, part % 2]
                    mgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    buffer[...] = values.astype(out.dtype)
                    mgpu.commit_smem()
                    mgpu.copy_smem_to_gmem(
                        buffer,
                        out.at[
                            pl.ds(block * BLOCK_ROWS + warpgroup * 64, 64), pl.ds(column * width + part * STORE, STORE)
                        ],
                    )

            mgpu.wait_smem_to_gmem(0)

    swizzled = (mgpu.TilingTransform((8, 64)), mgpu.SwizzleTransform(128))

    def allocate(*refs):
        pl.run_scoped(
            lambda *scratch: kernel(*refs, *scratch),
            mgpu.SMEM((STAGES, BLOCK_ROWS, STEP), x.dtype, transforms=swizzled),
            mgpu.SMEM((STAGES, BLOCK_COLUMNS, STEP), x.dtype, transforms=swizzled),
            mgpu.SMEM((2, 2, 64, STORE), x.dtype, transforms=swizzled),
            mgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            mgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            collective_axes="wg",
        )

    return mgpu.kernel(
        allocate,
        out_type=jax.ShapeDtypeStruct((rows, bands * width), x.dtype),
        grid=(2 if interpret else jax.local_devices()[0].core_count,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        compiler_params=mgpu.CompilerParams(lowering_semantics=mgpu.LoweringSemantics.Warpgroup, approx_math=True),
        interpret=interpret,
    )(x, weights, block_experts, num_blocks)


def gram_distances(
    outputs: Float[Array, "rows hidden"],
    places: Int[Array, "tokens K"],
    change: Float[Array, "tokens K K"],
    *,
    interpret: Any = None,
) -> Float[Array, "tokens K"]:
    """||sum_j change[t, k, j] outputs[places[t, j]]||^2, float32, from one Gram matrix of several tokens' outputs.

    Outputs are read once, in place. The last k is the base: its distance is zero.
    """
    (tokens, top_k), hidden = places.shape, outputs.shape[1]
    ranks = 1 << (top_k - 1).bit_length()
    spare = -tokens % (GRAM_ROWS // ranks)
    places = jnp.pad(places, ((0, spare), (0, ranks - top_k))).reshape(-1)
    change = jnp.pad(change[:, :-1], ((0, spare), (0, 0), (0, ranks - top_k)))
    change = change.transpose(1, 0, 2).reshape(-1)

    def kernel(outputs, places, change, out):
        first = pl.program_id(0) * GRAM_ROWS
        place = triton.load(places.at[pl.ds(first, GRAM_ROWS)])

        def add(i, gram):
            columns = i * GRAM_STEP + jnp.arange(GRAM_STEP, dtype=jnp.int32)
            y = triton.load(outputs.at[place[:, None], columns[None, :]])
            return gram + jax.lax.dot_general(y, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

        gram = jax.lax.fori_loop(0, hidden // GRAM_STEP, add, jnp.zeros((GRAM_ROWS, GRAM_ROWS), jnp.float32))
        token, other = (jax.lax.broadcasted_iota(jnp.int32, gram.shape, axis) // ranks for axis in (0, 1))
        gram = jnp.where(token == other, gram, 0.0)
        for k in range(top_k - 1):
            rows = pl.ds(k * places.size + first, GRAM_ROWS)
            weights = triton.load(change.at[rows])
            triton.store(out.at[rows], jnp.sum(gram * weights[None, :], axis=1) * weights)

    parts = pl.pallas_call(
        kernel,
        grid=(places.size // GRAM_ROWS,),
        out_shape=jax.ShapeDtypeStruct(change.shape, jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret is not None,
    )(outputs, places, change)
    distances = parts.reshape(top_k - 1, -1, ranks).sum(axis=-1)[:, :tokens]
    return jnp.pad(jnp.maximum(distances, 0.0), ((0, 1), (0, 0))).T
