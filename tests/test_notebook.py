"""In a real kernel: what a training shows below its cell, stepping through a batch, and Ctrl-C."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

BEGIN = """
import torch
from torch import nn
from orchestrator import Trainer, seed_everything
from states import State

seed_everything(3)
data = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(5)]
model = nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), data, data[:2], epochs=3, track=None, name="book")
"""


def execute(folder: Path, *cells: str) -> list[list[Any]]:
    """The outputs of the cells, in a kernel that works in `folder`."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in (BEGIN, *cells)])
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute()
    return [cell.outputs for cell in notebook.cells[1:]]


@pytest.mark.long
@pytest.mark.xdist_group("notebook")
def test_a_training_is_shown_below_its_cell_and_can_be_stepped_through(tmp_path: Path) -> None:
    stepped, fitted, interrupted = execute(
        tmp_path,
        "trainer.advance(until=State.BACKWARD)\nmodel.weight.grad.shape, trainer.data[0].shape",
        "result = trainer.fit()\nresult.state, len(result.history)",
        # What Ctrl-C and the kernel's stop button do.
        "import _thread\n"
        'again = Trainer(model, optimizer, nn.CrossEntropyLoss(), data, epochs=2, track=None, name="again")\n'
        "again.after('step')(lambda: _thread.interrupt_main() if again.batches == 3 else None)\n"
        "halted = again.fit().state\nhalted, again.fit().state, len(again.history)",
    )
    assert "(torch.Size([2, 4]), torch.Size([8, 4]))" in _result(stepped)

    assert _result(fitted) == "(<State.DONE: 'DONE'>, 3)"
    (shown,) = (output for output in [*stepped, *fitted] if output.output_type == "display_data")
    html, text = shown.data["text/html"], shown.data["text/plain"]
    assert html.count("<tr>") == 1 + 3
    assert [f"{n}/3" in html and f"epoch {n}/3  loss " in text for n in (1, 2, 3)] == [True] * 3
    assert "done after 3 epochs and 15 batches" in html
    assert "<progress" not in html
    assert "batches/s" not in text
    assert not [output for output in fitted if output.output_type == "stream"], "lines beside the display"

    assert _result(interrupted) == "(<State.HALTED: 'HALTED'>, <State.DONE: 'DONE'>, 2)"


def _result(outputs: list[Any]) -> str:
    return next(output.data["text/plain"] for output in outputs if output.output_type == "execute_result")
