#!/bin/sh
# install.sh EXTRAS [PYTHON]: makes .venv and installs the package in it, editable, with its extras; quick when that is done already.
# Done means: the same folder, the same extras, the same pyproject.toml, settings.ini and setup.py as at the last complete installation.
set -eu
cd "$(dirname "$0")/.."
extras=$1 wanted=${2:-} stamp=.venv/.installed-$1
min=$(sed -n 's/^min_python *= *//p' settings.ini)
key="$PWD $(cat pyproject.toml settings.ini setup.py | cksum)"

new_enough() { "$1" -c "import sys,venv,ensurepip; sys.exit(sys.version_info < tuple(map(int, '$min'.split('.'))))" 2>/dev/null; }

if new_enough .venv/bin/python; then
    if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then exit 0; fi
else
    python=
    for p in ${wanted:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if new_enough "$p"; then python=$p; break; fi
    done
    if [ -z "$python" ]; then
        found=$("${wanted:-python3}" -V 2>/dev/null) || found="not there"
        echo "Python >= $min with its venv module is needed, and ${wanted:-python3} is $found: install one, or name it, as in 'make test PYTHON=python3.12'" >&2
        exit 1
    fi
    "$python" -m venv --clear .venv
fi

echo "Installing into .venv: some minutes the first time, PyTorch is large"
export PYTHONWARNINGS=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
quiet=-qq; if [ -t 1 ]; then quiet=; fi
.venv/bin/python -m pip install $quiet --upgrade pip
.venv/bin/python -m pip install $quiet -e ".[$extras]"
echo "$key" > "$stamp"
