// SPDX-License-Identifier: Apache-2.0
// Whose turn it is. A thread runs until it waits; orders decide who is next.
#include <signal.h>
#include <sys/time.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#include "memory.h"
#include "state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

State state;

namespace {

struct Turn {
    unsigned long long key;
    Thread *thread;
    bool operator<(const Turn &other) const { return key > other.key; }  // smallest key on top
};
std::vector<Turn> turns;  // a heap, reserved before fibers run
unsigned long long clock_ticks = 0;
constexpr unsigned long long kMiddle = 1ull << 62, kLast = 1ull << 63;

enum Order { kFifo, kLifo, kPriority } order = kFifo;
unsigned long long seed = 0;
bool order_known = false;
int failures = 0;
char words[4096] = "";

void set_order(const char *name) {
    order_known = true;
    order = !name || !strcmp(name, "fifo") ? kFifo : !strcmp(name, "lifo") ? kLifo : kPriority;
    char *end = nullptr;
    seed = order == kPriority ? strtoull(name, &end, 10) : 0;
    if (end && *end) {
        fprintf(stderr, "simt: order must be fifo, lifo or a number; got %s\n", name);
        abort();
    }
}

void take_turn(Thread &thread, bool last = false) {
    ++clock_ticks;
    unsigned long long key = clock_ticks;
    if (last)
        key = kLast + clock_ticks;
    else if (order == kLifo)
        key = kMiddle - clock_ticks;
    else if (order == kPriority)
        key = thread.priority;
    turns.push_back({key, &thread});
    std::push_heap(turns.begin(), turns.end());
}

Thread *next_turn() {
    if (turns.empty()) return nullptr;
    std::pop_heap(turns.begin(), turns.end());
    Thread *thread = turns.back().thread;
    turns.pop_back();
    return thread;
}

void resume(Thread *next) {
    state.current = next;
    ++state.progress;
    if (!next) return;
    threadIdx = next->index;
    blockIdx = next->block->index;
}

// From a thread, or from the host (null), to whoever is next; to the host when nobody is.
void switch_to_next(Thread *from, bool finished = false) {
    Thread *next = next_turn();
    if (next == from) return;
    resume(next);
    switch_fiber(from ? from->fiber : state.host, next ? next->fiber : state.host, finished);
}

void thread_main() {
    arrived_in_fiber();
    Thread &thread = *state.current;
    order_acquire(&state.begin_order);
    state.launch->call(state.launch->arguments);
    check_leaving(thread);
    thread.done = true;
    --state.live;
    state.spins = 0;
    if (--thread.block->live == 0) release_shared(*thread.block);
    order_release(&state.end_order);
    switch_to_next(&thread, true);
    abort();  // nobody comes back
}

void say(Site site, const char *what) {
    const size_t room = sizeof words;
    int used = 0;
    if (site.file) used = snprintf(words, room, "%s:%d: ", site.file, site.line);
    used += snprintf(words + used, room - used, "%s", what);
    if (const Thread *t = state.current) {
        const uint3 b = t->block->index, i = t->index;
        snprintf(words + used, room - used, " [block (%u, %u, %u), thread (%u, %u, %u)]", b.x, b.y,
                 b.z, i.x, i.y, i.z);
    }
    ++failures;
    fprintf(stderr, "simt: %s\n", words);
}

// Nobody can run and not everybody is done: who waits where.
void report_deadlock() {
    struct Group {
        const char *doing;
        Site site;
        int count;
    };
    std::vector<Group> groups;
    for (unsigned i = 0; i < state.resident; ++i) {
        const Thread &t = state.threads[i];
        if (t.done) continue;
        auto same = [&](const Group &g) { return g.doing == t.doing && g.site == t.site; };
        auto found = std::find_if(groups.begin(), groups.end(), same);
        if (found == groups.end())
            groups.push_back({t.doing, t.site, 1});
        else
            ++found->count;
    }
    std::string text = "deadlock:";
    for (const Group &g : groups) {
        char line[512];
        snprintf(line, sizeof line, " %d wait in %s at %s:%d;", g.count, g.doing, g.site.file,
                 g.site.line);
        text += line;
    }
    text += " " + std::to_string(state.resident - state.live) + " have left";
    say(groups[0].site, text.c_str());
}

// A loop that never reaches the scheduler. The race detector holds signals back; there the time
// limit of the process has to do.
unsigned long long progress_at_tick = 0;
void tick(int) {
    if (state.current && state.progress == progress_at_tick)
        fail(state.current->site,
             "timeout: a thread runs on and on without meeting others; it "
             "last did at this line");
    progress_at_tick = state.progress;
}

// Of processor time: SIMT_SECONDS, or 10.
itimerval tick_length() {
    const char *text = getenv("SIMT_SECONDS");
    const double seconds = text ? atof(text) : 10;
    const timeval length = {time_t(seconds), suseconds_t((seconds - time_t(seconds)) * 1e6)};
    return {length, length};
}

class Watchdog {
 public:
    Watchdog() {
        progress_at_tick = ~0ull;
        struct sigaction action = {};
        action.sa_handler = tick;
        action.sa_flags = SA_NODEFER;  // a handler that fails does not return
        sigaction(SIGVTALRM, &action, &old_action_);
        const itimerval every = tick_length();
        setitimer(ITIMER_VIRTUAL, &every, &old_timer_);
    }
    ~Watchdog() {
        setitimer(ITIMER_VIRTUAL, &old_timer_, nullptr);
        sigaction(SIGVTALRM, &old_action_, nullptr);
    }

 private:
    struct sigaction old_action_;
    itimerval old_timer_;
};

#ifdef SIMT_TSAN
// Every block of a launch gets fibers that know nothing of what other blocks did: races between
// blocks show. Those of blocks that are done wait for the next launch, which comes after all of
// them. Beyond a number they are given up, since the race detector has 8128; not at once, since it
// drops a report whose other side is gone.
std::vector<Fiber> spent, idle;
std::vector<void *> couriers;

void spend_fibers() {
    constexpr std::size_t kMost = 4096;
    if (spent.size() + state.resident > kMost) {
        for (Fiber &fiber : spent) dispose(fiber);
        spent.clear();
    }
    for (unsigned i = 0; i < state.resident; ++i) {
        spent.push_back(state.threads[i].fiber);
        state.threads[i].fiber = Fiber();
    }
}
void refresh_fibers() {
    for (void *courier : couriers) __tsan_destroy_fiber(courier);
    couriers.clear();
    idle.insert(idle.end(), spent.begin(), spent.end());
    spent.clear();
}
void take_idle(Fiber &fiber) {
    if (idle.empty()) return;
    fiber = idle.back();
    idle.pop_back();
}
#endif

void set_up_block(Block &block, const Launch &launch, unsigned rank, Shape index) {
    const unsigned threads = unsigned(launch.block.count()), warps = (threads + 31) / 32;
    block.index = {index.x, index.y, index.z};
    block.rank = rank;
    block.first = &state.threads[rank * threads];
    block.threads = block.live = threads;
    block.warps = &state.warps[rank * warps];
#ifdef SIMT_TSAN
    couriers.push_back(block.courier = __tsan_create_fiber(0));
#endif
    for (unsigned i = 0; i < threads; ++i) {
        Thread &t = block.first[i];
        const Fiber fiber = t.fiber;
        retire(t.copies);
        t = Thread();
        t.fiber = fiber;
        t.block = &block;
        t.warp = &block.warps[i / 32];
        t.rank = i;
        t.lane = i % 32;
        t.warp->lane[t.lane] = &t;
        t.index = {i % launch.block.x, i / launch.block.x % launch.block.y,
                   i / launch.block.x / launch.block.y};
        t.priority = mix(seed * 1000003 + mix(rank * 1024 + i)) >> 2;
#ifdef SIMT_TSAN
        take_idle(t.fiber);
#endif
        prepare(t.fiber, thread_main);
    }
}

// The blocks from `origin` on that must be resident together.
bool run_together(const Launch &launch, Shape origin, Shape extent) {
    state.resident = state.live = unsigned(launch.block.count() * extent.count());
    state.blocks = std::vector<Block>(extent.count());
    state.warps = std::vector<Warp>(extent.count() * ((launch.block.count() + 31) / 32));
    state.failed = false;
    state.spins = 0;
    turns.clear();
    for (Block &block : state.blocks) allocate_shared(block, launch.shared);
    unsigned rank = 0;
    for (unsigned z = 0; z < extent.z; ++z)
        for (unsigned y = 0; y < extent.y; ++y)
            for (unsigned x = 0; x < extent.x; ++x, ++rank)
                set_up_block(state.blocks[rank], launch, rank,
                             {origin.x + x, origin.y + y, origin.z + z});
    for (unsigned i = 0; i < state.resident; ++i) take_turn(state.threads[i]);
    order_release(&state.begin_order);
    switch_to_next(nullptr);
    if (!state.failed && state.live) {
        report_deadlock();
        state.failed = true;
    }
    for (unsigned i = 0; i < rank; ++i) release_shared(state.blocks[i]);
#ifdef SIMT_TSAN
    spend_fibers();
#else
    free_retired();
#endif
    return !state.failed;
}

// Where the groups of `step` blocks begin, in the order in which they run: as with threads.
std::vector<Shape> origins(Shape grid, Shape step) {
    std::vector<Shape> found;
    for (unsigned z = 0; z < grid.z; z += step.z)
        for (unsigned y = 0; y < grid.y; y += step.y)
            for (unsigned x = 0; x < grid.x; x += step.x) found.push_back({x, y, z});
    if (order == kLifo) std::reverse(found.begin(), found.end());
    if (order == kPriority)
        for (size_t i = found.size(); i > 1; --i) std::swap(found[i - 1], found[mix(seed + i) % i]);
    return found;
}

bool run_grid(const Launch &launch) {
    const Shape grid = launch.grid, step = launch.cooperative ? grid : launch.cluster;
    const size_t blocks = step.count(), threads = launch.block.count();
    if (state.threads.size() < blocks * threads) state.threads.resize(blocks * threads);
    turns.reserve(blocks * threads + 1);
    StaticShared shared(launch);
    for (const Shape &origin : origins(grid, step)) {
        shared.fill();
        if (!run_together(launch, origin, step)) return false;
        if (blocks == 1 || !shared.touched()) continue;
        state.current = nullptr;
        say({}, "static __shared__ with several blocks resident; use dynamic shared");
        return false;
    }
    return true;
}

}  // namespace

void fail(Site site, const char *format, ...) {
    char text[2048];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    say(site, text);
    state.failed = true;
    Thread *from = state.current;
    resume(nullptr);
    switch_fiber(from->fiber, state.host, true);
    abort();
}

bool run(const Launch &launch) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    if (!order_known) set_order(getenv("SIMT_ORDER"));
    state.launch = &launch;
    adopt(state.host);
    blockDim = dim3(launch.block.x, launch.block.y, launch.block.z);
    gridDim = dim3(launch.grid.x, launch.grid.y, launch.grid.z);
    const Watchdog watchdog;
    const bool fine = run_grid(launch);
    state.current = nullptr;
    order_acquire(&state.end_order);
    free_retired();
#ifdef SIMT_TSAN
    refresh_fibers();
#endif
    return fine;
}

const char *failure() { return words; }

void wait_for(const void *what, const char *doing, Site site) {
    Thread &t = *state.current;
    t.waits_for = what;
    t.doing = doing;
    t.site = site;
    switch_to_next(&t);
}

void wake(Thread *first, unsigned count, const void *what) {
    state.spins = 0;
    for (Thread *t = first; t != first + count; ++t) {
        if (t->waits_for != what) continue;
        t->waits_for = nullptr;
        take_turn(*t);
    }
}

void let_others_run() {
    take_turn(*state.current);
    switch_to_next(state.current);
}

void step_back() {
    take_turn(*state.current, true);
    switch_to_next(state.current);
}

// Any bijection that looks random (the finaliser of splitmix64).
unsigned long long mix(unsigned long long x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

}  // namespace simt

void simt_set_order(const char *order) { simt::set_order(order); }
int simt_failures(void) { return simt::failures; }
const char *simt_failure(void) { return simt::words; }
