#!/usr/bin/env bash
# What the launchers call on every machine, in its checkout: bash launch/worker.sh [--dry-run] ACTION [flags]
#
#   setup    the environment of REQUIREMENTS, and a copy of the folder DATA (gs:// or any that fsspec reads) in data/
#   run      trains in the foreground; after a failure again, at most RETRIES times, RETRY_WAIT seconds apart
#   start    the same in the background, with its log in runs/worker/log
#   logs     follows that log
#   status   whether it runs, and the last lines of the log
#   stop     ends it: first politely, after STOP_WAIT seconds by force
#
# How the processes find each other is in the environment: JAX_DISTRIBUTED=auto on TPUs, GKE and Slurm, or
# JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; with none of them the machine trains alone.
set -euo pipefail
# shellcheck source=launch/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

REQUIREMENTS=${REQUIREMENTS:-requirements-tpu.txt}
DATA=${DATA:-}
RETRIES=${RETRIES:-10}
RETRY_WAIT=${RETRY_WAIT:-60}
STOP_WAIT=${STOP_WAIT:-60}
state=runs/worker

# The machines of some TPU generations have Python 3.10, or one without venv.
ensure_python() {
  local python
  if [[ -x ${VENV:-.venv}/bin/python ]]; then
    return
  fi
  if python=$(find_python 2>/dev/null) && "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    return
  fi
  execute_line "curl -LsSf https://astral.sh/uv/install.sh | sh"
  execute "$HOME/.local/bin/uv" venv --seed --python=3.12 "${VENV:-.venv}"
}

copy_data() {
  local copy='import sys, fsspec; fs, path = fsspec.url_to_fs(sys.argv[1].rstrip("/"));'
  copy+=' fs.get(path + "/", "data/", recursive=True)'
  if [[ -n $DATA && $(cat data/.copied-from 2>/dev/null) != "$DATA" ]]; then
    execute mkdir -p data
    execute "$PYTHON" -c "$copy" "$DATA"
    execute_line "echo $(quoted "$DATA") >data/.copied-from"
  fi
}

do_setup() {
  [[ $DRY_RUN == true ]] || ensure_python
  setup_env "$REQUIREMENTS"
  copy_data
}

do_run() {
  setup_env "$REQUIREMENTS"
  if [[ $DRY_RUN == true ]]; then
    execute "$PYTHON" -m src.main ${FLAGS[@]+"${FLAGS[@]}"}
  else
    retry "$PYTHON" -m src.main ${FLAGS[@]+"${FLAGS[@]}"}
  fi
}

is_running() {
  [[ -f $state/pid ]] && kill -0 "$(cat $state/pid)" 2>/dev/null
}

do_start() {
  local command
  if [[ $DRY_RUN == false ]] && is_running; then
    die "a training runs here already (process $(cat $state/pid)): stop it first"
  fi
  command=$(quoted bash launch/worker.sh run ${FLAGS[@]+"${FLAGS[@]}"})
  # A session of its own, so that it outlives the connection and can be ended as a whole.
  execute mkdir -p "$state"
  execute_line "nohup setsid $command >>$state/log 2>&1 </dev/null & echo \$! >$state/pid"
}

do_logs() {
  execute tail -n 100 -F "$state/log"
}

do_status() {
  if [[ $DRY_RUN == false ]]; then
    if is_running; then echo "runs (process $(cat $state/pid))"; else echo "does not run"; fi
  fi
  [[ $DRY_RUN == false && ! -f $state/log ]] || execute tail -n 3 "$state/log"
}

do_stop() {
  local waited=0
  if [[ $DRY_RUN == true ]]; then
    execute_line "kill -TERM \"\$(cat $state/pid)\""
    return
  fi
  is_running || return 0
  kill -TERM "$(cat $state/pid)"
  while is_running; do
    if ((waited++ >= 5 * STOP_WAIT)); then
      kill -KILL -- "-$(cat $state/pid)" # the whole session
      break
    fi
    sleep 0.2
  done
}

parse_arguments "$@"
[[ -n $ACTION ]] || usage
[[ $RETRIES =~ ^[0-9]+$ ]] || die "RETRIES is '$RETRIES': set a whole number such as 10"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
do_action setup run start logs status stop
