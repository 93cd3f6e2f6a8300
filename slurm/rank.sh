# shellcheck shell=bash
# Runs one rank's command; its output goes to the rank's own file as well, and of rank 0 to the job's log. What other
# ranks print stays in their files; their errors are in the job's log too.
mkdir -p "$LOG_DIR"
log="$LOG_DIR/rank-$SLURM_PROCID.log"
echo "--- $(date -Is) on ${SLURMD_NODENAME:-$HOSTNAME}, restart ${SLURM_RESTART_COUNT:-0}" >>"$log"
# Signals reach the whole task: the command saves itself on them, and what surrounds it must outlive it.
if [ "$SLURM_PROCID" = 0 ]; then
  exec > >(trap '' TERM USR1 INT && exec tee -a "$log")
else
  exec >>"$log"
fi
exec 2> >(trap '' TERM USR1 INT && exec tee -a "$log" >&2)
trap : TERM USR1 INT
"$@" &
command=$!
# A signal ends `wait` before the command ends.
while kill -0 "$command" 2>/dev/null; do wait "$command"; done
wait "$command"
code=$?
# What the job's script watches: srun itself waits for the tasks of a node that is gone.
if [ "$code" != 0 ]; then echo "$SLURM_PROCID $code" >>"$LOG_DIR/failed.${SLURM_RESTART_COUNT:-0}"; fi
exit "$code"
