"""The documents: every command that they show is one that the tools know, and those that need no engine run."""

import re
import shlex
from pathlib import Path

import click
import pytest

import lexi_adapter.cli.main
import lexi_search.cli.main

ROOT = Path(lexi_search.__file__).parent.parent
DOCUMENTS = ["README.md", "examples/searching.md", "examples/serving.md", "examples/reproduce/README.md"]
TOOLS = {"lexi-search": lexi_search.cli.main.main, "lexi-adapter": lexi_adapter.cli.main.main}


def list_commands(text):
    """Every command line of the tools in a document's code: in blocks, joined at a backslash, and within a line."""
    text = re.sub(r"\\\n\s*", " ", text)
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [line.strip() for line in text.splitlines() if line.startswith("    ")]
    lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in lines:
        for part in re.split(r"\s*(?:;|&&)\s+", line):
            words = part.split()
            while words and (words[0] == "srun" or "=" in words[0]):
                words = words[1:]
            if len(words) > 1 and words[0] in TOOLS and not words[1].startswith("..."):
                yield " ".join(words)


def parse(command):
    """Parse a command line as the tool does, without running it. Raises click.UsageError for what it does not know."""
    tool, *arguments = shlex.split(command.replace("$i", "0"), comments=True)  # a shell's variable
    group = TOOLS[tool]
    with group.make_context(tool, arguments) as context:
        name, subcommand, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        subcommand.make_context(name, rest, parent=context).close()


def test_commands_are_found_wherever_a_document_shows_them():
    text = "`lexi-search show a` and `other`\n\n    srun lexi-search profile w/ \\\n        --distributed\n```\n"
    text += "X=1 lexi-adapter check s/  # fits?\npip install x; lexi-search search p --budget 3\n```\n"
    assert sorted(list_commands(text)) == [
        "lexi-adapter check s/ # fits?",
        "lexi-search profile w/ --distributed",
        "lexi-search search p --budget 3",
        "lexi-search show a",
    ]
    for wrong in ("lexi-search profile weights/ --no-such-option", "lexi-search show", "lexi-search nonsense x"):
        with pytest.raises(click.UsageError):
            parse(wrong)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_one_that_the_tools_know(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    commands = list(list_commands(text))
    assert commands
    for command in commands:
        try:
            parse(command)
        except click.MissingParameter:
            assert f"`{command}`" in text, f"{document}: {command} is not whole"  # named in a sentence, not to be typed
        except click.UsageError as error:
            raise AssertionError(f"{document}: {command}: {error.format_message()}") from error


def list_claims(readme):
    """(what is claimed, anchor) of every link of README into the results whose text holds a number."""
    return re.findall(r"\[([^\]]*\d[^\]]*)\]\(examples/benchmarks/RESULTS\.md#([\w-]+)\)", readme)


def read_section(text, anchor):
    """The part of a Markdown document below the heading of that anchor, up to the next heading of its level."""
    for part in re.split(r"^## +", text, flags=re.MULTILINE):
        head, _, body = part.partition("\n")
        if re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") == anchor:
            return body
    raise AssertionError(f"no section {anchor}")


def test_every_number_of_readme_is_in_the_section_of_the_results_that_it_links_to():
    readme, results = ((ROOT / name).read_text("utf-8") for name in ("README.md", "examples/benchmarks/RESULTS.md"))
    claims = list_claims(readme)
    assert len(claims) >= 6
    for shown, anchor in claims:
        numbers = set(re.findall(r"\d[\d,.]*\d|\d", read_section(results, anchor)))
        claimed = re.findall(r"\d[\d,.]*\d|\d", shown)
        assert not (strange := [number for number in claimed if number not in numbers]), f"{shown}: {strange}"


def test_readme_is_short():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.split()) <= 1500 and len(text.splitlines()) <= 250
