"""Mutated configs of every family: each is described or refused in one line, within a gigabyte and five seconds.

A few hundred in CI; `LEXI_MUTATIONS=12000` sets another number, spread over all families.
"""

import copy
import json
import os
import random
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import ALL_FAMILIES, make_checkpoint

from lexi_search.allocation.export import check_config, make_vllm_overrides
from lexi_search.artifacts.allocation import Allocation
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.errors import InputError
from lexi_search.models.decoder_families import FAMILIES
from lexi_search.models.decoder_stack import describe_decoder
from lexi_search.models.model import describe, find_dtype
from lexi_search.pruning.sizes import change_config, check_width, find_blocks, find_sizes, is_single

COUNT = int(os.environ.get("LEXI_MUTATIONS", 12 * len(ALL_FAMILIES)))
SECONDS, BYTES = 5.0, 1 << 30
VALUES = [
    *(0, 1, 2, 3, 4, 16, -1, 2**31, 2**31 - 1, 2**63, 2**64, 10**30, 10**400, 0.0, 0.5, -1.5, 1e-320, 1e38, 1e300),
    *(float("nan"), float("inf"), float("-inf"), True, False, None, "", "1", "yarn", "silu", "gelu", "\ud800", "a\nb"),
    *([], [[]], [1], [-1, 2], ["full_attention"] * 2, [True, 1], {}, {"a": 1}, {"rope_type": "yarn"}),
]
NUMBERS = [0, 1, 2, -1, 1e-9, 0.5, 1.0, 4, 4096, 1e300, 10**30, 10**400, True, "8", [1.0] * 16, None, float("nan")]
ROPES = ("default", "mrope", "linear", "dynamic", "llama3", "yarn", "longrope", "su", 1, None, [])
ROPE_KEYS = (
    *("rope_theta", "factor", "partial_rotary_factor", "rotary_dim", "original_max_position_embeddings", "alpha"),
    *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"),
    *("short_factor", "long_factor", "short_mscale", "truncate", "llama_4_scaling_beta", "full_attention"),
)
# Keys that some family reads; a config of the tests may lack them.
KEYS = (
    *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_dim", "layer_types"),
    *("num_hidden_layers", "layers_block_type", "sliding_window", "use_sliding_window", "max_window_layers"),
    *("max_position_embeddings", "original_max_position_embeddings", "num_attention_heads", "num_key_value_heads"),
    *("hidden_size", "hidden_act", "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
    *("norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "topk_method", "scoring_func", "dtype"),
    *("rms_norm_eps", "scale_depth", "scale_emb", "dim_model_base", "logits_scaling", "index_topk", "clip_qkv"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "quantization_config", "model_type", "text_config"),
    *("bos_token_id", "tie_word_embeddings", "moe_intermediate_size", "n_shared_experts", "num_shared_experts"),
)


def mutate(rng, config):
    """The config with up to three of its values changed, removed or added, most of them where the model's are."""
    config = copy.deepcopy(config)
    for _ in range(rng.choice((1, 1, 2, 3))):
        section = find_section(rng, config)
        key = rng.choice(KEYS if rng.random() < 0.5 or not section else list(section))
        match rng.randrange(6):
            case 0:
                section.pop(key, None)
            case 1 | 2:
                section[rng.choice(("rope_parameters", "rope_scaling"))] = draw_rope(rng)
            case 3 if type(section.get(key)) in (int, float):
                section[key] *= rng.choice((-1, 0, 2, 2**31) if isinstance(section[key], int) else (-1, 0, 0.5, 1e300))
            case 4 if isinstance(section.get(key), dict | list) and section[key]:
                inner = section[key]
                inner[rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))] = rng.choice(VALUES)
            case _:
                section[key] = copy.deepcopy(rng.choice(VALUES))
    return config


def find_section(rng, config):
    nested = [value for value in config.values() if isinstance(value, dict)]
    return find_section(rng, rng.choice(nested)) if nested and rng.random() < 0.6 else config


def draw_rope(rng):
    keys = rng.sample(ROPE_KEYS, rng.randrange(8))
    rope = {"rope_type": rng.choice(ROPES)} | {key: copy.deepcopy(rng.choice(NUMBERS)) for key in keys}
    return {"full_attention": rope} if rng.random() < 0.2 else rope


@contextmanager
def bounds():
    """Memory and time that end in MemoryError and TimeoutError."""

    def stop(*_):
        raise TimeoutError(f"more than {SECONDS:g} s")

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def read_all(folder):
    """All that is read of a config before any weights are: by `profile` on both inputs, `prune` and `export`."""
    checkpoint = open_checkpoint(folder)
    model = describe(checkpoint, max_k=2 if is_single(checkpoint.config) else None)
    find_dtype(checkpoint, model)
    read = [lambda: check_sizes(checkpoint, model), lambda: check_export(checkpoint, model)]
    if model.identity.model_type in FAMILIES:
        read.append(lambda: hash(describe_decoder(checkpoint, model).blocks))
    refusals = []
    for one in read:
        try:
            one()
        except InputError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0] if len(refusals) == 1 else InputError("; ".join(map(str, refusals)))


def check_export(checkpoint, model):
    identity = model.identity
    top_k = dict.fromkeys(identity.moe_layers, identity.top_k)
    check_config(identity, checkpoint.config)
    make_vllm_overrides(Allocation(identity, top_k, sum(top_k.values()), 0.0, 0.0, {}), checkpoint.config)


def check_sizes(checkpoint, model):
    sizes = find_sizes(checkpoint.tensors, checkpoint, model)
    find_blocks(checkpoint.tensors, checkpoint, model)
    check_width(checkpoint, sizes)
    change_config(checkpoint.config, sizes, sizes.shrink(num_experts=2, width=sizes.width))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_mutated_config_is_read_or_refused_in_one_line(family, tmp_path):
    make_checkpoint(family, tmp_path)
    file, rng = tmp_path / "config.json", random.Random(family)
    original = json.loads(file.read_text())
    problems = []
    for number in range(-(-COUNT // len(ALL_FAMILIES))):
        mutated = mutate(rng, original)
        file.write_text(json.dumps(mutated))
        try:
            with bounds():
                read_all(tmp_path)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, (number, error)
        except Exception as error:
            problems.append(f"config {number}, {find_changes(original, mutated)!r:.500}: {error!r:.300}")
    assert not problems, "\n".join(problems)


def find_changes(original, mutated):
    """What of a config was changed: of objects, only the values that were."""
    if not isinstance(original, dict) or not isinstance(mutated, dict):
        return mutated
    changed = {key: value for key, value in mutated.items() if key not in original or original[key] != value}
    removed = dict.fromkeys(original.keys() - mutated.keys(), "removed")
    return removed | {key: find_changes(original.get(key), value) for key, value in changed.items()}


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("qwen3_moe", {"rope_parameters": 1}, "the rope parameters are 1, expected an object"),
        ("qwen3_moe", {"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type \\['yarn'\\] is not known"),
        ("qwen3_moe", {"rope_parameters": {"rope_theta": 1e300}}, "rope_theta is 1e\\+300, expected a number"),
        ("qwen3_moe", {"rope_parameters": {"rope_theta": 10**400}}, "rope_theta is 10{39}, expected a number"),
        ("qwen3_moe", {"rope_parameters": {"rope_theta": 0}}, "'default' are incomplete or wrong"),
        ("qwen3_moe", {"rope_parameters": {"partial_rotary_factor": 1e30}}, "'default' are incomplete or wrong"),
        (
            "deepseek_v3",
            {"rope_parameters": {"rope_type": "yarn", "mscale_all_dim": 1.0, "rope_theta": 1e4}},
            "'yarn' are incomplete or wrong \\(KeyError\\('factor'\\)\\)",
        ),
        ("dots1", {"layer_types": 1, "sliding_window": 8}, "layer_types is 1, expected a list"),
        ("qwen3_moe", {"num_hidden_layers": 2**31}, "num_hidden_layers is 2147483648, expected at most 2147483647"),
        ("qwen3_moe", {"num_hidden_layers": 2**31 - 1}, "is 2147483647, but the files hold tensors of 3 layers"),
        ("qwen3_moe", {"rms_norm_eps": 1e300}, "rms_norm_eps is 1e\\+300, expected a value like"),
        ("granitemoe", {"logits_scaling": 0.0}, "the logit divisor is not finite"),
        ("qwen3_moe", {"architectures": 1}, "architectures is 1, expected a list of names"),
    ],
)
def test_numbers_and_types_are_checked_before_anything_is_built(family, changes, message, tmp_path):
    make_checkpoint(family, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match=message), bounds():
        read_all(tmp_path)
