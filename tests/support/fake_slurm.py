"""The commands of Slurm, as far as submitit calls them: a job runs here as soon as it is submitted, or again."""

from __future__ import annotations

from pathlib import Path

SCRIPTS = {
    "sbatch": 'cp "$1" FOLDER/submitted.sh; scontrol requeue 7; echo "Submitted batch job 7"',
    "scontrol": "echo $1 $2 >> FOLDER/requeued; SLURM_JOB_ID=7 setsid bash FOLDER/submitted.sh > /dev/null 2>&1 &",
    "srun": 'while [ "$1" != env ]; do shift; done; SLURM_LOCALID=0 SLURM_PROCID=0 SLURM_NTASKS=1 exec "$@"',
    "sacct": "echo 'JobID|State'; echo '7|RUNNING'",
    "scancel": "echo $1 >> FOLDER/cancelled",
}


def write_commands(folder: Path) -> None:
    """Write the commands to ``folder/bin``; what they were told lies in ``folder``."""
    (folder / "bin").mkdir()
    for name, script in SCRIPTS.items():
        path = folder / "bin" / name
        path.write_text("#!/bin/bash\n" + script.replace("FOLDER", str(folder)) + "\n", encoding="utf-8")
        path.chmod(0o755)
