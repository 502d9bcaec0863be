"""The notebook runs from the first cell to the last, in a short form, and leaves a trained pipeline that loads."""

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

from dit_hf import DiTClassCondPipeline


NOTEBOOK = ROOT / "examples" / "dit_hf_tour.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_is_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))


def test_runs_and_trains(notebook, tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.setenv("DIT_HF_NOTEBOOK_STEPS", "4")
    # Or the kernel writes into the user's home.
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}})
    ran = client.execute()  # raises at the first cell that fails

    outputs = [output for cell in code_cells(ran) for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6  # five grids and the curve of losses
    assert "flow_heun: 3 steps, 5 model calls" in "".join(output.get("text", "") for output in outputs)
    assert len(list((folder / "pictures" / "cats").iterdir())) == 12
    pipe = DiTClassCondPipeline.from_pretrained(folder / "my-model")
    assert list(pipe.labels) == ["cats", "fruits", "hearts"]
    assert pipe.transformer.proj_out.weight.abs().max() > 0  # zero before the first step
    assert pipe("cats", num_inference_steps=2).images[0].size == (64, 64)
