"""Settings of the documentation: ``sphinx-build -W --keep-going docs outputs/docs``."""

import pathlib
import shutil

import bilb

ROOT = pathlib.Path(__file__).parent.parent

project = "bilb"
release = version = bilb.__version__
author = "the authors of bilb"
language = "en-GB"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"bilb {release}"
html_show_sphinx = False
html_copy_source = False
myst_heading_anchors = 3

# Every cross-reference to a function or module must lead somewhere. Types of signatures need not:
# most are those of other libraries, and looking those up would need the network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:(class|exc|obj|data)", r".*"),
    ("py:.*", r"(bilb\.(base|checks|arguments)|jax|optax|flax|matplotlib|numpy)\..*"),
]
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_use_rtype = False
napoleon_preprocess_types = False
napoleon_custom_sections = [("State fields", "params_style")]

# What benchmarks wrote, beside the pages that are written by hand; index.md takes all by a pattern.
results = pathlib.Path(__file__).parent / "results"
shutil.rmtree(results, ignore_errors=True)
if (ROOT / "benchmarks" / "results").is_dir():
    shutil.copytree(ROOT / "benchmarks" / "results", results)
