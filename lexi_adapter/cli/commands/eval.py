"""`lexi-adapter eval`."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click

from lexi_adapter.cli.console import conclude, echo, print_table
from lexi_adapter.cli.options import Chosen, list_read, read_engine_options, takes_variants
from lexi_adapter.cli.progress import Progress
from lexi_adapter.environment import describe_call
from lexi_adapter.errors import AdapterError
from lexi_adapter.files import MOST_DATA_BYTES, check_writable, read_json, write_json
from lexi_adapter.model.variants import Variant, check_comparable
from lexi_adapter.tasks.harness import PREFIX
from lexi_adapter.tasks.scores import Model, Outcome, Task

HARNESS, HOOK = f"{PREFIX}TASK", "module:function"
# Option -> the kinds of tasks that read it.
READERS = {
    "texts": ("perplexity",),
    "window": ("perplexity",),
    "max_windows": ("perplexity",),
    "lengths": ("passkey",),
    "depths": ("passkey",),
    "trials": ("passkey",),
    "seed": ("passkey",),
    "questions": ("qasper",),
    "include_paths": (HARNESS,),
    "num_fewshot": (HARNESS,),
    "max_items": ("qasper", HARNESS),
    "max_length": ("qasper", HARNESS, HOOK),
}


@click.command("eval")
@click.argument("model")
@click.option(
    "--task",
    "names",
    multiple=True,
    required=True,
    help="perplexity, passkey, qasper, lm-eval:TASK, lm-eval:paper (those that LExI names), or your own "
    "module:function; repeat it.",
)
@takes_variants
@click.option("--backend", type=click.Choice(["transformers", "vllm"]), default="transformers")
@click.option(
    "--device",
    help="For transformers: cpu, cuda, cuda:1, or auto to spread over all GPUs.  [default: a GPU if there is one]",
    show_default=False,
)
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float16", "float32"]), default="auto")
@click.option("--batch-size", type=click.IntRange(1), default=8, help="Windows or prompts at once.")
@click.option("--tokenizer", help="Another folder with the tokenizer.  [default: MODEL]", show_default=False)
@click.option("--trust-remote-code", is_flag=True, show_default=False)
@click.option("--text", "texts", multiple=True, metavar="FILE", help="For perplexity, UTF-8; repeat it.")
@click.option(
    "--window",
    type=click.IntRange(2),
    help="Tokens of a window of text.  [default: 2048, or the model's positions if fewer]",
    show_default=False,
)
@click.option("--max-windows", type=click.IntRange(1), help="At most so many windows of each text.")
@click.option(
    "--passkey-length",
    "lengths",
    multiple=True,
    type=click.IntRange(1),
    help="Tokens of a passkey prompt with its answer; repeat it.  [default: 1024]",
    show_default=False,
)
@click.option("--depths", type=click.IntRange(1), default=10, help="Depths of the passkey in the text, evenly spaced.")
@click.option("--trials", type=click.IntRange(1), default=10, help="Passkeys at each depth.")
@click.option("--seed", default=0, help="Of the passkeys, and of a --budget-share's random mixed k.")
@click.option("--qasper", "questions", metavar="FILE", help="JSON or JSON lines: context, question, answers.")
@click.option("--include-path", "include_paths", multiple=True, metavar="FOLDER", help="Your own lm-eval task files.")
@click.option("--num-fewshot", type=click.IntRange(0), help="For lm-eval.  [default: each task's]", show_default=False)
@click.option("--max-items", type=click.IntRange(1), help="At most so many questions (qasper) or documents (lm-eval).")
@click.option(
    "--max-length",
    type=click.IntRange(2),
    help="Tokens of the longest prompt with its answer, for qasper, lm-eval and your own tasks.  [default: 4096, or "
    "the model's positions if fewer]",
    show_default=False,
)
@click.option("--tensor-parallel-size", type=click.IntRange(1), default=1, help="For vllm.")
@click.option("--engine", default="{}", metavar="JSON", help="For vllm: other arguments of vllm.LLM.")
@click.option("-o", "--output", default="eval.json", help="The results, as JSON; written after every task.")
@click.option("--restart", is_flag=True, show_default=False, help="Throw away the results in the output.")
def eval_(
    model: str,
    chosen: Chosen,
    backend: str,
    device: str | None,
    dtype: str,
    tokenizer: str | None,
    batch_size: int,
    trust_remote_code: bool,
    tensor_parallel_size: int,
    engine: str,
    output: str,
    restart: bool,
    **options: Any,
) -> None:
    """Measure the quality of MODEL, a folder, beside variants of it.

    Every number comes with its standard error, and with its difference from the base, taken item by item. A command
    that was cut short resumes when it is given again.

    \b
    Examples:
      lexi-adapter eval weights/ --task perplexity --text wiki.txt --allocation allocation.json --uniform-k 4
      lexi-adapter eval weights/ --task passkey --passkey-length 2048 --budget-share 50% --folder pruned/
      lexi-adapter eval weights/ --task lm-eval:paper --backend vllm --allocation allocation.json -o tasks.json
    """
    from lexi_adapter.cli.tables import tabulate_eval
    from lexi_adapter.evaluation import evaluate
    from lexi_adapter.tasks.registry import TaskOptions, make_tasks

    task_options = TaskOptions(**options)
    _check_readers(task_options.names, apart_from=("seed",) if chosen.shares else ())
    read = [model, tokenizer, *chosen.folders, *list_read(chosen.files), *task_options.texts, task_options.questions]
    check_writable(output, apart_from=read)
    variants = chosen.make(model, load_format="auto", seed=task_options.seed)
    check_comparable(variants)
    tokenizer = tokenizer or model
    common = {"batch_size": batch_size, "trust_remote_code": trust_remote_code}
    tasks = make_tasks(model, task_options, backend=backend, tokenizer=tokenizer, **common)
    read += [*_find_task_sources(task_options.names), *task_options.include_paths]
    check_writable(output, apart_from=read)
    common |= {"dtype": dtype}
    if backend == "vllm":
        backed = _choose_vllm(variants, tasks, tokenizer, device, tensor_parallel_size, engine, common)
    else:
        backed = _choose_transformers(tokenizer, device, tensor_parallel_size, engine, common)
    setting = {"backend": backend, "dtype": dtype, **_describe_tokenizer(tokenizer, model), **backed.setting}
    finished = {} if restart else _read_finished(output, evaluate.make_document(variants, tasks, setting, {}))
    made_by = describe_call()
    document = evaluate.evaluate(
        variants,
        tasks,
        setting=setting,
        finished=finished,
        open_model=backed.open_model,
        report=lambda document: write_json(output, {**document, "made_by": made_by}, apart_from=read),
        progress=Progress("results"),
    )
    print_table(tabulate_eval(document))
    _conclude(document, output)


def _conclude(document: Mapping[str, Any], output: str) -> None:
    first = document["summary"][0]
    compared = [
        line
        for line in document["summary"]
        if (line["task"], line["metric"]) == (first["task"], first["metric"]) and line["difference"] is not None
    ]
    nearest = min(compared, key=lambda line: abs(line["difference"]), default=None)
    found = ""
    if nearest is not None:
        error = nearest["difference_stderr"]
        spread = "" if error is None else f", standard error {error:.2g}"
        found = f"; nearest to the base: {nearest['variant']}, {first['metric']} {nearest['difference']:+.4g}{spread}"
    conclude(f"{output}{found}", ["lexi-adapter", "tradeoff", output, "bench.json"])


def _check_readers(names: Sequence[str], *, apart_from: Sequence[str] = ()) -> None:
    """Raise AdapterError for an option that was given and that none of the tasks reads, `apart_from` some."""
    kinds = {_find_kind(name) for name in names}
    context = click.get_current_context()
    for parameter in context.command.params:
        readers = READERS.get(parameter.name, ())
        given = context.get_parameter_source(parameter.name) is not click.core.ParameterSource.DEFAULT
        if given and readers and parameter.name not in apart_from and not kinds & set(readers):
            raise AdapterError(
                f"{parameter.opts[0]} is for --task {' or '.join(readers)}; add such a task, or leave it out"
            )


def _find_kind(name: str) -> str:
    if name.startswith(PREFIX):
        return HARNESS
    return HOOK if ":" in name else name


def _find_task_sources(names: Sequence[str]) -> list[str]:
    """The files of the tasks that users wrote."""
    from lexi_adapter.tasks.hooks import find_function, find_sources

    hooks = [name for name in names if _find_kind(name) == HOOK]
    return [file for name in hooks for file in find_sources(name, find_function(name))]


class _Backend(NamedTuple):
    """A backend: its part of the setting that results depend on, and the function that opens a variant's model."""

    setting: Mapping[str, Any]
    open_model: Callable[[Variant], AbstractContextManager[Model]]


def _choose_vllm(
    variants: Sequence[Variant],
    tasks: Sequence[Task],
    tokenizer: str,
    device: str | None,
    tensor_parallel_size: int,
    engine: str,
    common: Mapping[str, Any],
) -> _Backend:
    from lexi_adapter.engines.options import check_plugin
    from lexi_adapter.evaluation.vllm_backend import open_model

    check_plugin(variants)
    if device is not None:
        raise AdapterError("--device is for transformers; vLLM runs on the device that it was built for")
    options = read_engine_options("auto", tensor_parallel_size, 1, False, engine)
    longest = max(task.longest for task in tasks)
    return _Backend(
        {"engine": options}, partial(open_model, tokenizer=tokenizer, longest=longest, engine=options, **common)
    )


def _choose_transformers(
    tokenizer: str, device: str | None, tensor_parallel_size: int, engine: str, common: Mapping[str, Any]
) -> _Backend:
    from lexi_adapter.evaluation.transformers_backend import find_device, open_model
    from lexi_adapter.tasks.texts import load_tokenizer

    if engine != "{}" or tensor_parallel_size != 1:
        raise AdapterError("--engine and --tensor-parallel-size are for --backend vllm; see --device auto")
    device = find_device(device)
    reader = load_tokenizer(tokenizer, trust_remote_code=common["trust_remote_code"])
    return _Backend({"device": device}, partial(open_model, tokenizer=reader, device=device, **common))


def _describe_tokenizer(tokenizer: str, model: str) -> dict[str, str]:
    """The folder in one spelling, and the state of its files; the state of the model's own folder is in its variant."""
    from lexi_adapter.evaluation.evaluate import hash_state

    folder = Path(tokenizer).resolve()
    if not folder.is_dir():
        return {"tokenizer": tokenizer}  # a hub id
    state = {} if folder == Path(model).resolve() else {"tokenizer_sha256": hash_state(tokenizer)}
    return {"tokenizer": str(folder), **state}


def _read_finished(output: str, expected: Mapping[str, Any]) -> dict[tuple[str, str], Outcome]:
    """The results in `output`, if it is there, that this run can keep; a line on stderr counts them."""
    from lexi_adapter.evaluation.evaluate import find_finished

    if not Path(output).exists():
        return {}
    try:
        document = read_json(output, finite=False, most=MOST_DATA_BYTES)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{output} exists and is not JSON ({error}); name another by --output") from error
    finished = find_finished(document, output, expected)
    count = len(expected["variants"]) * len(expected["tasks"])
    rest = "; the rest follows" if len(finished) < count else ""
    echo(f"{output} has {len(finished)} of {count} results{rest}", err=True)
    return finished
