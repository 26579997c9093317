"""The Slurm script of docs/cluster.md works as it is printed."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from harness.measurements.ablation.tables import cell_states
from tests import warm
from tests.slurm.cluster import Cluster
from tests.studies import ROOT, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
# What the page leaves at its defaults is made small here: the settings come from a `harness` in front of ours.
SMALLER = ["model.recall.dim=16", "model.recall.hidden_dim=32", "model.recall.context_length=32",
           "model.recall.steps=20", "tasks.recall.n_sequences=8", "region.controls=[]", "region.kinds=[small]"]


def test_script_of_the_page(slurm: Cluster, tmp_path: Path):
    page = (ROOT / "docs" / "cluster.md").read_text()
    commands, script = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    assert script.startswith("#!/bin/bash\n#SBATCH")
    (tmp_path / "array.sh").write_text(script)
    (tmp_path / "bin").mkdir()
    harness = tmp_path / "bin" / "harness"
    smaller = " ".join(f"'{one}'" for one in [*SMALLER, f"model.recall.cache_dir={tmp_path}/trained"])
    harness.write_text(f"""#!/bin/bash
[ "$1" = plan ] && exec {warm.python()} -m harness "$@" {smaller}
exec {warm.python()} -m harness "$@"
""")
    harness.chmod(0o755)
    environment = {**slurm.env, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
                   "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-e", "-c", commands], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    job = int(re.search(r"Submitted batch job (\d+)", done.stdout).group(1))
    logs = lambda: "\n".join(path.read_text() for path in tmp_path.glob("shard-*.log"))  # noqa: E731
    wait_until(lambda: set(slurm.states(job).values()) <= {"COMPLETED", "FAILED"}, logs)
    assert set(slurm.states(job).values()) == {"COMPLETED"}, logs()
    states = cell_states(tmp_path / "study")
    n_cells = int(re.search(r"cells (\d+):", done.stdout).group(1))
    assert len(states) == n_cells and set(states.values()) == {"ok"}
