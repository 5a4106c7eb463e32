"""The commands and snippets of the pages: they run, or at least the command line can parse them."""

import contextlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cyclopts import MissingArgumentError

from parloop import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """Every line of code that calls parloop, without its comment; continued lines as one."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if re.match(r" {4,}parloop ", line)]
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines] + re.findall(r"`(parloop [a-z][^`]*)`", text)


def test_the_readmes_snippet_prints_what_it_says(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code, shown = re.search(r"```python\n(.*?)```\n+```\n(.*?)```", text, re.S).groups()
    run = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_that_pages_name(page):
    for command in commands(page):
        if re.search(r"\.\.|\[", command):  # left open on purpose
            continue
        tokens = cli.passed_through(shlex.split(command)[1:])
        with contextlib.suppress(MissingArgumentError):  # a verb that is only named
            cli.app.parse_args(tokens, exit_on_error=False, print_error=False)
