# Sourced by speedrun.sh and tests/run.sh, from the repo's root: makes .venv and installs into it, once.
# Set setup_extra=dev before for the development tools.
# Sets PYTHON to the environment's interpreter. An unchanged pyproject.toml is not installed again.

setup_base=${PYTHON:-python3}
setup_extra=${setup_extra-}
PYTHON=$PWD/.venv/bin/python
setup_stamp=.venv/installed${setup_extra:+-$setup_extra}

if ! cmp -s pyproject.toml "$setup_stamp" && ! cmp -s pyproject.toml .venv/installed-dev; then
    "$setup_base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "set-up: $setup_base is $("$setup_base" --version 2>&1), expected Python 3.11 or newer; set PYTHON" >&2
        exit 1
    }
    [ -x "$PYTHON" ] || "$setup_base" -m venv .venv || { echo "set-up: cannot make .venv" >&2; exit 1; }
    echo "== set-up: installing into .venv"
    "$PYTHON" -m pip install --quiet --editable ".${setup_extra:+[$setup_extra]}" || {
        echo "set-up: pip could not install gkachat${setup_extra:+[$setup_extra]}" >&2
        exit 1
    }
    cp pyproject.toml "$setup_stamp"
fi
