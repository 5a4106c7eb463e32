"""Interpreter for the programs of `task:run`: the few parts of Python that they use.

Python itself never compiles or executes them. Every other construct is refused, numbers and lists stay small, and the number of steps
(expressions and statements) is limited, so a program ends soon, and on every machine at the same point. (A limit in seconds would make
documents depend on the machine.)
"""

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_CHARACTERS = 4000
MAX_STEPS = 5000
MAX_NUMBER = 10**9
MAX_LIST = 100
MAX_CALLS = 10  # depth of nested calls
BUILT_IN = ("print", "range", "len")

OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Mod: operator.mod,
}
COMPARISONS: dict[type, Callable[[int, int], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
Value = int | list[int]


class ProgramError(Exception):
    """The program stops with an error, takes too long, or uses an unknown construct."""


@dataclass
class Execution:
    """Record of a program's execution.

    Attributes:
        printed: the numbers printed, in order.
        assigned: (name, value) of every assignment outside functions, loop variables included, in order; for a list, all its items.
        steps: number of expressions and statements that were evaluated.
    """

    printed: list[int] = field(default_factory=list)
    assigned: list[tuple[str, Value]] = field(default_factory=list)
    steps: int = 0


def run_program(text: str, max_steps: int = MAX_STEPS) -> Execution:
    """Interpret a program.

    Raises:
        ProgramError: it uses an unknown construct, stops with an error, or takes more than `max_steps`.
    """
    if len(text) > MAX_CHARACTERS:
        raise ProgramError(f"a program of {len(text)} characters is longer than {MAX_CHARACTERS}.")
    try:
        tree = ast.parse(text)
        return _Interpreter(max_steps).run(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ProgramError(f"{type(error).__name__}: {error}") from error


class _Interpreter:
    def __init__(self, max_steps: int):
        self.left = max_steps
        self.max_steps = max_steps
        self.names: dict[str, Value] = {}
        self.functions: dict[str, tuple[list[str], ast.expr]] = {}
        self.calls = 0
        self.done = Execution()

    def run(self, tree: ast.Module) -> Execution:
        """Interpret a module."""
        self._block(tree.body)
        self.done.steps = self.max_steps - self.left
        return self.done

    def _step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise ProgramError(f"it takes more than {self.max_steps} steps.")

    def _block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self._step()
            match statement:
                case ast.Assign(targets=[target]):
                    self._assign(target, self._value(statement.value, self.names))
                case ast.If():
                    self._block(statement.body if self._test(statement.test) else statement.orelse)
                case ast.For(target=ast.Name(id=name), orelse=[]):
                    for value in self._items(statement.iter):
                        self._step()
                        self._keep(name, value)
                        self._block(statement.body)
                case ast.FunctionDef():
                    self._define(statement)
                case ast.Expr(value=ast.Call(func=ast.Name(id="print"), args=[argument], keywords=[])):
                    self.done.printed.append(self._number(argument, self.names))
                case _:
                    raise ProgramError(f"{ast.unparse(statement)!r} is not known.")

    def _assign(self, target: ast.expr, value: Value) -> None:
        match target:
            case ast.Name(id=name):
                self._keep(name, value)
            case ast.Subscript(value=ast.Name(id=name)):
                items = self._list(target.value, self.names)
                items[self._index(items, target.slice, self.names)] = _as_number(value)
                self.done.assigned.append((name, list(items)))
            case _:
                raise ProgramError(f"assignment to {ast.unparse(target)!r} is not known.")

    def _keep(self, name: str, value: Value) -> None:
        if name in BUILT_IN or name in self.functions:
            raise ProgramError(f"{name!r} is a function, and is assigned to.")
        self.names[name] = value
        self.done.assigned.append((name, list(value) if isinstance(value, list) else value))

    def _define(self, statement: ast.FunctionDef) -> None:
        name, parameters = statement.name, [argument.arg for argument in statement.args.args]
        plain = ast.unparse(statement).startswith(f"def {name}({', '.join(parameters)}):")
        if not plain or len(set(parameters)) < len(parameters) or name in BUILT_IN or name in self.names:
            raise ProgramError(f"the function {name!r} has more than plain arguments, or a name that is taken.")
        match statement.body:
            case [ast.Return(value=ast.expr() as value)]:
                self.functions[name] = (parameters, value)
            case _:
                raise ProgramError("a function's body must be one return.")

    def _items(self, iterable: ast.expr) -> list[int]:
        match iterable:
            case ast.Call(func=ast.Name(id="range"), args=[end], keywords=[]):
                count = self._number(end, self.names)
                if count > self.left:
                    raise ProgramError(f"it takes more than {self.max_steps} steps.")
                return list(range(count))
            case _:
                return self._list(iterable, self.names)  # no copy: the loop sees its own changes to the list

    def _test(self, test: ast.expr) -> bool:
        self._step()
        match test:
            case ast.Compare(ops=[comparison], comparators=[right]) if type(comparison) in COMPARISONS:
                left = self._number(test.left, self.names)
                return COMPARISONS[type(comparison)](left, self._number(right, self.names))
            case _:
                raise ProgramError(f"the condition {ast.unparse(test)!r} is not known.")

    def _value(self, expression: ast.expr, names: dict[str, Value]) -> Value:
        self._step()
        match expression:
            case ast.Constant(value=value) if type(value) is int:
                return _small(value)
            case ast.Name(id=name):
                if name not in names:
                    raise ProgramError(f"{name!r} is not defined.")
                return names[name]
            case ast.BinOp(op=op) if type(op) in OPERATORS:
                left, right = self._number(expression.left, names), self._number(expression.right, names)
                if isinstance(op, ast.Mod) and right == 0:
                    raise ProgramError("modulo by zero.")
                return _small(OPERATORS[type(op)](left, right))
            case ast.List():
                if len(expression.elts) > MAX_LIST:
                    raise ProgramError(f"a list of {len(expression.elts)} items is longer than {MAX_LIST}.")
                return [self._number(item, names) for item in expression.elts]
            case ast.Subscript():
                items = self._list(expression.value, names)
                return items[self._index(items, expression.slice, names)]
            case ast.Call(func=ast.Name(id=name), keywords=[]):
                return self._call(name, expression.args, names)
            case _:
                raise ProgramError(f"{ast.unparse(expression)!r} is not known.")

    def _call(self, name: str, arguments: list[ast.expr], names: dict[str, Value]) -> Value:
        if name == "len" and len(arguments) == 1:
            return len(self._list(arguments[0], names))
        if name not in self.functions:
            raise ProgramError(f"the function {name!r} is not known.")
        parameters, value = self.functions[name]
        if len(parameters) != len(arguments):
            raise ProgramError(f"{name}() takes {len(parameters)} arguments, not {len(arguments)}.")
        given = {parameter: self._value(argument, names) for parameter, argument in zip(parameters, arguments)}
        if self.calls == MAX_CALLS:
            raise ProgramError(f"more than {MAX_CALLS} functions within functions.")
        self.calls += 1
        result = self._value(value, self.names | given)
        self.calls -= 1
        return result

    def _number(self, expression: ast.expr, names: dict[str, Value]) -> int:
        return _as_number(self._value(expression, names))

    def _list(self, expression: ast.expr, names: dict[str, Value]) -> list[int]:
        value = self._value(expression, names)
        if not isinstance(value, list):
            raise ProgramError(f"{ast.unparse(expression)!r} is not a list.")
        return value

    def _index(self, items: list[int], expression: ast.expr, names: dict[str, Value]) -> int:
        index = self._number(expression, names)
        if not -len(items) <= index < len(items):
            raise ProgramError(f"there is no item {index} in a list of {len(items)}.")
        return index


def _as_number(value: Value) -> int:
    if isinstance(value, list):
        raise ProgramError("a list where a number is needed.")
    return value


def _small(value: int) -> int:
    if abs(value) > MAX_NUMBER:
        raise ProgramError(f"a number is beyond {MAX_NUMBER}.")
    return value
