"""A variant in transformers: the folder's model with the allocation applied."""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lexi_adapter.errors import AdapterError, check_memory
from lexi_adapter.model.variants import Variant, find_allocation
from lexi_adapter.tasks.scores import Outcome
from lexi_adapter.tasks.texts import check_prompt, check_tokens, check_unicode


@contextmanager
def explain_full_memory(device: str, remedy: str) -> Iterator[None]:
    """Turn torch's error on a full device into an AdapterError of one line with the remedy, such as a smaller batch."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise AdapterError(f"{device} ran out of memory; try {remedy}") from error


def find_memory(device: str) -> int | None:
    """The bytes of memory of a GPU, by its name; None for the machine's own memory, and for several GPUs."""
    return torch.cuda.get_device_properties(device).total_memory if device.startswith("cuda") else None


class TransformersModel:
    """A loaded model and its tokenizer; see `scores.Model` for the methods."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    def score(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        from torch.nn.functional import cross_entropy

        check_tokens("a window", windows, self.model.config.get_text_config().vocab_size)
        self._check_memory(windows, self.model.config.get_text_config().vocab_size, "logits")
        scores = []
        for batch in _cut_batches(windows, self.batch_size):
            tokens = torch.tensor(batch, device=self.model.device)
            with torch.inference_mode():
                logits = self.model(input_ids=tokens, use_cache=False).logits[:, :-1]
            # One window at a time: the float32 copy of the logits takes the most memory.
            for window, following in zip(logits, tokens[:, 1:], strict=True):
                scores.append((-cross_entropy(window.float(), following, reduction="none")).tolist())
        return scores

    def generate(self, prompts: Sequence[Any], max_new_tokens: int, max_length: int | None = None) -> list[str]:
        from transformers import GenerationConfig

        encoded = [self._encode(prompt) for prompt in prompts]
        for number, tokens in enumerate(encoded, 1):
            check_prompt(number, len(tokens), max_new_tokens, max_length)
        check_tokens("a prompt", encoded, self.model.config.get_text_config().vocab_size)
        eos = self.model.generation_config.eos_token_id
        eos = eos if eos is not None else self.tokenizer.eos_token_id
        first_eos = eos[0] if isinstance(eos, list) else eos
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos,
            pad_token_id=0 if first_eos is None else first_eos,
        )
        self._check_memory(encoded, getattr(self.model.config.get_text_config(), "hidden_size", 1), "hidden states")
        answers = [""] * len(encoded)
        # Batches of prompts of equal length: without padding, each prompt is computed as it would be alone.
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        for length, group in itertools.groupby(order, key=lambda index: len(encoded[index])):
            for batch in _cut_batches(list(group), self.batch_size):
                tokens = torch.tensor([encoded[index] for index in batch], device=self.model.device)
                with torch.inference_mode():
                    sequences = self.model.generate(
                        input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=config
                    )
                for index, ids in zip(batch, sequences[:, length:].tolist(), strict=True):
                    answers[index] = self.tokenizer.decode(ids, skip_special_tokens=True)
        return answers

    def _check_memory(self, batches: Sequence[Sequence[int]], width: int, what: str) -> None:
        """Raise AdapterError where `width` numbers for every token of the largest batch fit no memory."""
        count = min(self.batch_size, len(batches))
        size = count * max(map(len, batches), default=0) * width * self.model.dtype.itemsize
        memory = find_memory(str(self.model.device))
        check_memory(f"{what} of {count} prompts at once", size, "lower --batch-size", most=memory)

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
        raise AdapterError("a prompt that is neither a text nor token ids needs --backend vllm")


def _cut_batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(items), size):
        yield list(items[first : first + size])


def find_device(device: str | None) -> str:
    """The device by its name; for None a GPU if there is one; "auto" stays. AdapterError for a device not here."""
    if device is None or device == "auto":
        return device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).tolist()  # the device has to compute, unlike "meta"
    except (RuntimeError, AssertionError, ImportError) as error:
        raise AdapterError(f"no device {device!r} here ({str(error).splitlines()[0]}); try --device cpu") from error
    return device


@contextmanager
def open_model(
    variant: Variant, tokenizer: Any, *, device: str, dtype: str, batch_size: int, trust_remote_code: bool
) -> Iterator[TransformersModel]:
    """The variant's model, in memory inside the block.

    Raises:
        AdapterError: transformers cannot load the folder, it lacks a tensor, or memory runs out.
        AllocationError: the allocation does not fit.
    """
    from transformers import AutoModelForCausalLM

    from lexi_adapter.serving.transformers_patch import apply

    allocation = find_allocation(variant)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    remedy = "--device auto or --dtype bfloat16"
    model = _load(variant.folder, device, lambda: AutoModelForCausalLM, remedy=remedy, **options)
    if allocation is not None:
        apply(model, allocation)
    try:
        with explain_full_memory(device, f"a --batch-size below {batch_size}"):
            yield TransformersModel(model, tokenizer, batch_size)
    finally:
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_model(folder: str, *, device: str | None = None, dtype: str = "float32") -> torch.nn.Module:
    """The language model in a folder, in evaluation mode on one device: by default the GPU where there is one.

    Raises:
        AdapterError: no such device or model, or the folder lacks a tensor.
    """
    device = find_device(device)
    if device == "auto":
        raise AdapterError("the layers have to be on one device; name that by --device")
    options = {"dtype": dtype, "trust_remote_code": False}
    model = _load(folder, device, lambda: _find_class(folder), remedy="--dtype bfloat16", **options)
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # they are for a training loss, and layers that are not run give none
    return model


def _find_class(folder: str) -> Any:
    """The class of transformers that loads a folder: of language models, or of those that read images too."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModelForImageTextToText


def _load(folder: str, device: str, find_class: Callable[[], Any], *, remedy: str, **options: Any) -> torch.nn.Module:
    """The model in a folder, in evaluation mode on a device, or with "auto" spread over all GPUs.

    Args:
        find_class: its class of transformers, which may fail as the loading may.
        remedy: for a model that does not fit on the device.
        options: arguments of `from_pretrained`.

    Raises:
        AdapterError: transformers cannot load the folder, it lacks a tensor, or the device is too small.
    """
    try:
        model, info = find_class().from_pretrained(
            folder, device_map="auto" if device == "auto" else None, output_loading_info=True, **options
        )
        if device != "auto":
            model.to(device)
    except torch.OutOfMemoryError as error:
        raise AdapterError(f"{folder} does not fit on {device}; try {remedy}") from error
    except Exception as error:  # its type depends on the file that is missing, broken or unknown to transformers
        raise AdapterError(f"transformers cannot load {folder}: {' '.join(str(error).split())[:300]}") from error
    _check_whole(folder, info)
    return model.eval()


def _check_whole(folder: str, info: Mapping[str, Collection[Any]]) -> None:
    """Raise AdapterError for tensors that, by its loading info, transformers did not find and initialised itself."""
    lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lacking:
        raise AdapterError(f"{folder} lacks {len(lacking)} tensors, such as {lacking[0]}; fetch it again")
