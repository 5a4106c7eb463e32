"""Break one thing after another in the source and see whether a test notices: what survives is not tested.

    python benchmarks/mutants.py run                       # everything that benchmarks/mutants.yaml names; a second call resumes
    python benchmarks/mutants.py run model --seconds 15    # with the fastest tests only: most changes die of them
    python benchmarks/mutants.py run model --again         # the survivors of the target `model` again, after tests were added
    python benchmarks/mutants.py list model                # survivors that are not known to be equivalent
    python benchmarks/mutants.py summary                   # a table, per file

It needs `pip install mutmut coverage` beside what `make test` installs, and hours: run it with `nice` and OMP_NUM_THREADS=1.

The changes are mutmut's (operators, numbers, names, assignments, arguments) at every place of a file, and some that it leaves out
because they are many: statements, decorators and elements left out, conditions that always or never hold, one operand of two, an
argument or a receiver in place of a call. mutmut's own command skips functions with decorators, `forward` among them, and all code
outside functions; what it does change it wraps, which torch.compile and inspect.signature see. cosmic-ray starts a process for
every change, and importing torch takes longer than most tests. So each change runs in a fork of a process that has imported
everything but parloop. Not changed, since no behaviour hangs on it: docstrings, annotations, imports, what `raise` says, and
strings with a blank in them.

Tests run in a copy of the tracked files, so that work can go on: of all tests of a target those that reach the line, the fastest and
those that killed most first, until one fails. "Timed out" is much more processor time than these tests took before, and counts as
killed. Results are lines of JSON, found again by the text of the function around a change, so they outlive changes elsewhere.
"""

import argparse
import ast
import contextlib
import gc
import hashlib
import importlib
import importlib.machinery
import importlib.util
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import libcst as cst
import yaml
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
SETTINGS = yaml.safe_load((ROOT / "benchmarks/mutants.yaml").read_text())
MEMORY = 16 << 30  # bytes of address space of one run


# Changes


def statements_left_out(node: cst.SimpleStatementLine) -> Iterator[cst.CSTNode]:
    first = node.body[0]
    is_call = isinstance(first, cst.Expr) and not isinstance(first.value, (cst.SimpleString, cst.ConcatenatedString))
    if is_call or isinstance(first, (cst.Assign, cst.AugAssign, cst.Raise, cst.Return, cst.Del)):
        yield cst.SimpleStatementLine([cst.Pass()])


def conditions(node: cst.If | cst.CompIf | cst.While) -> Iterator[cst.CSTNode]:
    for always in ("False",) if isinstance(node, cst.While) else ("True", "False"):
        yield node.with_changes(test=cst.Name(always))


def one_operand(node: cst.BinaryOperation | cst.BooleanOperation) -> Iterator[cst.CSTNode]:
    yield node.left
    yield node.right


def calls_left_out(node: cst.Call) -> Iterator[cst.CSTNode]:
    modules = ("torch", "F", "nn", "np", "math", "init")
    if isinstance(node.func, cst.Attribute) and getattr(node.func.value, "value", None) not in modules:
        yield node.func.value
    for argument in node.args:
        if argument.keyword is None and not argument.star:
            yield argument.value


def one_less(node: cst.Integer) -> Iterator[cst.CSTNode]:
    yield cst.parse_expression(f"({node.evaluated_value - 1})")


def open_slices(node: cst.Slice) -> Iterator[cst.CSTNode]:
    if node.lower is not None:
        yield node.with_changes(lower=None)
    if node.upper is not None:
        yield node.with_changes(upper=None)


def decorators_left_out(node: cst.FunctionDef) -> Iterator[cst.CSTNode]:
    for i in range(len(node.decorators)):
        yield node.with_changes(decorators=[*node.decorators[:i], *node.decorators[i + 1 :]], leading_lines=[])


def elements_left_out(node: cst.Tuple | cst.List | cst.Set | cst.Dict) -> Iterator[cst.CSTNode]:
    if len(node.elements) > 1:
        for i in range(len(node.elements)):
            kept = [*node.elements[:i], *node.elements[i + 1 :]]
            if isinstance(node, cst.Tuple) and len(kept) == 1:
                kept = [kept[0].with_changes(comma=cst.Comma())]
            yield node.with_changes(elements=kept)


def loops_left_out(node: cst.For) -> Iterator[cst.CSTNode]:
    yield node.with_changes(iter=cst.Tuple([]))


OPERATORS: list[tuple[Any, Callable]] = [
    *mutation_operators,
    (cst.SimpleStatementLine, statements_left_out),
    ((cst.If, cst.CompIf, cst.While), conditions),
    ((cst.BinaryOperation, cst.BooleanOperation), one_operand),
    (cst.Call, calls_left_out),
    (cst.Integer, one_less),
    (cst.Slice, open_slices),
    (cst.FunctionDef, decorators_left_out),
    ((cst.Tuple, cst.List, cst.Set, cst.Dict), elements_left_out),
    (cst.For, loops_left_out),
]


@dataclass
class Mutant:
    """One change of one file."""

    file: str
    function: str  # around it, its qualified name; "" outside functions and classes
    line: int  # where the changed node begins, from 1
    kind: str  # which operator made it
    start: int  # of what is replaced, in bytes of the file
    stop: int
    code: str  # in its place
    was: str  # the changed lines before, without indentation
    now: str  # and after
    key: str  # of the function's text and the change

    @property
    def change(self) -> tuple[str, str, str]:
        return self.function, self.was, self.now

    def of(self, text: str) -> str:
        """The whole file, changed."""
        return replaced(text.encode(), self.start, self.stop, self.code)


class Places(cst.CSTVisitor):
    """Collects every node that may be changed, its line, and the names of the functions and classes around it."""

    METADATA_DEPENDENCIES = (PositionProvider, ByteSpanPositionProvider)

    def __init__(self) -> None:
        self.found: list[tuple[cst.CSTNode, int, int, int, str]] = []
        self.names: list[str] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, (cst.Annotation, cst.Import, cst.ImportFrom, cst.FormattedString)):
            return False
        if isinstance(node, cst.SimpleString) and " " in node.value:
            return False
        if isinstance(node, (cst.FunctionDef, cst.ClassDef)):
            self.names.append(node.name.value)
        with contextlib.suppress(KeyError):  # whitespace has no position
            at, line = (
                self.get_metadata(ByteSpanPositionProvider, node),
                self.get_metadata(PositionProvider, node).start.line,
            )
            self.found.append((node, line, at.start, at.start + at.length, ".".join(self.names)))
        return not isinstance(node, (cst.Raise, cst.Decorator))

    def on_leave(self, node: cst.CSTNode) -> None:
        if isinstance(node, (cst.FunctionDef, cst.ClassDef)):
            self.names.pop()


def mutants_of(file: str, text: str) -> list[dict]:
    module = MetadataWrapper(cst.parse_module(text))
    places = Places()
    module.visit(places)
    functions = functions_of(text)
    mutants, seen = [], {parsed(text)}
    for node, line, begin, end, function in places.found:
        for kinds, operator in OPERATORS:
            if not isinstance(node, kinds):
                continue
            for changed in operator(node):
                if isinstance(changed, cst.SimpleString) and "XX" not in changed.value and changed.value != '""':
                    continue  # the upper and lower case of a string that was changed already
                code = code_of(changed, node)
                source = replaced(text.encode(), begin, end, code)
                tree = parsed(source)
                if tree is None or tree in seen:
                    continue
                seen.add(tree)
                was, now, place = difference(text, source)
                start, around = functions.get(function, (0, ""))
                key = hashlib.sha256("\n".join((function, around, was, now, str(place - start))).encode()).hexdigest()[:12]
                mutants.append(Mutant(file, function, line, operator.__name__, begin, end, code, was, now, key))
    return [asdict(mutant) for mutant in mutants]


def code_of(changed: cst.CSTNode, node: cst.CSTNode) -> str:
    code = cst.Module([]).code_for_node(changed).strip()
    closed = (cst.Name, cst.Call, cst.Attribute, cst.Subscript, cst.BaseNumber, cst.BaseString, cst.List, cst.Dict, cst.Set)
    needs_brackets = isinstance(changed, cst.BaseExpression) and not isinstance(changed, (type(node), *closed))
    return f"({code})" if needs_brackets else code


def replaced(text: bytes, start: int, stop: int, code: str) -> str:
    return (text[:start] + code.encode() + text[stop:]).decode()


def parsed(source: str) -> str | None:
    """A program without its layout, or None if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "is" with a literal, and the like
            compile(tree := ast.parse(source), "mutant", "exec")
    except (SyntaxError, ValueError):
        return None
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def functions_of(text: str) -> dict[str, tuple[int, str]]:
    """First line and text of every function and class, by qualified name."""
    found: dict[str, tuple[int, str]] = {}

    def visit(node: ast.AST, names: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found[".".join((*names, child.name))] = child.lineno, ast.get_source_segment(text, child) or ""
                visit(child, (*names, child.name))

    visit(ast.parse(text), ())
    return found


def difference(text: str, source: str) -> tuple[str, str, int]:
    """The lines that differ, before and after, and which is the first of them."""
    before, after = text.splitlines(), source.splitlines()
    start = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after)))
    end = 0
    while end < min(len(before), len(after)) - start and before[-1 - end] == after[-1 - end]:
        end += 1
    was, now = before[start : len(before) - end], after[start : len(after) - end]
    return " ".join(line.strip() for line in was), " ".join(line.strip() for line in now), start


def header_of(text: str) -> dict[int, tuple[int, int]]:
    """Line -> first and last line of the statement it belongs to, or of the statement's part before its body."""
    lines: dict[int, tuple[int, int]] = {}
    for node in ast.walk(ast.parse(text)):  # outer ones first
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno
            lines |= dict.fromkeys(range(node.lineno, last + 1), (node.lineno, last))
    return lines


# Runs, each in a fork


class Selection:
    """A plugin of pytest: which tests to run, in which order; which one failed, and seconds of processor time of each."""

    def __init__(self, order: list[str] | None = None) -> None:
        self.order, self.seconds, self.failed = order, {}, None  # type: ignore[var-annotated]
        self.modules: list[str] = []

    def pytest_collection_modifyitems(self, config, items):
        self.modules = sorted(sys.modules)
        if self.order is not None:
            by_name = {item.nodeid: item for item in items}
            items[:] = [by_name[name] for name in self.order if name in by_name]

    def pytest_runtest_logstart(self, nodeid, location):
        self.seconds[nodeid] = -processor_time()

    def pytest_runtest_logfinish(self, nodeid, location):
        self.seconds[nodeid] += processor_time()

    def pytest_runtest_logreport(self, report):
        if report.failed and self.failed is None:
            self.failed = report.nodeid


def processor_time() -> float:
    """Seconds so far, of this process and of those it started and that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


class Changed(importlib.machinery.SourceFileLoader):
    """Loads a module from a changed source, which is nowhere on disk."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname):
        return compile(self.source, self.path, "exec", dont_inherit=True)

    def find_spec(self, fullname, path=None, target=None):
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None


def pytest_in(tree: Path, tests: list[str], plugins: list, *arguments: str) -> int:
    import hypothesis
    import pytest
    import torch

    os.chdir(tree)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # each costs as much as a test
    sys.path[:0] = [str(tree / "src")]
    torch.set_num_threads = lambda n: None  # tests ask for two; runs go side by side
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None)
    hypothesis.settings.load_profile("mutants")
    quick = ["--assert=plain", "--tb=no", "--disable-warnings", "-p", "no:unraisableexception", "-p", "no:threadexception"]
    options = ["-q", "-p", "no:cacheprovider", *quick, "--rootdir", str(tree), "-c", str(tree / "pyproject.toml")]
    return int(pytest.main([*options, *arguments, *tests], plugins=plugins))


class Fork:
    """A function in a child of this process; what it returns comes back as JSON."""

    def __init__(self, function: Callable[[], Any], folder: Path, seconds: float = 3600.0) -> None:
        self.began, self.limit = time.monotonic(), 3600 + 5 * seconds  # a machine that others use gives little time
        self.result_file = folder / f"{time.monotonic_ns()}.json"
        self.pid = os.fork()
        if self.pid == 0:
            self._child(function, folder, seconds)

    def _child(self, function, folder, seconds) -> None:
        code = 1
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 5))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            log = os.open(folder / f"{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            result = function()
            self.result_file.write_text(json.dumps(result))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
            os._exit(code)

    def result(self) -> tuple[str, Any] | None:
        """("done", result), ("failed", None), ("timed out", None), or None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        ended = pid != 0
        late = not ended and time.monotonic() - self.began > self.limit
        if not ended and not late:
            return None
        self.stop()
        if late:
            os.waitpid(self.pid, 0)
            return "timed out", None
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
            return "timed out", None
        result = json.loads(self.result_file.read_text()) if self.result_file.exists() else None
        self.result_file.unlink(missing_ok=True)
        return ("done", result) if result is not None else ("failed", None)

    def stop(self) -> None:
        """The child, and what its tests started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self) -> Any:
        while (got := self.result()) is None:
            time.sleep(0.05)
        if got[0] != "done":
            raise SystemExit(f"A run without any change {got[0]}, see {self.result_file.parent}/{self.pid}.log")
        return got[1]


def baseline(tree: Path, tests: list[str], files: list[str], folder: Path) -> dict:
    """Without changes: seconds of every test, and which tests reach which line (null: read when it is imported)."""

    def measure():
        import coverage

        measured = coverage.Coverage(data_file=None, include=[str(tree / file) for file in files])
        selection = Selection()

        class Contexts:
            def pytest_runtest_logstart(self, nodeid, location):
                measured.switch_context(nodeid)

            def pytest_runtest_logfinish(self, nodeid, location):
                measured.switch_context("between tests")

        measured.start()
        code = pytest_in(tree, tests, [selection, Contexts()])
        measured.stop()
        if code != 0:
            raise SystemExit(f"Tests fail without any change, {selection.failed} first.")
        reached = {}
        for file in files:
            contexts = measured.get_data().contexts_by_lineno(str(tree / file))
            reached[file] = {line: None if "" in names else sorted(names) for line, names in contexts.items()}
        return {"seconds": selection.seconds, "reached": reached}

    return Fork(measure, folder).wait()


def import_what_tests_import(tree: Path, tests: list[str], folder: Path) -> None:
    """All modules but those of the project, so that forks have them."""
    selection = Selection()

    def collect():
        pytest_in(tree, tests, [selection], "--collect-only")
        return selection.modules

    for name in Fork(collect, folder).wait():
        own = name.split(".")[0]
        if name == "parloop" or own in ("parloop", "conftest", "__main__") or own.startswith(("test_", "tests")):
            continue
        with contextlib.suppress(BaseException), contextlib.redirect_stderr(None):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is shared with forks stays shared, and is not searched again in each


def kept(folder: Path, name: str, parts: list[str], make: Callable[[], Any]) -> Any:
    """What `make` gives, kept as long as `parts` stay the same."""
    file = folder / f"{name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}.json"
    if not file.exists():
        file.write_text(json.dumps(make()))
    return json.loads(file.read_text())


class Target:
    """Files, the tests that are to notice changes of them, and what came of each change."""

    def __init__(self, name: str, only: str, results: Path) -> None:
        self.name, self.results = name, results
        settings = SETTINGS["targets"][name]
        self.tests: list[str] = settings["tests"]
        files = [str(path.relative_to(ROOT)) for pattern in settings["files"] for path in ROOT.glob(pattern)]
        self.files = sorted(file for file in files if only in file)
        self.mutants = []
        for file in self.files:
            text = (ROOT / file).read_text()
            parts = [Path(__file__).read_text().split("# Runs, each")[0], file, text]
            known = kept(results.parent, "changes", parts, lambda: mutants_of(file, text))  # noqa: B023
            self.mutants += [Mutant(**mutant) for mutant in known]
        self.known: dict[str, dict] = {}
        if results.exists():
            for line in results.read_text().splitlines():
                found = json.loads(line)
                self.known[found["key"]] = found  # the last one counts

    def status(self, mutant: Mutant) -> str:
        status = self.known.get(mutant.key, {}).get("status", "not tried")
        return "equivalent" if status in ("survived", "unreached") and mutant.change in EQUIVALENT else status

    def run(self, jobs: int, again: bool, most: float, console: Console) -> None:
        waiting = ("survived", "unreached") if again else ("not tried",)
        todo = [mutant for mutant in self.mutants if self.status(mutant) in waiting]
        todo.sort(
            key=lambda mutant: mutant.kind in ("operator_arg_removal", "operator_assignment")
        )  # many, and most just crash
        console.print(f"{self.name}: {len(self.mutants)} changes, {len(todo)} to try")
        if not todo:
            return
        folder = self.results.parent / f"{self.name}-{os.getpid()}"
        tree = folder / "tree"
        for file in subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0"):
            if file and (ROOT / file).exists():
                (tree / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, tree / file)
        import_what_tests_import(tree, self.tests, folder)
        texts = [path.read_text() for part in ("src", "tests") for path in sorted((tree / part).rglob("*.py"))]
        parts = [*self.tests, *self.files, *texts]
        before = kept(self.results.parent, "baseline", parts, lambda: baseline(tree, self.tests, self.files, folder))
        console.print(f"{len(before['seconds'])} tests in {sum(before['seconds'].values()):.0f} s")
        headers = {file: header_of((tree / file).read_text()) for file in self.files}
        kills: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        running: list[tuple[Fork, Mutant]] = []
        try:
            while todo or running:
                while todo and len(running) < jobs:
                    mutant = todo.pop(0)
                    tests = self._tests_of(mutant, before, headers[mutant.file], kills, most)
                    if not tests:
                        self._keep(mutant, counts, status="unreached")
                        continue
                    seconds = 20 + 3 * sum(before["seconds"][test] for test in tests)
                    running.append((Fork(lambda: self._try(tree, mutant, tests), folder, seconds), mutant))  # noqa: B023
                time.sleep(0.02)
                for fork, mutant in list(running):
                    if (got := fork.result()) is None:
                        continue
                    running.remove((fork, mutant))
                    status, result = got
                    if status == "done":
                        assert result["code"] != 5, "no tests were found"
                        status = "survived" if result["code"] == 0 else "killed"
                    elif status == "failed":
                        status = "killed"  # the process died
                    by = (result or {}).get("failed")
                    kills[by or ""] += 1
                    self._keep(mutant, counts, status=status, by=by, seconds=round(time.monotonic() - fork.began, 1))
                    (folder / f"{fork.pid}.log").unlink(missing_ok=True)
                    if sum(counts.values()) % 50 == 0:
                        console.print(f"{time.strftime('%H:%M:%S')} {dict(counts)}, {len(todo)} to go", highlight=False)
            console.print(f"{self.name}: {dict(counts)}", highlight=False)
        finally:
            for fork, _ in running:
                fork.stop()
            shutil.rmtree(folder, ignore_errors=True)

    @staticmethod
    def _tests_of(
        mutant: Mutant, before: dict, headers: dict[int, tuple[int, int]], kills: Counter, most: float
    ) -> list[str]:
        seconds = before["seconds"]
        reached = before["reached"][mutant.file]
        first, last = headers.get(mutant.line, (0, 0))
        names: set[str] = set()
        for line in range(first, last + 1):
            by = reached.get(str(line), [])
            names |= set(seconds) if by is None else set(by)
        if not first:  # a decorator
            names = set(seconds)
        order = sorted(names & set(seconds), key=lambda name: (seconds[name] + 0.05) / (1 + kills[name]))
        total = itertools.accumulate(seconds[name] for name in order)
        return [name for name, so_far in zip(order, total) if so_far <= most or name == order[0]]

    @staticmethod
    def _try(tree: Path, mutant: Mutant, tests: list[str]) -> dict:
        module = mutant.file.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        source = mutant.of((tree / mutant.file).read_text())
        sys.meta_path.insert(0, Changed(module, str(tree / mutant.file), source))  # type: ignore[arg-type]
        for some in (tests[:3], tests[3:]):  # most changes die of the first, and other files need not be collected
            if some:
                selection = Selection(some)
                code = pytest_in(tree, sorted({test.split("::")[0] for test in some}), [selection], "-x")
                if code != 0:
                    break
        return {"code": code, "failed": selection.failed}

    def _keep(self, mutant: Mutant, counts: Counter, **found: Any) -> None:
        counts[found["status"]] += 1
        line = asdict(mutant) | found
        self.known[mutant.key] = line
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")


EQUIVALENT = {tuple(change): why for why, changes in (SETTINGS.get("equivalent") or {}).items() for change in changes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "list", "summary"])
    parser.add_argument("targets", nargs="*", default=[], help=f"of {', '.join(SETTINGS['targets'])}; default: all")
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--again", action="store_true", help="run: try survivors again")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="run: of tests per change, the fastest first; default: all"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / "runs/mutants/results.jsonl")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    console = Console(soft_wrap=True)
    targets = [Target(name, arguments.only, arguments.results) for name in arguments.targets or SETTINGS["targets"]]
    if arguments.verb == "run":
        for target in targets:
            target.run(arguments.jobs, arguments.again, arguments.seconds, console)
    elif arguments.verb == "list":
        for target in targets:
            for mutant in target.mutants:
                if (status := target.status(mutant)) in ("survived", "unreached"):
                    print(f"{mutant.file}:{mutant.line} {mutant.function} ({status})\n  - {mutant.was}\n  + {mutant.now}")
    else:
        table = Table("file", "changes", "killed", "timed out", "equivalent", "survived", "unreached", "not tried")
        for target in targets:
            for file in target.files:
                counts = Counter(target.status(mutant) for mutant in target.mutants if mutant.file == file)
                columns = ("killed", "timed out", "equivalent", "survived", "unreached", "not tried")
                table.add_row(file, str(counts.total()), *(str(counts[column]) for column in columns))
        console.print(table)


if __name__ == "__main__":
    main()
