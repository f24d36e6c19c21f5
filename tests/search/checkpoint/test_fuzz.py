"""Damaged checkpoints: none crashes the reader, none is read as anything but what its files still say.

Formats without checksums cannot tell damage from meaning: a config with another top-k is another config. So what a
mutation may change is defined by an independent reading. A shard that is accepted is accepted by safetensors' own
reader, with the same bytes in every tensor; an index that is accepted changes no tensor; a config that is accepted is
JSON, and the model is described by the values that its keys have. Everything else is an InputError of one line.

A thousand in CI; `LEXI_MUTATIONS=10000` sets another number.
"""

import dataclasses
import json
import os
import random

import numpy as np
import pytest
import torch
from mutation import mutate_shard, mutate_text
from quantised import CASES
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from lexi_search.checkpoint.reader import INDEX, open_checkpoint
from lexi_search.errors import InputError
from lexi_search.models.model import describe

CASE_COUNT = int(os.environ.get("LEXI_MUTATIONS", "1000"))
SHARDS = ("one.safetensors", "two.safetensors")
CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 1,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "hidden_size": 32,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "dtype": "bfloat16",
}
NUMBERS = {  # what a description says, and the keys that say it
    "num_hidden_layers": lambda model: model.identity.num_hidden_layers,
    "num_experts": lambda model: model.identity.num_experts,
    "num_experts_per_tok": lambda model: model.identity.top_k,
    "hidden_size": lambda model: model.hidden_size,
}


def build(folder, case):
    """A checkpoint of one MoE layer in two shards and an index; experts plain, or quantised as `case` says."""
    rng, stem = np.random.default_rng(0), "model.layers.0.mlp."
    tensors = {stem + "gate.weight": torch.tensor(rng.standard_normal((3, 32))).bfloat16(), "norm": torch.ones(3)}
    for expert in range(3):
        for name in ("gate_proj", "up_proj", "down_proj"):
            name = f"{stem}experts.{expert}.{name}.weight"
            if case is None:
                tensors[name] = torch.tensor(rng.standard_normal((32, 32))).bfloat16()
            else:
                tensors |= CASES[case](rng, name, 32, 32).tensors
    names = sorted(tensors)
    split = {shard: names[place::2] for place, shard in enumerate(SHARDS)}
    for shard, own in split.items():
        save_file({name: tensors[name].contiguous() for name in own}, folder / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, own in split.items() for name in own}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    config = CONFIG | ({"quantization_config": CASES[case].config} if case else {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def summarise(folder):
    """Everything that is read of a checkpoint: what describes it, and the bytes of every tensor."""
    checkpoint = open_checkpoint(folder)
    model = describe(checkpoint)
    names = [name for layer in model.tensors.values() for expert in layer.experts.separate for name in expert]
    logical = {name: checkpoint.tensors[name] for name in names}
    stored = {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in checkpoint.items()}
    return checkpoint, model, logical, stored


def check_shard(data, entries, stored):
    try:
        theirs = load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        pytest.fail(f"accepted what safetensors refuses: {error!r}")
    for name in entries:
        array = theirs[name].contiguous()
        assert stored[name][1:] == (tuple(array.shape), array.flatten().view(torch.uint8).numpy().tobytes()), name


def check_config(data, model, logical, original):
    config = json.loads(data.decode())
    for key, read in NUMBERS.items():
        numbers = config[key] if isinstance(config[key], list) else [config[key]]  # one for all, or for every layer
        assert numbers and all(type(number) is int and number == read(model) for number in numbers), key
    assert config["model_type"] == model.identity.model_type
    assert model.routing.renormalize is bool(config.get("norm_topk_prob"))
    assert model.identity.router_sha256 == original[1].identity.router_sha256
    quantisation = config.get("quantization_config") or {}
    for name, tensor in logical.items():
        same = original[2][name]
        assert (tensor.file, tensor.shape, tensor.parts) == (same.file, same.shape, same.parts)
        expected = same.scheme
        if "weight_block_size" in quantisation:
            expected = dataclasses.replace(expected, block=tuple(quantisation["weight_block_size"]))
        if quantisation.get("quant_method") == "gptq":
            v2 = quantisation.get("checkpoint_format") == "gptq_v2"
            expected = dataclasses.replace(expected, zero_offset=0 if v2 else 1)
        assert tensor.scheme == expected


@pytest.mark.parametrize("case", [None, "fp8 blocks", "gptq desc_act", "compressed int4, zeros"])
def test_damage_is_refused_or_read_as_it_stands(case, tmp_path):
    folder, rng = build(tmp_path, case), random.Random(str(case))
    original, accepted = summarise(folder), 0
    for number in range(CASE_COUNT // 4):
        file = rng.choice([*SHARDS, INDEX, "config.json"])
        before = (folder / file).read_bytes()
        data = mutate_shard(rng, before) if file in SHARDS else mutate_text(rng, before)
        (folder / file).write_bytes(data)
        try:
            checkpoint, model, logical, stored = summarise(folder)
        except InputError as error:
            assert "\n" not in str(error), (number, error)
        else:
            accepted += 1
            if file in SHARDS:
                check_shard(data, [n for n, e in checkpoint.entries.items() if e.file.name == file], stored)
            elif file == INDEX:
                assert model == original[1] and logical == original[2]
                assert stored.items() <= original[3].items()
            else:
                check_config(data, model, logical, original)
        (folder / file).write_bytes(before)
    assert 0 < accepted < CASE_COUNT // 8
