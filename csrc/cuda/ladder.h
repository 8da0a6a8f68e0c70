// SPDX-License-Identifier: Apache-2.0
// Which threads own a sample, and where its logits are kept: one table, from the shape alone.
#pragma once

namespace msdkern {

enum class Home { kRegisters, kShared, kGlobal };

// One way to run. Derived from bytes, registers and issue slots, not measured.
struct Rung {
    Home home;
    int rows;       // exits and teachers at most; 0: any
    int chunks;     // 16-byte pieces of a row that each thread has at most; 0: any
    int lanes;      // threads of a block that share a sample
    int threads;    // per block
    int blocks;     // of a cluster
    int kilobytes;  // of shared memory that the row sets of one block may take
    int resident;   // blocks per processor, for which registers and shared memory leave room
};

// The first rung that fits serves, if its shared memory leaves room for `resident` blocks, whose
// loads, arithmetic and stores overlap, and if half as many blocks of a cluster would leave threads
// more than a piece of a row: what makes a row set large may be many short rows.
//
// For the sweeps of tile.cuh. Three blocks of 128 threads leave 168 registers to each thread. A row
// set of more than 64 KB is shared by a cluster, and only what no cluster can hold that way takes a
// processor's memory whole. The last rung holds nothing.
// clang-format off
constexpr Rung kTileLadder[] = {
    {Home::kRegisters, 8, 1,   8, 128,  1,   0, 3},
    {Home::kRegisters, 8, 1,  16, 128,  1,   0, 3},
    {Home::kRegisters, 8, 1,  32, 128,  1,   0, 3},
    {Home::kShared,    0, 4,   8, 128,  1,  64, 3},
    {Home::kShared,    0, 4,  32, 128,  1,  64, 3},
    {Home::kShared,    0, 0, 128, 128,  1,  64, 3},
    {Home::kShared,    0, 0, 128, 128,  2,  64, 3},
    {Home::kShared,    0, 0, 128, 128,  4,  64, 3},
    {Home::kShared,    0, 0, 128, 128,  8,  64, 3},
    {Home::kShared,    0, 0, 128, 128, 16,  64, 3},
    {Home::kShared,    0, 0, 384, 384,  8, 176, 1},
    {Home::kShared,    0, 0, 384, 384, 16, 176, 1},
    {Home::kShared,    0, 0, 384, 384,  1, 176, 1},
    {Home::kGlobal,    0, 0, 384, 384,  1,   0, 1},
};
// For all others: more exits, other divergences, float64. Up to 48 KB per block leave room for four
// blocks per processor.
constexpr Rung kLadder[] = {
    {Home::kShared,    0, 4,   8, 128,  1,  48, 4},
    {Home::kShared,    0, 4,  32, 128,  1,  48, 4},
    {Home::kShared,    0, 4, 128, 128,  1,  48, 4},
    {Home::kShared,    0, 4, 128, 128,  1,  80, 2},
    {Home::kShared,    0, 0, 256, 256,  1,  64, 2},
    {Home::kShared,    0, 0, 256, 256,  2,  64, 2},
    {Home::kShared,    0, 0, 256, 256,  4,  64, 2},
    {Home::kShared,    0, 0, 256, 256,  8,  64, 2},
    {Home::kShared,    0, 0, 256, 256, 16,  64, 2},
    {Home::kShared,    0, 0, 256, 256,  8, 176, 1},
    {Home::kShared,    0, 0, 256, 256, 16, 176, 1},
    {Home::kShared,    0, 0, 256, 256,  1, 176, 1},
    {Home::kGlobal,    0, 0, 256, 256,  1,   0, 2},
    {Home::kGlobal,    0, 0, 128, 128,  1,   0, 1},
};
// clang-format on
constexpr int kTileThreads = 384;  // of a processor

// Blocks of 256 threads per processor that a kernel's registers leave room for. Pairwise
// divergences and float64 need more of them than the ladder's common calls.
constexpr int roomy(bool general, int bytes) { return general || bytes == 8 ? 1 : 2; }

}  // namespace msdkern
