// SPDX-License-Identifier: Apache-2.0
// Where threads meet: blocks, clusters, grids, and the lanes of a warp.
#include <algorithm>

#include "state.h"

namespace simt {
namespace {

const char *const kNames[] = {"__syncwarp",        "__shfl_sync",       "__ballot_sync",
                              "__any_sync",        "__all_sync",        "__match_any_sync",
                              "__reduce_add_sync", "__reduce_min_sync", "__reduce_min_sync",
                              "__reduce_max_sync", "__reduce_max_sync", "__reduce_and_sync",
                              "__reduce_or_sync",  "__reduce_xor_sync"};

void must_agree(const Barrier &barrier, const char *name, Site site) {
    if (barrier.arrived == 0 || (barrier.site == site && barrier.name == name)) return;
    fail(site, "divergent barrier: %s here, while others wait in %s at line %d", name, barrier.name,
         barrier.site.line);
}

void must_be_whole(const char *name, unsigned left, Site site) {
    if (left) fail(site, "early exit: %s, but %u threads have left the kernel", name, left);
}

// Counts the current thread in; the last one opens the barrier. Returns the generation to wait for.
unsigned arrive(Barrier &barrier, unsigned expected, bool yes, const char *name, Site site,
                Thread *first, unsigned count) {
    const unsigned generation = barrier.generation;
    barrier.name = name;
    barrier.site = site;
    barrier.yes += yes;
    order_release(&barrier.order[generation & 1]);
    if (unsigned(++barrier.arrived) < expected) return generation;
    barrier.arrived = 0;
    barrier.last_yes = barrier.yes;
    barrier.yes = 0;
    ++barrier.generation;
    wake(first, count, &barrier);
    return generation;
}

void leave(Barrier &barrier, unsigned generation, const char *name, Site site) {
    if (barrier.generation == generation)
        wait_for(&barrier, name, site);
    else
        let_others_run();
    order_acquire(&barrier.order[generation & 1]);
}

int meet(Barrier &barrier, unsigned expected, bool yes, const char *name, Site site, Thread *first,
         unsigned count) {
    leave(barrier, arrive(barrier, expected, yes, name, site, first, count), name, site);
    return barrier.last_yes;
}

unsigned left_in(const Block &block) { return block.threads - block.live; }

}  // namespace

int block_barrier(const char *name, bool predicate, Site site) {
    Block &block = *state.current->block;
    must_be_whole(name, left_in(block), site);
    must_agree(block.barrier, name, site);
    return meet(block.barrier, block.threads, predicate, name, site, block.first, block.threads);
}

void cluster_arrive(Site site) {
    Thread &t = *state.current;
    if (state.launch->cooperative) fail(site, "cluster barrier: not in a cooperative launch");
    if (t.in_cluster_barrier) fail(site, "a second arrival at the cluster's barrier, and no wait");
    must_be_whole("cluster barrier", state.resident - state.live, site);
    t.in_cluster_barrier = true;
    t.cluster_generation = arrive(state.blocks[0].cluster_barrier, state.resident, false,
                                  "cluster barrier", site, state.threads.data(), state.resident);
    if (state.blocks[0].cluster_barrier.generation != t.cluster_generation)
        for (Block &block : state.blocks) block.reached_by_peer = Site();
}

void cluster_wait(Site site) {
    Thread &t = *state.current;
    if (!t.in_cluster_barrier) fail(site, "a wait at the cluster's barrier without an arrival");
    t.in_cluster_barrier = false;
    leave(state.blocks[0].cluster_barrier, t.cluster_generation, "cluster barrier", site);
}

void grid_barrier(Site site) {
    if (!state.launch->cooperative) fail(site, "grid barrier: the launch is not cooperative");
    must_be_whole("grid barrier", state.resident - state.live, site);
    must_agree(state.blocks[0].grid_barrier, "grid barrier", site);
    meet(state.blocks[0].grid_barrier, state.resident, false, "grid barrier", site,
         state.threads.data(), state.resident);
}

namespace {

unsigned long long of_all(const Meeting &m) {
    unsigned long long ballot = 0, result = 0;
    bool first = true;
    for (int l = 0; l < 32; ++l) {
        if (!(m.mask >> l & 1)) continue;
        const unsigned long long v = m.value[l];
        ballot |= (v ? 1ull : 0ull) << l;
        const unsigned a = unsigned(result), b = unsigned(v);
        if (first)
            result = v;
        else if (m.what == kAdd)
            result = a + b;
        else if (m.what == kMinSigned)
            result = unsigned(std::min(int(a), int(b)));
        else if (m.what == kMaxSigned)
            result = unsigned(std::max(int(a), int(b)));
        else if (m.what == kMinUnsigned)
            result = std::min(a, b);
        else if (m.what == kMaxUnsigned)
            result = std::max(a, b);
        else if (m.what == kAnd)
            result = a & b;
        else if (m.what == kOr)
            result = a | b;
        else if (m.what == kXor)
            result = a ^ b;
        first = false;
    }
    if (m.what == kBallot) return ballot;
    if (m.what == kAny) return ballot != 0;
    if (m.what == kAll) return ballot == m.mask;
    return result;
}

unsigned long long for_lane(const Meeting &m, int lane) {
    if (m.what == kShuffle) {
        if (!(m.mask >> m.source[lane] & 1))
            fail(m.site, "shuffle: lane %d reads lane %d, which mask %#x leaves out", lane,
                 m.source[lane], m.mask);
        return m.value[m.source[lane]];
    }
    unsigned same = 0;
    for (int l = 0; l < 32; ++l)
        if (m.mask >> l & 1 && m.value[l] == m.value[lane]) same |= 1u << l;
    return same;
}

void conclude(Meeting &m, Warp &warp) {
    const bool alike = m.what != kShuffle && m.what != kMatch;
    const unsigned long long result = alike ? of_all(m) : 0;
    for (int l = 0; l < 32; ++l)
        if (m.mask >> l & 1) warp.lane[l]->result = alike ? result : for_lane(m, l);
    m.arrived = 0;
    ++m.generation;
}

void check_mask(const Thread &t, unsigned mask, const char *name, Site site) {
    if (!(mask >> t.lane & 1)) fail(site, "%s: mask %#x leaves out the caller", name, mask);
    for (int l = 0; l < 32; ++l) {
        if (!(mask >> l & 1)) continue;
        if (!t.warp->lane[l])
            fail(site, "%s: mask %#x names lane %d, which the block does not have", name, mask, l);
        if (t.warp->lane[l]->done)
            fail(site, "early exit: %s waits for lane %d, which has left the kernel", name, l);
    }
}

// Where the lanes of the mask meet: they keep their place, so that a lane that is late to leave
// does not find another mask's meeting there.
Meeting &meeting(Warp &warp, unsigned mask) {
    Meeting *free = nullptr;
    for (Meeting &m : warp.meeting) {
        if (m.mask == mask) return m;
        if (m.mask == 0) return m;
        if (!free && !m.arrived) free = &m;
    }
    return *free;
}

}  // namespace

std::uint64_t collective(Collective what, unsigned mask, std::uint64_t value, int source,
                         Site site) {
    Thread &t = *state.current;
    check_mask(t, mask, kNames[what], site);
    Meeting &m = meeting(*t.warp, mask);
    if (m.arrived && (m.what != what || !(m.site == site)))
        fail(site, "divergent %s: other lanes of mask %#x wait in %s at line %d", kNames[what],
             mask, kNames[m.what], m.site.line);
    m.mask = mask;
    m.what = what;
    m.site = site;
    m.value[t.lane] = value;
    m.source[t.lane] = source;
    m.arrived |= 1u << t.lane;
    // Of all that lanes do together only __syncwarp orders memory.
    long long *order = &m.order[m.generation & 1];
    if (what == kSyncWarp) order_release(order);
    if (m.arrived == mask) {
        conclude(m, *t.warp);
        Thread *lanes = t.block->first + t.rank / 32 * 32;
        wake(lanes, std::min(32u, t.block->threads - t.rank / 32 * 32), &m);
        let_others_run();
    } else {
        wait_for(&m, kNames[what], site);
    }
    if (what == kSyncWarp) order_acquire(order);
    return t.result;
}

void check_leaving(Thread &t) {
    const Block &block = *t.block;
    if (const Barrier &b = block.barrier; b.arrived)
        fail(b.site, "early exit: a thread left the kernel while others wait in %s", b.name);
    for (const Meeting &m : t.warp->meeting)
        if (m.arrived && m.mask >> t.lane & 1)
            fail(m.site, "early exit: %s waits for lane %d, which has left the kernel",
                 kNames[m.what], int(t.lane));
    if (t.in_cluster_barrier)
        fail(t.site, "arrived at the cluster's barrier and left without a wait");
    if (state.blocks[0].cluster_barrier.arrived)
        fail(state.blocks[0].cluster_barrier.site,
             "early exit: a thread left while others wait here");
    if (block.reached_by_peer.file)
        fail(block.reached_by_peer,
             "missing cluster barrier: the block left while another, which "
             "took an address in its shared memory here, may still use it");
    check_copies(t);
}

}  // namespace simt
