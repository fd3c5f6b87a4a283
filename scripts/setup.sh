# Makes .venv and installs gkachat into it. Sourced by speedrun.sh and tests/run.sh from the repository's root.
# Sets PYTHON to the environment's interpreter. pip runs again only when pyproject.toml has changed.
# Set setup_extra=dev before for the development tools, and setup_check to Python code that checks "$@" before anything
# is installed: it has only the standard library.

setup_base=${PYTHON:-python3}
setup_extra=${setup_extra-}
PYTHON=$PWD/.venv/bin/python
setup_stamp=.venv/installed${setup_extra:+-$setup_extra}

# glibc keeps freed memory in the process, for the next step's tensors. By default it returns large blocks to the
# system, which hands them out as zeroed pages with a page fault each: 1 to 7 % of a laptop's training time.
setup_memory='export MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_MAX_=0  # gkachat: see scripts/setup.sh'
eval "$setup_memory"

if cmp -s pyproject.toml "$setup_stamp" || cmp -s pyproject.toml .venv/installed-dev; then
    [ -z "${setup_check-}" ] || "$PYTHON" -c "$setup_check" "$@"
else
    "$setup_base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "set-up: $setup_base is $("$setup_base" --version 2>&1), expected Python 3.11 or newer; set PYTHON" >&2
        exit 1
    }
    [ -z "${setup_check-}" ] || "$setup_base" -c "$setup_check" "$@"
    [ -x "$PYTHON" ] || "$setup_base" -m venv .venv || { echo "set-up: cannot make .venv" >&2; exit 1; }
    echo "== set-up: installing into .venv"
    # Python compiles each module when it is first imported. To compile all of them now takes as long as the downloads.
    "$PYTHON" -m pip install --quiet --no-compile --editable ".${setup_extra:+[$setup_extra]}" || {
        echo "set-up: pip could not install gkachat${setup_extra:+[$setup_extra]}" >&2
        exit 1
    }
    # `source .venv/bin/activate` sets the same variables.
    grep -qsF "$setup_memory" .venv/bin/activate || echo "$setup_memory" >> .venv/bin/activate
    cp pyproject.toml "$setup_stamp"
fi
