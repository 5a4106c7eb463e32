"""Find commands with which an agent may have read the answer.

Containers of SWE-bench hold the repository's whole history, future commits included, and a patch that was copied from there cannot be
distinguished from an honest one. Only the agent's commands show it.

A hit is a command that reads history beyond HEAD, remotes, tags or git's own files, or the network. It is reported beside the score and not
subtracted from it: some such commands are harmless, and the trajectory holds their outputs for a closer look.
"""

import re
import shlex
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Hit:
    """A command, the kind of suspicion, and the number of characters that it printed."""

    step: int
    kind: str
    command: str
    shown: int

    def to_dict(self) -> dict[str, Any]:
        """Return the hit as JSON holds it."""
        return asdict(self)


REACHES = {"--all", "--branches", "--remotes", "--tags", "--reflog", "-g", "--walk-reflogs", "--glob", "--alternate-refs"}
HISTORY = {"log", "rev-list", "shortlog", "whatchanged", "grep", "bisect"}
REVISION = {"show", "checkout", "switch", "cherry-pick", "diff", "restore", "archive", "worktree", "reset", "merge", "rebase", "blame", "cat-file", "ls-tree", "read-tree"}  # fmt: skip
ALWAYS = {
    "reflog": "future commits", "fsck": "future commits", "for-each-ref": "future commits", "show-ref": "future commits",
    "ls-remote": "remotes", "fetch": "remotes", "pull": "remotes", "clone": "remotes", "tag": "tags", "describe": "tags", "name-rev": "future commits",
    "unpack-objects": "future commits", "verify-pack": "future commits", "stash": "",
}  # fmt: skip
GIT_FILES = re.compile(r"\.git/(packed-refs|ORIG_HEAD|FETCH_HEAD|logs|refs|objects)")
# Beginnings of commands: lines, after operators, after commands that run another one, and in strings for sh -c, os.system and subprocess.
BEGINS = (
    r"(?:^|[;|&(`{\n]|\b(?:sudo|xargs|env|time|nohup|exec|then|do|else)[ \t]++(?:-\S++[ \t]++|\w++=\S*+[ \t]++)*+|\btimeout[ \t]++(?:-\S++[ \t]++)*+\S++[ \t]++"
    r"|(?:\s-\w*c[ \t]*+|[(\[][ \t]*+)[\"'])[ \t]*+(?:\w++=\S*+[ \t]++)*+(?:/\S*/)?"
)
LOCAL = r"[\"']?(?:\.{1,2}(?=[\s/\[\"';|&)]|$)|/)[^\s\"';|&)]*[\"']?"  # a local path to install
OTHER_WORD = r"(?:-\S+|\d?>\S+)"
ALL_LOCAL = rf"(?:[ \t]+{OTHER_WORD})*[ \t]+{LOCAL}(?:[ \t]+(?:{OTHER_WORD}|{LOCAL}))*[ \t]*(?:$|[;|&)\n\"'])"
HERE = r"(?:127\.0\.0\.1|localhost)"
NETWORK = re.compile(
    rf"{BEGINS}(?:curl|wget|aria2c|ssh|scp|sftp|rsync|nc|ncat|telnet|gh|lynx|w3m)(?=[ \t]+\S|[\"'],)(?![^;|&\n]*{HERE})"
    rf"|(?:{BEGINS}|\s-m\s+)(?:uv\s+)?(?:pip3?|npm|yarn|cargo|go|gem|apt|apt-get|conda|uv)\s+(?:-\S+\s+)*(?:install|download|add|get|update|fetch|ci)\b(?!{ALL_LOCAL})"
    r"|\b(?:urlopen|urlretrieve|PoolManager|HTTPS?Connection|ClientSession|create_connection)\(|\bfrom requests import\b"
    r"|\b(?:requests|httpx)\.(?:get|post|put|head|request|stream|[Ss]ession|Client|AsyncClient)\("
    rf"|\b(?:fetch|open|file_get_contents)\(\s*[\"']https?://(?!{HERE})|\.connect\(\(\s*[\"'](?!{HERE})|/dev/(?:tcp|udp)/"
)
IN_A_LIST = re.compile(r"""\[\s*["']git["']\s*((?:,\s*["'][^"']*["']\s*)*)""")  # subprocess.run(["git", ..])
HASH = re.compile(r"\b[0-9a-f]{7,40}\b")
NAMES_COMMITS = {"log", "show", "blame", "rev-list", "rev-parse", "whatchanged"}
OWN = re.compile(r"^(HEAD([~^]\d*)*|@|--|:/.*)$")


def scan(trajectory: dict[str, Any]) -> list[Hit]:
    """Return all hits in a mini-swe-agent trajectory, in order."""
    messages, hits, past = trajectory["messages"], [], ""
    for number, message in enumerate(messages):
        for action in (message.get("extra") or {}).get("actions") or []:
            command, output = action.get("command", ""), _output(messages, number, action)
            found = kinds(command, past)
            hits += [Hit(number, kind, command[:500], len(output)) for kind in found]
            if not found and any(words[:1] and words[0] in NAMES_COMMITS for words in _git_calls(command)):
                past += "".join(f" {name}" for name in HASH.findall(output))
    return hits


def kinds(command: str, past: str = "") -> list[str]:
    """Return the kinds of suspicion about a command line.

    Args:
        command: the command line.
        past: hashes that harmless commands have printed, each after a space: HEAD and earlier commits, which may be named.
    """
    command = command.replace("\\\n", " ")
    found = []
    if GIT_FILES.search(command):
        found.append("git's own files")
    if NETWORK.search(command):
        found.append("network")
    for words in _git_calls(command):
        kind = _of_git(words, past)
        if kind:
            found.append(kind)
    return list(dict.fromkeys(found))


def _git_calls(command: str) -> list[list[str]]:
    """Return the words after each `git` of a command line, without options of git itself."""
    try:
        lexer = shlex.shlex(command, posix=True, punctuation_chars="();<>|&\n")
        lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
        words = list(lexer)
    except ValueError:  # quotes that do not close
        words = re.split(r"[ \t]+|(?=[;|&\n])|(?<=[;|&\n])", re.sub(r"[\"'`]", " ", command))
    calls: list[list[str]] = [re.findall(r"""["']([^"']*)["']""", match[1]) for match in IN_A_LIST.finditer(command)]
    call: list[str] | None = None
    for word in words:
        if re.fullmatch(r"[();<>|&\n]+", word):
            call = None
        elif call is not None:
            call.append(word)
        elif re.fullmatch(r"(.*/)?git|\$\(git|`git", word):
            call = []
            calls.append(call)
        elif re.search(r"(^|\W)git\s", word):  # sh -c "git log --all"
            calls += _git_calls(word)
    return [_without_options(words) for words in calls]


def _without_options(words: list[str]) -> list[str]:
    rest = list(words)
    while rest and rest[0].startswith("-"):
        takes_value = rest[0] in ("-C", "-c", "--git-dir", "--work-tree", "--namespace", "--exec-path")
        rest = rest[2:] if takes_value else rest[1:]
    return rest


def _of_git(words: list[str], past: str) -> str:
    if not words:
        return ""
    what, rest = words[0], words[1:]
    if what in ALWAYS:
        return ALWAYS[what]
    if what == "remote":
        return "remotes"
    if what == "submodule":
        return "remotes" if rest[:1] in (["update"], ["add"]) else ""
    if what == "branch":
        others = any(re.fullmatch(r"-\w*[ar]\w*|--(all|remotes|contains|no-merged)(=.*)?", word) for word in rest)
        return "future commits" if others else ""
    options = {word.partition("=")[0] for word in rest if word.startswith("-")}
    if what in HISTORY | REVISION and options & REACHES:
        return "future commits"
    if what == "cat-file" and options & {"--batch-all-objects"}:
        return "future commits"
    if what in HISTORY | REVISION:
        # Named revisions: all words before `--` except HEAD, its ancestors written as HEAD~n, and paths.
        before = rest[: rest.index("--")] if "--" in rest else rest
        names = [
            word.removeprefix("--source=") for word in before if not word.startswith("-") or word.startswith("--source=")
        ]
        named = [end for word in names for end in re.split(r"\.\.\.?", word.partition(":")[0])]
        if any(_looks_like_revision(word, what, past) for word in named):
            return "a named revision"
    return ""


def _looks_like_revision(word: str, what: str, past: str) -> bool:
    if not word or OWN.match(word):
        return False
    if "@{" in word:  # the reflog, or a branch's upstream
        return not word.startswith("stash@")
    word = re.sub(r"[~^].*$", "", word)
    if HASH.fullmatch(word) and f" {word[:7]}" in past:
        return False
    if HASH.fullmatch(word) or re.match(r"(origin|upstream|refs)/", word):
        return True
    if re.fullmatch(r"v?\d+(\.\w+)+", word) or word.partition("@")[0] in (
        "main",
        "master",
        "develop",
        "FETCH_HEAD",
        "ORIG_HEAD",
    ):
        return True
    # Paths have slashes or extensions; a bare word after show or cherry-pick is a revision.
    return what in ("show", "cherry-pick", "merge", "rebase", "archive") and re.fullmatch(r"[\w-]+", word) is not None


def _output(messages: list[dict[str, Any]], number: int, action: dict[str, Any]) -> str:
    name = action.get("tool_call_id")
    for message in messages[number + 1 :]:
        extra = message.get("extra") or {}
        if "raw_output" in extra and (name is None or message.get("tool_call_id") == name):
            return extra["raw_output"] or ""
        if "actions" in extra:
            break
    return ""
