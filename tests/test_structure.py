"""The sources themselves: what imports what, how long files, functions and lines are, and how modules are run."""

import ast
import subprocess

import pytest

from tests.conftest import ROOT

SIZES = {  # lines at most
    "train.py": 600, "prepare_latents.py": 485, "images.py": 480, "fid.py": 540, "sample.py": 520, "checkpoint.py": 305,
    "model.py": 510, "dataset.py": 170, "runtime.py": 250, "costs.py": 110, "losses.py": 120, "inception.py": 150,
    "vae.py": 270, "teacher.py": 215, "text.py": 120, "class_tokens.py": 155}


def tracked():
    """The Python files that git knows, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout, so that files of others may lie here")
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    return [ROOT / name for name in listed.splitlines() if (ROOT / name).exists()]


def at_the_top():
    return [path for path in tracked() if path.parent == ROOT]


def imported(path):
    """Names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def functions(path):
    """(name, lines) of each function in a file, methods and inner ones too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield f"{path.stem}.{node.name}", node.end_lineno - node.lineno + 1


def test_the_demo_alone_is_built_on_the_preparation():
    assert [path.name for path in at_the_top() if "prepare_latents" in imported(path)] == ["demo.py"]


def test_the_training_loop_alone_is_longer_than_a_screen():
    long = [found for path in at_the_top() for found in functions(path) if found[1] > 60]
    assert [name for name, _ in long if name != "train.main"] == [], long


def test_lines_are_short():
    lengths = {f"{path.relative_to(ROOT)}:{number}": len(line) for path in tracked()
               for number, line in enumerate(path.read_text().splitlines(), 1)}
    assert [where for where, length in lengths.items() if length > 120] == []
    of_the_top = [length for where, length in lengths.items() if "/" not in where]
    assert sum(length > 100 for length in of_the_top) <= 0.15 * len(of_the_top)


@pytest.mark.parametrize("name, most", SIZES.items())
def test_a_room_is_no_larger_than_can_be_read_at_once(name, most):
    lines = len((ROOT / name).read_text().splitlines())
    assert lines <= most


def test_no_page_asks_for_a_search_path():
    """All is run from the repository's root, experiments and benches as modules."""
    texts = {path: path.read_text() for path in (ROOT / "experiments").iterdir() if path.suffix in (".py", ".md")}
    texts |= {path: path.read_text() for path in ROOT.glob("*.md")}
    texts |= {path: ast.get_docstring(ast.parse(path.read_text())) or "" for path in tracked()}
    assert [path for path, text in texts.items() if "PYTHONPATH" in text] == []
