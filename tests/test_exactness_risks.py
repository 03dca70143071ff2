"""What cannot be exact is said before training; costs are paid only where something is asked for."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import trainings
from orchestrator.exactness import risks

CPU = torch.device("cpu")


def test_compiling_with_shapes_on_demand_is_said() -> None:
    plain = trainings.network()
    assert risks(plain, CPU) == []
    assert risks(torch.compile(trainings.network(), dynamic=False), CPU) == []
    assert risks(torch.compile(trainings.network(), dynamic=True), CPU) == []
    (said,) = risks(torch.compile(trainings.network()), CPU)
    assert said.startswith("the model is compiled")
    within = nn.Sequential(torch.compile(trainings.network()), nn.Identity())
    assert [text.split(" is ")[0] for text in risks(within, CPU)] == ["module '0'"]
    by_method = trainings.network()
    by_method.compile()
    assert len(risks(by_method, CPU)) == 1


def test_kernels_of_an_accelerator_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")  # only its name is looked at
    assert any("deterministic=True" in text for text in risks(trainings.network(), cuda))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert sum("cudnn.benchmark" in text for text in risks(trainings.network(), cuda)) == 1
    torch.use_deterministic_algorithms(True)
    try:
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        assert risks(trainings.network(), cuda) == []
    finally:
        torch.use_deterministic_algorithms(False)


def test_it_is_said_when_the_training_starts(tmp_path: Path) -> None:
    trainer = trainings.make(tmp_path)
    trainer.model.compile()  # compiled at the first batch, which this test does not come to
    with pytest.warns(UserWarning, match="makes it exact"):
        trainer.start()
    trainer.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = trainings.make(tmp_path)
        plain.start()
        plain.close()
