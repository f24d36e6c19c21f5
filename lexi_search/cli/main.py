"""`lexi-search`: profile a checkpoint, search allocations, show, plot and export them."""

import click

from lexi_search import __version__
from lexi_search.cli.commands.auto import auto
from lexi_search.cli.commands.compare import compare
from lexi_search.cli.commands.export import export
from lexi_search.cli.commands.front import front
from lexi_search.cli.commands.judge import judge
from lexi_search.cli.commands.merge import merge_profiles
from lexi_search.cli.commands.profile import profile
from lexi_search.cli.commands.prune import prune
from lexi_search.cli.commands.search import search
from lexi_search.cli.commands.show import plot, show
from lexi_search.cli.console import Commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
def main() -> None:
    """A top-k for every layer of a mixture-of-experts model, from its weights alone (LExI).

    \b
    lexi-search auto weights/ --budget 50% -o made   all of the below, and a report
    lexi-search profile weights/                     how much each layer loses at each k
    lexi-search search profile.json --budget 62.5%   the best k per layer, 62.5 % of the active experts in sum
    lexi-search front profile.json --knee            every trade of cost against loss, and one of them
    lexi-search export allocation.json --to vllm --model weights/ -o served
                                                     a folder for `vllm serve`
    """


for command in (auto, profile, merge_profiles, search, front, show, plot, compare, judge, export, prune):
    main.add_command(command)
