"""Digests of the parameters: what they see, what they leave alone, and where they stand in the journal."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from orchestrator import ParameterDigests, Trainer
from orchestrator.callbacks import parameter_digests
from orchestrator.callbacks.parameter_digests import digest_by_bytes, digest_by_xor, parameter_digest
from orchestrator.errors import ConfigurationError
from states import State, Trigger
from tracking.journal import Journal, Transition
from trainings import make, spoilt

METHODS = [
    pytest.param(
        digest_by_xor, marks=pytest.mark.skipif(not hasattr(torch, "hash_tensor"), reason="older torch")
    ),
    digest_by_bytes,
]
Digest = Callable[[Mapping[str, Tensor]], str]


def rows_of(trainer: Trainer) -> list[Transition]:
    assert trainer.run is not None
    with Journal.open(trainer.run) as journal:
        return list(journal.transitions(scope="train"))


def digests_of(trainer: Trainer) -> list[tuple[str, int, int, str]]:
    """(trigger, epoch, batch, note) of each row with a digest."""
    return [
        (row.trigger.value, row.epoch, row.batch, row.note)
        for row in rows_of(trainer)
        if "parameters" in row.note
    ]


# -- a digest ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("digest", METHODS)
@pytest.mark.parametrize("size", [1, 5, 1021, 2042, 20_000, 3_000_000])
def test_any_bit_anywhere_is_seen(digest: Digest, size: int) -> None:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(1))
    before = digest({"weight": weight})
    assert digest({"weight": weight.clone()}) == before
    for place in {0, size // 3, size - 1}:
        changed = weight.clone()
        changed.view(torch.int32)[place] ^= 1  # the last bit of the mantissa
        assert digest({"weight": changed}) != before
        changed = weight.clone()
        changed[place] = -changed[place]
        assert digest({"weight": changed}) != before


@pytest.mark.parametrize("digest", METHODS)
def test_what_a_xor_of_all_elements_would_not_see(digest: Digest) -> None:
    """Order, constant tensors, the sign of zero, payloads of NaN, which tensor it is, and its shape."""
    weight = torch.arange(20_000.0)
    swapped = weight.clone()
    swapped[[3, 4]] = weight[[4, 3]]
    nan = torch.full((9000,), torch.nan)
    other_nan = nan.clone()
    other_nan.view(torch.int32)[8] ^= 1
    seen = [
        digest(tensors)
        for tensors in (
            {"w": weight},
            {"w": swapped},
            {"w": weight.flip(0)},
            {"w": weight.view(100, 200)},
            {"w": weight.double()},
            {"v": weight},
            {"w": torch.zeros(20_000)},
            {"w": torch.ones(20_000)},
            {"w": torch.full((20_000,), 2.0)},
            {"w": -torch.zeros(20_000)},
            {"w": nan},
            {"w": other_nan},
            {"w": torch.ones(4), "v": torch.zeros(4)},
            {"w": torch.zeros(4), "v": torch.ones(4)},
            {"w": torch.empty(0)},
            {},
        )
    ]
    assert len(set(seen)) == len(seen)
    assert all(len(found) == 16 for found in seen)


@pytest.mark.parametrize("digest", METHODS)
@pytest.mark.parametrize(
    "kind",
    [
        *(torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.int8),
        *(torch.int64, torch.bool, torch.uint8, torch.uint16, torch.float8_e4m3fn),
    ],
)
def test_every_type_and_layout(digest: Digest, kind: torch.dtype) -> None:
    values = torch.randint(0, 2, (130, 67), generator=torch.Generator().manual_seed(2)).to(kind)
    before = digest({"w": values})
    assert digest({"w": values.t().contiguous().t()}) == before  # its values count, and not how they lie
    shifted = torch.cat([values.flatten()[:1], values.flatten()])[1:]  # words that begin at an odd address
    assert digest({"w": shifted.view(130, 67)}) == before
    assert digest({"w": values.t()}) != before
    scalar = values[0, 0].clone()
    assert digest({"w": scalar}) == digest({"w": scalar.clone()})


@given(st.lists(st.floats(width=32), max_size=30), st.lists(st.floats(width=32), max_size=30))
@settings(max_examples=200, deadline=None)
def test_two_methods_one_judgement(one: list[float], other: list[float]) -> None:
    tensors = [{"w": torch.tensor(values).repeat(600)} for values in (one, other)]
    same = digest_by_bytes(tensors[0]) == digest_by_bytes(tensors[1])
    if hasattr(torch, "hash_tensor"):
        assert (digest_by_xor(tensors[0]) == digest_by_xor(tensors[1])) == same
    assert same == torch.equal(tensors[0]["w"].view(torch.int32), tensors[1]["w"].view(torch.int32))


def test_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 2)
    monkeypatch.delattr(torch, "hash_tensor", raising=False)
    assert parameter_digest(model) == f"blake2:{digest_by_bytes(dict(model.named_parameters()))}"


def test_buffers_count_too() -> None:
    model = nn.BatchNorm1d(3)
    model.register_buffer("hidden", torch.zeros(2), persistent=False)
    before = parameter_digest(model)
    model.get_buffer("hidden")[1] = 1.0
    after = parameter_digest(model)
    model.get_buffer("running_mean")[0] = 1.0
    assert len({before, after, parameter_digest(model)}) == 3


# -- in a training -----------------------------------------------------------------------------------


def test_digests_stand_where_they_are_due_and_cost_nothing_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counted(model: nn.Module) -> str:
        made.append(parameter_digest(model))
        return made[-1]

    monkeypatch.setattr(parameter_digests, "parameter_digest", counted)
    trainer = make(tmp_path, callbacks=[ParameterDigests(every_batches=4)])
    trainer.fit()
    found = digests_of(trainer)
    expected = [
        *[
            ("end_batch", 0, 0),
            ("end_batch", 0, 4),
            ("end_epoch", 0, 5),
            ("end_batch", 1, 2),
            ("end_epoch", 1, 5),
        ],
        *[("end_batch", 2, 0), ("end_batch", 2, 4), ("end_epoch", 2, 5)],
    ]
    assert [row[:3] for row in found] == expected
    assert [row[3] for row in found] == [f"parameters {digest}" for digest in made]
    assert len(set(made)) == len(made)
    assert made[-1] == parameter_digest(trainer.model)
    assert ParameterDigests().state_dict() == {}


def test_the_same_training_has_the_same_digests_whatever_happens_to_it(tmp_path: Path) -> None:
    whole = make(tmp_path, callbacks=[ParameterDigests(every_batches=1)])
    whole.fit()
    other = make(tmp_path, seed=2, callbacks=[ParameterDigests(every_batches=1)])
    other.fit()
    cut = make(tmp_path, callbacks=[ParameterDigests(every_batches=1)])
    for _ in range(40):
        cut.advance()
    assert cut.run is not None
    cut.close()
    again = make(tmp_path, callbacks=[ParameterDigests(every_batches=1)])
    again.fit(resume=cut.run.path)
    assert digests_of(again) == digests_of(whole)
    assert len(digests_of(whole)) == 18 + 3
    pairs = zip(digests_of(whole), digests_of(other), strict=True)
    assert all(one[:3] == two[:3] and one[3] != two[3] for one, two in pairs)


@pytest.mark.parametrize("options", [{"accumulate": 4}, {"nonfinite": "skip"}])
def test_every_due_batch_has_its_digest(tmp_path: Path, options: dict[str, object]) -> None:
    trainer = make(tmp_path, epochs=1, callbacks=[ParameterDigests(every_batches=2)], **options)
    trainer.fit()
    assert [row[:3] for row in digests_of(trainer)] == [
        *[("end_batch", 0, 0), ("end_batch", 0, 2), ("end_batch", 0, 4), ("end_epoch", 0, 5)]
    ]


def test_a_note_of_ones_own(tmp_path: Path) -> None:
    trainer = make(tmp_path, epochs=1, callbacks=[ParameterDigests()])
    trainer.after(Trigger.FORWARD)(lambda: trainer.note("looked") or trainer.note("twice"))
    trainer.on(State.EPOCH_END)(lambda: trainer.note("over"))
    trainer.before(Trigger.END_EPOCH)(lambda: trainer.note("soon"))
    trainer.fit()
    rows = rows_of(trainer)
    assert {row.note for row in rows if row.trigger is Trigger.FORWARD} == {"looked; twice"}
    last = next(row.note for row in rows if row.trigger is Trigger.END_EPOCH)
    assert last == f"soon; over; parameters {parameter_digest(trainer.model)}"
    with pytest.raises(ConfigurationError, match=r"note\('late'\) in DONE.*call it from a hook"):
        trainer.note("late")


def test_a_note_from_before_the_work_comes_after_what_the_work_notes(tmp_path: Path) -> None:
    """And a transition that gives way to a halt takes its note with it."""
    model = spoilt(torch.log, batch=2)
    trainer = make(tmp_path, epochs=1, model=model, nonfinite="skip")
    trainer.before(Trigger.STEP)(lambda: trainer.note("mine"))
    trainer.fit()
    notes = [row.note for row in rows_of(trainer) if row.trigger is Trigger.STEP]
    assert notes[1:4] == ["mine", "skipped: non-finite loss; mine", "mine"]


@pytest.mark.parametrize("every", [0, -1, 2.5, True, None])
def test_how_often_must_make_sense(every: object) -> None:
    with pytest.raises(ConfigurationError, match="ParameterDigests: every_batches is"):
        ParameterDigests(every_batches=every)  # type: ignore[arg-type]
