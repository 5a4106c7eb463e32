"""Small random Python programs, and the numbers that they print.

After Zaremba and Sutskever, "Learning to execute" (arXiv 1410.4615), with worked steps as in Nye et al., "Show your work: scratchpads for
intermediate computation with language models" (arXiv 2112.00114). Programs are correct by construction: every name is assigned before it is
read on every path, lists keep their three items, loops end. Only our own interpreter runs them.
"""

import ast
import random
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from tokenizers import Regex, decoders

from .interpreter import Execution, run_program
from .task import EOS_ID, HELD_OUT, NO_TARGET, Document, Task, option

INDENT = "    "
NAMES, LIST, LOOPS, FUNCTION, PARAMETER = "abcd", "s", "ij", "f", "x"
ITEMS = 3  # per list
ANSWER, STEPS_END = "#", "->"
KEYWORDS = ("if", "else", "for", "in", "def", "return")
SYMBOLS = (
    *NAMES, LIST, *LOOPS, FUNCTION, PARAMETER, *map(str, range(11)), "=", "==", "<", ">", "+", "-", "*", "%", "(", ")", "[", "]", ",", ":",
    *KEYWORDS, "range", "print", ANSWER, STEPS_END, "\n", INDENT,
)  # fmt: skip
SYMBOL = r"\n| {4}|[a-z]+|[0-9]+|==|->|[^\sa-z0-9]"
MAX_ASSIGNED = 24  # assignments that a program makes at run time, and so worked steps
DRAWS = 10_000  # attempts to draw a program of its level, of which it takes a few dozen at most


@dataclass(frozen=True)
class Level:
    """Difficulty of programs.

    Attributes:
        statements: number of statements, without prints.
        nesting: depth of nested blocks, functions aside.
        parts: constructs that may occur, among list, if, for and function.
        chance: share of the most frequent answer, 0, in 20,000 programs.
    """

    statements: int
    nesting: int
    parts: tuple[str, ...]
    chance: float


LEVELS = {
    1: Level(2, 0, (), 0.10),
    2: Level(4, 0, ("list",), 0.12),
    3: Level(6, 1, ("list", "if"), 0.11),
    4: Level(8, 1, ("list", "if", "for"), 0.12),
    5: Level(10, 1, ("list", "if", "for", "function"), 0.11),
    6: Level(12, 2, ("list", "if", "for", "function"), 0.11),
}


@dataclass(frozen=True)
class Run(Task):
    """Running programs without an interpreter.

    A program is followed by `print(a) #`, and the answer is the printed number, from 0 to 9. Groups are levels: 2, 4, .. 12 statements,
    with lists from level 2, `if` from 3, `for` from 4, a function from 5, and nested blocks at 6. In training every variable is printed. With
    `trace` every assignment is written before the answer: `print(a) # b 4 a 7 -> 7`.
    """

    name: ClassVar[str] = "run"
    unit: ClassVar[str] = "level"
    pattern: ClassVar[str] = SYMBOL
    levels: int = option(6, "levels of difficulty, from 1", at_least=1, at_most=len(LEVELS))
    trace: bool = option(False, "write all assignments before the answer")

    @property
    def symbols(self) -> tuple[str, ...]:
        return SYMBOLS

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(LEVELS)[: self.levels]

    @property
    def asks_every_group(self) -> bool:
        return False

    def chance(self, group: int) -> float:
        return LEVELS[group].chance

    def draw(self, rng: random.Random, split: str, group: int | None) -> tuple[str, Any]:
        level = rng.choice(self.groups) if group is None else group
        program, printed, execution = draw_program(rng, LEVELS[level])
        if split == HELD_OUT or self.trace:
            printed = printed[:1]
        return program, (program, printed, execution, level)

    def write(self, drawn: Any) -> Document:
        program, printed, execution, level = drawn
        values = dict(execution.assigned)
        symbols = symbols_of(program)
        answers: dict[int, str] = {}
        for name in printed:
            symbols += ["print", "(", name, ")", ANSWER]
            answers[len(symbols) - 1] = str(values[name])
            symbols.append("\n")
        symbols.pop()
        prompt = len(symbols)
        if self.trace:
            symbols += [*trace_of(execution), STEPS_END, str(values[printed[0]])]
        ids = [self.id_of[symbol] for symbol in symbols]
        if self.trace:
            targets = [NO_TARGET] * (prompt - 1) + ids[prompt:] + [EOS_ID]
            groups = [0] * (len(ids) - 2) + [level, 0]
        else:
            targets = [self.id_of[answers[at]] if at in answers else NO_TARGET for at in range(len(ids))]
            groups = [level if at in answers else 0 for at in range(len(ids))]
        return Document.of(ids, targets, groups, prompt)

    def join(self, symbols: list[str]) -> tuple[str, list[int]]:
        text, starts = "", []
        before = "\n"
        for symbol in symbols:
            opens = symbol in "([" and before.isalpha() and before not in KEYWORDS
            if not (opens or before in ("\n", INDENT, "(", "[") or symbol in (")", "]", ",", ":", "\n")):
                text += " "
            starts.append(len(text))
            text += symbol
            before = symbol
        return text, starts

    def decoder(self) -> decoders.Decoder:
        """Return a decoder that puts spaces between symbols where Python has them. (An indentation goes through it as a
        tab.)"""
        replaced = [
            (" \n", "\n"),
            (" \t", "\t"),
            ("\n ", "\n"),
            ("\t ", "\t"),
            (" )", ")"),
            (" ]", "]"),
            (" ,", ","),
            (" :", ":"),
        ]
        replaced += [("( ", "("), ("[ ", "["), ("\t", INDENT)]
        replaced += [
            (f"{name} {bracket}", f"{name}{bracket}") for name, bracket in (*((n, "(") for n in CALLED), (LIST, "["))
        ]
        parts = [decoders.Replace(INDENT, "\t"), decoders.Replace(Regex("^"), " "), decoders.Fuse()]
        return decoders.Sequence([*parts, *(decoders.Replace(*pair) for pair in replaced), decoders.Strip(" ", 1, 0)])


CALLED = ("range", "print", FUNCTION)


def symbols_of(text: str) -> list[str]:
    """Return a program's text as symbols."""
    return re.findall(SYMBOL, text)


def trace_of(execution: Execution) -> list[str]:
    """Return the worked steps: each assignment in order, as the name and the value (all items of a list)."""
    steps = []
    for name, value in execution.assigned:
        steps += [name, *map(str, value if isinstance(value, list) else [value])]
    return steps


def draw_program(rng: random.Random, level: Level) -> tuple[str, list[str], Execution]:
    """Return a program of this level, the names it may print, the last one assigned first, and its execution."""
    for _ in range(DRAWS):
        writer = _Writer(rng, level)
        writer.program()
        if writer.nesting < level.nesting:
            continue
        program = "\n".join(writer.lines) + "\n"
        execution = run_program(program)
        if len(execution.assigned) <= MAX_ASSIGNED:
            others = [name for name in writer.names if name != writer.last]
            rng.shuffle(others)
            return program, [writer.last, *others], execution
    raise AssertionError(f"no program of {level} in {DRAWS} draws")


def measures(program: str) -> dict[str, int]:
    """Return measures of a program's difficulty: statements, nesting of blocks (functions aside), and assignments at run
    time."""
    tree = ast.parse(program)

    def depth(statements: list[ast.stmt]) -> int:
        blocks = [statement for statement in statements if isinstance(statement, (ast.If, ast.For))]
        return max((1 + depth([*block.body, *block.orelse]) for block in blocks), default=0)

    return {
        "statements": sum(isinstance(node, ast.stmt) for node in ast.walk(tree)),
        "nesting": depth(tree.body),
        "assignments": len(run_program(program).assigned),
    }


class _Writer:
    """Writes one program, statement by statement."""

    def __init__(self, rng: random.Random, level: Level):
        self.rng, self.level = rng, level
        self.left = level.statements
        self.lines: list[str] = []
        self.names: list[str] = []  # variables assigned on every path so far
        self.loops: list[str] = []  # variables of the enclosing loops
        self.has_list = self.has_function = False
        self.last = ""
        self.nesting = 0

    def program(self) -> None:
        if "function" in self.level.parts:
            self.lines.append(f"def {FUNCTION}({PARAMETER}):")
            self.lines.append(f"{INDENT}return ({self.operation(PARAMETER)}) % 10")
            self.left -= 2
            self.has_function = True
        self.assign("", str(self.rng.randint(0, 9)))
        while self.left:
            self.statement(0)

    def statement(self, depth: int) -> None:
        kinds = {"assign": 5.0}
        parts = self.level.parts
        if "list" in parts and not depth and not self.has_list:
            kinds["list"] = 2.0
        if self.has_list:
            kinds["item"] = 1.0
        if depth < self.level.nesting and self.left >= 2:
            kinds |= {kind: 2.0 for kind in ("if", "for") if kind in parts}
        kind = self.rng.choices(list(kinds), list(kinds.values()))[0]
        indent = INDENT * depth
        if kind == "assign":
            self.assign(indent, self.expression())
        elif kind == "list":
            self.add(f"{LIST} = [{', '.join(self.operand() for _ in range(ITEMS))}]")
            self.has_list = True
        elif kind == "item":
            self.add(f"{indent}{LIST}[{self.rng.randrange(ITEMS)}] = {self.operand()}")
        elif kind == "if":
            compared = self.rng.choice([*self.names, *self.loops])
            self.add(f"{indent}if {compared} {self.rng.choice(('<', '>', '=='))} {self.other_than(compared)}:")
            self.block(depth + 1)
            if self.left and self.rng.random() < 0.5:
                self.lines.append(f"{indent}else:")
                self.block(depth + 1)
        else:
            loop = LOOPS[len(self.loops)]
            items = f"range({self.rng.randint(2, 3)})"
            self.add(f"{indent}for {loop} in {LIST if self.has_list and self.rng.random() < 0.5 else items}:")
            self.loops.append(loop)
            self.block(depth + 1)
            self.loops.pop()

    def block(self, depth: int) -> None:
        self.nesting = max(self.nesting, depth)
        for _ in range(self.rng.randint(1, min(2, self.left))):
            if self.left:
                self.statement(depth)

    def assign(self, indent: str, value: str) -> None:
        name = self.rng.choice(self.names if indent else NAMES)
        if name not in self.names:
            self.names.append(name)
        self.last = name
        self.add(f"{indent}{name} = {value}")

    def add(self, line: str) -> None:
        self.lines.append(line)
        self.left -= 1

    def operand(self) -> str:
        return str(self.rng.randint(0, 9)) if self.rng.random() < 0.3 else self.rng.choice([*self.names, *self.loops])

    def expression(self) -> str:
        known = self.rng.choice([*self.names, *self.loops])
        kinds = ["operation"] * 4 + ["item"] * self.has_list + ["call"] * self.has_function
        kind = self.rng.choice(kinds)
        if kind == "item":
            return f"{LIST}[{self.rng.randrange(ITEMS)}]"
        if kind == "call":
            return f"{FUNCTION}({known})"
        return f"({self.operation(known)}) % 10"

    def operation(self, known: str) -> str:
        """Draw an operation on two different operands, such that no result is more frequent than others: factors are
        coprime to ten."""
        sign = self.rng.choice("+-*")
        if sign == "*":
            return f"{known} * {self.rng.choice((3, 7, 9))}"
        return f"{known} {sign} {self.other_than(known)}"

    def other_than(self, known: str) -> str:
        others = [name for name in (*self.names, *self.loops) if name != known and known != PARAMETER]
        return self.rng.choice(others) if others and self.rng.random() < 0.7 else str(self.rng.randint(1, 9))
