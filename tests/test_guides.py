"""The code of the guides in docs/, run as it stands."""

import pathlib
import re

import jax
import pytest

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def code_blocks(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_guide_has_a_block_for_each_library():
    flax, jinns = code_blocks("pinns.md")
    for block, library in ((flax, "flax"), (jinns, "jinns")):
        compile(block, "pinns.md", "exec")
        assert f"import {library}" in block


@pytest.mark.slow
@pytest.mark.parametrize(("number", "needs"), [(0, "flax"), (1, "jinns")])
def test_physics_informed_networks(number, needs, capsys):
    pytest.importorskip(needs)
    block = code_blocks("pinns.md")[number]
    names = {}
    with jax.enable_x64(False):
        exec(compile(block, "pinns.md", "exec"), names)
    assert names["losses"].shape[0] == names["steps"]
    assert names["losses"][-1].sum() < 0.01 * names["losses"][0].sum()
    assert names["relative_error"] < 0.1
    assert capsys.readouterr().out
