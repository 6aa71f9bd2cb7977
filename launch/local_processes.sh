#!/usr/bin/env bash
# A pod on one machine: bash launch/local_processes.sh [--dry-run] N [flags of src.main]
#
# Starts N processes that find each other as the workers of a pod do, each with DEVICES_PER_PROCESS (4) emulated CPU
# devices. Process 0 speaks on the terminal; all write runs/processes/<number>.log (LOGS names another folder). When
# one fails, the others are ended too, and its exit code is the answer. At Ctrl-C all save at one step and end, within
# STOP_WAIT (60) seconds; a second Ctrl-C ends them at once.
# Makes the Python environment first when there is none (see setup_env.sh for VENV and PYTHON).
set -euo pipefail
# shellcheck source=launch/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

parse_arguments "$@"
[[ -n $ACTION ]] || usage
[[ $ACTION =~ ^[1-9][0-9]*$ ]] || die "'$ACTION' is not a number of processes: write local_processes.sh 2 [flags]"
count=$ACTION
devices=${DEVICES_PER_PROCESS:-4}
[[ $devices =~ ^[1-9][0-9]*$ ]] || die "DEVICES_PER_PROCESS is '$devices': set a whole number such as 4"
CONFIG=configs/digits.py:debug
WORKDIR=runs/processes-debug
add_main_flags
setup_env requirements.txt
logs=${LOGS:-runs/processes}
wait=${STOP_WAIT:-60}
[[ $wait =~ ^[0-9]+$ ]] || die "STOP_WAIT is '$wait': set a whole number of seconds such as 60"
address=127.0.0.1:${PORT:-$((20000 + RANDOM % 20000))}
pids=()

# The command of one process, as one line of shell.
line() {
  quoted env JAX_PLATFORMS=cpu "XLA_FLAGS=--xla_force_host_platform_device_count=$devices" \
    "JAX_COORDINATOR_ADDRESS=$address" "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$1" \
    "$PYTHON" -m src.main "${FLAGS[@]}"
}

# end_all SECONDS: what does not end by itself by then is ended.
end_all() {
  local pid waited=0
  trap 'waited=$((10 * $1))' INT TERM
  for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  while ((waited++ < 10 * $1)) && [[ -n $(jobs -rp) ]]; do sleep 0.1 || true; done
  trap '' INT TERM
  for pid in "${pids[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
  wait
}

execute mkdir -p "$logs"
for ((i = 0; i < count; i++)); do
  if [[ $DRY_RUN == true ]]; then
    if ((i == 0)); then to="2>&1 | tee $(quoted "$logs/0.log")"; else to=">$(quoted "$logs/$i.log") 2>&1"; fi
    echo "$(line "$i") $to &"
  elif ((i == 0)); then
    # exec, so that the signal reaches Python and no shell in between.
    bash -c "exec $(line 0)" > >(tee "$logs/0.log") 2>&1 &
    pids+=($!)
  else
    bash -c "exec $(line "$i")" >"$logs/$i.log" 2>&1 &
    pids+=($!)
  fi
done
if [[ $DRY_RUN == true ]]; then
  echo wait
  exit 0
fi

trap 'echo "ending the processes; the same command goes on from the last checkpoint" >&2; end_all "$wait"; exit 130' INT TERM
running=("${pids[@]}")
while ((${#running[@]} > 0)); do
  still=()
  for pid in "${running[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      still+=("$pid")
      continue
    fi
    code=0
    wait "$pid" || code=$?
    if ((code != 0)); then
      for ((i = 0; i < count; i++)); do
        if [[ ${pids[i]} == "$pid" ]]; then
          echo "process $i ended with exit code $code: ending the others; see $logs/$i.log" >&2
        fi
      done
      end_all 5
      exit "$code"
    fi
  done
  running=(${still[@]+"${still[@]}"})
  sleep 0.2
done
