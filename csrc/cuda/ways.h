// SPDX-License-Identifier: Apache-2.0
// Which threads own a row that is read once: one table, from the number of classes alone.
#pragma once

#include "launch.h"
#include "reading.cuh"

namespace msdkern {

// How a call was laid out by the host.
struct Layout {
    int lanes, blocks;  // threads per team and block, blocks per team
    int width;          // bytes on whose multiples rows begin, 16 at most
    bool together;      // the last block to finish puts the rows in order (gate.cuh)
};

struct Way {
    int lanes, threads;  // of a team and of a block
    int blocks;          // of a cluster
    int pieces;          // of a row that each thread reads at most; 0: any
};

// The first that fits serves, whatever the number of rows: a row's result does not depend on it.
// Few threads per row leave little to merge; more, and clusters, keep the reading of one row short.
// From bytes and shuffles, not measured.
// clang-format off
constexpr Way kWays[] = {
    {  1, 256, 1, 1},
    {  2, 256, 1, 1},
    {  4, 256, 1, 1},
    {  8, 256, 1, 1},
    { 16, 256, 1, 1},
    { 32, 256, 1, 2},
    {128, 128, 1, 2},
    {256, 256, 1, 2},
    {256, 256, 2, 2},
    {256, 256, 4, 2},
    {256, 256, 8, 0},
    {256, 256, 1, 0},
};
// clang-format on

constexpr int kRowThreads = 256;  // of a block at most
// Blocks of so many threads per processor that registers leave room for.
constexpr int rows_resident(int bytes) { return bytes == 8 ? 2 : bytes == 4 ? 4 : 3; }
constexpr int kFewestThreads = 128;  // of a block, as far as a processor's room is concerned
constexpr int64_t kMostRowBlocks = rows_resident(4) * kRowThreads / kFewestThreads;  // of each

struct RowChoice {
    Layout layout;
    int threads;
    int64_t grid;
};

// `most`: pieces of a row that a thread may read, where that is less than the table says.
template <class S>
const Way *way_of(int64_t classes, bool clusters, int64_t most = INT64_MAX) {
    for (const Way &way : kWays) {
        const int64_t piece = int64_t(kDeep) * kVector<S> * way.lanes * way.blocks;
        const int64_t pieces = (classes + piece - 1) / piece;
        if ((!way.pieces || pieces <= way.pieces) && pieces <= most &&
            (way.blocks == 1 || clusters))
            return &way;
    }
    return nullptr;
}

// `bytes`: all addresses and strides of rows, joined by "or".
template <class S>
RowChoice choose(const Machine &m, const Way &way, int64_t rows, uint64_t bytes) {
    int threads = way.threads;
    // Few rows: rather more blocks than more teams per block.
    while (threads > 32 && threads > way.lanes &&
           rows * way.lanes < int64_t(threads) * m.processors)
        threads /= 2;
    const int64_t teams = threads / way.lanes, wanted = (rows + teams - 1) / teams;
    const int resident = rows_resident(sizeof(S)) * kRowThreads /
                         (threads < kFewestThreads ? kFewestThreads : threads);
    const int64_t room = int64_t(m.processors) * resident / way.blocks;
    const int64_t grid = wanted < room ? wanted : room;
    return {{way.lanes, way.blocks, common_width(bytes), false},
            threads,
            (grid < 1 ? 1 : grid) * way.blocks};
}

// The addresses and strides of K tensors, joined.
template <class S, class P, size_t N>
uint64_t joined(int exits, P *const (&rows)[N], const int64_t (&stride)[N]) {
    uint64_t bytes = 0;
    for (int k = 0; k < exits; ++k)
        bytes |= reinterpret_cast<uintptr_t>(rows[k]) | uint64_t(stride[k]) * sizeof(S);
    return bytes;
}

}  // namespace msdkern
