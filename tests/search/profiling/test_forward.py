"""Whole checkpoints carried through in JAX, with transformers' own hidden states and logits as the judge."""

import json
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
from quantised import CASES
from safetensors.torch import load_file, save_file
from transformers import Glm5NextTextConfig

from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.errors import InputError
from lexi_search.layers.decoder import attend, embed, finish, read_logits
from lexi_search.layers.mixers import attention as attention_module
from lexi_search.layers.mixers import recurrent
from lexi_search.layers.mixers.scans import CHUNK
from lexi_search.layers.moe import compute_outputs, mix
from lexi_search.layers.routing import look_up, route
from lexi_search.layers.spec import GroupedAttention, Norm
from lexi_search.layers.weights import Affine, GroupedWeights
from lexi_search.models.decoder_families import FAMILIES
from lexi_search.models.decoder_stack import count_tokens, describe_decoder
from lexi_search.models.loading.reader import read_ngrams, read_tensors
from lexi_search.models.loading.residence import Residence
from lexi_search.models.model import describe

LENGTH = 24
END = 217  # a token of `draw_tokens`
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
    "deepseek": GROUPED
    | dict(attention_bias=True, rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)),
    "deepseek_v2": dict(rope_parameters=YARN | dict(mscale=0.707, mscale_all_dim=0.707)),
    "deepseek_vl2": dict(q_lora_rank=24, qk_nope_head_dim=24, v_head_dim=16),
    "deepseek_v3": dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.8), first_k_dense_replace=1),
    "kimi_k2": dict(rope_interleave=False, attention_bias=True),
}
MISTRAL4 = dict(
    head_dim=64,
    rope_parameters=YARN | dict(llama_4_scaling_beta=0.1, mscale=1.0, mscale_all_dim=1.0, partial_rotary_factor=0.5),
)
STEP = GROUPED | dict(
    sliding_window=7,
    num_hidden_layers=3,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    mlp_layer_types=["dense", "sparse", "sparse"],
    num_sliding_attention_heads=2,
    swiglu_limits=[None, 0.5, 0.0],
    swiglu_limits_shared=[0.4, 0.0, 0.3],
    rope_parameters={
        "full_attention": dict(rope_type="default", rope_theta=1e3, partial_rotary_factor=0.5),
        "sliding_attention": dict(rope_type="default", rope_theta=100.0),
    },
)
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
    "mistral4": MISTRAL4,
    "mistral3": MISTRAL4,
    "axk1": dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.8), first_k_dense_replace=1),
    "deepseek_ocr2": GROUPED | dict(attention_bias=True),
    "sarvam_mla": dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.8)),
    "axk2": dict(index_topk=LENGTH, mlp_layer_types=["dense", "sparse"], attention_bias=True)
    | dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.8)),
    "hy_v4": dict(index_topk=LENGTH, indexer_types=["full", "shared"], hc_mult=3, hc_magnitude=1.5, hc_eps=0.01)
    | dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.8)),
    "deepseek_v4": dict(
        num_hidden_layers=4,
        num_attention_heads=4,
        sliding_window=7,
        layer_types=["sliding_attention", *["heavily_compressed_attention", "compressed_sparse_attention"] * 2][:4],
        compress_rates={"heavily_compressed_attention": 5, "compressed_sparse_attention": 3},
        index_topk=LENGTH // 3,
        rope_parameters={key: value for key, value in YARN.items() if key != "rope_theta"},
        hc_eps=0.01,
        hc_sinkhorn_iters=3,
    ),
    "glm5_next": dict(
        num_hidden_layers=3,
        layer_types=["linear_attention", "indexed_attention", "linear_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
        linear_num_heads=3,
        linear_head_dim=24,
        linear_lower_bound=-3.0,
        attention_bias=True,
        index_topk=LENGTH - 4,
        index_kpool=5,
        hc_mult=3,
        hc_eps=0.01,
    ),
    "deepseek_v32": dict(index_topk=LENGTH),
    "glm_moe_dsa": dict(index_topk=LENGTH),
    "glm4_moe": GROUPED | dict(use_qk_norm=True, attention_bias=True, first_k_dense_replace=1),
    "glm4v_moe": dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])),
    "laguna": GROUPED | SLIDING | dict(num_attention_heads_per_layer=[4, 2], gating=True),
    "cohere2_moe": GROUPED
    | dict(num_hidden_layers=3, layer_types=["full_attention", "sliding_attention", "full_attention"])
    | dict(mlp_layer_types=["dense", "sparse", "sparse"], sliding_window=7, num_shared_experts=2, logit_scale=0.3)
    | dict(prefix_dense_intermediate_size=48, tie_word_embeddings=True),
    "granitemoe_swa": GROUPED
    | SLIDING
    | dict(shared_intermediate_size=32, layer_rope_theta=[0, 100.0], residual_multiplier=0.5, attention_multiplier=0.1),
    "bailing_moe": GROUPED,
    "bailing_moe_v2": GROUPED | dict(use_qk_norm=True, first_k_dense_replace=1),
    "sarvam_moe": GROUPED | dict(use_qk_norm=True, attention_bias=True),
    "step3p5": STEP,
    "step3p7": STEP,
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
DELTA = GROUPED | dict(
    num_hidden_layers=3,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=24,
    linear_value_head_dim=16,
)
SETTINGS |= {
    "qwen3_next": DELTA | dict(mlp_only_layers=[1]),
    "qwen3_5_moe": DELTA | dict(attention_bias=True),
    "qwen3_5_moe_text": DELTA,
    "qwen4_exp": DELTA
    | dict(layer_types=["linear_attention", "indexed_attention", "linear_attention"], hc_count=3, hc_lowrank=8)
    | dict(ple_layer_ids=[1, 3], ple_embed_dim=32, heads_per_ngram=2, ple_conv_kernel_size=3, split_ngram_parts=3)
    | dict(ngram_vocab_size_base=50, make_ngram_vocab_size_divisible_by=3, eos_token_id=END, output_gate_type="sigmoid")
    | dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=32, indexer_budget=20, indexer_compress_ratio=5),
}
HYBRID = GROUPED | dict(num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"])
SETTINGS |= {
    "lfm2_moe": GROUPED
    | dict(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], num_dense_layers=1, conv_bias=True),
    "granitemoehybrid": HYBRID
    | dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=24, residual_multiplier=0.5, position_embedding_type="rope"),
    "nemotron_h": GROUPED
    | dict(
        num_hidden_layers=5,
        hybrid_override_pattern="M*EM-",
        mamba_num_heads=8,
        mamba_head_dim=24,
        n_groups=2,
        ssm_state_size=16,
        time_step_min=1e-9,  # vLLM has no bounds on steps
    ),
    "kimi_linear": HYBRID
    | dict(num_attention_heads=2)
    | dict(linear_num_heads=3, linear_head_dim=24, mlp_layer_types=["dense", "sparse", "sparse"]),
}
CHUNKS = GROUPED | dict(num_experts_per_tok=2, attention_chunk_size=7, no_rope_layers=[1, 0], floor_scale=9)
GEMMA4 = dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=7, final_logit_softcapping=3.0) | dict(
    attention_k_eq_v=True, num_global_key_value_heads=1, tie_word_embeddings=True
)
SETTINGS |= {
    "gemma4": GEMMA4,
    "gemma4_text": GEMMA4 | dict(attention_k_eq_v=False, layer_types=None, num_hidden_layers=3),
    "llama4": CHUNKS,
    "llama4_text": CHUNKS | dict(use_qk_norm=False),
    "mimo_v2_flash": dict(num_attention_heads=8, num_key_value_heads=2, v_head_dim=24, sliding_window=7)
    | dict(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]),
    "minimax_m3_vl": GROUPED
    | dict(layer_types=["minimax_m3_sparse", "full_attention"], mlp_layer_types=["sparse", "dense"])
    | dict(rotary_dim=16, rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5))
    | dict(index_block_size=LENGTH // 2, index_topk_blocks=2, index_n_heads=2, index_head_dim=32),
}
SETTINGS |= {
    "minimax": HYBRID
    | dict(full_attn_alpha_factor=3.5, linear_attn_alpha_factor=1.5, linear_attn_beta_factor=0.5, mlp_alpha_factor=2.5)
    | dict(block_size=8, mlp_beta_factor=0.8),
}
SETTINGS |= {"jamba": GROUPED | dict(num_hidden_layers=3, attn_layer_period=3, attn_layer_offset=1, mamba_dt_rank=6)}
KNOWN = [name for name in tiny.ALL_FAMILIES if tiny.MODEL_TYPES.get(name, name) in FAMILIES]


def build(name, **changes):
    """The tiny model, with gains and biases that differ from the 1 and 0 that transformers gives them."""
    changes = SETTINGS.get(name, {}) | changes
    model, generator = tiny.build_reference(name, **changes), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value.add_(torch.randn(value.shape, generator=generator), alpha=0.3)
        for name, value in model.named_buffers():
            if name.endswith("layer_scalar"):
                value.fill_(0.7)
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
    for layer, weights in Residence(checkpoint, model, decoder).stream(range(len(decoder.blocks))):
        block, routed = decoder.blocks[layer], None
        ngrams = read_ngrams(checkpoint, decoder, layer, tokens)
        hidden, x = attend(block, weights, hidden, None if ngrams is None else jnp.asarray(ngrams))
        if weights.moe:
            traits = {"routing": model.routing}
            if weights.moe.choices is None:
                choice = route(x, weights.moe.router, weights.moe.bias, top_k=model.top_k, **traits)
            else:
                choice = look_up(x, weights.moe.router, weights.moe.choices, tokens.reshape(-1), **traits)
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
        b = b.reshape(*b.shape[:2], *a.shape[2:])  # residual streams may lie side by side
        assert a.shape == b.shape and np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("name", KNOWN)
def test_every_layer_equals_transformers(name, tmp_path):
    model, tokens = build(name), draw_tokens()
    tiny.save_checkpoint(name, model, tmp_path)
    assert_same(run(tmp_path, tokens), run_reference(model, tokens))


def test_ngrams_of_short_texts_equal_transformers(tmp_path):
    """Of one token and more, one after the other, also at both ends."""
    model = build("qwen4_exp")
    tokens = np.random.default_rng(1).choice([END, 3, 4, 5], (4, LENGTH))
    tokens[0, [0, 1, -1]] = tokens[1, -3:] = END
    tiny.save_checkpoint("qwen4_exp", model, tmp_path)
    assert_same(run(tmp_path, tokens), run_reference(model, tokens))


TABLE = "model.language_model.layers.2.ple.ple_embedding."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ngram_embedding.shard_2.weight": None}, "2 parts of .*ngram_embedding have .* rows, and its hashes need"),
        ({"ngram_embedding.shard_0.weight": None}, "ngram_embedding.shard_0.weight is missing"),
        ({"ngram_embedding.shard_1.weight": torch.full((104, 8), torch.nan)}, "shard_0.weight holds NaN or Inf"),
        ({"layer_multipliers": None}, "layer_multipliers is missing; use lexi-search profile --input paper"),
        ({"layer_multipliers": torch.ones(3)}, r"layer_multipliers is float32 of shape \[3\], expected a short list"),
        ({"ngram_heads_vocab_sizes": torch.ones(3, dtype=torch.int64)}, "3 multipliers and 3 hashes of n-grams do not"),
        ({"ngram_heads_offsets": torch.ones(3, dtype=torch.int64)}, "sizes and offsets of n-grams do not fit"),
        ({"ngram_heads_vocab_sizes": torch.zeros(4, dtype=torch.int64)}, "sizes and offsets of n-grams do not fit"),
    ],
)
def test_refuses_tables_of_ngrams(changes, message, tmp_path):
    tiny.save_checkpoint("qwen4_exp", build("qwen4_exp"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {TABLE + name: value for name, value in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        run(tmp_path, draw_tokens())
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_experts_in_a_latent_space_equal_transformers(tmp_path):
    model, tokens = build("nemotron_h", moe_latent_size=24), draw_tokens()
    tiny.save_checkpoint("nemotron_h", model, tmp_path)
    assert_same(run(tmp_path, tokens), run_reference(model, tokens))


def test_every_known_family_is_tested():
    assert {tiny.MODEL_TYPES.get(name, name) for name in KNOWN} == set(FAMILIES)


def test_a_layer_with_fewer_experts_equals_transformers(tmp_path):
    model, tokens = build("qwen3_moe"), draw_tokens()
    tiny.save_checkpoint("qwen3_moe", model, tmp_path)
    before = run_reference(model, tokens)
    tiny.find_moe_blocks(model)[2].gate.top_k = 2
    ours = run(tmp_path, tokens, top_k={2: 2})
    assert_same(ours, run_reference(model, tokens))
    assert np.linalg.norm(ours[1] - before[1]) > 0.01 * np.linalg.norm(before[1])


# Where scores of experts are near, rounding chooses others.
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("olmoe", 0.05), ("qwen3_next", 0.15), ("nemotron_h", 0.15), ("deepseek_v4", 0.05), ("qwen4_exp", 0.05)],
)
def test_sixteen_bits_are_near_float32(name, tolerance, tmp_path):
    model, tokens = build(name), draw_tokens()
    tiny.save_checkpoint(name, model, tmp_path)
    states, logits = run(tmp_path, tokens, dtype="bfloat16")
    assert (states[-1] == states[-1].astype(ml_dtypes.bfloat16)).all() and logits.dtype == np.float32
    assert_same((states, logits), run_reference(model, tokens), tolerance=tolerance)


@pytest.mark.parametrize("name", ["qwen3_next", "nemotron_h", "kimi_linear", "jamba", "glm5_next"])
def test_chunks_of_long_sequences_equal_transformers(name, tmp_path):
    """Of a length that the chunks of the recurrence do not divide."""
    model = build(name, max_position_embeddings=256, **({"index_topk": 80} if name == "glm5_next" else {}))
    tokens = np.random.default_rng(0).integers(3, 256, (2, CHUNK + 7))
    tiny.save_checkpoint(name, model, tmp_path)
    assert_same(run(tmp_path, tokens), run_reference(model, tokens))


def test_sequences_that_are_mixed_one_by_one_equal_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(recurrent, "MIX_BYTES", 1)
    model, tokens = build("qwen3_next", rms_norm_eps=1e-7), draw_tokens()  # no other test's compiled layers
    tiny.save_checkpoint("qwen3_next", model, tmp_path)
    assert_same(run(tmp_path, tokens), run_reference(model, tokens))


def test_minicpm_scales(tmp_path):
    """MiniCPM has no class in transformers; Granite's multipliers do what its scales do."""
    granite = dict(
        embedding_multiplier=12.0,
        residual_multiplier=1.4 / 2**0.5,
        logits_scaling=64 / 16,
        attention_multiplier=32**-0.5,
        num_experts_per_tok=2,
    )
    model, tokens = build("granitemoe", **granite), draw_tokens()
    tiny.save_checkpoint("granitemoe", model, tmp_path)
    names = {"router.layer": "gate", "input_linear.weight": "experts.gate_up_proj"}
    names |= {"output_linear.weight": "experts.down_proj", "block_sparse_moe": "mlp"}
    tensors = {
        re.sub("|".join(names), lambda match: names[match[0]], key): value
        for key, value in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    rewrite_config(tmp_path, model_type="minicpm", scale_emb=12, scale_depth=1.4, dim_model_base=16)
    assert_same(run(tmp_path, tokens), run_reference(model, tokens))


def test_deepseek_without_latent_attention(tmp_path):
    """As the smallest DeepSeek-VL2 has it; what GLM-4.5 computes is then the same but for its partial rotation."""
    model, tokens = build("glm4_moe", use_qk_norm=False, partial_rotary_factor=1.0), draw_tokens()
    tiny.save_checkpoint("glm4_moe", model, tmp_path)
    rewrite_config(tmp_path, model_type="deepseek_v2", use_mla=False, topk_method="noaux_tc", scoring_func="sigmoid")
    assert_same(run(tmp_path, tokens), run_reference(model, tokens))


# Too narrow for AWQ, or left as they are in quantised checkpoints.
UNQUANTISED = "mlp.gate.weight", "ffn.gate.weight", "in_proj_a.weight", "in_proj_b.weight", "shared_expert_gate.weight"


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("fp8 blocks", "deepseek_v2"),
        ("awq", "deepseek_v2"),
        ("awq", "qwen3_5_moe"),
        ("deepseek-v4 fp8", "deepseek_v4"),
    ],
)
def test_quantised_tensors_are_their_values(case, name, tmp_path):
    model, tokens, rng = build(name), draw_tokens(), np.random.default_rng(0)
    for kind in ("stored", "values"):
        (tmp_path / kind).mkdir()
        tiny.save_checkpoint(name, model, tmp_path / kind)
    stored, values = {}, load_file(tmp_path / "values/model.safetensors")
    for name, tensor in values.items():
        if re.match(r"(.*\.)?layers\..*\.weight$", name) and tensor.ndim == 2 and not name.endswith(UNQUANTISED):
            matrix = CASES[case](rng, name, *tensor.shape)
            stored, values = stored | matrix.tensors, values | {name: torch.from_numpy(matrix.values)}
        else:
            stored[name] = tensor
    save_file(stored, tmp_path / "stored/model.safetensors")
    save_file(values, tmp_path / "values/model.safetensors")
    rewrite_config(tmp_path / "stored", quantization_config=CASES[case].config)
    for a, b in zip(run(tmp_path / "stored", tokens)[0], run(tmp_path / "values", tokens)[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score_bytes", [100, 1500, 1 << 20])
@pytest.mark.parametrize(("window", "with_sinks"), [(None, False), (4, True)])
def test_attention_equals_the_loop(score_bytes, window, with_sinks, monkeypatch):
    """However much of it is computed at a time."""
    monkeypatch.setattr(attention_module, "SCORE_BYTES", score_bytes)
    rng, length, heads, kv_heads, width = np.random.default_rng(1), 11, 4, 2, 6
    hidden = heads * width  # the output is as wide as the input, so that the last projection may be the identity
    draw = [rng.normal(size=(rows, hidden)) for rows in (hidden, kv_heads * width, kv_heads * width)]
    x, sinks = rng.normal(size=(3, length, hidden)), rng.normal(size=heads)
    weights = GroupedWeights(*(Affine(jnp.float32(part)) for part in (*draw, np.eye(hidden))))
    if with_sinks:
        weights = weights._replace(sinks=jnp.float32(sinks))
    settings = GroupedAttention(heads, kv_heads, width, 0.4, Norm(1e-6), None, window)
    ours = attention_module.attend(jnp.float32(x), weights, attention=settings)
    queries, keys, values = (np.einsum("bti,oi->bto", x, part).reshape(3, length, -1, width) for part in draw)
    for sequence, position, head in np.ndindex(3, length, heads):
        first = 0 if window is None else max(position - window + 1, 0)
        seen = slice(first, position + 1)
        scores = 0.4 * keys[sequence, seen, head // 2] @ queries[sequence, position, head]
        nothing = np.exp(sinks[head]) if with_sinks else 0.0
        shares = np.exp(scores) / (np.exp(scores).sum() + nothing)
        theirs = shares @ values[sequence, seen, head // 2]
        found = ours[sequence, position, head * width : (head + 1) * width]
        np.testing.assert_allclose(found, theirs, rtol=1e-4, atol=1e-5)


def test_old_keys_of_the_rotation_mean_the_same(tmp_path):
    tiny.save_checkpoint("deepseek_v3", build("deepseek_v3"), tmp_path)
    new = describe_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    old = config.pop("rope_parameters")
    old |= {"type": old.pop("rope_type")}
    config |= {"rope_theta": old.pop("rope_theta"), "rope_scaling": old}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert describe_folder(tmp_path) == new


def describe_folder(folder):
    checkpoint = open_checkpoint(folder)
    return describe_decoder(checkpoint, describe(checkpoint))


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({}, -3.0),
        ({"linear_lower_bound": None}, None),
        ({"linear_lower_bound": None, "linear_attn_config": {"head_dim": 24}}, -5.0),
        ({"linear_lower_bound": None, "linear_attn_config": {"safe_gate": False}}, None),
        ({"linear_attn_config": {"gate_lower_bound": -2.0}}, -2.0),
    ],
)
def test_the_bound_of_decays_is_that_of_the_class(changes, bound, tmp_path):
    tiny.save_checkpoint("glm5_next", build("glm5_next"), tmp_path)
    rewrite_config(tmp_path, text_config=changes)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert (
        describe_folder(tmp_path).blocks[0].mixer.decay_bound == bound == Glm5NextTextConfig(**text).linear_lower_bound
    )


def rewrite_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    if "text_config" in changes:
        changes = changes | {"text_config": config["text_config"] | changes["text_config"]}
    config |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["bailing_hybrid"])
def test_refuses_families_that_it_does_not_know(name, tmp_path):
    tiny.make_checkpoint(name, tmp_path)
    message = (
        f"config.json: what {name} computes outside its MoE layers is not known; "
        "use lexi-search profile --input paper, which takes the MoE layers alone; known are afm"
    )
    with pytest.raises(InputError, match=message):
        describe_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "spiral"}},
            {},
            "rope_type 'spiral' is not known; use lexi-search profile --input paper.*; known are default",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3"}},
            {},
            "parameters of type 'llama3' are incomplete .*low_freq_factor",
        ),
        (
            {"layer_types": ["full_attention", "mamba"]},
            {},
            "layer_types 'mamba' is not known; use lexi-search profile --input paper",
        ),
        ({"layer_types": ["full_attention"]}, {}, "layer_types is of 1 layers, expected 2"),
        ({"num_attention_heads": 3}, {}, "3 heads and 2 of keys do not fit .*q_proj.weight of 128 rows"),
        ({"hidden_act": "relu6"}, {}, "hidden_act 'relu6' is not known"),
        (
            {},
            {"model.layers.1.self_attn.temperature": 4},
            "what tensor model.layers.1.self_attn.temperature does is not",
        ),
        ({}, {"model.layers.1.self_attn.k_proj.weight": None}, "layers.1.self_attn.k_proj.weight is missing"),
        ({}, {"model.layers.0.self_attn.v_proj.weight": 7}, r"v_proj.weight has shape \[7\], expected \[64, 64\]"),
        ({}, {"model.layers.0.self_attn.k_norm.weight": 7}, r"k_norm.weight has shape \[7\], expected \[64\]"),
        ({}, {"model.norm.weight": None}, "model.norm.weight is missing"),
        ({}, {"lm_head.weight": None}, "model.lm_head.weight or lm_head.weight is missing"),
    ],
)
def test_refuses(config, tensors, message, tmp_path):
    refuse("dots1", config, tensors, message, tmp_path)


@pytest.mark.parametrize(
    ("name", "config", "tensors", "message"),
    [
        ("qwen3_next", {"linear_num_key_heads": 3}, {}, "4 linear_num_value_heads are no multiple of 3 of keys"),
        (
            "qwen3_next",
            {"linear_key_head_dim": 8},
            {},
            r"in_proj_qkvz.weight has shape \[224, 64\], expected \[160, 64",
        ),
        ("qwen3_next", {"output_gate_type": "tanh"}, {}, "output_gate_type 'tanh' is not known; known are silu"),
        ("qwen3_next", {}, {"model.layers.0.linear_attn.A_log": None}, "layers.0.linear_attn.A_log is missing"),
        ("qwen3_next", {}, {"model.layers.0.linear_attn.lambda": 4}, "tensor model.layers.0.linear_attn.lambda does"),
        ("nemotron_h", {"n_groups": 3}, {}, "8 heads and 3 groups of Mamba-2 do not fit"),
        ("nemotron_h", {"mamba_hidden_act": "tanh"}, {}, "mamba_hidden_act 'tanh' is not known"),
        ("nemotron_h", {}, {"backbone.layers.1.mixer.k_proj.weight": None}, "1.mixer.k_proj.weight is missing"),
        ("llama4_text", {"attention_chunk_size": 0}, {}, "attention_chunk_size is 0, expected"),
        ("llama4_text", {"floor_scale": 0}, {}, "floor_scale is 0.0, expected a number above 0"),
        ("llama4_text", {"no_rope_layers": 4}, {}, "no_rope_layers is 4, expected a list"),
        ("glm5_next", {"text_config": {"index_kpool_always_select_tail": False}}, {}, "select_tail False is not known"),
        ("qwen4_exp", {"text_config": {"eos_token_id": None}}, {}, "eos_token_id is None, expected a token"),
        (
            "qwen4_exp",
            {"text_config": {"hc_count": 2}},
            {},
            r"ple.key_proj.weight has shape \[192, 32\], expected",
        ),
        ("glm5_next", {"text_config": {"linear_lower_bound": 1}}, {}, "linear_lower_bound is 1.0, expected at most 0"),
        ("deepseek_v4", {"head_dim": 16}, {}, r"attn.wkv.weight has shape \[32, 64\], expected \[16, 64\]"),
        ("deepseek_v4", {"hc_mult": 3}, {}, r"hc_attn_fn has shape \[24, 256\], expected \[15, 192\]"),
        ("deepseek_v4", {}, {"hc_head_scale": None}, "tensor hc_head_scale is missing"),
        ("deepseek_v4", {}, {"layers.0.attn.wo_a.weight": (32, 50)}, r"4 heads of 32 values do not fit .*\[32, 50\]"),
        ("minimax", {"num_attention_heads": 5}, {}, "5 heads do not fit model.layers.0.self_attn.norm.weight"),
    ],
)
def test_refuses_hybrids(name, config, tensors, message, tmp_path):
    refuse(name, config, tensors, message, tmp_path)


def refuse(name, config, tensors, message, tmp_path):
    tiny.save_checkpoint(name, build(name), tmp_path)
    rewrite_config(tmp_path, **config)
    changed = load_file(tmp_path / "model.safetensors") | {k: v and torch.zeros(v) for k, v in tensors.items()}
    save_file({k: v for k, v in changed.items() if v is not None}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        describe_folder(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "longest"),
    [
        ("deepseek_v32", {"index_topk": LENGTH - 1}, LENGTH - 1),
        ("minimax_m3_vl", {"index_block_size": 7, "index_topk_blocks": 3}, 21),
        ("hy_v4", {"index_topk": LENGTH - 1}, LENGTH - 1),
        ("glm5_next", {"index_topk": 16, "index_kpool": 4}, 19),
        ("qwen4_exp", {"indexer_budget": 18, "indexer_compress_ratio": 3}, 20),
        ("deepseek_v4", {"index_topk": LENGTH // 3 - 1}, LENGTH - 1),
    ],
)
def test_refuses_sequences_that_are_too_long(name, changes, longest, tmp_path):
    tiny.save_checkpoint(name, build(name, **changes), tmp_path)
    with pytest.raises(InputError, match=f"sequences of 24 tokens are longer than {longest}"):
        run(tmp_path, draw_tokens())


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (torch.full((256, 4), 16), "tid2eid names experts from 16 to 16, and there are 16; is the file damaged"),
        (torch.full((256, 4), -1), "tid2eid names experts from -1 to -1"),
        (
            torch.zeros((256, 3), dtype=torch.int32),
            r"is int32 of shape \[256, 3\], expected whole numbers of shape .*4\]",
        ),
        (torch.zeros((256, 4)), "is float32 of shape"),
    ],
)
def test_refuses_experts_of_tokens_that_are_not_there(choices, message, tmp_path):
    tiny.save_checkpoint("deepseek_v4", build("deepseek_v4"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {"layers.0.ffn.gate.tid2eid": choices}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        run(tmp_path, draw_tokens())


def test_only_tokens_with_experts_are_sampled(tmp_path):
    tiny.save_checkpoint("deepseek_v4", build("deepseek_v4"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["layers.0.ffn.gate.tid2eid"] = tensors["layers.0.ffn.gate.tid2eid"][:250].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    model = describe(checkpoint)
    assert count_tokens(checkpoint, model, describe_decoder(checkpoint, model)) == 250


def test_names_a_tensor_that_is_damaged(tmp_path):
    tiny.save_checkpoint("dots1", build("dots1"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="tensor model.layers.1.self_attn.o_proj.weight holds NaN or Inf"):
        run(tmp_path, draw_tokens())
