"""Who may import whom, what nobody imports, and that everything can be imported."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "realm_retro"
FILES = sorted(PACKAGE.rglob("*.py"))

FOUNDATION = set(
    "arrays artifacts atomic config disk errors host_memory leases progress shards "  # noqa: SIM905
    "typing".split()
)
# Part → the other parts that it may import. Everything points down.
MAY_IMPORT = {
    **{name: FOUNDATION for name in FOUNDATION},
    "text": FOUNDATION,
    "parallel": FOUNDATION,
    "data": FOUNDATION | {"text"},
    "nn": FOUNDATION | {"parallel"},
    "retrieval": FOUNDATION | {"parallel", "text"},
    "train": FOUNDATION | {"parallel", "nn"},
    "interop": FOUNDATION | {"parallel", "nn", "text"},
}
LOWER = FOUNDATION | set(MAY_IMPORT)
MAY_IMPORT |= {"realm": LOWER, "retro": LOWER, "cli": LOWER | {"realm", "retro"}}
# The package itself holds the version alone.
MAY_IMPORT["__init__"] = set()

FOREIGN = set(
    "tensorflow torch pickle cloudpickle dill joblib marshal shelve".split()  # noqa: SIM905
)
# What reads numpy's formats, and must say that it takes no pickles, whatever the
# default of the numpy that is installed.
NUMPY_READERS = {"np.load", "numpy.load"}
# What runs text as a program, or a file as one.
RUNS_CODE = set("eval exec read_pickle run_path load_module".split())  # noqa: SIM905
# Likewise, but only by itself: `re.compile` and a traced program's are other things.
BUILT_IN = {"compile"}


def part_of(path):
    """The part of the package that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(tree, path):
    """Dotted names of everything that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).parts[: -node.level]
                base = ".".join([*package, *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{a.name}") for a in node.names)


def import_faults(path, source):
    """What a file imports and may not, as ``line: name``."""
    part = part_of(path)
    for line, name in imports_of(ast.parse(source), path):
        top, *rest = name.split(".")
        if top in FOREIGN or "_src" in rest:
            yield f"{line}: {name}"
        elif top == "realm_retro" and rest:
            # `from realm_retro import __version__` names no part.
            known = rest[0] in MAY_IMPORT
            if known and rest[0] != part and rest[0] not in MAY_IMPORT[part]:
                yield f"{line}: {name} (not for {part})"


def use_faults(source):
    """Uses of private or retired JAX, and of pickles, as ``line: what``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in {"_src", "pmap", "pjit"}:
            yield f"{node.lineno}: .{node.attr}"
        elif isinstance(node, ast.With):
            for item in node.items:
                context = item.context_expr
                called = context.func if isinstance(context, ast.Call) else context
                name = ast.unparse(called).split(".")[-1]
                if name == "Mesh" or ("mesh" in name and called is context):
                    yield f"{node.lineno}: with {ast.unparse(context)}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in NUMPY_READERS and "allow_pickle" not in {
                keyword.arg for keyword in node.keywords
            }:
                yield f"{node.lineno}: {name} without allow_pickle=False"
            elif (
                name.removeprefix("builtins.") in BUILT_IN
                or name.split(".")[-1] in RUNS_CODE
            ):
                yield f"{node.lineno}: {name}"
        elif (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and ast.unparse(node.value) != "False"
        ):
            yield f"{node.value.lineno}: allow_pickle={ast.unparse(node.value)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down_only(path):
    assert part_of(path) in MAY_IMPORT, "a new part: say here what it may import"
    assert not list(import_faults(path, path.read_text()))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_jax_no_pmap_no_pickles(path):
    assert not list(use_faults(path.read_text()))


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("text/tokenizer.py", "from realm_retro.data import loader"),
        ("text/tokenizer.py", "import realm_retro.data.loader"),
        ("text/tokenizer.py", "from ..data import loader"),
        ("text/tokenizer.py", "from .. import data"),
        ("text/tokenizer.py", "def f():\n    from realm_retro.parallel import mesh"),
        ("parallel/mesh.py", "from realm_retro import nn"),
        ("data/loader.py", "from realm_retro.nn import layers"),
        ("nn/layers.py", "from realm_retro.text import tokenizer"),
        ("retrieval/index/exact.py", "from realm_retro.data import chunk_store"),
        ("retrieval/embed.py", "from realm_retro.nn import bert"),
        ("train/loop.py", "from realm_retro.retrieval import neighbours"),
        ("train/loop.py", "from realm_retro.data import loader"),
        ("retro/model.py", "from realm_retro.realm import model"),
        ("retro/model.py", "from realm_retro.cli import common"),
        ("realm/model.py", "from realm_retro.retro import cca"),
        ("artifacts.py", "from realm_retro.text import tokenizer"),
        ("nn/bert.py", "import torch.nn"),
        ("data/loader.py", "try:\n    import tensorflow as tf\nexcept: pass"),
        ("data/loader.py", "import pickle"),
        ("data/loader.py", "from joblib import load"),
        ("nn/bert.py", "from jax._src import core"),
        ("nn/bert.py", "import jax._src.core"),
    ],
)
def test_the_rules_see_a_wrong_import(file, statement):
    assert list(import_faults(PACKAGE / file, statement))


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("text/tokenizer.py", "from realm_retro.text import chunking"),
        ("text/tokenizer.py", "from . import chunking"),
        ("data/loader.py", "from realm_retro.text.tokenizer import Tokenizer"),
        ("retro/recipe.py", "from realm_retro.retrieval import neighbours"),
        ("cli/train.py", "from realm_retro.retro import recipe"),
        ("cli/train.py", "from realm_retro import __version__"),
    ],
)
def test_the_rules_allow_a_right_import(file, statement):
    assert not list(import_faults(PACKAGE / file, statement))


@pytest.mark.parametrize(
    "statement",
    [
        "jax.pmap(f)",
        "jax._src.core.x",
        "jax.experimental.pjit.pjit(f)",
        "with mesh:\n    pass",
        "with Mesh(devices, names) as m:\n    pass",
        "np.load(path, allow_pickle=True)",
        "np.load(path, 'r')",
        "numpy.load(path, **options)",
        "eval(text)",
        "exec(path.read_text())",
        "compile(text, 'f', 'exec')",
        "builtins.compile(text, 'f', 'exec')",
        "pandas.read_pickle(path)",
    ],
)
def test_the_rules_see_a_wrong_use(statement):
    assert list(use_faults(statement))


@pytest.mark.parametrize(
    "statement", ["re.compile(text)", "jax.jit(f).lower(x).compile()"]
)
def test_the_rules_allow_a_right_use(statement):
    assert not list(use_faults(statement))


def test_every_module_imports_without_tensorflow_and_torch():
    code = """
import importlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
for path in sorted((root / "realm_retro").rglob("*.py")):
    parts = path.relative_to(root).with_suffix("").parts
    importlib.import_module(".".join(p for p in parts if p != "__init__"))
print(sorted({name.split(".")[0] for name in sys.modules} & {"tensorflow", "torch"}))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n", "imported although nothing may need it"


def test_importing_the_package_is_instant():
    code = "import sys, realm_retro; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
