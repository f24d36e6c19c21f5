"""`lexi-search`: profile a checkpoint, search allocations, show, plot and export them."""

import click

from lexi_search import __version__
from lexi_search.commands.compare import compare
from lexi_search.commands.export import export
from lexi_search.commands.front import front
from lexi_search.commands.judge import judge
from lexi_search.commands.merge import merge_profiles
from lexi_search.commands.profile import profile
from lexi_search.commands.prune import prune
from lexi_search.commands.search import search
from lexi_search.commands.show import plot, show
from lexi_search.console import Commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
def main() -> None:
    """A top-k for every layer of a mixture-of-experts model, from its weights alone (LExI).

    \b
    lexi-search profile WEIGHTS                   how much each layer loses at each k
    lexi-search search profile.json --budget 80   the best k per layer, 80 in sum
    lexi-search front profile.json --knee         every trade of cost against loss, and one of them
    lexi-search export allocation.json --to vllm --model WEIGHTS -o FOLDER
    """


for command in (profile, merge_profiles, search, front, show, plot, compare, judge, export, prune):
    main.add_command(command)
