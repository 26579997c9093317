"""runtime.compile=true: the numbers of a run without it up to rounding, resumed at the edited block all the same."""

import shutil

import numpy as np
import pytest
import torch

from harness.errors import InputError
from harness.measurements import compose_settings
from harness.measurements.ablation.tables import read_metrics
from tests.checkpoints import save_checkpoint, text_file
from tests.studies import run_settings


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_blocks_give_the_same_numbers(tmp_path):
    checkpoint, text = save_checkpoint(tmp_path / "tiny"), text_file(tmp_path / "text.txt")
    overrides = ["model=pretrained", f"model.name={checkpoint}", "task=text", f"tasks.text.data_files={text}",
                 "tasks.text.window=32", "target.layer_types=[up_proj,q_proj]", "region=decile",
                 "region.deciles=[1,10]", "runtime.batch_tokens=128"]
    tables = {}
    for compiled in ("false", "true"):
        torch._dynamo.utils.counters.clear()
        folder = tmp_path / compiled
        words = [*overrides, f"runtime.compile={compiled}", f"output={folder}"]
        run_settings(compose_settings("ablation", words))
        tables[compiled] = read_metrics(folder)
        assert set(tables[compiled]["status"]) == {"ok"}
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        # all blocks, batches and edits share their graphs, but for shapes that torch specialises on
        assert graphs == 0 if compiled == "false" else 1 <= graphs <= 4
    columns = ["target", "region", "metric"]
    plain, compiled = (table.sort_values(columns) for table in tables.values())
    np.testing.assert_allclose(compiled["value"], plain["value"], rtol=1e-5)
    assert not set(plain["cell_id"]) & set(compiled["cell_id"])


@pytest.mark.parametrize("other", ["runtime.edit=branch", "model.device_map=auto"])
def test_what_cannot_be_compiled_is_refused(other):
    with pytest.raises(InputError, match="runtime.compile: True is wrong"):
        compose_settings("ablation", ["runtime.compile=true", other])
