"""evalplus without its optional dependency, without the 20 seconds at its end, and without endless retries of hopeless requests.

    evalplus_driver.py problems OUT.jsonl [--limit N]     write the first N problems (of HUMANEVAL_OVERRIDE_PATH, or downloaded)
    evalplus_driver.py codegen ..                         as evalplus.codegen
    evalplus_driver.py evaluate ..                        as evalplus.evaluate

PARLOOP_MODEL is the model's name at the server; --model only names files. It runs in evalplus's environment.
"""

import functools
import json
import os
import sys
import threading
import types

sys.modules.setdefault("datasets", types.SimpleNamespace(load_dataset=None))  # only another benchmark of evalplus needs it


def problems(out: str, *options: str) -> None:
    """Write the problems."""
    from evalplus.data import get_human_eval_plus
    from evalplus.data.humaneval import HUMANEVAL_OVERRIDE_PATH

    limit = int(options[1]) if options else None
    if HUMANEVAL_OVERRIDE_PATH:
        with open(HUMANEVAL_OVERRIDE_PATH, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
    else:
        rows = list(get_human_eval_plus().values())
    with open(out + ".partial", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[:limit])
    os.replace(out + ".partial", out)


def codegen() -> None:
    """Generate, and exit at errors that no retry can cure."""
    import evalplus.codegen
    import evalplus.gen.util.openai_request as request
    import openai
    from fire import Fire

    plain = request.make_request
    hopeless = (
        openai.BadRequestError,
        openai.NotFoundError,
        openai.AuthenticationError,
        openai.PermissionDeniedError,
        openai.UnprocessableEntityError,
    )

    def make_request(*args, **kwargs):
        if "model" in kwargs:
            kwargs["model"] = os.environ["PARLOOP_MODEL"]
        try:
            return plain(*args, **kwargs)
        except hopeless as error:
            sys.exit(f"the server refuses: {error}")  # SystemExit passes evalplus's `except Exception`

    request.make_request = make_request
    Fire(evalplus.codegen.run_codegen)


def evaluate() -> None:
    """Score, without waiting for threads at the end."""
    import evalplus.evaluate

    evalplus.evaluate.threading = types.SimpleNamespace(Thread=functools.partial(threading.Thread, daemon=True))
    evalplus.evaluate.main()


if __name__ == "__main__":
    what = sys.argv.pop(1)
    if what == "problems":
        problems(*sys.argv[1:])
    else:
        {"codegen": codegen, "evaluate": evaluate}[what]()
