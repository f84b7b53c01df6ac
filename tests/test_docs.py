"""The pages name what is public, and nothing else."""

import inspect
import pathlib
import re

import pytest

import bilb
from bilb import plots

ROOT = pathlib.Path(bilb.__file__).parent.parent
DOCS = ROOT / "docs"
MODULES = ("curvatures", "grams", "metrics", "names", "presets", "slopes")
MODULES += ("discrepancies", "lower_levels", "routers")


def public_functions():
    """Returns the dotted names of all public functions, plots included."""
    named = {"plots": plots, **{name: getattr(bilb, name) for name in MODULES}}
    found = [name for name, value in vars(bilb).items() if inspect.isfunction(value)]
    for prefix, module in named.items():
        functions = inspect.getmembers(module, inspect.isfunction)
        own = [n for n, f in functions if f.__module__ == module.__name__ and n[0] != "_"]
        found += [f"{prefix}.{name}" for name in own]
    return found


def documented(pages="*"):
    """Returns the names that the pages document."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.glob(f"{pages}.md"))
    return re.findall(r"^\.\. autofunction:: bilb\.(\S+)$", pages, re.MULTILINE)


# Of use to the drivers alone.
INTERNAL = {"grams.of_linearization", "grams.norms_of_linearization", "grams.of_rows"}
INTERNAL |= {"grams.products", "grams.norm"}
INTERNAL |= {f"names.{n}" for n in ("current", "names_of", "in_order", "known", "index")}


def test_every_public_function_has_its_place():
    names = documented()
    assert len(names) == len(set(names)), "documented twice"
    assert set(names) == set(public_functions()) - INTERNAL


def test_the_readme_names_every_method():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rungs = [*documented("rung*"), *documented("links"), *documented("steps")]
    methods = {name for name in rungs if "." not in name} - {"adagrad_norm"}  # an optimiser
    assert methods == {name for name in methods if f"`{name}`" in readme or f".{name}(" in readme}


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in DOCS.glob("*.md"))])
def test_links_to_files_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    missing = [target for target in targets if not ((ROOT / page).parent / target).exists()]
    assert not missing


def test_the_changelog_begins_with_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE)[1] == bilb.__version__
