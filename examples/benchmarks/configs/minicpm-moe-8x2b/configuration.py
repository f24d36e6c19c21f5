"""transformers has no configuration of this model type; vLLM's class reads the values of config.json as they are."""

from transformers.configuration_utils import PretrainedConfig


class MiniCPMConfig(PretrainedConfig):
    model_type = "minicpm"
    keys_to_ignore_at_inference = ["past_key_values"]
