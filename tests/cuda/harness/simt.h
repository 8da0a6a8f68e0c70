// SPDX-License-Identifier: Apache-2.0
// What the stand-ins for CUDA's headers ask of the scheduler. Values pass as 64 bits, so that the
// scheduler can stay out of the sanitizers' sight.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace simt {

// A place in a kernel, taken where a default argument is used.
struct Site {
    const char *file = nullptr;
    int line = 0;
    static constexpr Site here(const char *f = __builtin_FILE(), int l = __builtin_LINE()) {
        return {f, l};
    }
    bool operator==(const Site &other) const {
        return line == other.line && std::strcmp(file, other.file) == 0;
    }
};

// Ends the launch; the kernel's threads are abandoned where they are.
[[noreturn]] void fail(Site site, const char *format, ...) __attribute__((format(printf, 2, 3)));

// Barriers. Threads of a block must meet at one line, and none may have left. Returns how many
// came with a predicate.
int block_barrier(const char *name, bool predicate, Site site);
void cluster_arrive(Site site);
void cluster_wait(Site site);
void grid_barrier(Site site);

// What the lanes of a mask do together.
enum Collective {
    kSyncWarp,
    kShuffle,
    kBallot,
    kAny,
    kAll,
    kMatch,
    kAdd,
    kMinSigned,
    kMinUnsigned,
    kMaxSigned,
    kMaxUnsigned,
    kAnd,
    kOr,
    kXor
};
std::uint64_t collective(Collective what, unsigned mask, std::uint64_t value, int source,
                         Site site);

// Shared memory.
void *dynamic_shared();
unsigned dynamic_shared_size();
void *peer_shared(const void *mine, unsigned rank, Site site);

// Copies that the hardware makes when it likes: here at the last moment, at the wait.
void copy_async(void *to, const void *from, std::size_t bytes, std::size_t zeros, Site site);
void commit_copies();
void wait_copies(unsigned newest);  // all but the newest groups

// Around every atomic access: lets others run, and notes what fences may order.
// Whether the race detector should see the access: not in global memory, where a plain access may
// be ordered by what an atomic has seen, which it does not understand.
bool before_atomic(const void *address, std::size_t bytes, Site site);
void after_atomic(const void *address);
void fence();

void check_aligned(const void *address, std::size_t bytes, Site site);

unsigned lane();
unsigned cluster_rank();
unsigned cluster_size();

// Launching.
struct Shape {
    unsigned x = 1, y = 1, z = 1;
    unsigned long long count() const { return 1ull * x * y * z; }
};
struct Launch {
    Shape grid, block, cluster;
    std::size_t shared = 0;
    bool cooperative = false;
    const void *kernel = nullptr;
    void (*call)(void *) = nullptr;  // the kernel, with its arguments
    void *arguments = nullptr;
};
bool run(const Launch &launch);  // false: a check failed
const char *failure();           // its words

}  // namespace simt

#define SIMT_EXPORT __attribute__((visibility("default")))
extern "C" {
// The order in which threads that could run do: fifo, lifo, or the number of a random priority
// order. Until it is called, the environment variable SIMT_ORDER tells.
SIMT_EXPORT void simt_set_order(const char *order);
// Launches that failed a check so far, and the words of the last.
SIMT_EXPORT int simt_failures(void);
SIMT_EXPORT const char *simt_failure(void);
}
