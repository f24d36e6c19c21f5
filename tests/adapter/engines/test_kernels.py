"""Seconds of kernels by kind: names as vLLM's libraries have them, intervals judged by a timeline of single ticks."""

import json
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lexi_adapter.engines.kernels import (
    COMMUNICATION,
    NAMES,
    Kernel,
    _read_kernels,
    _read_operators,
    classify,
    combine,
    measure_union,
    start_recording,
    stop_recording,
    summarise,
)
from lexi_adapter.errors import AdapterError

KNOWN = {
    "communication": [
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 4>(vllm::RankData*, vllm::RankSignals)",
        "void vllm::cross_device_reduce_2stage<__nv_bfloat16, 4>(vllm::RankData*, vllm::RankSignals)",
        "void (anonymous namespace)::multimem_all_reduce_kernel<c10::BFloat16, 16, 8>",
        "void flashinfer::trtllm_allreduce_fusion::allreduce_fusion_kernel_oneshot_lamport<0>",
        "void deep_ep::intranode::dispatch<8, 768, 8192>",
        "_dcp_a2a_pack_send_kernel",
        "c10d::allreduce_",
        "_C::shm_allreduce",
    ],
    "moe": [
        "fused_moe_kernel",
        "void vllm::moe::topkGating<8, 64, 4, 16, 32, int, __nv_bfloat16, (vllm::moe::ScoringFunc)0>",
        "void vllm::moe::grouped_topk_fused_small_expert_count_kernel<float, __nv_bfloat16, int>",
        "void vllm::moe::count_and_sort_expert_tokens_kernel<int>(int const*, int*, int*)",
        "void vllm::moe::moe_align_block_size_small_batch_expert_kernel<int, 256>",
        "void vllm::moe::moe_sum_vec_kernel<c10::BFloat16, int, 8, false>",
        "void vllm::act_and_mul_kernel<c10::BFloat16, __nv_bfloat162, &vllm::silu_kernel<c10::BFloat16>>",
        "void expandInputRowsKernel<__nv_bfloat16>",
        "void finalizeMoeRoutingKernel<__nv_bfloat16>",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<1>>>",
        "_fwd_kernel_ep_scatter_1",
        "vllm::cpu_fused_moe_torch",
    ],
    "attention": [
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<2>>>",
        "void cutlass::device_kernel<flash::FlashAttnFwdCombine<cute::tuple<cute::C<16>, cute::C<64>>, 4, 256>>",
        "flash::prepare_varlen_num_blocks_kernel<1, true>(int, int, int)",
        "void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16, __nv_bfloat16>",
        "void vllm::concat_and_cache_mla_kernel<__nv_bfloat16, __nv_bfloat16>",
        "kernel_unified_attention",
        "_fwd_grouped_kernel_stage1",
        "_fwd_kernel_stage2",
        "reduce_segments",
        "vllm::unified_kv_cache_update",
        "void vllm::merge_attn_states_kernel<__nv_bfloat16, 128>",
    ],
    "gemm": [
        "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_128x2_tn_align8>",
        "void gemvx::kernel<int, int, __nv_bfloat16, __nv_bfloat16, float, false, true>",
        "std::enable_if<true, void>::type internal::gemvx::kernel<int, float>",
        "void router_gemm_kernel_float_output<__nv_bfloat16, 128, 8, 16, 256, 7168>",
        "triton_tem_fused_addmm_3",
        "aten::linear",
    ],
    "other": [
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "triton_poi_fused_all_reduce_moe_forward_0",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_1",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>>>",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>",
        "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>",
        "void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>",
        "void vllm::rotary_embedding_kernel<c10::BFloat16, true>",
        "void at::native::vectorized_gather_kernel<16, long>",
        "_topk_topp_kernel",
        "_topk_log_softmax_kernel",
        "void flashinfer::sampling::TopKTopPSamplingFromProbKernel<1024, float, int>",
    ],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KNOWN.items() for name in names])
def test_knows_the_kind_of(kind, name):
    assert classify(name) == kind


SAMPLES = {kind: names[0] for kind, names in KNOWN.items()}
kernels = st.builds(
    lambda kind, start, length: Kernel(SAMPLES[kind], start, start + length),
    st.sampled_from(NAMES),
    st.integers(0, 40),
    st.integers(0, 9),
)


def mark(chosen):
    return {tick for kernel in chosen for tick in range(kernel.start, kernel.end)}


@given(st.lists(kernels))
def test_union_counts_every_tick_once(chosen):
    assert measure_union((kernel.start, kernel.end) for kernel in chosen) == len(mark(chosen))


@given(st.lists(kernels, min_size=1))
def test_summary_is_that_of_a_timeline(chosen):
    record = summarise(chosen)
    communicating = [kernel for kernel in chosen if classify(kernel.name) == COMMUNICATION]
    computing = mark(kernel for kernel in chosen if kernel not in communicating)
    for kind, seconds in record["seconds"].items():
        assert seconds == pytest.approx(1e-9 * sum(k.end - k.start for k in chosen if classify(k.name) == kind))
    assert set(record["seconds"]) == set(NAMES)
    assert record["busy"] == pytest.approx(1e-9 * len(mark(chosen)))
    assert record["exposed_communication"] == pytest.approx(1e-9 * len(mark(communicating) - computing))
    first, last = min(kernel.start for kernel in chosen), max(kernel.end for kernel in chosen)
    assert record["span"] == pytest.approx(1e-9 * (last - first))
    assert record["kernels"] == len(chosen) == sum(line["count"] for line in record["longest"])
    assert sum(record["collectives"]) == pytest.approx(record["seconds"][COMMUNICATION])
    assert json.loads(json.dumps(record)) == record


def record_collectives(*durations):
    moe = Kernel(SAMPLES["moe"], 0, 5)
    return summarise([moe, *(Kernel(SAMPLES[COMMUNICATION], 10 * i, 10 * i + d) for i, d in enumerate(durations))])


def test_the_shortest_kernel_of_each_collective_is_its_transfer():
    combined = combine([record_collectives(9, 2, 4), record_collectives(3, 7, 4)])
    assert combined["transfer"] == pytest.approx((3 + 2 + 4) * 1e-9)
    assert combined["least_communication"] == pytest.approx(14e-9)
    assert combined["seconds"][COMMUNICATION] == pytest.approx(14.5e-9)
    assert combined["seconds"]["moe"] == pytest.approx(5e-9)
    assert (combined["workers"], combined["kernels"]) == (2, 4)


def test_collectives_of_unlike_number_are_not_matched():
    assert combine([record_collectives(9, 2), record_collectives(3)])["transfer"] is None


@given(st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=3), min_size=1, max_size=4))
def test_transfer_is_the_least_of_the_three_numbers(workers):
    combined = combine([record_collectives(*durations) for durations in workers])
    assert combined["transfer"] <= combined["least_communication"] + 1e-15
    assert combined["least_communication"] <= combined["seconds"][COMMUNICATION] + 1e-15


def test_an_empty_record_is_refused():
    with pytest.raises(AdapterError, match="no kernel"):
        summarise([])


def make_event(name, start, end, *, device="CUDA", annotation=False, thread=1):
    from torch.autograd import DeviceType

    values = {
        "name": name,
        "start_ns": start,
        "end_ns": end,
        "device_type": getattr(DeviceType, device),
        "is_user_annotation": annotation,
        "start_thread_id": thread,
    }
    return types.SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()})


def test_launches_annotations_and_waits_are_no_kernels():
    events = [
        make_event("cudaGraphLaunch", 0, 1, device="CPU"),
        make_event("fused_moe_kernel", 2, 5),
        make_event("execute_model", 0, 9, annotation=True),
        make_event("Context Sync", 0, 9),
        make_event("Stream Wait Event", 0, 9),
        make_event("Memset (Device)", 6, 7),
    ]
    assert _read_kernels(events) == [Kernel("fused_moe_kernel", 2, 5), Kernel("Memset (Device)", 6, 7)]


def test_operators_inside_others_are_not_counted_twice():
    spans = [
        ("vllm::a", 0, 9, 1),
        ("aten::b", 0, 4, 1),
        ("aten::c", 4, 9, 1),
        ("aten::d", 9, 12, 1),
        ("aten::e", 3, 5, 2),
    ]
    events = [make_event(name, start, end, thread=thread) for name, start, end, thread in reversed(spans)]
    found = _read_operators([*events, make_event("Torch-Compiled Region: 0/0", 0, 99)])
    assert [kernel.name for kernel in found] == ["vllm::a", "aten::e", "aten::d"]


def test_a_worker_records_what_it_runs():
    import torch

    worker = types.SimpleNamespace()
    weights = torch.ones(8, 8)
    for times in (3, 5):  # again, because an engine records one variant after the other
        start_recording(worker)
        for _ in range(times):
            torch.nn.functional.linear(weights, weights)
        record = stop_recording(worker)
        (line,) = (line for line in record["longest"] if line["kind"] == "gemm")
        assert line["count"] == times
        assert 0 < record["seconds"]["gemm"] <= record["busy"] <= record["span"] <= record["wall"]
    assert combine([record, record])["seconds"] == pytest.approx(record["seconds"])
    with pytest.raises(AdapterError, match="start_recording"):
        stop_recording(worker)
