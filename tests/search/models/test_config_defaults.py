"""Configs that leave keys out: what is read of them is what the family's own configuration class fills in."""

import copy
import json
from collections.abc import Mapping

import pytest
import tiny
import vllm.transformers_utils.configs as vllm_configs
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from lexi_search.checkpoint.reader import Checkpoint, open_checkpoint
from lexi_search.errors import InputError
from lexi_search.models.decoder_families import FAMILIES
from lexi_search.models.decoder_stack import describe_decoder, find_first_token
from lexi_search.models.families.defaults import SIZES
from lexi_search.models.model import describe

# Configuration classes of vLLM, which it takes before those of transformers.
VLLM_CLASSES = {"deepseek_vl_v2": "DeepseekVLV2Config", "kimi_vl": "KimiVLConfig"} | {
    "kimi_linear": "KimiLinearConfig",
    "hy_v4": "HYV4Config",
    "minimax_m3_vl": "MiniMaxM3Config",
}
OTHER_CLASSES = {"kimi_k2": "deepseek_v3", "deepseek_v32": "deepseek_v3"}  # as vLLM maps them
# A tiny model has others than its class' default.
TAKEN = {"num_experts_per_tok", "moe_topk", "moe_k", "layer_types", *SIZES}
# Families whose configuration class is in the checkpoint's own folder alone.
REMOTE = {
    "minicpm",
    "deepseek",
    "bailing_moe",
    "bailing_moe_v2",
    "sarvam_moe",
    "sarvam_mla",
    "bailing_hybrid",
    "step3p5",
}
# Sizes that the tensors show, so that a default would nearly always be wrong: refused by name.
SHOWN = {"hidden_size", "num_hidden_layers", "layers_block_type"} | {
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
}


def find_class(model_type):
    if model_type in VLLM_CLASSES:
        return getattr(vllm_configs, VLLM_CLASSES[model_type])
    return CONFIG_MAPPING[OTHER_CLASSES.get(model_type, model_type)]


def find_text(config):
    """The language model's part of a config, to be changed in place."""
    for key in ("text_config", "language_config", "thinker_config"):
        if key in config:
            return find_text(config[key])
    return config


def fill_in(config):
    """The config as its class writes it, with every default."""
    config = json.loads(json.dumps(config))
    find_text(config).pop("time_step_limit", None)  # JSON's infinity, which the class refuses to read again
    full = find_class(config["model_type"]).from_dict(config).to_dict()
    if "language_config" in config:
        full["language_config"] = full.pop("text_config")
    return json.loads(json.dumps(full)) | {"model_type": config["model_type"]}


def understand(checkpoint, config):
    """Everything that is read of a config, or the refusal."""
    read = Checkpoint(checkpoint.folder, config, checkpoint.entries)
    single = find_text(config).get("num_experts_per_tok") == 1
    try:
        model = describe(read, max_k=4 if single else None)
        if model.identity.model_type not in FAMILIES:
            return model
        decoder = describe_decoder(read, model)
        return model, decoder, find_first_token(read, model, 256)
    except InputError as error:
        return str(error)


def write_old(config):
    """The config with its rotary parameters where transformers 4 has them, as most public ones do."""
    text = find_text(config)
    rope = text.pop("rope_parameters", None)
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        return None
    text |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    text["rope_scaling"] = None
    return config


class Recorder(dict):
    """A section of a config that notes the keys that are read."""

    def __init__(self, values, keys):
        super().__init__((k, Recorder(v, keys) if isinstance(v, dict) else v) for k, v in values.items())
        self.keys_read = keys

    def get(self, key, default=None):
        self.keys_read.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.keys_read.add(key)
        return super().__getitem__(key)


def list_variants(checkpoint):
    """Name of what is left out -> the config without it: every key that is read, and all at once that need not be."""
    read = set()
    understand(checkpoint, Recorder(checkpoint.config, read))
    for form, config in (("", checkpoint.config), ("old ", write_old(copy.deepcopy(checkpoint.config)))):
        for key in sorted(read & find_text(config or {}).keys() - {"model_type"}):
            yield form + key, leave_out(config, {key})
        if config:
            yield form + "all", leave_out(config, find_text(config).keys() - SHOWN - TAKEN - {"model_type"})


def leave_out(config, keys):
    config = copy.deepcopy(config)
    for key in keys:
        del find_text(config)[key]
    return config


@pytest.mark.parametrize("name", [name for name in tiny.ALL_FAMILIES if name not in REMOTE])
def test_a_key_left_out_means_the_default_of_the_familys_class(name, tmp_path):
    checkpoint = open_checkpoint(tiny.make_checkpoint(name, tmp_path))
    compared = 0
    for key, config in list_variants(checkpoint):
        try:
            full = fill_in(config)
        except (StrictDataclassError, ValueError):
            continue  # nor does the class take it
        found, expected = understand(checkpoint, config), understand(checkpoint, full)
        named = isinstance(found, str) and key.removeprefix("old ") in found
        assert found == expected or named, (key, found, expected)
        compared += not named
    assert compared > 1
