"""`lexi-adapter sensitivity`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from lexi_adapter.allocation import MAX_GATE_EXPONENT
from lexi_adapter.cli.options import FiniteRange
from lexi_adapter.errors import AllocationError
from lexi_adapter.files import check_writable, write_json


@click.command()
@click.argument("model")
@click.option("--text", "texts", multiple=True, metavar="FILE", help="A text, cut by the model's tokenizer; repeat it.")
@click.option(
    "--tokens",
    "files",
    multiple=True,
    metavar="FILE",
    help="Or token ids: a .json list of lists, .npy or .npz arrays; repeat it.",
)
@click.option("--generate", "own", is_flag=True, show_default=False, help="Or no data: the model's own samples.")
@click.option("--length", type=click.IntRange(2), default=512, help="Tokens of a sequence.")
@click.option("--sequences", type=click.IntRange(2), default=32, help="At most so many, evenly over what there is.")
@click.option("--batch", type=click.IntRange(1), default=8, help="Sequences in one forward pass.")
@click.option("--local", is_flag=True, show_default=False, help="Only how each layer's own output moves: one pass.")
@click.option(
    "--gate-exponent",
    type=FiniteRange(0, MAX_GATE_EXPONENT),
    help="Let kept experts take over a part of the others' gate mass: 0 nothing, 1 all.  [default: as the model does]",
)
@click.option("--tokenizer", help="Folder of the tokenizer.  [default: MODEL]", show_default=False)
@click.option("--device", help="As torch names it.  [default: the GPU where there is one]", show_default=False)
@click.option(
    "--dtype",
    type=click.Choice(("float32", "bfloat16", "float16")),
    default="float32",
    help="Element type of weights and states; what rounding adds to small losses is far less in float32.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Of the model's own samples.")
@click.option("--restart", is_flag=True, show_default=False, help="Throw away what a run cut short has measured.")
@click.option("-o", "--output", default="truth.json", help="The profile, for lexi-search search.")
def sensitivity(
    model: str,
    texts: Sequence[str],
    files: Sequence[str],
    own: bool,
    length: int,
    sequences: int,
    batch: int,
    local: bool,
    gate_exponent: float | None,
    tokenizer: str | None,
    device: str | None,
    dtype: str,
    seed: int,
    restart: bool,
    output: str,
) -> None:
    """What MODEL, a folder, really loses when one layer alone runs fewer experts, as a profile that a search takes.

    The losses are: divergence from the model's own predictions; on a text the increase of its cross-entropy; and how
    far each layer's own output moves. Finished parts are kept in OUTPUT.partial: cut short, the same command goes on.
    """
    if bool(texts) + bool(files) + own != 1:
        raise AllocationError("give one of --text, --tokens and --generate")
    check_writable(output, apart_from=[model, tokenizer, *texts, *files])
    from lexi_adapter.evaluation.transformers_backend import explain_full_memory, load_model
    from lexi_adapter.model.folder import find_limit, read_config
    from lexi_adapter.model.identity import describe_checkpoint
    from lexi_adapter.sensitivity.ablation import measure
    from lexi_adapter.sensitivity.journal import find_place, keep_journal
    from lexi_adapter.sensitivity.profile import describe_run, make_document, make_settings
    from lexi_adapter.sensitivity.windows import check_vocabulary, cut, generate, read_tokens
    from lexi_adapter.tasks.texts import check_length, encode, load_tokenizer, read_text

    check_writable(find_place(output), apart_from=[*texts, *files])
    identity = describe_checkpoint(Path(model))
    check_length("--length", length, find_limit(read_config(Path(model))))
    reader = load_tokenizer(tokenizer or model) if texts else None
    streams = [encode(reader, read_text(path)) for path in texts]
    streams += [stream for path in files for stream in read_tokens(path)]
    windows = None if own else cut(streams, length=length, sequences=sequences, source=", ".join((*texts, *files)))
    loaded = load_model(model, device=device, dtype=dtype)
    with explain_full_memory(batch):
        if windows is None:
            windows = generate(loaded, length=length, sequences=sequences, batch=batch, seed=seed)
        check_vocabulary(windows, loaded.config)
        settings = make_settings(
            "generated" if own else "text",
            sequences=len(windows),
            length=length,
            dtype=dtype,
            seed=seed,
            gate_exponent=gate_exponent,
        )
        # Over the model's own samples the mean increase of the cross-entropy is the divergence, only less well known.
        kinds = () if local else ("divergence",) if own else ("divergence", "increase")
        made_by = describe_run(loaded, windows, batch)
        run = {"model": asdict(identity), "settings": settings, "made_by": made_by, "losses": kinds}
        with keep_journal(output, run, restart=restart) as journal:
            total = len(identity.moe_layers) * len(windows.split(batch))
            if journal.parts:
                click.echo(f"{len(journal.parts)} of {total} parts are finished in {journal.path}", err=True)
            parts = measure(
                loaded,
                identity,
                windows,
                batch=batch,
                local=local,
                gate_exponent=gate_exponent,
                finished=tuple(journal.parts),
            )
            for index, layer, movements in parts:
                journal.add(index, layer, movements)
                click.echo(f"{len(journal.parts)} of {total}: sequences {index * batch} on, layer {layer}", err=True)
            write_json(output, make_document(identity, settings, journal.parts, made_by, kinds=kinds))
    click.echo(output)
