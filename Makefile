# make demo: a complete small run on any machine.  make test: all tests.  make compare-quick: the paper's comparison in
# miniature, one seed of a reduced version.  Each sets up .venv first.
# The first interpreter that really runs (a pyenv shim may exist and fail) and is 3.11 or 3.12.
FITS := import sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
# torch is pinned first: its own index decides between a CPU and a CUDA build, the other packages then fit to it.
TORCH ?= torch==2.13.0

.PHONY: setup demo test compare-quick clean

setup: .venv/.ready

# A .venv whose interpreter is gone or does not fit is made anew.
ifneq ($(shell .venv/bin/python -c '$(FITS)' 2>/dev/null && echo fits),fits)
.PHONY: .venv/.ready
endif
.venv/.ready: pyproject.toml
	@"$(PYTHON)" -c '$(FITS)' 2>/dev/null || \
	  { echo "ExpRL needs Python 3.11 or 3.12: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	.venv/bin/python -c 'import pip; $(FITS)' 2>/dev/null || "$(PYTHON)" -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

demo: setup
	.venv/bin/python exprl.py

# A process per core, one thread each: small models gain nothing from more.
test: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses auto --dist worksteal

compare-quick: setup
	.venv/bin/python experiments/miniature.py --quick

clean:
	rm -rf .venv *.egg-info
