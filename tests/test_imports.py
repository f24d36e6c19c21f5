"""The structure that readers rely on: one straight line of imports, two packages apart, and one module that prints."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lexi_adapter
import lexi_search

ROOT = Path(lexi_search.__file__).parent.parent
# Wings in reading order, and the rooms of each. A room may import from wings above its own, and rooms before it.
HOUSE = {
    "lexi_search": {
        "errors": "",
        "artifacts": "files codec identity compensation profile allocation cost_table serialisation records",
        "solvers": "problem pareto exact operators evolution uncertainty robust",
        "layers": "spec weights routing ffn experts moe mixers decoder kernels",
        "checkpoint": "folder config dequantise quantisation_methods quantisation_config quantisation_formats "
        "tensors reader writer",
        "models": "families moe_families finder moe_tensors model decoder_families mixers decoder_stack loading",
        "profiling": "paper forward compensation divergence profile distributed resume observer session",
        "allocation": "costs speed_estimate allocate tradeoff targets comparison baselines export auto",
        "pruning": "importance slicing sizes prune",
        "cli": "console options tables plots progress report commands main entry",
    },
    "lexi_adapter": {
        "errors": "",
        "files": "",
        "allocation": "",
        "environment": "",
        "model": "tensors folder identity compensation shapes variants",
        "serving": "kernels transformers_gates transformers_patch "
        "vllm_names vllm_gates vllm_correction vllm_build vllm_status vllm_plugin",
        "engines": "workload locks kernels worker process options measuring",
        "speed": "throughput latency expert_load",
        "tasks": "scores texts perplexity passkey qasper harness hooks registry",
        "evaluation": "transformers_backend vllm_backend evaluate results tradeoff",
        "sensitivity": "windows divergence replay ablation journal profile",
        "cli": "console progress options tables placement figures commands main entry",
    },
}
# Modules of a room that is a folder, in the same order; the commands of a package do not import one another.
FOLDERS = {
    "lexi_search/layers/mixers": "attention compressed streams scans recurrent ngrams",
    "lexi_search/models/families": "default_parts defaults config refused moe kinds decoder",
    "lexi_search/models/loading": "pieces reader streaming residence",
    "lexi_search/profiling/forward": "variants layer passes losses sampling text",
    "lexi_search/models/mixers": "rope source streams ngrams attention compressed recurrent",
    "lexi_search/layers/kernels": "blocks hopper grouped",
    "lexi_search/profiling/paper": "moments gaussian",
    "lexi_adapter/serving/kernels": "gates correction triton_launch triton_gates triton_correction",
    "lexi_search/cli/report": "statements facts drawings pages",
}
MOST_ROOMS, MOST_LINES, MOST_LINES_OF_A_FUNCTION = 9, 330, 60
STANDARD = set(sys.stdlib_module_names) | {"lexi_search"}
MAY_IMPORT = {
    "lexi_search": STANDARD
    | {
        "click",
        "huggingface_hub",
        "jax",
        "jaxtyping",
        "matplotlib",
        "ml_dtypes",
        "numpy",
        "rich",
        "safetensors",
        "tokenizers",
    },
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


def list_line(package):
    """Every place of a package in reading order: wings as (wing,), rooms as (wing, room)."""
    for wing, rooms in HOUSE[package].items():
        yield from ((wing, room) for room in rooms.split())
        yield (wing,)  # after its rooms: they import one another, never their wing


def find_place(package, line, dotted):
    """The longest beginning of a dotted name that is a place in the line; None for what is outside the package."""
    parts = tuple(dotted.split("."))
    if parts[0] != package:
        return None
    return next((parts[1:end] for end in (3, 2) if parts[1:end] in line), None)


ROOMS = [(package, *place) for package in HOUSE for place in list_line(package)]


def find_files(package, *place):
    path = ROOT.joinpath(package, *place)
    return sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


@pytest.mark.parametrize("package", HOUSE)
def test_every_module_has_its_place_in_the_line(package):
    top = ROOT / package
    wings = {path.stem for path in top.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))} - {"__init__"}
    assert wings == set(HOUSE[package])
    for wing, rooms in HOUSE[package].items():
        there = {path.stem for path in (top / wing).glob("*") if not path.name.startswith("_")}
        assert there == set(rooms.split()), wing
        assert len(there) <= MOST_ROOMS, wing
    folders = {str(path.relative_to(ROOT)) for path in top.glob("*/*") if path.is_dir() and path.name[0] != "_"}
    assert folders - {f"{package}/cli/commands"} == {folder for folder in FOLDERS if folder.startswith(package)}


@pytest.mark.parametrize("room", ROOMS, ids="/".join)
def test_imports_go_left_only(room):
    package, *place = room
    line = list(list_line(package))
    for file in find_files(*room):
        for name in find_imports(file):
            found = find_place(package, line, name)
            if found is not None and found != tuple(place):
                assert line.index(found) < line.index(tuple(place)), f"{file}: {name}"


@pytest.mark.parametrize("folder", [*FOLDERS, *(f"{package}/cli/commands" for package in HOUSE)])
def test_modules_of_a_folder_import_only_those_before_them(folder):
    order = FOLDERS.get(folder, "").split()
    files = [path for path in (ROOT / folder).glob("*.py") if not path.name.startswith("_")]
    assert not order or {path.stem for path in files} == set(order)
    prefix = folder.replace("/", ".") + "."
    for file in files:
        imported = {name.removeprefix(prefix).split(".")[0] for name in find_imports(file) if name.startswith(prefix)}
        assert imported <= set(order[: order.index(file.stem)] if order else ()), file


@pytest.mark.parametrize("package", HOUSE)
def test_modules_and_functions_are_short(package):
    for path in sorted((ROOT / package).glob("**/*.py")):
        text = path.read_text()
        assert len(text.splitlines()) <= MOST_LINES, path
        if path.parent.name == "kernels":  # GPU kernels are one function each
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < MOST_LINES_OF_A_FUNCTION, f"{path}: {node.name}"


@pytest.mark.parametrize("package", HOUSE)
def test_a_wing_says_what_it_is_for_and_nothing_else(package):
    for path in sorted((ROOT / package).glob("*/**/__init__.py")):
        (docstring,) = ast.parse(path.read_text()).body
        assert isinstance(docstring.value.value, str), path
        if path.parent.name != "commands":
            rooms = {other.stem for other in path.parent.iterdir() if not other.name.startswith("_")}
            missing = {room for room in rooms if f"`{room}`" not in docstring.value.value}
            assert not missing, f"{path} does not name {missing}"


@pytest.mark.parametrize("package", ["lexi_search", "lexi_adapter"])
def test_packages_import_only_what_is_theirs(package):
    files = sorted((ROOT / package).glob("**/*.py"))
    assert files
    for path in files:
        assert {name.split(".")[0] for name in find_imports(path)} <= MAY_IMPORT[package], path


def test_artifacts_need_the_standard_library_only():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import lexi_search.artifacts.serialisation"
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
    allowed = {"console", "progress", "commands", "cli"}
    for path in (ROOT / "lexi_search").glob("**/*.py"):
        prints = any(speaks(node) for node in ast.walk(ast.parse(path.read_text())))
        assert not prints or allowed & {path.stem, path.parent.stem}, path


def loaded_after(statement):
    code = f"import sys; {statement}; print(*sorted(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement", ["import lexi_search", "import lexi_search.artifacts.serialisation", "import lexi_search.cli.main"]
)
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


def test_what_the_adapter_exports_is_listed():
    assert lexi_adapter.__all__ and set(lexi_adapter.__all__) == set(dir(lexi_adapter))


@pytest.mark.parametrize("module", ["lexi_adapter", "lexi_adapter.cli.main", "lexi_adapter.serving.vllm_plugin"])
def test_importing_the_adapter_is_light(module):
    code = f"import sys, {module}; print(*(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "vllm", "transformers", "numpy", "jax", "lexi_search"} & set(done.stdout.split())
