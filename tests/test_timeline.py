"""timeline.html and what it is made of: its numbers equal the journal's, and its size is bounded."""

import json
import math
import re
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import trainings
from deliveries import Training
from orchestrator import Checkpointing
from orchestrator.cli import main
from states.table import State, Trigger
from tracking import tally as tallying
from tracking import timeline
from tracking.artifacts import REPORTS, make_reports
from tracking.curves import curves, resumes, write_curves
from tracking.mlflow_delivery import MLflow
from tracking.outbox import read_outbox
from tracking.runs import RunFolder, create_run, find_run
from tracking.shipper import sync
from tracking.tally import BETWEEN, GONE, VALIDATION, tally
from tracking.timeline import write_timeline


def embedded(page: Path) -> dict[str, Any]:
    """The data in the page."""
    found = re.search(r"^const D = (.*);$", page.read_text(), re.MULTILINE)
    assert found is not None
    data = json.loads(found[1])
    assert isinstance(data, dict)
    return data


def rows_of(run: RunFolder, sql: str) -> list[Any]:
    with closing(sqlite3.connect(f"{run.journal.as_uri()}?mode=ro", uri=True)) as journal:
        return journal.execute(sql).fetchall()


def unpacked(data: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The page's single transitions: (seq, attempt, scope, epoch, batch, trigger, end in ns, duration in ns)."""
    columns, found, at = data["rows"], [], 0
    gaps = {(row, pos): ns for row, pos, ns in columns["gaps"]}
    values = dict.fromkeys(("seq", "attempt", "scope", "word", "epoch", "batch", "t"), 0)
    for number in range(len(columns["seq"])):
        for name in values:
            values[name] += columns[name][number]
        end = values["t"]
        for pos, pattern in enumerate(data["words"][str(values["word"])]):
            duration = columns["d"][at]
            at += 1
            if pos:
                end += duration + gaps.get((number, pos), 0)
            place = (values["epoch"], values["batch"])
            scope = data["scopes"][str(values["scope"])]
            seq = values["seq"] + pos
            found.append((seq, values["attempt"], scope, *place, pattern[0], end, duration))
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Trained, halted in the middle of a batch, gone on from an older checkpoint, with validation and skips."""
    root = tmp_path_factory.mktemp("runs")
    options: dict[str, Any] = {
        "val_loader": trainings.loader(16),
        "nonfinite": "skip",
        "checkpoint": Checkpointing(every_batches=4),
    }
    trainer = trainings.make(root, **options)

    @trainer.after(Trigger.FETCH)
    def spoil() -> None:
        if trainer.batches == 2:
            trainer.data[0].mul_(math.nan)

    @trainer.after(Trigger.BACKWARD)
    def fail() -> None:
        if trainer.batches == 9:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError):
        trainer.fit()
    trainings.make(root, **options).fit(resume="auto")
    return find_run("test", root)


def test_the_page_s_totals_are_the_journal_s(run: RunFolder, tmp_path: Path) -> None:
    write_timeline(run, tmp_path / "page.html")
    data = embedded(tmp_path / "page.html")
    found = sorted((*key, count, ns, most) for *key, count, ns, most in data["totals"])
    assert found == sorted(
        rows_of(
            run,
            """SELECT scope, trigger, source, dest, phase, count(*), sum(duration_ns), max(duration_ns)
               FROM transitions GROUP BY scope, trigger, source, dest, phase""",
        )
    )
    assert data["superseded"] == list(
        rows_of(
            run,
            """SELECT count(*), sum(duration_ns) FILTER (WHERE scope = 'train') FROM all_transitions
               WHERE superseded""",
        )[0]
    )
    assert data["superseded"][0] > 0
    assert [attempt["outcome"] for attempt in data["attempts"]] == ["failed", "done"]
    assert data["state"] == "DONE"


def test_the_page_s_transitions_are_the_journal_s(run: RunFolder, tmp_path: Path) -> None:
    write_timeline(run, tmp_path / "page.html")
    data = embedded(tmp_path / "page.html")
    assert data["complete"]
    assert unpacked(data) == [
        (*row[:-2], row[-2] - int(data["base_ns"]), row[-1])
        for row in rows_of(
            run,
            """SELECT seq, attempt, scope, epoch, batch, trigger, time_ns, duration_ns FROM all_transitions
               ORDER BY seq""",
        )
    ]
    losses = [loss for loss in data["rows"]["loss"] if loss is not None]
    journaled = rows_of(
        run, "SELECT loss FROM all_transitions WHERE trigger = 'forward' AND loss IS NOT NULL ORDER BY seq"
    )
    assert "nan" in losses
    assert [x if isinstance(x, str) else pytest.approx(x, rel=1e-4) for x in losses] == [
        loss for (loss,) in journaled
    ]
    notes = " ".join(data["rows"]["notes"].values())
    assert "skipped" in notes
    assert "from 0000" in notes


def test_time_adds_up(run: RunFolder) -> None:
    found = tally(run)
    for stretch in found.stretches:
        elapsed = stretch.end_ns - stretch.start_ns
        assert sum(stretch.ns.values()) == pytest.approx(elapsed, abs=elapsed / 100 + 1000)
    spent = sum(total.ns for (scope, _, _), total in found.totals.items() if scope != "train")
    by_epoch = [epochs.ns for epochs in found.epochs]
    assert sum(ns[VALIDATION] for ns in by_epoch) == spent > 0
    trained = sum(total.ns for (scope, _, _), total in found.totals.items() if scope == "train")
    assert sum(sum(ns.values()) for ns in by_epoch) == trained, "validation is part of its end_epoch"
    assert [epochs.batches for epochs in found.epochs] == [6, 6, 6]
    assert any(stretch.ns[GONE] for stretch in found.stretches)
    assert any(stretch.ns[BETWEEN] for stretch in found.stretches), "checkpoints were saved"


def test_a_row_of_which_the_end_is_superseded(tmp_path: Path) -> None:
    run = create_run(tmp_path, "cut")
    training = Training(run)
    for _ in range(3):
        training.batch()
    step = training.recorder.next_seq - 2  # in the middle of a packed row
    training.writer.sync()
    training.end("stopped", "enough")
    again = Training(run, position=step, done=2)
    again.end("stopped")
    found = tally(run)
    counted = {
        (arc.trigger.value, arc.source.value, total.count, total.ns)
        for (_, arc, _), total in found.totals.items()
        if total.count
    }
    assert counted == set(
        rows_of(
            run,
            "SELECT trigger, source, count(*), sum(duration_ns) FROM transitions GROUP BY trigger, source, dest",
        )
    )
    assert (found.gone.count,) == rows_of(run, "SELECT count(*) FROM all_transitions WHERE superseded")[0]


def test_the_page_of_a_run_that_has_not_begun(tmp_path: Path) -> None:
    run = create_run(tmp_path, "new")
    write_timeline(run, tmp_path / "page.html")
    assert embedded(tmp_path / "page.html")["totals"] == []
    write_curves(run, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_in_the_data_ends_the_script(tmp_path: Path) -> None:
    run = create_run(tmp_path, "sly")
    training = Training(run)
    training.batch()
    training.end("stopped", "</script><!-- ")
    write_timeline(run, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("</script>") == 1
    assert "<!--" not in page
    assert embedded(tmp_path / "page.html")["attempts"][0]["reason"] == "</script><!-- "


def test_the_page_needs_nothing_from_elsewhere(run: RunFolder, tmp_path: Path) -> None:
    write_timeline(run, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?://|<link|src=|@import|url\(|localStorage|fetch\(|import\(", page)


def test_a_long_run_keeps_the_newest_the_first_the_slowest_and_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeline, "_NEWEST", 200)
    monkeypatch.setattr(timeline, "_FIRST", 20)
    monkeypatch.setattr(tallying, "_MOST_STRETCHES", 40)
    run = create_run(tmp_path, "long")
    training = Training(run)
    for number in range(2000):
        training.batch()
        if number == 700:
            now = training.walk
            now.go(Trigger.FETCH)
            now.go(Trigger.FORWARD)
            now.go(Trigger.BACKWARD)
            now.go(Trigger.STEP, note="skipped: loss was nan")
            now.go(Trigger.END_BATCH)
    training.end()
    write_timeline(run, tmp_path / "page.html")
    data = embedded(tmp_path / "page.html")
    assert not data["complete"]
    assert len(data["stretches"]) <= 40 + 1
    kept = {row[0] for row in unpacked(data)}
    (total,) = rows_of(run, "SELECT count(*) FROM transitions")[0]
    assert {1, 2, 3, total - 1, total} <= kept
    (skipped,) = rows_of(run, "SELECT seq FROM transitions WHERE note LIKE 'skipped%'")[0]
    assert skipped in kept
    assert len(kept) < total / 2
    assert sum(count for *_, count, _, _ in data["totals"]) == total


@pytest.mark.long
def test_two_million_transitions_take_seconds_and_make_a_small_page(tmp_path: Path) -> None:
    run = create_run(tmp_path, "big")
    training = Training(run)
    for _ in range(10):
        training.batch()
    training.end()
    with closing(sqlite3.connect(run.journal)) as journal, journal:
        (word,) = journal.execute("SELECT word FROM words GROUP BY word HAVING count(*) = 5").fetchone()
        journal.executemany(
            f"INSERT INTO packed_transitions VALUES ({', '.join('?' * 24)})",
            (
                (1000 + 5 * n, 1, 1, word, 3 + n // 4000, n % 4000, 1_800_000_000_000_000_000 + 5000 * n,
                 1000, 2000, 3000, 4000, None, None, None, 1000, 1000, 1000, 1000, 1000, None, None, None,
                 1 / (n + 1), None)
                for n in range(400_000)
            ),
        )  # fmt: skip
    began = time.process_time()
    write_timeline(run, tmp_path / "page.html")
    assert time.process_time() - began < 30
    assert (tmp_path / "page.html").stat().st_size < 3_000_000
    data = embedded(tmp_path / "page.html")
    assert len(data["epochs"]) <= 400
    (forwards,) = {count for _, trigger, _, _, _, count, _, _ in data["totals"] if trigger == "forward"}
    assert forwards == 400_010


def test_curves_are_the_journal_s_metrics(run: RunFolder, tmp_path: Path) -> None:
    found = curves(run)
    assert found["loss"].keys() == {"batch", "train", "val"}
    batches = dict(
        rows_of(
            run,
            """SELECT step, value FROM metrics WHERE key = 'loss' AND scope = 'train' AND batch >= 0
               AND typeof(value) = 'real'""",
        )
    )
    assert dict(zip(found["loss"]["batch"].x, found["loss"]["batch"].mean, strict=True)) == batches
    assert 3 not in batches, "the third batch's was NaN"
    assert found["loss"]["val"].x == [6, 12, 18]
    assert found["loss"]["val"].mean == [
        value
        for (value,) in rows_of(
            run, "SELECT value FROM metrics WHERE scope = 'validation/val' AND key = 'loss'"
        )
    ]
    assert found["loss"]["batch"].odd == [3]
    write_curves(run, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 20_000


def test_resumes_are_marked_where_they_went_on(run: RunFolder, tmp_path: Path) -> None:
    """At the batches that were done at the transition that an attempt went back to."""
    went_on = rows_of(
        run,
        """SELECT attempt, (SELECT max(step) FROM all_metrics AS m WHERE m.attempt < a.attempt AND batch >= 0
                AND NOT superseded AND scope = 'train') FROM attempts AS a WHERE position > 0""",
    )
    assert [(mark.attempt, mark.batches) for mark in resumes(run)] == went_on != []
    assert {mark.after for mark in resumes(run)} <= {"failed", "stopped", "died"}
    result = CliRunner().invoke(main, ["curves", str(run.path), "-o", str(tmp_path / "curves.svg")])
    assert result.exit_code == 0, result.output
    drawn = (tmp_path / "curves.svg").read_text()
    panels = len(re.findall(r'id="axes_\d+"', drawn))
    assert drawn.count("stroke: #6a51a3") == panels * len(went_on) > 0
    assert "not finite" in drawn


def test_curves_for_programs_and_of_a_run_without_values(run: RunFolder, tmp_path: Path) -> None:
    found = json.loads(CliRunner().invoke(main, ["curves", str(run.path), "--json"]).stdout)
    assert found["curves"]["loss"]["val"]["x"] == curves(run)["loss"]["val"].x
    empty = create_run(tmp_path, "empty")
    assert curves(empty) == {}
    assert resumes(empty) == []
    write_curves(empty, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    said = CliRunner().invoke(main, ["curves", str(run.path), "-o", str(tmp_path / "curves.xyz")])
    assert said.exit_code == 1
    assert "expected a name that ends in .png" in said.output


def test_curves_of_a_long_run_are_means_of_stretches(tmp_path: Path) -> None:
    run = create_run(tmp_path, "long")
    training = Training(run)
    for _ in range(3000):
        training.batch()
    training.end()
    curve = curves(run)["loss"]["batch"]
    assert len(curve.x) <= 601
    losses = [1 / (n + 1) for n in range(3000)]
    assert curve.least[-1] == losses[-1]
    assert curve.most[0] == losses[0]
    assert curve.x == sorted(curve.x)


def test_the_diagram_s_counts_are_those_that_stand(run: RunFolder) -> None:
    counts, times = tally(run).of_training()
    stands = rows_of(
        run,
        """SELECT trigger, source, dest, count(*), avg(duration_ns) FROM transitions WHERE scope = 'train'
           GROUP BY trigger, source, dest""",
    )
    for trigger, source, dest, count, mean in stands:
        (arc,) = [
            arc
            for arc in counts
            if (arc.trigger, arc.source, arc.dest) == (Trigger(trigger), State(source), State(dest))
        ]
        assert counts[arc] == count
        assert times[arc] == pytest.approx(mean)


def test_a_report_that_cannot_be_made_keeps_no_other_from_being(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / ".timeline.html").mkdir()
    failures = make_reports(run, tmp_path)
    assert failures.keys() == {"timeline.html"}
    assert "IsADirectoryError" in failures["timeline.html"]
    assert {file.name for file in tmp_path.iterdir() if file.is_file()} == REPORTS.keys() - {"timeline.html"}


@pytest.mark.long
def test_without_matplotlib_all_but_the_curves_arrive(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken" / "matplotlib").mkdir(parents=True)
    (tmp_path / "broken" / "matplotlib" / "__init__.py").write_text(
        "import os, signal; os.kill(os.getpid(), 9)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    report = sync(run, tracker=MLflow(f"sqlite:///{tmp_path}/mlflow.db"))
    assert report.complete
    assert {*REPORTS} - read_outbox(run.outbox).artifacts.keys() == {"curves.png"}
    assert (
        "curves.png: cannot be made (the process that makes it ended"
        in (run.path / "shipper.log").read_text()
    )
