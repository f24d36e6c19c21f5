"""The sentences of the report: how sure it is, what to do next, what its words mean, and where its figures are from."""

import math
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lexi_search import __version__
from lexi_search.allocation.auto import (
    ALLOCATION,
    ESTIMATE,
    JUDGED,
    PAPER,
    PAPER_ITERATIONS,
    PROFILE,
    Outcome,
)
from lexi_search.allocation.baselines import COMPENSATED
from lexi_search.allocation.baselines import PAPER as PAPER_NAME
from lexi_search.allocation.targets import RESAMPLES, find_limit, sum_largest
from lexi_search.artifacts.serialisation import sha256
from lexi_search.cli.console import format_share
from lexi_search.cli.options import parse_budget
from lexi_search.cli.tables import describe_compensation, explain_fallbacks
from lexi_search.solvers.uncertainty import NOISY, find_saving

_UNITS = {"divergence": "nats per token", "increase": "nats per token"}


class Step(NamedTuple):
    """Something to do next: commands, one a line, and what they are for."""

    title: str
    commands: tuple[str, ...]
    note: str


def clean(text: str) -> str:
    """`text` without what cannot be printed: names of folders may hold anything."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def find_name(outcome: Outcome) -> str:
    """The name of the model, from its folder."""
    return clean(Path(os.path.abspath(outcome.job.source)).name)


def find_unit(outcome: Outcome) -> str:
    """The unit of the profile's losses, in words."""
    return _UNITS.get(outcome.profile.default_loss, f"in units of the {outcome.profile.default_loss} loss")


def state_certainty(outcome: Outcome) -> Iterator[str]:
    sure, regret, settings = outcome.result.share, outcome.result.regret, outcome.profile.settings
    least = min(range(len(sure)), key=sure.__getitem__)
    if line := explain_fallbacks({str(outcome.result.allocation.budget): outcome.result}):
        yield f"{line[0].upper()}{line[1:]}."
    else:
        yield (
            f"{100 * sum(sure) / len(sure):.0f} % of the layers' k would be the same, had the profile drawn another "
            f"sample as large ({RESAMPLES} resampled profiles); least sure is layer {outcome.job.model.layers[least]}, "
            f"{100 * sure[least]:.0f} %."
        )
        remedy = "; a larger profile (--samples) would pay" if regret > NOISY else ""
        saving = format_share(find_saving(regret))
        yield f"Another sample would have led to a summed loss {saving} smaller, in the mean{remedy}."
    if outcome.settings is None:
        yield "The whole model was not measured under the allocation: summed losses of single layers are all there is."
    else:
        tokens, text = outcome.settings.max_samples, outcome.job.text
        where = (
            f"that it wrote by seed {outcome.settings.seed}; the profile's text is by seed {settings.seed}."
            if text is None
            else f"of {clean(text)}, which follow those of the profile."
        )
        yield (
            f"The whole model was measured on {tokens} tokens {where} ± is one standard error over sequences, and "
            "differences are on the same sequences."
        )
    if outcome.job.text is None:
        yield "A text that the model writes itself is not your task: measure that before you trust the allocation."
    else:
        yield "The profile took data, the beginning of that text: the allocation suits it and what is like it."


def list_steps(outcome: Outcome) -> tuple[Step, ...]:
    job, allocation = outcome.job, str(outcome.job.folder / ALLOCATION)

    def spell(*words: str) -> str:
        return clean(shlex.join(words))

    check = spell("lexi-adapter", "check", allocation, "--model", job.source)
    text = () if job.text is None else ("--text", job.text)
    measures = ("eval", "--task", "perplexity", "--text", "YOUR.txt"), ("bench",)
    return (
        Step("Serve", (clean(outcome.command),), "Where vLLM runs, this package must be installed: it is a plugin."),
        Step(
            "Check",
            (check, "grep 'LExI allocation applied' LOG"),
            "The first says whether allocation and model fit, before a start-up; the second whether the server runs "
            "it: a log without that line is of a server with the full k.",
        ),
        Step(
            "Measure",
            tuple(
                spell("lexi-adapter", name, job.source, *more, "--allocation", allocation) for name, *more in measures
            ),
            "Quality on a text of yours, and throughput, each beside the model's own k.",
        ),
        Step(
            "Roll back",
            (spell("vllm", "serve", job.source), spell("rm", "-r", job.output)),
            f"No weight was changed: {clean(job.output)} holds links to the model's files and a config.json of its "
            "own.",
        ),
        Step(
            "Choose otherwise",
            (
                spell(
                    "lexi-search",
                    "auto",
                    job.source,
                    *text,
                    "--budget",
                    _find_other(outcome),
                    "-o",
                    job.output,
                    "--force",
                ),
            ),
            f"Another target takes the profile that is in {clean(str(job.folder))}; without --force nothing is "
            "replaced.",
        ),
    )


def _find_other(outcome: Outcome) -> str:
    """A budget other than the allocation's, as a share."""
    allocation = outcome.result.allocation
    layers, top_k = len(allocation.top_k), allocation.model.top_k
    shares = ("50%", "75%", "25%")
    return next((one for one in shares if parse_budget(one, layers=layers, top_k=top_k) != allocation.budget), "100%")


def explain(outcome: Outcome) -> Iterator[str]:
    """What the words of the report mean."""
    kind, full = outcome.profile.default_loss, outcome.job.model.top_k
    writes = "the model writes" if outcome.job.text is None else "you gave"
    if kind == "divergence":
        loss = outcome.contenders[0].judged
        scale = (
            f" A loss of {loss.divergence:.3g} is a perplexity {math.exp(loss.divergence):.3g} times as high."
            if loss
            else ""
        )
        yield (
            "Loss: how far the predictions of the next token move from those of the model with its own k, as the "
            f"Kullback-Leibler divergence in nats per token, on text that {writes}.{scale}"
        )
    else:
        yield f"Loss: the {kind} loss of the profile, how far layers' outputs move; it says nothing in nats."
    yield (
        "Layers summed: each layer is measured with its k while all others keep theirs, and the losses are added. "
        "That is what the search minimises; layers that are reduced together may lose more or less than that."
    )
    target = outcome.job.target
    if target.kind == "max_loss":
        limit, largest = find_limit(outcome.profile, target), sum_largest(outcome.profile)
        yield (
            f"The target is a sum over layers of at most {limit:.4g} {find_unit(outcome)}, "
            f"{100 * limit / largest:.3g} % of the {largest:.4g} that one expert in every layer loses."
        )
    if any(one.name == PAPER_NAME for one in outcome.contenders):
        yield (
            f"The paper's method: the same budget, spent by the norms of LExI's Algorithm 1 (random input, "
            f"{PAPER_ITERATIONS} iterations), at the optimum of that objective."
        )
    yield from _explain_compensation(outcome)
    if outcome.job.cost.estimated:
        origin = outcome.job.table.made_by["estimate"]
        yield (
            f"Speed-ups are an estimate, nothing was timed: a decode step of {origin['batch']} sequences with "
            f"{origin['context']} tokens of context on one {origin['card']}, bytes at "
            f"{origin['bytes_per_second'] / 1e12:g} TB/s or FLOPs at {origin['flops_per_second'] / 1e12:g} TFLOP/s, "
            f"whichever takes longer ({origin['source']}), and {origin['layer_ms']:g} ms a layer beside that. Experts "
            "are read as if every token chose its own evenly; attention, LM head and KV cache are in it. Routed "
            f"experts take {_share_of_experts(outcome):.2g} % of such a step with the model's own k. For five models "
            "with half of their experts, such estimates were within 5 % of what was measured on H100 and H200; "
            "lexi-adapter latency measures your card, for --cost."
        )
    else:
        mix = ", ".join(f"{count:g} of {tokens} tokens" for tokens, count in outcome.job.cost.mix.items())
        yield f"Speed-ups are by the cost table measured on {clean(outcome.job.table.device)}, for steps: {mix}."
    yield f"A budget of 100 % is the model's own k = {full} in every MoE layer."


def _explain_compensation(outcome: Outcome) -> Iterator[str]:
    """What makes up for dropped experts, and which of the report's figures are with it."""
    made_up, corrections = describe_compensation(outcome.profile), outcome.result.allocation.compensation
    if not made_up:
        return
    alike = any(one.name.endswith(COMPENSATED) for one in outcome.contenders)
    yield (
        f"Compensation: {made_up}, to make up for dropped experts, in this allocation, summed losses and the front. "
        f"All others{f' but the one {COMPENSATED}' * alike} are measured without it, and have no such sum."
    )
    if corrections:
        yield (
            f"Corrections are small maps for layers with fewer experts: {len(outcome.result.allocation.corrected)} of "
            f"them in {corrections.file}, of which the folder that is served has a copy. "
            f"Speed-ups {_count_time(outcome)}."
        )


def _count_time(outcome: Outcome) -> str:
    """What speed-ups hold of the time that corrections take, in words."""
    if not outcome.job.cost.estimated:
        return "leave out the time that they take"
    return "count their bytes and FLOPs, as an estimate, and not what their kernels take beside that"


def _name_choice(outcome: Outcome) -> str:
    """What the allocation is, in words."""
    if outcome.result.expected_gain is None:
        return "exact optimum"
    even = "fallback" in outcome.result.allocation.made_by
    return "as even as can be" if even else "exact optimum of losses shrunk towards their mean over layers"


def list_origin(outcome: Outcome) -> Iterator[tuple[str, str]]:
    """Where the figures are from, by name."""
    settings, job, allocation = outcome.profile.settings, outcome.job, outcome.result.allocation
    yield (
        "model",
        f"{clean(job.source)} ({clean(job.model.identity.model_type)}), routers {allocation.model.router_sha256[:12]}",
    )
    yield (
        "profile",
        f"{PROFILE}, input {settings.input}, {settings.max_samples} tokens, sequences of {settings.length}, "
        f"{settings.dtype}, seed {settings.seed}, SHA-256 {sha256(outcome.profile)[:12]}",
    )
    yield (
        "allocation",
        f"{ALLOCATION}, loss {allocation.made_by['loss']}, {_name_choice(outcome)}, SHA-256 {sha256(allocation)[:12]}",
    )
    yield (
        "costs",
        f"{ESTIMATE if job.cost.estimated else 'a table that was given'}, SHA-256 {job.cost.table_sha256[:12]}",
    )
    names = [PROFILE, ALLOCATION, *([ESTIMATE] if job.cost.estimated else [])]
    names += [PAPER] if any(one.name == PAPER_NAME for one in outcome.contenders) else []
    names += [JUDGED] if outcome.settings is not None else []
    yield "files", f"{clean(str(job.folder))}: {', '.join(names)}"
    yield "made by", f"lexi-search {__version__}"


def _share_of_experts(outcome: Outcome) -> float:
    """The percentage of a step's time that routed experts take with the model's own k."""
    cost = outcome.job.cost
    return 100 * (1 - cost.other_ms / cost.base_ms)
