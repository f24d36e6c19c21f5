"""`lexi-adapter sensitivity`."""

from typing import Any

import click

from lexi_adapter.allocation import MAX_GATE_EXPONENT
from lexi_adapter.cli.console import conclude, echo
from lexi_adapter.cli.options import FiniteRange
from lexi_adapter.cli.progress import Progress
from lexi_adapter.errors import AdapterError


@click.command()
@click.argument("model")
@click.option("--text", "texts", multiple=True, metavar="FILE", help="A text, cut by the model's tokenizer; repeat it.")
@click.option(
    "--tokens",
    "token_files",
    multiple=True,
    metavar="FILE",
    help="Or token ids: a .json list of lists, .npy or .npz arrays; repeat it.",
)
@click.option("--generate", "generated", is_flag=True, show_default=False, help="Or no data: the model's own samples.")
@click.option("--length", type=click.IntRange(2), default=512, help="Tokens of a sequence.")
@click.option("--sequences", type=click.IntRange(2), default=32, help="At most so many, evenly spaced over the text.")
@click.option("--batch", type=click.IntRange(1), default=8, help="Sequences in one forward pass.")
@click.option("--local", is_flag=True, show_default=False, help="Only the change of each layer's own output: one pass.")
@click.option(
    "--gate-exponent",
    type=FiniteRange(0, MAX_GATE_EXPONENT),
    help="How much of the dropped experts' gate weights the kept ones take over: 0 nothing, 1 all.  [default: as the "
    "model does]",
)
@click.option("--tokenizer", help="Folder of the tokenizer.  [default: MODEL]", show_default=False)
@click.option("--device", help="As torch names it.  [default: the GPU where there is one]", show_default=False)
@click.option(
    "--dtype",
    type=click.Choice(("float32", "bfloat16", "float16")),
    default="float32",
    help="Element type of weights and hidden states; rounding adds far less to small losses in float32.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Of the model's own samples.")
@click.option("--restart", is_flag=True, show_default=False, help="Throw away the finished parts of an earlier run.")
@click.option("-o", "--output", default="truth.json", help="The profile, for lexi-search search.")
def sensitivity(output: str, restart: bool, **options: Any) -> None:
    """Measure the losses of MODEL, a folder, when one layer alone runs fewer experts, as a profile for a search.

    The losses are: divergence from the model's own predictions; on a text the increase of its cross-entropy; and the
    change of each layer's own output. Finished parts are kept in OUTPUT.partial: a command that was cut short resumes.

    \b
    Examples:
      lexi-adapter sensitivity weights/ --text mine.txt -o truth.json
      lexi-adapter sensitivity weights/ --generate --sequences 16 --device cuda:0
    """
    sources = (options["texts"], options["token_files"], options["generated"])
    if sum(map(bool, sources)) != 1:
        raise AdapterError("give one of --text, --tokens and --generate")
    from lexi_adapter.sensitivity.profile import ProfileOptions, write_profile

    write_profile(ProfileOptions(**options), output, restart=restart, progress=Progress("parts"))
    echo(output)
    conclude(
        f"{output}, the losses of {options['model']} by brute force",
        ["lexi-search", "search", output, "--budget", "50%"],
        ["lexi-search", "compare", output, "profile.json"],
    )
