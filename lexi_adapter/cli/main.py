"""The command `lexi-adapter` and its subcommands."""

import click

from lexi_adapter.cli.commands.bench import bench
from lexi_adapter.cli.commands.check import check
from lexi_adapter.cli.commands.eval import eval_
from lexi_adapter.cli.commands.latency import latency
from lexi_adapter.cli.commands.loads import loads
from lexi_adapter.cli.commands.sensitivity import sensitivity
from lexi_adapter.cli.commands.tradeoff import tradeoff
from lexi_adapter.cli.console import Commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="lexi-moe")
def main() -> None:
    """Apply a LExI allocation, a top-k for every mixture-of-experts layer, where a model is served."""


for command in (check, bench, latency, loads, sensitivity, eval_, tradeoff):
    main.add_command(command)
