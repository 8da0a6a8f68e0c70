# SPDX-License-Identifier: Apache-2.0
"""Rows of several tensors at once, gathered by an index or scattered back by it.

A row is copied in words of 1, 2, 4, 8 or 16 bytes, the widest that its length and all addresses
allow. Programs take neighbouring words of one tensor, whatever the length of its rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What the table holds of each tensor: addresses, distances between rows and length of a row in
# words; the size of a word in bytes; the first program that copies it.
SOURCE, TARGET, SOURCE_STEP, TARGET_STEP, WORDS, BYTES, FIRST = map(tl.constexpr, range(7))
FIELDS = tl.constexpr(7)
# Triton compiles anew for integers in a tuple that are 1, multiples of 16 or beyond 32 bits:
# numbers of the table travel as odd ones beyond 32 bits.
BEYOND = tl.constexpr(1 << 61)


def encode(number: int) -> int:
    return 2 * (number + (1 << 61)) + 1


@triton.jit
def decode(number):
    return (number >> 1) - BEYOND


@triton.constexpr_function
def word_type(size):
    return {1: tl.int8, 2: tl.int16, 4: tl.int32}.get(int(size), tl.int64)


@triton.jit
def copy_words(
    entry, block, index, count, capacity, limit, SIZE: tl.constexpr, SCATTER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK words, of SIZE bytes, of one tensor."""
    TYPE: tl.constexpr = word_type(SIZE)
    PARTS: tl.constexpr = 2 if SIZE == 16 else 1
    words = entry[WORDS]
    begin = (block - entry[FIRST]) * BLOCK
    place = begin % words + tl.arange(0, BLOCK)
    # How many rows further: 32 bits are enough to divide by a row that is shorter than a block.
    short = tl.minimum(words, BLOCK).to(tl.int32)
    further = tl.where(words < BLOCK, place.to(tl.int32) // short, (place >= words).to(tl.int32))
    row = begin // words + further
    word = place - further * words
    inside = row < capacity
    used = inside & (row < count)
    chosen = tl.load(index + row, mask=used, other=-1)
    used = used & (chosen >= 0) & (chosen < limit)  # nothing is touched out of bounds
    from_row, to_row = chosen, row
    if SCATTER:
        from_row, to_row = row, chosen
        inside = used
    part = tl.arange(0, PARTS)[None, :]
    source = tl.multiple_of((entry[SOURCE] * SIZE).to(tl.pointer_type(TYPE)), SIZE)
    target = tl.multiple_of((entry[TARGET] * SIZE).to(tl.pointer_type(TYPE)), SIZE)
    from_word = (from_row * entry[SOURCE_STEP] + word)[:, None] * PARTS + part
    to_word = (to_row * entry[TARGET_STEP] + word)[:, None] * PARTS + part
    x = tl.load(source + from_word, mask=used[:, None], other=0)
    tl.store(target + to_word, x, mask=inside[:, None])


@triton.jit(do_not_specialize=["capacity", "limit"])
def copy_rows_kernel(
    table, index, count, capacity, limit, SCATTER: tl.constexpr, TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(12) Gathers: target[i] = source[index[i]] for i < count, and 0 up to `capacity`. Scatters:
    target[index[i]] = source[i]. A row that does not exist is 0, or written nowhere."""
    block = tl.program_id(0).to(tl.int64)
    entry = table[0]
    for i in tl.static_range(1, TENSORS):
        here = block >= decode(table[i][FIRST])
        fields = ()
        for f in tl.static_range(FIELDS):
            fields = fields + (tl.where(here, table[i][f], entry[f]),)
        entry = fields
    decoded = ()
    for f in tl.static_range(FIELDS):
        decoded = decoded + (decode(entry[f]),)
    used = capacity.to(tl.int64)
    if count is not None:
        used = tl.load(count)
    for power in tl.static_range(5):
        if decoded[BYTES] == 1 << power:
            copy_words(decoded, block, index, used, capacity, limit, 1 << power, SCATTER, BLOCK)
