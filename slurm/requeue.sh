# shellcheck shell=bash
# Puts the job back into the queue. Sourced by env.sh, and by rank.sh for a job whose script died with its node.

# Of a job that goes on with fewer nodes SLURM still tells all the tasks that it had.
tasks_per_node() {
  echo "${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))}"
}

# persist COMMAND...: tries it for 20 seconds; what it complains of is told at the end alone.
persist() {
  local said
  for _ in {1..20}; do
    if said="$("$@" 2>&1)"; then return; fi
    sleep 1
  done
  echo "error: $*: $said" >&2
  return 1
}

# Whether SLURM has put the job back into the queue by itself: a node died, or a more important job came.
is_requeued() {
  local restarts
  restarts="$(scontrol show job "$SLURM_JOB_ID" -o | grep -o ' Restarts=[0-9]*' | cut -d= -f2)"
  [ "${restarts:-0}" -gt "${SLURM_RESTART_COUNT:-0}" ]
}

# requeue: puts the job back into the queue, up to MAX_REQUEUES (20) times. Nodes that were found sick are left out.
requeue() {
  local settings=() restarts="${SLURM_RESTART_COUNT:-0}" held=''
  # SLURM asks again for as many tasks as the job had, so that a node less would not do although `--nodes=MIN-MAX` allows
  # it. With the tasks of one node --nodes alone decides.
  if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then settings+=("NumTasks=$(tasks_per_node)"); fi
  if [ -s "$LOG_DIR/sick" ]; then settings+=("ExcNodeList=$(sort -u "$LOG_DIR/sick" | paste -sd ,)"); fi
  # Requeueing ends this shell, which has more to say: a signal that is ignored here is ignored by what it calls, too.
  trap '' TERM
  if ! is_requeued; then
    if [ "$restarts" -ge "${MAX_REQUEUES:-20}" ]; then
      echo "error: requeued $restarts times already (MAX_REQUEUES); submit it again to go on" >&2
      return
    fi
    # Settings can be changed only while a job waits.
    if [ "${#settings[@]}" -gt 0 ]; then held=hold; fi
    # Not every site lets jobs go back; scontrol says so, and the script's code why it stopped.
    scontrol "requeue$held" "$SLURM_JOB_ID" || return 0
  fi
  if [ "${#settings[@]}" -gt 0 ]; then persist scontrol update JobId="$SLURM_JOB_ID" "${settings[@]}" || true; fi
  if [ -n "$held" ]; then persist scontrol release "$SLURM_JOB_ID"; fi
}
