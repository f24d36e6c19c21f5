"""transformers has no configuration of this model type; vLLM's class reads the values of config.json as they are."""

from transformers.configuration_utils import PretrainedConfig


class DeepseekConfig(PretrainedConfig):
    model_type = "deepseek"
    keys_to_ignore_at_inference = ["past_key_values"]
