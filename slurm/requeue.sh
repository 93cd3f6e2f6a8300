# shellcheck shell=bash
# Puts the job back into the queue. Sourced by env.sh, and by rank.sh for a job whose script died with its node.

# Of a job that goes on with fewer nodes SLURM still tells all the tasks that it had.
tasks_per_node() {
  echo "${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))}"
}

# show_job PATTERN: the words of what SLURM knows of the job that match.
show_job() {
  scontrol show job "$SLURM_JOB_ID" -o | grep -oE " $1" | cut -c2-
}

# Whether SLURM has put the job back into the queue by itself: a node died, or a more important job came.
is_requeued() {
  local restarts
  restarts="$(show_job 'Restarts=[0-9]+')"
  restarts="${restarts#Restarts=}"
  [ "${restarts:-0}" -gt "${SLURM_RESTART_COUNT:-0}" ]
}

# requeue: puts the job back into the queue, up to MAX_REQUEUES (20) times. Nodes that were found sick are left out. Where
# SLURM does not answer it is asked for five minutes.
requeue() {
  local said asked=0
  # Requeueing ends this shell, which has more to say: a signal that is ignored here is ignored by what it calls, too.
  trap '' TERM
  until is_requeued; do
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_REQUEUES:-20}" ]; then
      echo "error: requeued ${SLURM_RESTART_COUNT:-0} times already (MAX_REQUEUES); submit it again to go on" >&2
      return 1
    fi
    if said="$(scontrol requeue "$SLURM_JOB_ID" 2>&1)"; then break; fi
    # Not every site lets jobs go back.
    if [[ "$said" == *disabled* || "$said" == *denied* ]] || [ $((asked += 1)) -ge 60 ]; then
      echo "error: not requeued: $said" >&2
      return 1
    fi
    sleep 5
  done
  let_shrink || echo "error: SLURM did not take new settings; the job waits for as many nodes as it had" >&2
}

# let_shrink: what a job is to be given that waits again. It does not start before this shell has ended.
let_shrink() {
  local settings=() excluded asked=0
  # SLURM asks again for as many tasks as the job had, so that a node less would not do although `--nodes=MIN-MAX` allows
  # it. With the tasks of one node --nodes alone decides. (MIN itself is not told while nodes still clear up.)
  if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then settings+=("NumTasks=$(tasks_per_node)"); fi
  if [ -s "$LOG_DIR/sick" ]; then
    excluded="$(show_job 'ExcNodeList=[^ ]*')"
    excluded="${excluded#ExcNodeList=}"
    if [ "$excluded" = "(null)" ]; then excluded=''; fi
    settings+=("ExcNodeList=$(sort -u "$LOG_DIR/sick" | paste -sd ,)${excluded:+,$excluded}")
  fi
  if [ "${#settings[@]}" = 0 ]; then return; fi
  until scontrol update JobId="$SLURM_JOB_ID" "${settings[@]}" 2>/dev/null; do
    if [ $((asked += 1)) -ge 20 ]; then return 1; fi
    sleep 1
  done
}
