"""Settings of the documentation: ``sphinx-build -W --keep-going docs outputs/docs``."""

import pathlib
import shutil

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

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
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
myst_heading_anchors = 3

# Every cross-reference to a function or module must lead somewhere. Types of signatures need not:
# most are those of other libraries, and looking those up would need the network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:(class|exc|obj|data)", r".*"),
    ("py:.*", r"(bilb\.(base|checks|arguments)|jax|optax|flax|matplotlib|numpy)\..*"),
]
autodoc_typehints = "none"  # the text names types and shapes; the annotations are long unions
autodoc_preserve_defaults = True
napoleon_use_rtype = False

# What benchmarks wrote, beside the pages that are written by hand; index.md takes all by a pattern.
results = pathlib.Path(__file__).parent / "results"
shutil.rmtree(results, ignore_errors=True)
if (ROOT / "benchmarks" / "results").is_dir():
    shutil.copytree(ROOT / "benchmarks" / "results", results)


def setup(app):
    """Writes formulas as MathML, which browsers draw themselves: no script from elsewhere."""

    def visit(translator, node):
        block = isinstance(node, nodes.math_block)
        translator.body.append(tex2mathml(node.astext(), as_block=block))
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (visit, None), (visit, None))
