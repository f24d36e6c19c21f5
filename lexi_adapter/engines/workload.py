"""Workloads of engines: batches of random tokens of fixed lengths, as LExI's throughput figures use them."""

import random
import re
from dataclasses import dataclass, replace

from lexi_adapter.errors import AdapterError, check_memory

BYTES_OF_TOKEN = 36  # of a number and its place in a list of Python's


@dataclass(frozen=True, order=True)
class Workload:
    """`batch` requests at once, each of `input_length` tokens, each answered by exactly `output_length`."""

    batch: int
    input_length: int
    output_length: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.input_length}x{self.output_length}"

    @property
    def tokens(self) -> int:
        """Input and output tokens of all requests; divided by the end-to-end seconds, they are the throughput."""
        return self.batch * (self.input_length + self.output_length)


BALANCED = Workload(16, 512, 512)
PREFILL_HEAVY = Workload(16, 1024, 16)
DECODE_HEAVY = Workload(16, 32, 512)
STEPS = Workload(16, 1024, 128)  # steps of 16 and of 16,384 tokens


def fit(workload: Workload, positions: int | None) -> Workload:
    """The workload with as many input tokens, halved as often as it takes, as a model of so many positions reads."""
    while positions is not None and workload.input_length > 2 and _count_positions(workload) > positions:
        workload = replace(workload, input_length=workload.input_length // 2)
    return workload


def _count_positions(workload: Workload) -> int:
    return workload.input_length + workload.output_length + 1


def parse_workload(text: str) -> Workload:
    """The workload that `str` prints: BATCHxINPUTxOUTPUT. AdapterError for one whose token ids fit no memory."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise AdapterError(f"workload {text!r} is not BATCHxINPUTxOUTPUT, such as {BALANCED}")
    workload = Workload(*map(int, text.split("x")))
    check_memory(f"the token ids of workload {text}", BYTES_OF_TOKEN * workload.tokens, "take a smaller one")
    return workload


def draw_prompts(workload: Workload, *, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids, [batch][input_length]; every seed gives others."""
    generator = random.Random(seed)
    return [generator.choices(range(vocab_size), k=workload.input_length) for _ in range(workload.batch)]
