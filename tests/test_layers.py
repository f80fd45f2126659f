"""Imports go one way: a module uses its own layer and those below it, and no two modules import each other."""

import ast

from tests.miniature import ROOT

# From the bottom to the top. A folder or module of the package stands in exactly one layer; those of one layer may use one another.
LAYERS = (
    ("core",),
    ("assets", "data", "rewards", "sharding", "sequence", "models"),
    ("sampling", "tokenizers"),
    ("checkpoint",),
    ("components", "pipeline"),
    ("training", "rl", "evaluation", "inference", "serving"),
    ("planner",),
    ("cli",),
)
MODULES = {
    str(p.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): p for p in (ROOT / "xomni_jax").rglob("*.py")
}


def imported(path):
    """Modules of the package that a file imports, wherever in the file, but for annotations alone."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("xomni_jax"):
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if whole in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in MODULES)


def layer(module):
    part = module.split(".")[1]
    return next(n for n, names in enumerate(LAYERS) if part in names)


def test_no_arrow_points_up():
    up = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        if "." in module
        for other in set(imported(path))
        if "." in other and layer(other) > layer(module)
    ]
    assert sorted(up) == []


def test_services_know_nothing_of_trainers():
    for module, path in MODULES.items():
        if module.startswith("xomni_jax.rewards"):
            assert {other.split(".")[1] for other in imported(path) if "." in other} <= {"core", "rewards", "data", "assets"}, module


def test_no_circle():
    graph = {module: set(imported(path)) - {module} for module, path in MODULES.items()}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in sorted(graph[module]):
                visit(other)
            done.add(path.pop())

    for module in graph:
        visit(module)
