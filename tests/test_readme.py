"README.md is made from the index notebook, and speaks of files that exist."
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("readme", ROOT/"tools"/"readme.py")
tool = importlib.util.module_from_spec(spec); spec.loader.exec_module(tool)
TEXT = (ROOT/"README.md").read_text(encoding="utf-8")


def test_readme_is_in_step_with_the_index_notebook():
    assert TEXT == tool.readme(), "run `make export`"

def test_links_lead_to_files():
    links = [l for l in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in l]
    assert len(links) > 10
    assert [l for l in links if not (ROOT/l).exists()] == []

def test_commands_are_targets_of_the_makefile():
    makefile = (ROOT/"Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:`|^ {4})make (\w+)", TEXT, re.M)) - {"PYTHON"}: assert re.search(rf"^{target}:", makefile, re.M), target

@pytest.mark.parametrize("line", re.findall(r"^ {4}kalm (.+)$", TEXT, re.M))
def test_command_lines_parse(line):
    from kalm.pipeline import configure, parser
    configure(parser().parse_args(line.split("#")[0].split()))
