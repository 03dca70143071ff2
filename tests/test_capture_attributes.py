"""Plain attributes of modules: captured where they can be restored exactly, and put back as they were."""

import json
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import trainings
from orchestrator.snapshot.attributes import Built, capture_attributes, restore_attributes
from orchestrator.snapshot.capture import capture_module, compare_module, restore_module
from orchestrator.snapshot.encoding import decode, encode
from states import State


class Part(nn.Module):
    """A module with whatever attributes are given."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        for name, value in attributes.items():
            setattr(self, name, value)


def stored(tree: Any) -> Any:
    encoded = encode(tree)
    return decode(
        json.loads(json.dumps(encoded.document)), {n: t.clone() for n, t in encoded.tensors.items()}
    )


def kept(module: nn.Module) -> dict[str, Any]:
    return capture_attributes(module)["values"].get("", {})


def test_data_of_every_kind_comes_back_as_it_was() -> None:
    attributes = {
        "_hidden": (torch.ones(2), [torch.zeros(3, dtype=torch.bfloat16)]),
        "steps": 3,
        "temperature": float("nan"),
        "recent": deque([torch.tensor(1.5), 2], maxlen=3),
        "seen": {1, 2},
        "counts": Counter(a=2),
        "nested": OrderedDict(a={"b": [1, {"c": None}]}),
        "by_length": defaultdict(list, {3: [1]}),
        "array": np.arange(4.0),
    }
    part, other = Part(**attributes), Part()
    restore_attributes(other, stored(capture_attributes(part)))
    for name, value in attributes.items():
        found = getattr(other, name)
        assert type(found) is type(value)
        assert repr(found) == repr(value)
    assert other.recent.maxlen == 3
    assert other.by_length[9] == []


def test_what_cannot_be_restored_exactly_is_left_out() -> None:
    part = Part(function=len, path=Path("x"), device=torch.device("cpu"), lists=[object()])
    part.weights = [part.layer.weight]
    part.view = part.layer.weight.detach()[0]
    part.itself = {}
    part.itself["me"] = part.itself
    part.parts = [part.layer]
    assert kept(part) == {}


def test_public_attributes_of_torchs_modules_are_captured_and_private_ones_are_not() -> None:
    lstm = nn.LSTM(2, 2)
    assert kept(lstm)["hidden_size"] == 2
    assert not any(name.startswith("_") for name in kept(lstm))
    parametrized = Part(_mine=1, weight=nn.Parameter(torch.ones(2, 2)))
    assert kept(parametrizations.weight_norm(parametrized))["_mine"] == 1, "its class is one that torch made"
    dropout = nn.Dropout(0.5)
    tree = stored(capture_attributes(dropout))
    dropout.p = 0.1
    restore_attributes(dropout, tree)
    assert dropout.p == 0.5


def test_tensors_are_new_ones_but_those_that_an_optimizer_may_hold() -> None:
    batch = torch.ones(3)
    trained = torch.ones(2, requires_grad=True)
    part = Part(memory=batch, trained=trained)
    tree = stored(capture_attributes(part))
    batch.zero_()
    with torch.no_grad():
        trained.zero_()
    restore_attributes(part, tree)
    assert part.memory is not batch
    assert batch.sum() == 0, "the tensor may be the data's"
    assert part.trained is trained
    assert trained.tolist() == [1, 1]
    assert trained.requires_grad


def test_one_object_under_two_names_is_one_again() -> None:
    shared = [torch.zeros(1)]
    part = Part(one=shared, inner=Part(other=shared))
    fresh = Part(inner=Part())
    restore_attributes(fresh, stored(capture_attributes(part)))
    assert fresh.one is fresh.inner.other
    tensor = torch.zeros(2)
    part, fresh = Part(a=tensor, b=(tensor,)), Part()
    restore_attributes(fresh, stored(capture_attributes(part)))
    assert fresh.a is fresh.b[0]


def test_tensors_that_overlap_are_captured_only_while_nobody_writes_to_them() -> None:
    output = torch.arange(6.0).view(2, 3)
    part = Part(output=output, last=output[1])
    assert set(kept(part)) == {"output", "last"}
    output[0, 0] = 9
    assert not kept(part)


def test_attributes_that_came_later_go_and_those_of_the_script_stay() -> None:
    part = Part(steps=0)
    built, tree = Built.of(part), stored(capture_attributes(part))
    part.steps, part.hidden = 5, torch.ones(1)
    restore_attributes(part, tree, built)
    assert part.steps == 0
    assert not hasattr(part, "hidden")
    newer = Part(steps=0, option=True)
    restore_attributes(newer, tree, Built.of(newer))
    assert newer.option is True


def test_strings_are_the_scripts_unless_training_changed_them() -> None:
    part = Part(folder="/here", stage="warmup")
    built = Built.of(part)
    part.stage = "main"
    tree = stored(capture_attributes(part, built))
    other = Part(folder="/there", stage="warmup")
    restore_attributes(other, tree, Built.of(other))
    assert (other.folder, other.stage) == ("/there", "main")


def test_a_name_that_is_a_parameter_now_is_a_difference() -> None:
    part, other = Part(scale=1.0), Part(scale=nn.Parameter(torch.ones(())))
    found = compare_module(other, capture_module(part))
    assert any("attribute 'scale'" in difference and "parameter" in difference for difference in found)


def test_modules_are_found_inside_torch_compile() -> None:
    part = Part(inner=Part(steps=1))
    tree = stored(capture_attributes(torch.compile(part)))
    part.inner.steps = 7
    restore_attributes(torch.compile(part), tree)
    assert part.inner.steps == 1


def test_a_checkpoint_from_before_attributes_were_captured_fits() -> None:
    part = Part(steps=4)
    tree = capture_module(part)
    del tree["attributes"]
    assert compare_module(part, tree) == []
    restore_module(part, tree)
    assert part.steps == 4


# --- in a training ----------------------------------------------------------------------------------------------


class Tempered(nn.Module):
    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.layers, self.temperature, self.calls = trainings.network(), temperature, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(x) / self.temperature


def test_a_constant_that_the_script_changed_is_listed_and_the_checkpoint_wins(tmp_path: Path) -> None:
    first = trainings.make(tmp_path, model=Tempered(1.0))
    first.start()
    first.advance(until=State.EPOCH_END)
    first.close()
    again = trainings.make(tmp_path, model=Tempered(2.0))
    with pytest.warns(
        UserWarning, match=r"temperature of the model: checkpoint has 1\.0, .* built with 2\.0"
    ) as all_:
        again.fit("auto")
    assert again.model.temperature == 1.0
    assert not any("calls" in str(warning.message) for warning in all_), "training changed it, not the script"


def test_a_second_attempt_in_the_same_process_goes_back_to_how_it_was(tmp_path: Path) -> None:
    whole = trainings.make(tmp_path / "whole", model=Tempered)
    whole.fit()
    trainer = trainings.make(tmp_path / "broken", model=Tempered)
    trainer.start()
    for _ in range(9):
        trainer.advance()
    trainer.model.layers[0].register_forward_hook(_fail_once())
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    trainer.fit(resume=trainer.run.path)
    assert trainer.model.calls == whole.model.calls == 18
    trainings.assert_equal(trainings.weights(trainer), trainings.weights(whole))


def _fail_once() -> Any:
    left = [1]

    def fail(*_: Any) -> None:
        if left:
            left.clear()
            raise ZeroDivisionError

    return fail


def test_a_validation_that_is_broken_off_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    class Counting(Tempered):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += len(x)
            if not self.training:
                self.latest = x
                if halting and trainer.batches == 6 and self.calls > 7:
                    halting.clear()
                    trainer.halt("in the middle of validation")
            return super().forward(x) * (1 + 0.001 * self.seen + 0.01 * self.calls)

    halting: list[int] = []
    trainer = whole = trainings.make(tmp_path / "whole", model=Counting, val_loader=trainings.loader(8))
    whole.fit()
    halting.append(1)
    trainer = trainings.make(tmp_path / "broken", model=Counting, val_loader=trainings.loader(8))
    assert trainer.fit().state is State.HALTED
    assert trainer.model.calls == 6
    assert trainer.model.seen == 48
    assert not hasattr(trainer.model, "latest")
    trainer = trainings.make(tmp_path / "broken", model=Counting, val_loader=trainings.loader(8))
    trainer.fit("auto")
    trainings.assert_equal(trainings.weights(trainer), trainings.weights(whole))
    assert trainer.model.calls == whole.model.calls
