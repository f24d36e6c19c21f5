"""One variant in transformers, for evaluation: the folder's model with the allocation applied."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lexi_adapter.errors import AllocationError
from lexi_adapter.model.variants import Variant, find_allocation
from lexi_adapter.tasks.scores import Outcome
from lexi_adapter.tasks.texts import check_prompt, check_tokens, check_unicode


@contextmanager
def explain_full_memory(batch: int) -> Iterator[None]:
    """Make what torch raises on a device without room for a batch of so many sequences one line with the remedy."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise AllocationError(f"the device ran out of memory; take a --batch below {batch}") from error


class TransformersModel:
    """A loaded model and the tokenizer of its prompts; see `scores.Model` for the methods."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    def score(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        import torch
        from torch.nn.functional import cross_entropy

        check_tokens("a window", windows, self.model.config.get_text_config().vocab_size)
        scores = []
        for batch in _cut_batches(windows, self.batch_size):
            tokens = torch.tensor(batch, device=self.model.device)
            with torch.inference_mode():
                logits = self.model(input_ids=tokens, use_cache=False).logits[:, :-1]
            # A window at a time: the float32 copy of the logits is the largest thing in memory.
            for window, following in zip(logits, tokens[:, 1:], strict=True):
                scores.append((-cross_entropy(window.float(), following, reduction="none")).tolist())
        return scores

    def generate(self, prompts: Sequence[Any], max_new_tokens: int, max_length: int | None = None) -> list[str]:
        import torch
        from transformers import GenerationConfig

        encoded = [self._encode(prompt) for prompt in prompts]
        for number, tokens in enumerate(encoded, 1):
            check_prompt(number, len(tokens), max_new_tokens, max_length)
        check_tokens("a prompt", encoded, self.model.config.get_text_config().vocab_size)
        own = self.model.generation_config
        stops = own.eos_token_id if own.eos_token_id is not None else self.tokenizer.eos_token_id
        first = stops[0] if isinstance(stops, list) else stops
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=stops,
            pad_token_id=0 if first is None else first,
        )
        answers = [""] * len(encoded)
        # Prompts of one length go together: without padding a batch computes what each prompt alone would.
        places = sorted(range(len(encoded)), key=lambda place: len(encoded[place]))
        for length, group in itertools.groupby(places, key=lambda place: len(encoded[place])):
            for batch in _cut_batches(list(group), self.batch_size):
                tokens = torch.tensor([encoded[place] for place in batch], device=self.model.device)
                with torch.inference_mode():
                    made = self.model.generate(
                        input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=config
                    )
                for place, ids in zip(batch, made[:, length:].tolist(), strict=True):
                    answers[place] = self.tokenizer.decode(ids, skip_special_tokens=True)
        return answers

    def run_harness(
        self,
        task: str,
        include_paths: Sequence[str],
        max_items: int | None,
        num_fewshot: int | None,
        max_length: int,
        batch_size: int,
    ) -> Outcome:
        from lm_eval.models.huggingface import HFLM

        from lexi_adapter.tasks import harness

        lm = HFLM(pretrained=self.model, tokenizer=self.tokenizer, max_length=max_length, batch_size=batch_size)
        return harness.run(lm, task, include_paths, max_items, num_fewshot)

    def _encode(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            check_unicode("a prompt", prompt)
            return self.tokenizer(prompt, verbose=False)["input_ids"]
        if isinstance(prompt, list) and all(type(token) is int for token in prompt):
            return prompt
        raise AllocationError("a prompt that is neither a text nor token ids needs --backend vllm")


def _cut_batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(items), size):
        yield list(items[first : first + size])


def find_device(device: str | None) -> str:
    """The device by its name, or a GPU if there is one; "auto" spreads a model over all. AllocationError for none."""
    import torch

    if device is None or device == "auto":
        return device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).tolist()  # a device that computes, unlike "meta"
    except (RuntimeError, AssertionError, ImportError) as error:
        raise AllocationError(f"no device {device!r} here ({str(error).splitlines()[0]}); try --device cpu") from error
    return device


def check_whole(folder: str, info: Mapping[str, Collection[Any]]) -> None:
    """Raise AllocationError for tensors that transformers, by its loading info, did not find and made up."""
    lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lacking:
        raise AllocationError(f"{folder} lacks {len(lacking)} tensors, such as {lacking[0]}; fetch it again")


@contextmanager
def open_model(
    variant: Variant, tokenizer: Any, *, device: str, dtype: str, batch_size: int, trust_remote_code: bool
) -> Iterator[TransformersModel]:
    """The variant's model, in memory inside the block.

    Raises:
        AllocationError: transformers cannot load the folder, it lacks a tensor, the allocation does not fit, or memory
            runs out.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from lexi_adapter.serving.transformers_patch import apply

    asked = find_allocation(variant)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            variant.folder,
            dtype=dtype,
            device_map="auto" if device == "auto" else None,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        model.eval()
        if device != "auto":
            model.to(device)
    except torch.OutOfMemoryError as error:
        raise AllocationError(
            f"{variant.folder} does not fit on {device}; try --device auto or --dtype bfloat16"
        ) from error
    except Exception as error:  # what it raises depends on the file that is missing, broken or unknown to it
        raise AllocationError(
            f"transformers cannot load {variant.folder}: {' '.join(str(error).split())[:300]}"
        ) from error
    check_whole(variant.folder, info)
    if asked is not None:
        apply(model, asked)
    try:
        yield TransformersModel(model, tokenizer, batch_size)
    except torch.OutOfMemoryError as error:
        raise AllocationError(f"{device} ran out of memory; try a --batch-size below {batch_size}") from error
    finally:
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


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
