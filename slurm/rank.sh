# shellcheck shell=bash
# Runs one rank's command; its output goes to the rank's own file as well, and of rank 0 to the job's log. What other
# ranks print stays in their files; their errors are in the job's log too.
mkdir -p "$LOG_DIR"
log="$LOG_DIR/rank-$SLURM_PROCID.log"
echo "--- $(date -Is) on ${SLURMD_NODENAME:-$HOSTNAME}, restart ${SLURM_RESTART_COUNT:-0}" >>"$log"
# On signals the command saves itself; what surrounds it must outlive it, and pass them on: most clusters (proctrack/cgroup)
# signal this shell alone, others every process of the task.
SIGNALS=(TERM INT USR1 USR2)
if [ "$SLURM_PROCID" = 0 ]; then
  exec > >(trap '' "${SIGNALS[@]}" && exec tee -a "$log")
else
  exec >>"$log"
fi
exec 2> >(trap '' "${SIGNALS[@]}" && exec tee -a "$log" >&2)
command='' successor='' passed=''
# shellcheck disable=SC2329  # by the traps
pass() {
  passed="$1"
  # shellcheck disable=SC2086  # none, one or two
  kill -s "$1" $command $successor 2>/dev/null
}
for name in "${SIGNALS[@]}"; do
  # shellcheck disable=SC2064  # now
  trap "pass $name" "$name"
done
# On SIGUSR2 Python tells here alone where it is.
export DEHVF_STACKS="$log"

# The job's script runs on the first node and dies with it. Then srun is gone, too, and SLURM needs minutes to notice and
# asks for the job's full size again. The second node's first task does in its place what is left to do.
heartbeat() {
  # Opened, since NFS looks anew only then.
  { : <"$LOG_DIR/heartbeat" && stat -c %y "$LOG_DIR/heartbeat"; } 2>/dev/null
}
succeed() {
  local first last='' now quiet=0 terminated='' asked=''
  trap '' INT USR1 USR2
  trap 'terminated=1' TERM
  first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
  while :; do
    sleep 2
    now="$(heartbeat)"
    if [ "$now" != "$last" ]; then
      last="$now" quiet=0 asked=''
      continue
    fi
    if [ $((quiet += 2)) -ge 4 ] && [ -n "$terminated" ] && is_requeued; then
      # SLURM was the first to know, and ends this shell within KillWait.
      requeue && return
    fi
    if [ "$quiet" -lt "${SUCCESSION_S:-60}" ]; then continue; fi
    # Not where the file system alone is slow. Beside this loop, which has to hear SLURM while a dead node is asked.
    if [ -z "$asked" ]; then
      timeout --kill-after=2 20 srun --overlap --nodes=1 --ntasks=1 --nodelist="$first" true &
      asked=$!
    fi
    if kill -0 "$asked" 2>/dev/null; then continue; fi
    quiet=0
    if wait "$asked"; then
      asked=''
      continue
    fi
    asked=''
    # What srun would have passed on goes to the job's log.
    exec >>"$(scontrol show job "$SLURM_JOB_ID" -o | grep -o 'StdOut=[^ ]*' | cut -d= -f2)" 2>&1
    echo "error: $first, where the job's script ran, does not answer; the job goes on from its last checkpoint"
    requeue && return
  done
}
if [ "$SLURM_NODEID" = 1 ] && [ "$SLURM_LOCALID" = 0 ]; then
  source slurm/requeue.sh
  succeed >>"$log" 2>&1 </dev/null &
  successor=$!
fi

# Python says on SIGUSR2 where it is, once it has begun.
(trap '' USR2 && exec "$@") &
command=$!
if [ -n "$passed" ]; then kill -s "$passed" "$command"; fi
# A signal ends `wait` before the command ends.
while kill -0 "$command" 2>/dev/null; do wait "$command"; done
wait "$command"
code=$?
# What the job's script watches: srun itself waits for the tasks of a node that is gone.
if [ "$code" != 0 ]; then echo "$SLURM_PROCID $code" >>"$LOG_DIR/failed.${SLURM_RESTART_COUNT:-0}"; fi
if [ -n "$successor" ]; then
  # A crash may be all that is heard of the first node's death: this task stays until the script gave signs, the first of
  # which may be old.
  signs=0 last="$(heartbeat)"
  while [ "$code" != 0 ] && [ "$code" != 2 ] && [ "$signs" -lt 2 ] && kill -0 "$successor"; do
    sleep 1
    now="$(heartbeat)"
    if [ "$now" != "$last" ]; then last="$now" signs=$((signs + 1)); fi
  done
  kill -KILL "$successor" 2>/dev/null
fi
exit "$code"
