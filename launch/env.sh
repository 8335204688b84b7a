# Sets up what every launch script needs: `source launch/env.sh`, from any folder.
# Goes to the repository's root, makes .venv, installs the pinned packages when their list is new, and puts the
# environment's python on PATH. A second run uses no network. PYTHON=... chooses the interpreter that makes .venv.
# REQUIREMENTS="requirements.txt requirements-test.txt" adds further lists.

fail() {
    echo "error: $*" >&2
    return 1
}

is_supported() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed, ${PYTHON:-python3} is older or missing: install it or give PYTHON=/path/to/python3"
}

make_venv() {
    # One that an interrupted run left behind has neither pip nor the file that is written last.
    is_supported .venv/bin/python && { [ -s .venv/made-by ] || .venv/bin/python -m pip --version >/dev/null 2>&1; } && return
    local python
    python=$(find_python) || return 1
    echo "Making .venv with $("$python" --version)"
    rm -rf .venv
    # Some systems ship Python without ensurepip: then the system's own pip installs into the environment.
    "$python" -m venv .venv >/dev/null 2>&1 || "$python" -m venv --clear --without-pip .venv ||
        fail "$python cannot make a virtual environment in $PWD/.venv" || return 1
    echo "$python" >.venv/made-by
    .venv/bin/python -m pip --version >/dev/null 2>&1 || pip_install pip
}

pip_install() {
    local pip=".venv/bin/python -m pip"
    $pip --version >/dev/null 2>&1 || pip="$(cat .venv/made-by) -m pip --python .venv/bin/python"
    $pip --version >/dev/null 2>&1 || fail "pip is missing: install your system's python3-venv or python3-pip package" || return 1
    PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0 $pip install -qq --no-compile "$@"
}

install() {
    local stamp=".venv/$1.installed"
    [ "$(cat "$stamp" 2>/dev/null)" = "$(cksum <"$1")" ] && return
    echo "Installing the packages of $1"
    pip_install -r "$1" || fail "the packages of $1 could not be installed: pip's reason is above" || return 1
    cksum <"$1" >"$stamp"
}

prepare() {
    local list
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || return 1
    make_venv || return 1
    for list in ${REQUIREMENTS:-requirements.txt}; do
        install "$list" || return 1
    done
}

prepare || return 1

export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD"

# Compiled programs are kept, so that the next run of the same command starts in seconds.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-$PWD}/.cache}/opensora_jax/jax}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0.5}"

# Progress bars in a log file or a CI page are a line now and then, not a stream.
[ -t 2 ] || export TQDM_MININTERVAL="${TQDM_MININTERVAL:-20}"

# Warnings and errors only, from libraries that read these when they load.
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}" TRANSFORMERS_VERBOSITY="${TRANSFORMERS_VERBOSITY:-error}"
