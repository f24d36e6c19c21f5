"""Seconds of a worker's kernels by kind, communication beside compute.

PyTorch's profiler lists every kernel of a run, those inside CUDA graphs too. `start_recording` and `stop_recording`
take a worker first and are sent there by `LLM.collective_rpc`; `combine` puts the workers' records together. Where
there is no GPU, operators that no other operator contains stand in for kernels; torch.compile leaves few of those.
"""

import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from lexi_adapter.errors import AdapterError

NAMES = COMMUNICATION, MOE, ATTENTION, GEMM, OTHER = "communication", "moe", "attention", "gemm", "other"
# The first pattern that a kernel's name matches, in upper or lower case, says its kind. The names are those of vLLM
# 0.26, NCCL, cuBLAS, CUTLASS, DeepEP, FlashInfer and torch.compile.
KINDS: tuple[tuple[str, str], ...] = (
    (OTHER, r"^(memcpy|memset)"),
    # A fused kernel is named after operators around it: "triton_poi_fused_all_reduce_.." reduces nothing.
    (GEMM, r"^triton_tem_.*mm"),
    (OTHER, r"^triton_"),
    (COMMUNICATION, r"nccl|cross_device_reduce|multimem|symm_mem|all_?reduce|all_?gather|reduce_?scatter|all_?2_?all"),
    (COMMUNICATION, r"all_?to_?all|_a2a_|deep_?ep|nvshmem"),
    # Before gemm, because experts are multiplied by CUTLASS kernels too, and before attention for `_fwd_kernel_ep`.
    (MOE, r"moe|expert|top_?k_?(gating|softmax|sigmoid)|grouped_(top_?k|mm|gemm)|groupproblemshape|group_?gemm"),
    (MOE, r"(expand|shuffle)inputrows|preprocesstopkid|_ep_(scatter|gather)|batched_triton_kernel"),
    # The activation between an expert's products. A shared expert's is the same kernel, and a dense MLP's unless
    # torch.compile made it a triton_ one.
    (MOE, r"(act|silu|gelu|swiglu)\w*_mul|swiglu"),
    # Before gemm: FlashAttention 3 is a CUTLASS kernel. Writing keys and values belongs here.
    (
        ATTENTION,
        r"flash(?!infer)|attention|attn|fmha|\bmla|_mla|paged|prepare_varlen|_and_cache|kv_cache",
    ),
    (ATTENTION, r"^_fwd_(grouped_)?kernel|reduce_segments"),
    (GEMM, r"gemm|gemv|nvjet|xmma|cutlass|cublas|splitk|matmul|marlin|machete|\bbmm|(^|_)(mm|addmm|linear)(_|$)"),
    (GEMM, r"::(linear|addmm|mm|bmm|matmul|onednn_mm)"),
)
LONGEST, LETTERS = 12, 200  # kernels named in a record, and letters of a name: templates can fill a page
STATE = "lexi_recording"


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel, times in ns of any clock."""

    name: str
    start: int
    end: int


@cache
def classify(name: str) -> str:
    """The kind of the kernel of this name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def measure_union(intervals: Iterable[tuple[int, int]]) -> int:
    """Length of the union of intervals [start, end)."""
    total, reached = 0, None
    for start, end in sorted(intervals):
        if reached is None or start > reached:
            reached = start
        total += max(0, end - reached)
        reached = max(reached, end)
    return total


def summarise(kernels: Sequence[Kernel]) -> dict[str, Any]:
    """The record of one device's kernels; plain numbers, times in seconds.

    Keys: "seconds" by kind, sums over kernels, which may run beside each other; "span", from the first start to the
    last end; "busy", while any kernel ran; "exposed_communication", while communication ran and nothing else;
    "kernels", how many; "collectives", the seconds of each communication kernel in the order of their starts;
    "longest", the names with most time in all: {"name", "kind", "seconds", "count"}.

    Raises:
        AdapterError: nothing was recorded.
    """
    if not kernels:
        raise AdapterError("the profiler saw no kernel: nothing ran on the device, or CUPTI does not work here")
    spent, counts = Counter(), Counter()
    for kernel in kernels:
        spent[kernel.name] += kernel.end - kernel.start
        counts[kernel.name] += 1
    seconds = dict.fromkeys(NAMES, 0.0)
    for name, duration in spent.items():
        seconds[classify(name)] += duration * 1e-9
    busy = measure_union((kernel.start, kernel.end) for kernel in kernels)
    computing = measure_union((k.start, k.end) for k in kernels if classify(k.name) != COMMUNICATION)
    collectives = sorted((k for k in kernels if classify(k.name) == COMMUNICATION), key=lambda k: k.start)
    return {
        "seconds": seconds,
        "span": (max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels)) * 1e-9,
        "busy": busy * 1e-9,
        "exposed_communication": (busy - computing) * 1e-9,
        "kernels": len(kernels),
        "collectives": [(kernel.end - kernel.start) * 1e-9 for kernel in collectives],
        "longest": [
            {"name": name[:LETTERS], "kind": classify(name), "seconds": duration * 1e-9, "count": counts[name]}
            for name, duration in spent.most_common(LONGEST)
        ],
    }


def combine(workers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One record of the workers' records of the same run.

    A collective's kernel also waits for the slowest peer, so its time is transfer and waiting together. The worker
    that starts last waits least, and its time is nearest to the transfer alone. Hence three numbers: "seconds", the
    means over workers of each kind, with the waiting; "least_communication", the least of the workers' sums; and
    "transfer", the sum over collectives of the shortest kernel among the workers, the closest of the three, or None if
    the workers did not run the same number of collectives.

    "span", "busy", "exposed_communication", "wall" and "kernels" are means; "longest" is of the first worker.
    """
    collectives = [worker["collectives"] for worker in workers]
    same = len({len(durations) for durations in collectives}) == 1
    means = [key for key in ("span", "busy", "exposed_communication", "wall", "kernels") if key in workers[0]]
    return {
        "workers": len(workers),
        "seconds": {kind: statistics.fmean(w["seconds"][kind] for w in workers) for kind in workers[0]["seconds"]},
        "least_communication": min(worker["seconds"][COMMUNICATION] for worker in workers),
        "transfer": math.fsum(map(min, zip(*collectives, strict=True))) if same else None,
        **{key: statistics.fmean(worker[key] for worker in workers) for key in means},
        "longest": list(workers[0]["longest"]),
    }


def start_recording(worker: Any) -> None:
    """Record this worker's kernels from now on.

    CUPTI stays attached afterwards and may slow the process: take measured times before. Its first recording prepares
    every CUDA graph it meets, in each worker at another pace, while the others wait in a collective: run the workload
    in a recording that is thrown away, then in the one that counts.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_device = torch.cuda.is_available()
    if on_device:
        torch.cuda.synchronize()
    recording = profile(activities=[ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU])
    recording.start()
    vars(worker)[STATE] = recording, time.perf_counter()


def stop_recording(worker: Any) -> dict[str, Any]:
    """`summarise` of the kernels since `start_recording`, and "wall", the seconds since then.

    If "span" is much shorter than "wall", the profiler's buffer was too small for the run.

    Raises:
        AdapterError: nothing was recorded, or no recording was started.
    """
    import torch

    if STATE not in vars(worker):
        raise AdapterError("no recording runs in this worker; call start_recording first")
    recording, started = vars(worker).pop(STATE)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall = time.perf_counter() - started
    recording.stop()
    events = recording.profiler.kineto_results.events()  # recording.events() builds a tree of all events, slowly
    read = _read_kernels if torch.cuda.is_available() else _read_operators
    return summarise(read(events)) | {"wall": wall}


def _read_kernels(events: Iterable[Any]) -> list[Kernel]:
    from torch.autograd import DeviceType

    return [
        Kernel(event.name(), event.start_ns(), event.end_ns())
        for event in events
        if event.device_type() != DeviceType.CPU and not event.is_user_annotation() and not _is_wait(event.name())
    ]


def _is_wait(name: str) -> bool:
    # Waits are listed on the device's line: "Context Sync", "Event Sync", "Stream Wait Event".
    return name.endswith(" Sync") or name == "Stream Wait Event"


def _read_operators(events: Iterable[Any]) -> list[Kernel]:
    """Operators that no other operator of their thread contains."""
    outermost: list[Kernel] = []
    operators = [event for event in events if "::" in event.name() and not event.is_user_annotation()]
    reached: dict[int, int] = {}
    for event in sorted(operators, key=lambda event: (event.start_ns(), -event.end_ns())):
        thread, end = event.start_thread_id(), event.end_ns()
        if end > reached.get(thread, -1):
            outermost.append(Kernel(event.name(), event.start_ns(), end))
            reached[thread] = end
    return outermost
