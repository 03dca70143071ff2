"""Packed rows in SQL: those that have a row of their own in the journal, and those that stand in a block with others.

A block is up to 64 consecutive packed rows of one attempt, scope and epoch in one row of `transition_blocks` or
`metric_blocks`: what they share as columns, and the rest as decimal digits in `data`, `record` of them for each row, so
that SQL finds each by its place. docs/formats.md has what they are.
"""

import struct
from collections.abc import Collection, Iterator
from typing import Any

__all__ = [
    "BATCH_DIGITS",
    "BLOCK_ROWS",
    "BLOCK_SPAN",
    "EXPONENT_DIGITS",
    "KEYSET_DIGITS",
    "LEAST_ROWS",
    "MANTISSA_DIGITS",
    "NEWEST_METRICS",
    "NEWEST_SEQ",
    "NUMBER_DIGITS",
    "PENDING_MANTISSA",
    "ROW_LENGTH",
    "SEQ_DIGITS",
    "WORD_DIGITS",
    "last_row",
    "metrics_between",
    "one_of_metrics",
    "ordinals",
    "since_first",
    "transitions_between",
    "unpacked_metrics",
    "unpacked_transitions",
    "values_of",
]

ROW_LENGTH = 8
"""Most transitions, and most metric values, in one packed row."""

LEAST_ROWS = 96
"""So many consecutive packed rows are written as blocks; of fewer, each is inserted sooner as a row of its own."""

BLOCK_ROWS = 64
"""Most packed rows in a block."""

BLOCK_SPAN = BLOCK_ROWS * ROW_LENGTH
"""Most transitions in a block."""

SEQ_DIGITS, BATCH_DIGITS, WORD_DIGITS, KEYSET_DIGITS = 3, 2, 3, 6
"""Digits of the transitions since a block's first, the batches since its first, a word, a keyset."""

EXPONENT_DIGITS, MANTISSA_DIGITS = 8, 16
"""Digits of the upper 12 bits of a double, which are its sign and its exponent, and of the lower 52."""

NUMBER_DIGITS = EXPONENT_DIGITS + MANTISSA_DIGITS

PENDING_MANTISSA = 0x8_0000_1C0C_0DE5
"""Of `frames.PENDING`."""

_ONE = 1 << 52  # of a double's mantissa: 1.0

NEWEST_SEQ = """
    SELECT max(
        coalesce((SELECT seq + (SELECT max(pos) FROM words WHERE words.word = packed_transitions.word)
            FROM packed_transitions ORDER BY seq DESC LIMIT 1), 0),
        coalesce((SELECT last FROM transition_blocks ORDER BY seq DESC LIMIT 1), 0))"""
"""The seq of the newest transition in the journal; 0 if there is none."""

NEWEST_METRICS = """
    SELECT max(coalesce((SELECT max(id) FROM packed_metrics), 0),
        coalesce((SELECT id + rows - 1 FROM metric_blocks ORDER BY id DESC LIMIT 1), 0))"""
"""The id of the newest packed row of metric values; 0 if there is none."""


def ordinals() -> list[tuple[int, float, float]]:
    """The table `ordinals`: n, 2 to the n, and 2 to the (32 n - 1023), of which each power of two is a product."""
    return [(n, 2.0**n, 2.0 ** (32 * n - 1023)) for n in range(BLOCK_ROWS)]


def _field(at: str, digits: str | int) -> str:
    """An integer of a block's row; `at` counts its digits from 0."""
    return f"CAST(substr(block.data, row.n * block.record + 1 + {at}, {digits}) AS INTEGER)"


def _number(at: str) -> str:
    """A double of a block's row, to the bit; NaN as text, and NULL for one that has not come yet (`frames.PENDING`)."""
    sign = _field(at, EXPONENT_DIGITS)
    exponent = f"({sign} & 2047)"
    mantissa = _field(f"{at} + {EXPONENT_DIGITS}", MANTISSA_DIGITS)
    return f"""CASE {exponent} WHEN 2047 THEN
            CASE {mantissa} WHEN 0 THEN CASE WHEN {sign} > 2047 THEN -9e999 ELSE 9e999 END
                WHEN {PENDING_MANTISSA} THEN NULL ELSE 'nan' END
        WHEN 0 THEN CASE WHEN {sign} > 2047 THEN -1.0 ELSE 1.0 END * {mantissa} / {_ONE}.0
            * ((SELECT power FROM ordinals WHERE n = 0) * 2.0)
        ELSE CASE WHEN {sign} > 2047 THEN -1.0 ELSE 1.0 END * ({mantissa} + {_ONE}) / {_ONE}.0
            * (SELECT two FROM ordinals WHERE n = {exponent} & 31)
            * (SELECT power FROM ordinals WHERE n = {exponent} >> 5) END"""


_AFTER_LEAD = SEQ_DIGITS + BATCH_DIGITS + WORD_DIGITS
_LOSS_AT = f"block.lead + {_AFTER_LEAD} + block.length * block.width"
_TRANSITIONS = {
    "seq": f"block.seq + {_field('block.lead', SEQ_DIGITS)}",
    "attempt": "block.attempt",
    "scope": "block.scope",
    "word": _field(f"block.lead + {SEQ_DIGITS + BATCH_DIGITS}", WORD_DIGITS),
    "epoch": "block.epoch",
    "batch": f"block.batch + {_field(f'block.lead + {SEQ_DIGITS}', BATCH_DIGITS)}",
    "time_ns": f"block.time_ns + {_field('0', 'block.lead')}",
    **{f"t{pos}": "NULL" for pos in range(1, ROW_LENGTH)},
    **{
        f"d{pos}": f"CASE WHEN block.length > {pos} THEN "
        f"{_field(f'block.lead + {_AFTER_LEAD} + {pos} * block.width', 'block.width')} END"
        for pos in range(ROW_LENGTH)
    },
    "loss": _number(_LOSS_AT),
    "note": "NULL",
}
"""What the columns of `packed_transitions` are in a block."""

_VALUES_AT = f"block.lead + block.span + {BATCH_DIGITS + KEYSET_DIGITS}"
_METRICS = {
    "id": "block.id + row.n",
    "attempt": "block.attempt",
    "seq": f"block.seq + {_field('block.lead', 'block.span')}",
    "scope": "block.scope",
    "epoch": "block.epoch",
    "batch": f"block.batch + {_field('block.lead + block.span', BATCH_DIGITS)}",
    "step": f"block.step + {_field('block.lead + block.span', BATCH_DIGITS)}",
    "keyset": _field(f"block.lead + block.span + {BATCH_DIGITS}", KEYSET_DIGITS),
    "time_ns": f"block.time_ns + {_field('0', 'block.lead')}",
    **{
        f"v{pos}": f"CASE WHEN block.length > {pos} THEN {_number(f'{_VALUES_AT} + {NUMBER_DIGITS * pos}')} END"
        for pos in range(ROW_LENGTH)
    },
}
"""What the columns of `packed_metrics` are in a block."""


def values_of(row: tuple[Any, ...]) -> Iterator[tuple[int, int, int, int, int, int, tuple[float, ...]]]:
    """(id, seq, batch, step, time, keyset, values) of each packed row of a block, sooner than SQL has it.

    `row` has the block's id, rows, seq, batch, step, time_ns, length, lead, span, record and data. Where a keyset has
    fewer keys, there are values too many.
    """
    first, rows, seq, batch, step, time_ns, length, lead, span, record, data = row
    after = lead + span
    numbers = after + BATCH_DIGITS + KEYSET_DIGITS
    cuts = [(at, at + EXPONENT_DIGITS, at + NUMBER_DIGITS) for at in range(numbers, record, NUMBER_DIGITS)]
    bits, doubles = struct.Struct(f"{length}Q"), struct.Struct(f"{length}d")
    for n in range(rows):
        one = data[n * record : (n + 1) * record]
        later = int(one[after : after + BATCH_DIGITS])
        values = doubles.unpack(
            bits.pack(*[int(one[at:middle]) << 52 | int(one[middle:end]) for at, middle, end in cuts])
        )
        keyset = int(one[after + BATCH_DIGITS : numbers])
        yield (
            first + n,
            seq + int(one[lead:after]),
            batch + later,
            step + later,
            time_ns + int(one[:lead]),
            keyset,
            values,
        )


def _columns(columns: dict[str, str], wanted: Collection[str]) -> str:
    return ", ".join(f"{found} AS {name}" for name, found in columns.items() if name in wanted)


def _in_blocks(table: str, columns: dict[str, str], wanted: Collection[str]) -> str:
    return f"""SELECT {_columns(columns, wanted)}
        FROM {table} AS block CROSS JOIN ordinals AS row ON row.n < block.rows"""


def transitions_between(
    first: str | None = None, last: str | None = None, wanted: Collection[str] = frozenset(_TRANSITIONS)
) -> str:
    """The columns `wanted` of the packed rows that begin with a seq of at least `first` and at most `last`, in SQL.

    In the order of the table, not in that of seq.
    """
    alone = f"SELECT {', '.join(name for name in _TRANSITIONS if name in wanted)} FROM packed_transitions"
    blocks = _in_blocks("transition_blocks", _TRANSITIONS, wanted)
    if first is not None:
        seq = _TRANSITIONS["seq"]
        alone += f" WHERE seq >= {first} AND seq <= {last}"
        blocks += (
            f" WHERE block.seq > {first} - {BLOCK_SPAN} AND block.seq <= {last} AND block.last >= {first}"
            f" AND {seq} >= {first} AND {seq} <= {last}"
        )
    return f"({alone} UNION ALL {blocks})"


def metrics_between(
    first: str | None = None, last: str | None = None, wanted: Collection[str] = frozenset(_METRICS)
) -> str:
    """The same of packed rows of metric values, by their ids."""
    alone = f"SELECT {', '.join(name for name in _METRICS if name in wanted)} FROM packed_metrics"
    blocks = _in_blocks("metric_blocks", _METRICS, wanted)
    if first is not None:
        alone += f" WHERE id >= {first} AND id <= {last}"
        blocks += (
            f" WHERE block.id > {first} - {BLOCK_ROWS} AND block.id <= {last}"
            f" AND row.n >= {first} - block.id AND row.n <= {last} - block.id"
        )
    return f"({alone} UNION ALL {blocks})"


def last_row(first: str, last: str, condition: str, *wanted: str) -> str:
    """Seq and columns of the last packed row that begins from `first` to `last` and fits `condition`, in SQL.

    The condition is on `packed` and `attempts`; where a row of a block fits it, so does the block's first.
    """
    return _one(
        ("packed_transitions", "transition_blocks", _TRANSITIONS),
        ("seq", *wanted),
        f"packed.seq > {first} - {BLOCK_SPAN} AND packed.last >= {first} AND packed.seq <= {last} AND {condition}",
        f"packed.seq >= {first} AND packed.seq <= {last} AND {condition}",
        "seq DESC",
    )


def one_of_metrics(first: str, condition: str, *wanted: str, oldest: bool = False) -> str:
    """Id and columns of the newest packed row of values from id `first` on that fits `condition`, or of the oldest."""
    return _one(
        ("packed_metrics", "metric_blocks", _METRICS),
        ("id", *wanted),
        f"packed.id > {first} - {BLOCK_ROWS} AND packed.id + packed.rows > {first} AND {condition}",
        f"packed.id >= {first} AND {condition}",
        "id" if oldest else "id DESC",
    )


def _one(
    tables: tuple[str, str, dict[str, str]],
    wanted: tuple[str, ...],
    fitting_blocks: str,
    fitting: str,
    order: str,
) -> str:
    alone, blocks, columns = tables
    attempts = "CROSS JOIN attempts ON attempts.attempt = packed.attempt"
    named = ", ".join(f"packed.{name}" for name in wanted)
    inside = _columns(
        columns, {*wanted, "id", "seq", "attempt", "scope", "epoch", "batch", "step", "time_ns"}
    )
    return f"""SELECT * FROM (
            SELECT * FROM (
                SELECT {named} FROM {alone} AS packed {attempts} WHERE {fitting} ORDER BY packed.{order} LIMIT 1)
            UNION ALL
            SELECT * FROM (
                SELECT {named} FROM (
                    SELECT {inside} FROM (
                        SELECT packed.* FROM {blocks} AS packed {attempts}
                        WHERE {fitting_blocks} ORDER BY packed.{order} LIMIT 1) AS block
                    CROSS JOIN ordinals AS row ON row.n < block.rows) AS packed {attempts}
                WHERE {fitting} ORDER BY packed.{order} LIMIT 1)
        ) ORDER BY {order} LIMIT 1"""


def since_first(pos: int) -> str:
    """The ns from a row's first transition to the one at `pos`, in SQL; NULL where the row is shorter."""
    return f"coalesce(packed.t{pos}, {' + '.join(f'packed.d{at}' for at in range(1, pos + 1))})"


def _pick(columns: list[str]) -> str:
    cases = " ".join(f"WHEN {pos} THEN {column}" for pos, column in enumerate(columns))
    return f"CASE pattern.pos {cases} END"


def unpacked_transitions(first: str | None = None, last: str | None = None) -> str:
    """One row for each transition of the packed rows that begin from `first` to `last`, in SQL; in no order."""
    return f"""
    SELECT packed.seq + pattern.pos AS seq, packed.attempt AS attempt, scopes.name AS scope,
        packed.epoch AS epoch, packed.batch AS batch, pattern.phase AS phase, pattern.trigger AS trigger,
        pattern.source AS source, pattern.dest AS dest,
        packed.time_ns + {_pick(["0", *(since_first(pos) for pos in range(1, ROW_LENGTH))])} AS time_ns,
        {_pick([f"packed.d{pos}" for pos in range(ROW_LENGTH)])} AS duration_ns,
        CASE WHEN pattern.loss THEN packed.loss END AS loss,
        CASE WHEN pattern.last THEN packed.note END AS note,
        attempts.kept_until IS NOT NULL AND packed.seq + pattern.pos > attempts.kept_until AS superseded
    FROM {transitions_between(first, last)} AS packed
        CROSS JOIN attempts ON attempts.attempt = packed.attempt
        CROSS JOIN scopes ON scopes.scope = packed.scope
        CROSS JOIN words AS pattern ON pattern.word = packed.word
"""


def unpacked_metrics(first: str | None = None, last: str | None = None) -> str:
    """One row for each value of the packed rows whose ids are from `first` to `last`, in SQL; in no order."""
    return f"""
    SELECT packed.id * {ROW_LENGTH} + pattern.pos AS id, packed.attempt AS attempt, scopes.name AS scope,
        packed.epoch AS epoch, packed.batch AS batch, packed.step AS step, pattern.key AS key,
        {_pick([f"packed.v{pos}" for pos in range(ROW_LENGTH)])} AS value, packed.time_ns AS time_ns,
        packed.seq AS seq,
        attempts.kept_until IS NOT NULL AND packed.seq > attempts.kept_until AS superseded
    FROM {metrics_between(first, last)} AS packed
        CROSS JOIN attempts ON attempts.attempt = packed.attempt
        CROSS JOIN scopes ON scopes.scope = packed.scope
        CROSS JOIN keysets AS pattern ON pattern.keyset = packed.keyset
"""
