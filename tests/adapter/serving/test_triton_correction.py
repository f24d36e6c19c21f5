"""The kernels of the correction, interpreted, judged by torch's definition."""

from functools import partial

import pytest
import torch

from lexi_adapter.serving.kernels import triton_launch
from lexi_adapter.serving.kernels.correction import correct, find_features, project
from lexi_adapter.serving.kernels.gates import compensate

EXPONENT = 0.5
# experts, own k, k, rank, tokens, type of the logits and the map, renormalised, scale
LAYERS = [
    (64, 8, 4, 32, 20, torch.bfloat16, False, 1.0),
    (60, 4, 2, 16, 5, torch.float32, True, 2.5),
    (128, 8, 3, 16, 33, torch.float16, True, 1.0),
    (8, 2, 1, 16, 1, torch.float32, True, 1.0),
    (160, 6, 5, 64, 17, torch.float32, False, 16.0),
]


def draw(experts, own, rank, tokens, dtype, renormalize, scale):
    """Logits without ties, a map, and the router's weights and ids at its own k, best first."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(tokens, experts, generator=generator).argsort(-1)
    logits = ((steps - experts / 2) / 16).to(dtype)
    A = torch.randn(3 * experts, rank, generator=generator).to(dtype)
    weights, ids = logits.float().softmax(-1).topk(own)
    return logits, A, scale * (weights / weights.sum(-1, keepdim=True) if renormalize else weights), ids


def spread(ids, weights, experts):
    return torch.zeros(len(ids), experts).scatter(1, ids.long(), weights)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_softmax_router_is_that_of_the_definition(interpret, layer):
    experts, own, top_k, *others, renormalize, scale = layer
    logits, A, weights, ids = draw(experts, own, *others, renormalize, scale)
    rule = {"renormalize": renormalize, "scale": scale, "ids_dtype": torch.int64}
    options = {"top_k": top_k, "own_top_k": own, "exponent": EXPONENT} | rule
    found, kept, sums = interpret("triton_correction", "route", logits, A, **options)
    assert torch.equal(kept, ids[:, :top_k])
    torch.testing.assert_close(found, compensate(weights, weights[:, :top_k], EXPONENT))
    torch.testing.assert_close(sums, find_features(logits, weights, ids, kept) @ A.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("ranked", [False, True])
def test_behind_another_router_it_is_that_of_the_definition(interpret, layer, ranked):
    experts, own, top_k, *others = layer
    logits, A, weights, ids = draw(experts, own, *others)
    order = torch.randperm(own, generator=torch.Generator().manual_seed(1)) if ranked else torch.arange(own)
    options = {"top_k": top_k, "exponent": EXPONENT, "ranked": ranked}
    found, kept, sums = interpret("triton_correction", "narrow", logits, weights[:, order], ids[:, order], A, **options)
    expected = compensate(weights, weights[:, :top_k], EXPONENT)
    torch.testing.assert_close(spread(kept, found, experts), spread(ids[:, :top_k], expected, experts))
    torch.testing.assert_close(sums, find_features(logits, weights, ids, kept) @ A.float(), rtol=1e-5, atol=1e-4)


def test_of_equal_logits_the_first_are_chosen_and_padding_harms_no_other_row(interpret):
    logits = torch.zeros(4, 16)
    logits[1] = float("nan")
    A = torch.ones(48, 16)
    padding = torch.tensor([False, True, True, False])
    options = {"top_k": 2, "own_top_k": 4, "exponent": 0.0, "renormalize": True, "scale": 1.0}
    weights, ids, sums = interpret(
        "triton_correction", "route", logits, A, **options, ids_dtype=torch.int32, padding=padding
    )
    assert ids.tolist() == [[0, 1], [-1, -1], [-1, -1], [0, 1]]
    assert weights.tolist() == [[0.25, 0.25], [0.0, 0.0], [0.0, 0.0], [0.25, 0.25]]
    assert sums[[0, 3]].isnan().all()  # of logits that are all zero
    blank = torch.zeros(4, 4), torch.full((4, 4), -1)
    options = {"top_k": 2, "exponent": 0.5, "ranked": True}
    weights, ids, sums = interpret("triton_correction", "narrow", torch.ones(4, 16), *blank, A, **options)
    assert (weights == 0).all() and (ids == -1).all() and (sums == 16).all()


def test_a_token_of_which_the_router_sees_nothing_gets_no_correction(interpret):
    experts, own, rank = 160, 6, 16  # more than one block of logits
    logits, A, _, _ = draw(experts, own, rank, 3, torch.float32, True, 1.0)
    logits[1], logits[2] = 0.0, -1.0 * (torch.arange(experts) == experts - 1)
    weights, ids = logits.softmax(-1).topk(own)
    sums = project(find_features(logits, weights, ids, ids[:, :2]), A)
    assert sums.isnan().any(-1).tolist() == sums.isnan().all(-1).tolist() == [False, True, False]
    rule = {"renormalize": False, "scale": 1.0, "ids_dtype": torch.int64, "own_top_k": own}
    for name, arguments, options in (("route", [], rule), ("narrow", [weights, ids], {"ranked": False})):
        options = {"top_k": 2, "exponent": 0.0} | options
        *_, found = interpret("triton_correction", name, logits, *arguments, A, **options)
        torch.testing.assert_close(found[[0, 1]], sums[[0, 1]], equal_nan=True, rtol=1e-5, atol=1e-4)
        assert not found[2].isnan().any()
    output = torch.ones(3, 64)
    interpret("triton_correction", "add", output, sums, torch.ones(rank, 64), torch.ones(64), output)
    assert (output[1] == 1).all() and (output[[0, 2]] != 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "hidden", "width"), [(1, 64, 64), (70, 200, 208)])
def test_the_sum_is_that_of_the_definition_in_place_or_not(interpret, dtype, tokens, hidden, width):
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(tokens, width + 8, generator=generator).to(dtype)[:, :width]  # rows apart
    phi, A = torch.randn(tokens, 48, generator=generator), torch.randn(16, 48, generator=generator)
    B, c = torch.randn(hidden, 16, generator=generator).to(dtype), torch.randn(hidden, generator=generator)
    arguments = phi @ A.T, B.T.contiguous(), c
    expected = correct(source[:, :hidden].float(), phi, A, B, c).to(dtype)
    output = torch.empty(tokens, width, dtype=dtype)
    interpret("triton_correction", "add", source, *arguments, output)
    torch.testing.assert_close(output[:, :hidden], expected)
    assert torch.equal(output[:, hidden:], source[:, hidden:])
    interpret("triton_correction", "add", output, *(part * 0 for part in arguments), output)
    torch.testing.assert_close(output[:, :hidden], expected)


@pytest.mark.parametrize("experts", [1, 3])
def test_the_outputs_of_a_tokens_experts_are_summed_on_the_way(interpret, experts):
    generator = torch.Generator().manual_seed(0)
    tokens, hidden, width = 37, 200, 208
    source = torch.randn(tokens, experts, width, generator=generator).bfloat16()
    sums, B = torch.randn(tokens, 16, generator=generator), torch.randn(16, hidden, generator=generator).bfloat16()
    sums[3] = float("nan")  # of a token that gets no correction
    c, output = torch.randn(hidden, generator=generator), torch.empty(tokens, width).bfloat16()
    interpret("triton_correction", "add", source, sums, B, c, output)
    expected = source.float().sum(1)
    expected[:, :hidden] += (sums @ B.float() + c).nan_to_num()
    torch.testing.assert_close(output, expected.bfloat16())


def test_a_kernel_is_dispatched_once_for_what_it_is_compiled_for():
    launched = []

    def launch_with(place, *arguments, **others):
        launched.append((place, len(arguments), sorted(others)))

    class Compiled:
        def __getitem__(self, grid):
            return partial(launch_with, ("compiled", grid))

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **others: launch_with(("kernel", grid), *arguments, **others) or Compiled()

    kernel, values = Kernel(), torch.zeros(64)
    again = {"tensors": (values,), "numbers": (3, 2), "constants": {"rank": 16}, "num_warps": 4}
    run = partial(triton_launch.launch, kernel, (1, 1, 1))
    run(**again)
    run(**again | {"numbers": (5, 2)})  # the first number is one of tokens
    assert launched == [(("kernel", (1, 1, 1)), 3, ["num_warps", "rank"]), (("compiled", (1, 1, 1)), 4, [])]
    for change in (
        {"tensors": (values.half(),)},
        {"tensors": (values[1:],)},  # not aligned
        {"numbers": (3, 4)},
        {"constants": {"rank": 32}},
        {"num_warps": 8},
    ):
        run(**again | change)
        assert launched[-1][0][0] == "kernel", change
