# shellcheck shell=bash
# Sourced by the scripts beside it: errors, settings, and commands that --dry-run prints instead of running.

DRY_RUN=${DRY_RUN:-false}

die() {
  echo "error: $*" >&2
  exit 1
}

# The usage of a script is the comment at its top.
usage() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
  exit 0
}

# Splits the arguments into ACTION, FLAGS (of src.main) and DRY_RUN.
parse_arguments() {
  local argument
  ACTION="" FLAGS=()
  for argument in "$@"; do
    case $argument in
      --dry-run) DRY_RUN=true ;;
      --help | -h) usage ;;
      *) if [[ -z $ACTION ]]; then ACTION=$argument; else FLAGS+=("$argument"); fi ;;
    esac
  done
  is_true_or_false DRY_RUN
}

# do_action create setup …: runs the function that the action names. Those that stop, delete or create take no flags.
do_action() {
  local known
  for known in "$@"; do
    if [[ $ACTION == "$known" ]]; then
      [[ ${#FLAGS[@]} == 0 || $ACTION =~ ^(setup|run|start|show)$ ]] ||
        die "'$ACTION' takes no ${FLAGS[0]}: settings are variables of the environment or of launch/cluster.env"
      "do_$ACTION"
      return
    fi
  done
  die "there is no action '$ACTION': give one of $* (--help explains them)"
}

# The settings of the cluster: the environment wins over the file.
read_settings() {
  CLUSTER_ENV=${CLUSTER_ENV:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/cluster.env}
  [[ -f $CLUSTER_ENV ]] || die "there is no settings file $CLUSTER_ENV: set CLUSTER_ENV to one like launch/cluster.env"
  # shellcheck source=launch/cluster.env
  source "$CLUSTER_ENV"
  # Host names, Slurm jobs and Kubernetes objects are named after it.
  [[ $RUN_NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "RUN_NAME is '$RUN_NAME': use at most 40 lower-case letters, digits and dashes, with a letter first"
  [[ $RETRIES =~ ^[0-9]+$ ]] || die "RETRIES is '$RETRIES': set a whole number such as 10"
  [[ $SLICES =~ ^[1-9][0-9]*$ ]] || die "SLICES is '$SLICES': set a whole number such as 1"
}

need() {
  local name
  for name in "$@"; do
    [[ -n ${!name:-} ]] || die "$name is empty: set it in $CLUSTER_ENV or in the environment"
  done
}

is_true_or_false() {
  local name
  for name in "$@"; do
    [[ ${!name} == true || ${!name} == false ]] || die "$name is '${!name}': set it to true or false"
  done
}

# Every machine writes its part of a checkpoint, and machines do not outlive a run.
need_workdir() {
  [[ -n $WORKDIR ]] || need BUCKET
  WORKDIR=${WORKDIR:-${BUCKET%/}/$RUN_NAME}
  [[ $WORKDIR == gs://?* ]] || die "the workdir is '$WORKDIR': give a gs:// path, which all machines can write"
}

# Config and workdir where the flags give none: config flags do not take the same flag twice.
add_main_flags() {
  local given=" ${FLAGS[*]-} "
  [[ $given == *" --workdir"[=\ ]* ]] || FLAGS=("--workdir=$WORKDIR" ${FLAGS[@]+"${FLAGS[@]}"})
  [[ $given == *" --config"[=\ ]* ]] || FLAGS=("--config=$CONFIG" ${FLAGS[@]+"${FLAGS[@]}"})
}

# The words as one line that a shell reads as the same words.
quoted() {
  local word line=""
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      line+=" $word"
    else
      line+=" '$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'"
    fi
  done
  printf '%s\n' "${line# }"
}

# Runs a command, or prints it.
execute() {
  if [[ $DRY_RUN == true ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

# The same for a line of shell text with pipes or redirections.
execute_line() {
  if [[ $DRY_RUN == true ]]; then
    printf '%s\n' "$1"
  else
    bash -o pipefail -c "$1"
  fi
}

need_program() {
  [[ $DRY_RUN == true ]] || command -v "$1" >/dev/null || die "$1 is not installed: $2"
}

# An action of worker.sh with its flags and the settings that it reads, as a line for a worker's shell.
in_environment() {
  local variables=() more=()
  if [[ $1 == setup || $1 == start || $1 == run ]]; then
    read -r -a more <<<"$RUN_ENV"
    variables=(env "JAX_DISTRIBUTED=${DISTRIBUTED-auto}" "REQUIREMENTS=${REQUIREMENTS:-requirements-tpu.txt}" "DATA=$DATA"
      "RETRIES=$RETRIES" "RETRY_WAIT=$RETRY_WAIT" ${more[@]+"${more[@]}"})
  fi
  quoted ${variables[@]+"${variables[@]}"} bash launch/worker.sh "$@"
}

in_checkout() {
  echo "cd $RUN_NAME && $(in_environment "$@")"
}

# Clones the code into RUN_NAME, or updates it.
fetch_checkout() {
  echo "{ test -d $RUN_NAME/.git || git clone $(quoted "$REPOSITORY" "$RUN_NAME"); }" \
    "&& git -C $RUN_NAME fetch $(quoted origin "$BRANCH") && git -C $RUN_NAME checkout --detach FETCH_HEAD"
}

# retry COMMAND…: again after a failure, at most RETRIES times. The run goes on from its newest checkpoint by itself.
# A run that was asked to stop saves, writes into the file STOP_NOTE and ends with 0: it is not finished, and is started
# again without counting as a failure (RETRIES=0: once only, exit code 143). A stop that comes here ends the loop (143).
retry() {
  local attempt=0 code child="" stopped=false note
  note=$(mktemp)
  # A stop is passed on and ends the loop; bash waits a second time because the trap interrupts the first.
  trap 'stopped=true; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM INT
  while true; do
    code=0
    : >"$note"
    STOP_NOTE=$note "$@" &
    child=$!
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do
      code=0
      wait "$child" || code=$?
    done
    child=""
    [[ $code != 0 || ! -s $note ]] || code=143
    if ((code == 134)) && [[ -n ${JAX_DISTRIBUTED:-}${JAX_COORDINATOR_ADDRESS:-} ]]; then
      echo "error: JAX aborted this process: process 0, which runs its service, ended or cannot be reached; the log of" \
        "process 0 says why, and all processes that are started again go on from the last checkpoint" >&2
    fi
    if [[ $stopped == true || $code == 0 || $attempt -ge $RETRIES && ($code != 143 || $RETRIES == 0) ]]; then
      break
    elif [[ $code == 143 ]]; then
      echo "asked to stop, not by this launcher: starting again in $RETRY_WAIT s" >&2
    else
      ((++attempt))
      echo "exit code $code: starting again in $RETRY_WAIT s (restart $attempt of at most $RETRIES)" >&2
    fi
    sleep "$RETRY_WAIT" &
    child=$!
    wait "$child" || true
    [[ $stopped == false ]] || break
  done
  trap - TERM INT
  rm -f "$note"
  [[ $stopped == false ]] || return 143
  return "$code"
}
