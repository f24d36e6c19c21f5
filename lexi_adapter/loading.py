"""A model of transformers from a folder, whole and ready to measure."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lexi_adapter.allocation import AllocationError
from lexi_adapter.transformers_model import check_whole, find_device


def load_model(folder: str, *, device: str | None = None, dtype: str = "float32") -> torch.nn.Module:
    """The language model in a folder, in evaluation mode on one device: by default the GPU where there is one.

    Raises:
        AllocationError: no such device or model, or the folder lacks a tensor, which transformers would make up.
    """
    import transformers

    place = find_device(device)
    if place == "auto":
        raise AllocationError("the layers have to be on one device; name that by --device")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        kind = transformers.AutoModelForCausalLM if known else transformers.AutoModelForImageTextToText
        model, info = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        model.to(place)
    except torch.OutOfMemoryError as error:
        raise AllocationError(f"{folder} does not fit on {place}; try --dtype bfloat16") from error
    except Exception as error:  # what it raises depends on the file that is missing, broken or unknown to it
        raise AllocationError(f"transformers cannot load {folder}: {' '.join(str(error).split())[:300]}") from error
    check_whole(folder, info)
    text = model.config.get_text_config()
    if getattr(text, "output_router_logits", False):
        text.output_router_logits = False  # they are for a loss of training, and layers that are not run give none
    return model.eval()


@contextmanager
def explain_full_memory(batch: int) -> Iterator[None]:
    """Make what torch raises on a device without room for a batch of so many sequences one line with the remedy."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise AllocationError(f"the device ran out of memory; take a --batch below {batch}") from error
