# Every target does all of its own set-up in .venv; a fresh machine needs Python and make, nothing else.
# Other Python: `make test PYTHON=python3.12`. More options for a target's program: `make demo ARGS="--epochs 1"`.
bin = .venv/bin
export OMP_NUM_THREADS ?= 1
export TORCH_CPP_LOG_LEVEL ?= ERROR
export KINETO_LOG_LEVEL ?= 99
long = 30_tutorial.imagenette 30_tutorial.translation
code = nbs adahessian_fastai tests tools docs $(wildcard benchmarks) setup.py
texts = $(wildcard *.md .github/*) Makefile pyproject.toml settings.ini
pytest = $(bin)/python -m pytest -n auto --maxprocesses 8 --dist loadfile
tree = git status --porcelain 2>/dev/null || true

help: ## Say what can be made
	@sed -n 's/^\([a-z-]*\): .*## /  make \1	/p' Makefile

demo: install ## Train a small network on real digits with Adam and AdaHessian, compare them
	$(bin)/python -m adahessian_fastai $(ARGS)

test: install ## Run everything that CI checks
	@($(tree)) > .venv/.tree
	$(bin)/python tools/in_step.py
	$(bin)/chkstyle $(code)
	$(bin)/codespell $(code) $(texts)
	$(bin)/nbdev-test --timing
	$(pytest) $(ARGS)
	@[ -z "$$CI" ] || ($(tree)) | diff .venv/.tree - || { echo "make test has changed the work tree, see above"; exit 1; }

test-cuda: install ## Run the tests that need a CUDA device
	$(bin)/python -m pytest -m cuda $(ARGS)

zoo: install-bench ## Train one member of each family of models, in every mode: takes minutes
	$(bin)/python -m pytest -m slow tests/test_zoo.py $(ARGS)

soak: install ## Kill, spoil and outlast training runs: six minutes of processor time
	$(bin)/python tests/soak.py $(ARGS)

coverage: install ## Run the tests of tests/ and print how many lines of the package they reach
	$(pytest) --cov --cov-report=term $(ARGS)

sync: install ## Clean the notebooks, write the package and the README from them
	$(bin)/nbdev-clean
	$(bin)/nbdev-export
	$(bin)/python tools/readme.py

outputs: install ## Run the notebooks, the long tutorials at full length, and save in them what their cells show
	PYTHONWARNINGS=ignore $(bin)/nbdev-test --save --skip-file-re '^[_.]|$(subst $() ,|,$(long))' $(ARGS)
	cd nbs && for o in $(long); do ../$(bin)/exec_nb $$o.ipynb --dest $$o.ipynb --exc-stop || exit 1; done
	$(bin)/nbdev-clean

docs: install-docs ## Build the documentation site in _docs/html
	rm -rf _docs
	$(bin)/python tools/site_pages.py
	$(bin)/sphinx-build -q -W --keep-going -n -c docs -d _proc/.doctrees _proc _docs/html
	@echo "Open _docs/html/index.html"

bench: install-bench ## Run the benchmarks, which write their results to benchmarks/results
	@for f in $(filter-out benchmarks/gpu.py benchmarks/forum.py benchmarks/transfer.py benchmarks/studies.py, $(wildcard benchmarks/[0-9a-z]*.py)); do echo "$$f"; $(bin)/python $$f $(ARGS) || exit 1; done

gpu: install-bench ## Run what needs a GPU: the cuda tests and the benchmarks, in pieces that resume
	$(bin)/python benchmarks/gpu.py $(ARGS)

hooks: install ## Have git check each commit and show, merge and compare notebooks cell by cell
	$(bin)/pre-commit install
	git config merge.jupyternotebook.driver '"$(CURDIR)/$(bin)/nbdev-merge" %O %A %B %P'
	git config diff.jupyternotebook.command '"$(CURDIR)/$(bin)/nbdev-diff-driver"'

clean: ## Remove what was built; .venv and results stay
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .cache/coverage* */__pycache__ */.ipynb_checkpoints

install:
	@sh tools/install.sh dev $(PYTHON)

install-bench:
	@sh tools/install.sh dev,bench $(PYTHON)

install-docs:
	@sh tools/install.sh dev,docs $(PYTHON)

.PHONY: help demo test test-cuda zoo soak coverage sync outputs docs bench gpu hooks clean install install-bench install-docs
