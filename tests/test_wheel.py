"""The wheel, in an environment that holds nothing else: `make test-wheel`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.sources import write_sources

pytestmark = pytest.mark.wheel
ROOT = Path(__file__).parents[1]
TINY = "--num-hidden-layers 1 --hidden-size 32 --num-attention-heads 2 --num-key-value-heads 1 --intermediate-size 32 --vocab-size 300 --length 32 --tokens 2048 --batch-size 4 --eval-every 4 --save-every 4"


def call(*command, ok=True, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).split())


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment with the wheel and what it asks for by itself, a folder to work in, and the wheel."""
    place = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", place, ROOT)
    (wheel,) = place.glob("parloop-*.whl")
    call(sys.executable, "-m", "venv", place / "env")
    pip_install(place / "env", wheel)
    return place / "env", place, wheel


def pip_install(env, what):
    call(env / "bin" / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", what)


@pytest.mark.timeout(1200)
def test_a_wheel_generates_alone_and_studies_with_its_extra(installed):
    env, place, wheel = installed
    write_sources(place / "sources", n=30)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    here = {
        "cwd": place,
        "env": environment | {"OMP_NUM_THREADS": "1", "PARLOOP_CACHE": str(place / "cache"), "COLUMNS": "200"},
    }
    parloop = env / "bin" / "parloop"
    assert "study" in call(parloop, "--help", **here)
    call(parloop, "check", "--write", "probe", **here)
    assert call(parloop, "generate", "probe", "def ", "--max-new-tokens", "4", **here)
    study = (parloop, "study", "sources", "--preset", "quick", "--loops", "1", "2", *TINY.split(), "--output", "out")
    assert 'pip install "parloop[study]"' in call(*study, ok=False, **here)
    assert not (place / "out").exists()

    pip_install(env, f"{wheel}[study]")
    assert "report:" in call(*study, **here)
    for name in ("results.json", "report.html", "loss.png", "r2-seed0/model.safetensors"):
        assert (place / "out" / name).is_file()
    assert (next(env.glob("lib/*/site-packages/parloop")) / "py.typed").is_file()
