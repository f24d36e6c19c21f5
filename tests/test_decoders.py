"""Whole checkpoints carried through in JAX, with transformers' own hidden states and logits as the judge."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from lexi_search.carrying import attend, embed, finish, read_logits
from lexi_search.checkpoint import open_checkpoint
from lexi_search.decoders import FAMILIES
from lexi_search.models import describe
from lexi_search.moe import compute_outputs, mix
from lexi_search.routing import route
from lexi_search.stacks import describe_decoder
from lexi_search.weights import read_tensors, stream_blocks

MODEL_TYPES = {"deepseek_vl2": "deepseek_vl_v2"}  # where tiny's name is not the config's
LENGTH = 24
# What makes the tiny models use more of what their family has.
GROUPED = dict(num_attention_heads=4, num_key_value_heads=2)
SETTINGS = {
    "olmoe": GROUPED | dict(clip_qkv=1.5, tie_word_embeddings=True),
    "mixtral": GROUPED | dict(sliding_window=7),
    "qwen2_moe": GROUPED | dict(use_sliding_window=True, sliding_window=7, max_window_layers=2),
    "qwen3_moe": GROUPED | dict(head_dim=32, use_sliding_window=True, sliding_window=7, mlp_only_layers=[1]),
}
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=8, rope_theta=1e4)
SETTINGS |= {
    "deepseek_v2": dict(rope_parameters=YARN | dict(mscale=0.707, mscale_all_dim=0.707)),
    "deepseek_vl2": dict(q_lora_rank=24, qk_nope_head_dim=24, v_head_dim=16),
    "deepseek_v3": dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.8), first_k_dense_replace=1),
    "kimi_k2": dict(rope_interleave=False, attention_bias=True),
}
LONG = dict(short_factor=[1.0, 1.5] * 8, long_factor=[2.0] * 16, short_mscale=1.1, long_mscale=1.3)
SLIDING = dict(sliding_window=7, layer_types=["sliding_attention", "full_attention"])
SETTINGS |= {
    "phimoe": GROUPED
    | dict(
        attention_bias=True,
        lm_head_bias=True,
        sliding_window=7,
        original_max_position_embeddings=64,
        rope_parameters=LONG | dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=64),
    ),
    "granitemoe": dict(embedding_multiplier=3.0, attention_multiplier=0.1, residual_multiplier=0.3, logits_scaling=5.0),
    "granitemoeshared": dict(residual_multiplier=0.5),
    "hunyuan_v1_moe": dict(
        rope_parameters=dict(rope_type="dynamic", alpha=50.0, factor=1.0, rope_theta=1e4),
    ),
    "ernie4_5_moe": GROUPED | dict(use_bias=True, moe_layer_start_index=1, moe_num_shared_experts=2),
    "mistral4": dict(
        head_dim=64,
        rope_parameters=YARN
        | dict(llama_4_scaling_beta=0.1, mscale=1.0, mscale_all_dim=1.0, partial_rotary_factor=0.5),
    ),
    "deepseek_v32": dict(index_topk=LENGTH),
    "glm_moe_dsa": dict(index_topk=LENGTH),
    "glm4_moe": GROUPED | dict(use_qk_norm=True, attention_bias=True, first_k_dense_replace=1),
    "glm4v_moe": dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])),
    "minimax_m2": GROUPED | dict(rotary_dim=16),
    "dots1": GROUPED | SLIDING,
    "mellum": GROUPED
    | SLIDING
    | dict(
        rope_parameters={
            "full_attention": YARN,
            "sliding_attention": dict(rope_type="linear", factor=2.0, rope_theta=100.0),
        }
    ),
    "exaone_moe": GROUPED | SLIDING | dict(mlp_layer_types=["dense", "sparse"]),
    "gpt_oss": GROUPED | SLIDING | dict(rope_parameters=YARN | dict(truncate=False)),
    "afmoe": GROUPED | SLIDING | dict(mup_enabled=True, num_dense_layers=1),
    "solar_open": GROUPED
    | dict(
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=1e4,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        )
    ),
}
KNOWN = [name for name in tiny.ALL_FAMILIES if MODEL_TYPES.get(name, name) in FAMILIES]


def build(name, **changes):
    """The tiny model, with gains and biases that differ from the 1 and 0 that transformers gives them."""
    changes = SETTINGS.get(name, {}) | changes
    if "text_config" in tiny.ALL_FAMILIES[name][1]:
        changes = {"text_config": tiny.ALL_FAMILIES[name][1]["text_config"] | changes}
    model, generator = tiny.build_reference(name, **changes), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value.add_(torch.randn(value.shape, generator=generator), alpha=0.3)
    return model


def run_reference(model, tokens):
    """Hidden states after every decoder layer, and logits."""
    states = []
    layers = [module for name, module in model.named_modules() if re.fullmatch(r"(?!.*vis).*layers\.\d+", name)]
    hooks = [
        layer.register_forward_hook(lambda _, __, output: states.append(output[0] if type(output) is tuple else output))
        for layer in layers
    ]
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return [state.numpy() for state in states], logits.numpy()


def run(folder, tokens, *, top_k=None, dtype="float32"):
    checkpoint = open_checkpoint(folder)
    model = describe(checkpoint)
    decoder = describe_decoder(checkpoint, model)
    ends = read_tensors(checkpoint, decoder.ends)
    hidden, states = embed(decoder, ends, jnp.asarray(tokens), dtype=dtype), []
    for layer, weights in stream_blocks(checkpoint, model, decoder):
        block, routed = decoder.blocks[layer], None
        hidden, x = attend(block, weights, hidden)
        if weights.moe:
            traits = {"routing": model.routing}
            choice = route(x, weights.moe.router, weights.moe.bias, top_k=model.top_k, **traits)
            outputs = compute_outputs(x, choice, weights.moe.experts, activation=model.activation, **traits)
            k = (top_k or {}).get(layer, model.top_k)
            routed = mix(outputs, choice.scores, jnp.int32(k), **traits)
        hidden = finish(block, weights, hidden, x, routed)
        states.append(np.asarray(hidden.astype(jnp.float32)))
    return states, np.asarray(read_logits(decoder, ends, hidden))


def draw_tokens():
    return np.random.default_rng(0).integers(3, 256, (2, LENGTH))


def assert_same(ours, theirs, tolerance=1e-4):
    (states, logits), (expected, expected_logits) = ours, theirs
    for a, b in zip([*states, logits], [*expected, expected_logits], strict=True):
        assert a.shape == b.shape and np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("name", KNOWN)
def test_every_layer_equals_transformers(name, tmp_path):
    model, tokens = build(name), draw_tokens()
    tiny.save_checkpoint(name, model, tmp_path)
    assert_same(run(tmp_path, tokens), run_reference(model, tokens))
