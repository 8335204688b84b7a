#!/usr/bin/env bash
# What tpu_pod.sh runs on each worker: `python -m` with the arguments, started so that it outlives the connection. It
# shows the log (run.log) and ends with the command's status (run.status); the process's number is in run.pid.
# A second call, as gcloud makes after a broken connection, shows the same run. Without arguments it installs what is
# needed and ends.
set -euo pipefail
command -v python3.11 python3.12 python3.13 >/dev/null || {  # images of Ubuntu 22.04 have Python 3.10
    sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
    sudo apt-get -o DPkg::Lock::Timeout=600 install -qq --yes python3.11 python3.11-venv
}
REQUIREMENTS="requirements.txt requirements-tpu.txt"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ $# -gt 0 ] || exit 0

run() {
    local status=0
    python -m "$@" </dev/null >run.log 2>&1 &
    echo $! >run.pid
    wait $! || status=$?
    echo "$status" >run.status
}

if [ ! -e run.status ] && ! kill -0 "$(cat run.pid 2>/dev/null)" 2>/dev/null; then
    rm -f run.pid
    trap '' HUP
    run "$@" >/dev/null 2>&1 &
    until [ -s run.pid ]; do sleep 0.1; done
fi
tail -n +1 -f --pid="$(cat run.pid)" run.log
until [ -s run.status ]; do sleep 0.1; done
exit "$(cat run.status)"
