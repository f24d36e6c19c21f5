"""The commands that the documents show."""

import re
from pathlib import Path

import lexi_adapter.cli.main
import lexi_search.cli.main

ROOT = Path(lexi_search.__file__).parent.parent
EXAMPLES = ROOT / "examples"
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
