"""A model rigged to copy: after what it has read before, it writes what followed there."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

LONGEST = 8  # tokens of the end of the text that are looked for earlier in it


class CopyingConfig(PretrainedConfig):
    model_type = "copying"
    num_hidden_layers = 1


class CopyingModel(PreTrainedModel, GenerationMixin):
    """An induction head without weights: the longest end of the text that occurs earlier decides the next token."""

    config_class = CopyingConfig

    def __init__(self, config):
        super().__init__(config)
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.post_init()

    def forward(self, input_ids, **_):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, tokens in enumerate(input_ids.tolist()):
            logits[row, -1, find_next(tokens)] = 1.0
        return CausalLMOutput(logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
        return {"input_ids": input_ids}


def find_next(tokens):
    for length in range(min(LONGEST, len(tokens) - 1), 0, -1):
        end = tokens[-length:]
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == end:
                return tokens[start + length]
    return tokens[-1]


def save_copying_model(folder, *, vocab_size):
    AutoConfig.register("copying", CopyingConfig, exist_ok=True)
    AutoModelForCausalLM.register(CopyingConfig, CopyingModel, exist_ok=True)
    CopyingModel(CopyingConfig(vocab_size=vocab_size)).save_pretrained(folder)
    return folder
