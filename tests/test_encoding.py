"""Files are written and read as UTF-8, whatever the locale."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import parloop

SOURCE = Path(parloop.__file__).parent
OPENERS = ("open", "read_text", "write_text", "fdopen", "TextIOWrapper", "NamedTemporaryFile")
# The last one is record.py's, which is checked itself.
NOT_OF_TEXT = ("os.open", "Image.open", "webbrowser.open", "write_text")


def without_encoding(text: str) -> list[str]:
    """Calls that open a file as text and leave the encoding to the locale."""
    found = []
    for call in ast.walk(ast.parse(text)):
        if not isinstance(call, ast.Call) or any(keyword.arg == "encoding" for keyword in call.keywords):
            continue
        name = ast.unparse(call.func)
        if name.rpartition(".")[2] not in OPENERS or name in NOT_OF_TEXT:
            continue
        values = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        modes = [v.value for v in values if isinstance(v, ast.Constant) and set(str(v.value)) <= set("rwaxbt+")]
        if not any("b" in mode for mode in modes):
            found.append(f"line {call.lineno}: {ast.unparse(call)}")
    return found


def test_every_text_file_is_opened_with_an_encoding():
    sample = (
        "open(a)\nopen(a, 'rb')\na.open('w')\na.open('wb')\na.read_text()\na.read_text(encoding='utf-8')\nos.open(a, 0)\n"
    )
    assert without_encoding(sample) == ["line 1: open(a)", "line 3: a.open('w')", "line 5: a.read_text()"]
    found = {path: without_encoding(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")}
    assert len(found) > 50
    assert {str(path): calls for path, calls in found.items() if calls} == {}


SCRIPT = """
import locale, sys
from pathlib import Path
from parloop.folder import STUDY, claimed
from parloop.record import write_json
from parloop.train import Recipe
assert locale.getpreferredencoding(False) == "ANSI_X3.4-1968", locale.getpreferredencoding(False)
folder = Path(sys.argv[1])
with claimed(folder / "study", STUDY) as out:
    out.write("report.html", "offset cost \\u03a9")
with claimed(folder / "study", STUDY) as out:
    out.write("report.html", "offset cost \\u03a9, again")
write_json(folder / "a.json", "\\u03a9")
Recipe(source="caf\\u00e9/").save(folder / "recipe.yaml")
(folder / "mine.yaml").write_bytes("source: caf\\u00e9/  # \\u03a9".encode())
assert Recipe.load(folder / "recipe.yaml") == Recipe.load(folder / "mine.yaml")
"""


def test_reports_and_recipes_where_the_locale_is_ascii(tmp_path):
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "study" / "report.html").read_bytes() == "offset cost Ω, again".encode()
