"""The structure that readers rely on: one straight line of imports, two packages apart, and one module that prints."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lexi_search

ROOT = Path(lexi_search.__file__).parent.parent
# Reading order. A module may import those to its left only.
LINE = [
    "errors",
    "files",
    "documents",
    "artifacts",
    "merging",
    "partials",
    "checkpoint",
    "schemes",
    "quantisation",
    "formats",
    "tensors",
    "architectures",
    "layouts",
    "models",
    "routing",
    "ffn",
    "rope",
    "decoders",
    "components",
    "stacks",
    "attention",
    "experts",
    "moe",
    "blocks",
    "hopper",
    "grouped",
    "weights",
    "carrying",
    "moments",
    "controls",
    "measuring",
    "propagation",
    "synthesis",
    "sensitivities",
    "profiling",
    "distribution",
    "problems",
    "frontiers",
    "exact",
    "populations",
    "evolution",
    "uncertainty",
    "costs",
    "allocations",
    "fronts",
    "comparisons",
    "exporters",
    "importance",
    "slicing",
    "sizes",
    "shards",
    "pruning",
    "plots",
    "tables",
    "console",
    "commands",
    "cli",
]
STANDARD = set(sys.stdlib_module_names) | {"lexi_search"}
MAY_IMPORT = {
    "lexi_search": STANDARD
    | {"click", "huggingface_hub", "jax", "jaxtyping", "matplotlib", "ml_dtypes", "numpy", "rich", "safetensors"},
    "lexi_adapter": set(sys.stdlib_module_names)
    | {
        "click",
        "lexi_adapter",
        "lm_eval",
        "matplotlib",
        "numpy",
        "rich",
        "safetensors",
        "torch",
        "transformers",
        "triton",
        "vllm",
    },
}


def find_imports(path):
    """Dotted names of everything that the file imports, at its top or inside functions; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_every_module_has_its_place_in_the_line():
    assert {path.stem for path in (ROOT / "lexi_search").iterdir() if not path.name.startswith("_")} == set(LINE)


@pytest.mark.parametrize("module", LINE)
def test_imports_go_left_only(module):
    folder = ROOT / "lexi_search" / module
    files = sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    parts = [name.split(".") for file in files for name in find_imports(file)]
    imported = {part[1] for part in parts if part[0] == "lexi_search"} - {"__version__"}
    assert imported <= set(LINE[: LINE.index(module) + folder.is_dir()])  # a folder's modules may share among them


@pytest.mark.parametrize("package", ["lexi_search", "lexi_adapter"])
def test_packages_import_only_what_is_theirs(package):
    files = sorted((ROOT / package).glob("**/*.py"))
    assert files
    for path in files:
        assert {name.split(".")[0] for name in find_imports(path)} <= MAY_IMPORT[package], path


def test_artifacts_need_the_standard_library_only():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import lexi_search.artifacts"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)  # -S: no site-packages


def speaks(node):
    """Whether a node of a syntax tree names a way to print."""
    match node:
        case ast.Name(id="print"):
            return True
        case ast.Attribute(value=ast.Name(id="sys"), attr="stdout" | "stderr"):
            return True
        case ast.Import() | ast.ImportFrom():
            names = [getattr(node, "module", ""), *(name.name for name in node.names)]
            return bool({"click", "logging", "warnings", "Console"} & set(names))
    return False


def test_only_the_command_line_prints():
    allowed = {"console", "commands", "cli"}
    for path in (ROOT / "lexi_search").glob("**/*.py"):
        prints = any(speaks(node) for node in ast.walk(ast.parse(path.read_text())))
        assert not prints or allowed & {path.stem, path.parent.stem}, path


def loaded_after(statement):
    code = f"import sys; {statement}; print(*sorted(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import lexi_search", "import lexi_search.artifacts", "import lexi_search.cli"])
def test_importing_is_light(statement):
    heavy = {"jax", "jaxlib", "numpy", "torch", "transformers", "vllm", "matplotlib", "rich", "huggingface_hub"}
    assert not loaded_after(statement) & heavy


def test_exported_names_are_there_and_loaded_late():
    for name in lexi_search.__all__:
        assert getattr(lexi_search, name) is not None
    assert set(lexi_search.__all__) <= set(dir(lexi_search))
    with pytest.raises(AttributeError, match="module 'lexi_search' has no attribute 'nonsense'"):
        lexi_search.nonsense  # noqa: B018
    assert "jax" not in loaded_after("from lexi_search import read_profile, Allocation, InputError")
