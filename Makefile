.PHONY: demo docs test test-nojit coverage test-vllm test-peers test-live test-clients check bench release setup

setup:
	@scripts/setup

demo: setup  ## train briefly, evaluate against the baselines, show the result
	.venv/bin/servegym demo

# bytecode too: where Python is told to write none, each process that a test starts compiles it anew
test: setup  ## the whole test suite
	.venv/bin/python -m compileall -q src
	.venv/bin/servegym compile
	.venv/bin/python -m pytest -n auto --dist loadfile

test-nojit: setup  ## the tests that can do without the compiler, without it
	scripts/test-nojit

coverage: setup  ## the whole suite with line coverage
	scripts/coverage

test-vllm: setup  ## compare with vLLM's real scheduler, in an environment of its own
	scripts/test-vllm

test-peers: setup  ## published rows through other simulators: PUBLISHED=measurements.csv.gz
	scripts/test-peers "$(PUBLISHED)"

test-live: setup  ## the plug-in in the real vLLM, Ray Serve, LiteLLM and Envoy, in environments of their own
	scripts/test-live

test-clients: setup  ## other people's clients and checkers, in environments of their own
	scripts/test-clients

check: setup  ## lint, types, import directions
	scripts/check

docs: setup  ## the documentation site, into site/
	scripts/docs

bench: setup  ## measure speeds
	.venv/bin/servegym bench

release: setup  ## build and check sdist and wheel, write the notes; uploads nothing
	scripts/release
