"""`lexi-adapter eval`."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from lexi_adapter.allocation import read_allocation
from lexi_adapter.cli.console import print_table
from lexi_adapter.cli.options import read_engine_options
from lexi_adapter.environment import describe_call
from lexi_adapter.errors import AllocationError
from lexi_adapter.files import check_writable, write_json
from lexi_adapter.tasks.harness import PREFIX

HARNESS, OWN = f"{PREFIX}TASK", "module:function"
# Which tasks read an option.
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
    "max_length": ("qasper", HARNESS, OWN),
}


@click.command("eval")
@click.argument("model")
@click.option(
    "--task",
    "names",
    multiple=True,
    required=True,
    help="perplexity, passkey, qasper, lm-eval:TASK, lm-eval:paper (those that LExI names), or module:function of your "
    "own; repeat it.",
)
@click.option("--allocation", "files", multiple=True, metavar="FILE", help="An allocation to compare; repeat it.")
@click.option("--uniform-k", "uniform", multiple=True, type=int, help="This k in every layer; repeat it.")
@click.option(
    "--folder", "folders", multiple=True, help="Another folder to compare, such as a pruned checkpoint; repeat it."
)
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
@click.option("--max-windows", type=click.IntRange(1), help="Read no more windows of each text.")
@click.option(
    "--passkey-length",
    "lengths",
    multiple=True,
    type=click.IntRange(1),
    help="Tokens of a passkey prompt with its answer; repeat it.  [default: 1024]",
    show_default=False,
)
@click.option("--depths", type=click.IntRange(1), default=10, help="Places of the passkey, evenly spaced.")
@click.option("--trials", type=click.IntRange(1), default=10, help="Passkeys at each place.")
@click.option("--seed", default=0, help="Of the passkeys.")
@click.option("--qasper", "questions", metavar="FILE", help="JSON or JSON lines: context, question, answers.")
@click.option("--include-path", "include_paths", multiple=True, metavar="FOLDER", help="Your own lm-eval task files.")
@click.option("--num-fewshot", type=click.IntRange(0), help="For lm-eval.  [default: each task's]", show_default=False)
@click.option("--max-items", type=click.IntRange(1), help="Only so many questions (qasper) or documents (lm-eval).")
@click.option(
    "--max-length",
    type=click.IntRange(2),
    help="Tokens of the longest prompt with its answer, for qasper, lm-eval and your own.  [default: 4096, or the "
    "model's positions if fewer]",
    show_default=False,
)
@click.option("--tensor-parallel-size", type=click.IntRange(1), default=1, help="For vllm.")
@click.option("--engine", default="{}", metavar="JSON", help="For vllm: other arguments of vllm.LLM.")
@click.option("-o", "--output", default="eval.json", help="The results, as JSON; written after every task.")
@click.option("--restart", is_flag=True, show_default=False, help="Throw away what the output has already.")
def eval_(
    model: str,
    files: Sequence[str],
    uniform: Sequence[int],
    folders: Sequence[str],
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
    """Quality of MODEL, a folder, beside variants of it.

    Every number comes with its standard error, and with its difference from the base, taken item by item. The same
    command goes on where it was cut short.
    """
    from lexi_adapter.cli.tables import tabulate_eval
    from lexi_adapter.evaluation import evaluate
    from lexi_adapter.model.variants import check_comparable, make_variants
    from lexi_adapter.tasks.hooks import find_function, find_sources
    from lexi_adapter.tasks.registry import make_tasks
    from lexi_adapter.tasks.texts import load_tokenizer

    _check_readers(options["names"])
    read = [model, tokenizer, *folders, *files, *options["texts"], options["questions"]]
    check_writable(output, apart_from=read)
    variants = make_variants(
        model,
        load_format="auto",
        allocations={file: read_allocation(file) for file in files},
        uniform=list(dict.fromkeys(uniform)),
        folders=list(dict.fromkeys(folders)),
    )
    check_comparable(variants)
    tokenizer = tokenizer or model
    setting = {"backend": backend, "dtype": dtype, **_describe_tokenizer(tokenizer, model)}
    own = {"batch_size": batch_size, "trust_remote_code": trust_remote_code}
    tasks = make_tasks(model, backend=backend, tokenizer=tokenizer, **own, **options)
    own_tasks = [name for name in options["names"] if _name_kind(name) == OWN]
    sources = [file for name in own_tasks for file in find_sources(name, find_function(name))]
    check_writable(output, apart_from=[*sources, *options["include_paths"]])
    if backend == "vllm":
        from lexi_adapter.engines.options import check_plugin
        from lexi_adapter.evaluation.vllm_backend import open_model

        check_plugin(variants)
        if device is not None:
            raise AllocationError("--device is for transformers; vLLM runs on what it was built for")
        others = read_engine_options("auto", tensor_parallel_size, 1, False, engine)
        setting |= {"engine": others}
        own |= {"tokenizer": tokenizer, "longest": max(task.longest for task in tasks), "engine": others}
    else:
        from lexi_adapter.evaluation.transformers_backend import find_device, open_model

        if engine != "{}" or tensor_parallel_size != 1:
            raise AllocationError("--engine and --tensor-parallel-size are for --backend vllm; see --device auto")
        setting |= {"device": find_device(device)}
        own |= {
            "tokenizer": load_tokenizer(tokenizer, trust_remote_code=trust_remote_code),
            "device": setting["device"],
        }
    finished = {}
    if Path(output).exists() and not restart:
        empty = evaluate.make_document(variants, tasks, setting, {})
        finished = evaluate.find_finished(_read(output), output, empty)
        count = len(variants) * len(tasks)
        rest = "; the rest follows" if len(finished) < count else ""
        click.echo(f"{output} has {len(finished)} of {count} results{rest}", err=True)
    made_by = describe_call()
    document = evaluate.evaluate(
        variants,
        tasks,
        setting=setting,
        finished=finished,
        open_model=partial(open_model, dtype=dtype, **own),
        report=lambda document: write_json(output, {**document, "made_by": made_by}),
    )
    print_table(tabulate_eval(document))


def _check_readers(names: Sequence[str]) -> None:
    """Raise AllocationError for an option that was given and that none of the tasks reads."""
    kinds = {_name_kind(name) for name in names}
    context = click.get_current_context()
    for parameter in context.command.params:
        readers = READERS.get(parameter.name, ())
        given = context.get_parameter_source(parameter.name) is not click.core.ParameterSource.DEFAULT
        if given and readers and not kinds & set(readers):
            raise AllocationError(
                f"{parameter.opts[0]} is for --task {' or '.join(readers)}; add such a task, or leave it out"
            )


def _name_kind(name: str) -> str:
    if name.startswith(PREFIX):
        return HARNESS
    return OWN if ":" in name else name


def _describe_tokenizer(tokenizer: str, model: str) -> dict[str, str]:
    """The folder, however it was spelt, and the state of its files; that of the model's own is told with the model."""
    from lexi_adapter.evaluation.evaluate import hash_state

    place = Path(tokenizer).resolve()
    if not place.is_dir():
        return {"tokenizer": tokenizer}  # a hub id
    state = {} if place == Path(model).resolve() else {"tokenizer_sha256": hash_state(tokenizer)}
    return {"tokenizer": str(place), **state}


def _read(path: str) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AllocationError(f"{path} is there and not JSON ({error}); name another by --output") from error
