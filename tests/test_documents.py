"""The documents: links lead somewhere, commands are ones that the tools know, README's numbers are measured."""

import re
import shlex

import click
import pytest
from documents import EXAMPLES, ROOT, TOOLS, list_commands

WITH_COMMANDS = ["README.md", "examples/searching.md", "examples/serving.md", "examples/reproduce/README.md"]
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|^ {0,3}\[[^\]]+\]:\s*(\S+)", re.MULTILINE)


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


@pytest.mark.parametrize("document", WITH_COMMANDS)
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
        if name_anchor(head) == anchor:
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


def strip_code(text):
    """The document without fenced and indented blocks of code, and with code in a line for GitHub to read as it is."""
    text = re.sub(r"^ {0,3}(```+|~~~+).*?^ {0,3}\1[`~]*\s*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?:^|(?<=\n\n))(?: {4}.*\n?)+", "", text)


def name_anchor(heading):
    """The fragment of a heading by GitHub's rules, if no other heading is like it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def list_anchors(text):
    """What a fragment may name: headings by GitHub's rules, and anchors set by hand."""
    text, found = strip_code(text), []
    for heading in re.findall(r"^ {0,3}#{1,6} +(.+?)(?: +#+)? *$", text, re.MULTILINE):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = name_anchor(shown)
        same = sum(name == other for other, _ in found)
        found.append((name, f"{name}-{same}" if same else name))
    by_hand = re.findall(r"<a\s[^>]*?(?:name|id)=[\"']([^\"']+)", text)
    return {anchor for _, anchor in found} | set(by_hand)


def find_broken_links(document, root):
    """Links of a Markdown file to files, folders or anchors that are not there."""
    text = document.read_text(encoding="utf-8")
    for match in LINK.finditer(re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", strip_code(text), flags=re.DOTALL)):
        link = match[1] or match[2]
        if re.match(r"[a-z][a-z0-9+.-]*:", link, re.IGNORECASE):
            continue  # elsewhere: a test does not ask the network
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        inside = target.is_relative_to(root.resolve()) and target.exists()
        if not inside or anchor and (target.suffix != ".md" or anchor not in list_anchors(target.read_text("utf-8"))):
            yield link


def test_a_link_is_broken_if_its_file_or_its_anchor_is_missing(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "other.md").write_text(
        "# The plugin's `k`, in [vLLM](x) & 2\n## Twice\n<a name='by-hand'></a>\n## Twice\n```\n# code\n```\n"
    )
    good = ["there", "there/other.md", "there/other.md#the-plugins-k-in-vllm--2", "there/other.md#twice-1", "#here"]
    good += ["there/other.md#by-hand", "https://example.org/no#where", "mailto:a@example.org"]
    bad = ["gone.md", "../outside.md", "there/other.md#the-plugin", "there/other.md#twice-2", "there/other.md#code"]
    bad += ["#nowhere", "there#anchor"]
    (tmp_path.parent / "outside.md").touch()
    document = tmp_path / "document.md"
    document.write_text(
        "# Here\n" + "\n".join(f"[two\nlines]({link})" for link in [*good, *bad]) + "\n\n    [code](gone-1.md)\n\n"
        "`[code](gone-2.md)`\n```\n[code](gone-3.md)\n```\n[named]: gone-4.md\n"
    )
    assert list(find_broken_links(document, tmp_path)) == [*bad, "gone-4.md"]


DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in EXAMPLES.rglob("*.md"))]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_between_documents_leads_somewhere(name):
    assert list(find_broken_links(ROOT / name, ROOT)) == []
