// SPDX-License-Identifier: Apache-2.0
// What the parts of the scheduler share: the threads, warps and blocks that are resident together.
#pragma once

#include <vector>

#include "fiber.h"
#include "shims/vector_types.h"
#include "simt.h"

#ifdef SIMT_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace simt {

struct Block;
struct Warp;

struct Copy {
    void *to;
    unsigned bytes, group;
    Site site;
    alignas(16) unsigned char data[16];
};

struct Thread {
    Fiber fiber;
    Block *block = nullptr;
    Warp *warp = nullptr;
    uint3 index = {0, 0, 0};
    unsigned rank = 0, lane = 0;
    bool done = false;
    unsigned long long priority = 0;
    // While it waits: for what, in which words, where.
    const void *waits_for = nullptr;
    const char *doing = nullptr;
    Site site;
    unsigned long long result = 0;  // of a collective
    bool in_cluster_barrier = false;
    unsigned cluster_generation = 0;
    std::vector<Copy> copies;
    unsigned copy_group = 0;
};

struct Barrier {
    int arrived = 0, yes = 0, last_yes = 0;
    unsigned generation = 0;
    const char *name = nullptr;
    Site site;
    // One for even and one for odd generations: whoever is late to leave the one must not learn
    // from those who have reached the next.
    long long order[2] = {};
};

struct Meeting {  // of the lanes of one mask
    unsigned mask = 0, arrived = 0, generation = 0;
    Collective what = kSyncWarp;
    Site site;
    unsigned long long value[32] = {};
    int source[32] = {};
    long long order[2] = {};
};

struct Warp {
    Thread *lane[32] = {};
    Meeting meeting[32];  // a lane is in one at a time
};

struct Block {
    uint3 index = {0, 0, 0};
    unsigned rank = 0;  // in the cluster
    Thread *first = nullptr;
    unsigned threads = 0, live = 0;
    Warp *warps = nullptr;
    Barrier barrier;
    Barrier cluster_barrier, grid_barrier;  // used in the first block for all
    char *shared = nullptr;
    // For fences: where the block's atomics were, and what its fences came after.
    const void *atomics[8] = {};
    unsigned atomic_count = 0;
    long long fence_order = 0;
    void *courier = nullptr;  // a fiber of the race detector's
    Site
        reached_by_peer;  // where another block took an address here since the last cluster barrier
};

struct State {
    const Launch *launch = nullptr;
    Thread *current = nullptr;
    Fiber host;
    std::vector<Thread> threads;
    // Resident together: a cluster, or all of a cooperative launch. Fresh each time, as are the
    // race detector's memories of barriers then.
    std::vector<Warp> warps;
    std::vector<Block> blocks;
    unsigned resident = 0, live = 0;  // threads
    unsigned long long progress = 0, spins = 0;
    bool failed = false;
    long long begin_order = 0, end_order = 0;
};
extern State state;

// The current thread waits until it is woken.
void wait_for(const void *what, const char *doing, Site site);
// Wakes those of the threads that wait for it; the current thread lets others run if it is
// their turn.
void wake(Thread *first, unsigned count, const void *what);
void let_others_run();
void step_back();  // behind everybody else
unsigned long long mix(unsigned long long x);
void check_leaving(Thread &thread);  // what a thread must not leave behind
void check_copies(Thread &thread);
void release_shared(Block &block);

inline void order_release(void *object) {
#ifdef SIMT_TSAN
    __tsan_release(object);
#endif
    (void)object;
}
inline void order_acquire(void *object) {
#ifdef SIMT_TSAN
    __tsan_acquire(object);
#endif
    (void)object;
}

}  // namespace simt
