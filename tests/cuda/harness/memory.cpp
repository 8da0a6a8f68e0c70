// SPDX-License-Identifier: Apache-2.0
// Shared memory, asynchronous copies, and the order that fences give to atomics.
#include "memory.h"

#include <link.h>

#include <cstdlib>
#include <cstring>
#include <iterator>

#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#endif
#ifdef SIMT_TSAN
extern "C" {  // the only way to tell the race detector that memory is as good as new
void __tsan_java_init(unsigned long begin, unsigned long size);
void __tsan_java_alloc(unsigned long begin, unsigned long size);
void __tsan_func_entry(void *caller);
void __tsan_func_exit();
}
#endif

namespace simt {
namespace {

constexpr unsigned char kGarbage = 0xff;  // a NaN in every floating type
constexpr std::size_t kSharedAlignment = 128;
constexpr unsigned long long kSpins = 20'000'000;
std::vector<void *> retired;
std::vector<std::vector<Copy>> retired_copies;
thread_local volatile char anchor;  // brings the library's thread-local memory into being

// Plain loops: the sanitizers listen to memcpy and memset.
void fill_bytes(unsigned char *p, std::size_t n, unsigned char value) {
    for (std::size_t i = 0; i < n; ++i) p[i] = value;
}

// Puts the kernel's line into reports on what is read and written here in its name.
struct Frame {
    explicit Frame(void *caller) {
#ifdef SIMT_TSAN
        __tsan_func_entry(caller);
#endif
        (void)caller;
    }
    ~Frame() {
#ifdef SIMT_TSAN
        __tsan_func_exit();
#endif
    }
};

struct Found {
    const void *code;
    unsigned char *begin;
    std::size_t size;
} static_shared;  // of the launch

int look(dl_phdr_info *info, size_t, void *data) {
    auto &found = *static_cast<Found *>(data);
    const auto code = reinterpret_cast<std::uintptr_t>(found.code);
    bool inside = false;
    std::size_t size = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto &part = info->dlpi_phdr[i];
        const std::uintptr_t begin = info->dlpi_addr + part.p_vaddr;
        if (part.p_type == PT_LOAD) inside |= code >= begin && code < begin + part.p_memsz;
        if (part.p_type == PT_TLS) size = part.p_memsz;
    }
    if (!inside) return 0;
    found.begin = static_cast<unsigned char *>(info->dlpi_tls_data);
    found.size = found.begin ? size : 0;
    return 1;
}

}  // namespace

StaticShared::StaticShared(const Launch &launch) {
    anchor = 0;
    static_shared = {launch.kernel, nullptr, 0};
    dl_iterate_phdr(look, &static_shared);
    begin_ = static_shared.begin;
    size_ = static_shared.size;
    before_.assign(begin_, begin_ + size_);
}

StaticShared::~StaticShared() {
    for (std::size_t i = 0; i < size_; ++i) begin_[i] = before_[i];
}

void StaticShared::fill() {
    fill_bytes(begin_, size_, kGarbage);
#ifdef SIMT_TSAN
    const auto begin = reinterpret_cast<std::uintptr_t>(begin_) & ~15ul;
    const std::size_t size =
        (reinterpret_cast<std::uintptr_t>(begin_) + size_ - begin + 15) & ~15ul;
    static const bool once = (__tsan_java_init(begin, size), true);
    if (once) __tsan_java_alloc(begin, size);
#endif
}

bool StaticShared::touched() const {
    for (std::size_t i = 0; i < size_; ++i)
        if (begin_[i] != kGarbage) return true;
    return false;
}

void allocate_shared(Block &block, std::size_t bytes) {
    void *memory = nullptr;
    // Exactly as large as the launch says, so that the address sanitizer sees the end.
    if (posix_memalign(&memory, kSharedAlignment, bytes ? bytes : 1)) abort();
    block.shared = static_cast<char *>(memory);
    retired.push_back(memory);
    fill_bytes(static_cast<unsigned char *>(memory), bytes, kGarbage);
#ifdef SIMT_ASAN
    if (!bytes) __asan_poison_memory_region(memory, 1);
#endif
}

// As soon as a block has left: a peer in its cluster that reads on finds garbage, or is caught.
void release_shared(Block &block) {
    if (!block.shared) return;
    fill_bytes(reinterpret_cast<unsigned char *>(block.shared), state.launch->shared, kGarbage);
#ifdef SIMT_ASAN
    __asan_poison_memory_region(block.shared, state.launch->shared);
#endif
    block.shared = nullptr;
}

void retire(std::vector<Copy> &copies) {
    if (copies.capacity()) retired_copies.push_back(std::move(copies));
}

void free_retired() {
    for (void *memory : retired) free(memory);
    retired.clear();
    retired_copies.clear();
}

namespace {

bool in_shared(const void *address) {
    const auto *p = static_cast<const char *>(address);
    for (const Block &block : state.blocks)
        if (block.shared && p >= block.shared && p < block.shared + state.launch->shared)
            return true;
    const auto *begin = reinterpret_cast<const char *>(static_shared.begin);
    return p >= begin && p < begin + static_shared.size;
}

}  // namespace

void *dynamic_shared() { return state.current->block->shared; }
unsigned dynamic_shared_size() { return unsigned(state.launch->shared); }

void *peer_shared(const void *mine, unsigned rank, Site site) {
    Block &block = *state.current->block;
    const Launch &launch = *state.launch;
    const auto offset = static_cast<const char *>(mine) - block.shared;
    if (rank >= launch.cluster.count()) fail(site, "cluster: no block %u in this cluster", rank);
    if (offset < 0 || std::size_t(offset) >= launch.shared)
        fail(site, "cluster: not an address in this block's dynamic shared memory");
    Block &peer = state.blocks[rank];
    if (&peer == &block) return const_cast<void *>(mine);
    if (state.blocks[0].cluster_barrier.generation == 0)
        fail(site, "missing cluster barrier: block %u may not have started yet", rank);
    if (!peer.shared) fail(site, "missing cluster barrier: block %u has left", rank);
    peer.reached_by_peer = site;
    return peer.shared + offset;
}

void check_aligned(const void *address, std::size_t bytes, Site site) {
    if (reinterpret_cast<std::uintptr_t>(address) % bytes)
        fail(site, "misaligned: an access of %zu bytes to %p", bytes, address);
}

// The source is read now and the target spoilt; what is read arrives at the wait.
void copy_async(void *to, const void *from, std::size_t bytes, std::size_t zeros, Site site) {
    if (bytes != 4 && bytes != 8 && bytes != 16)
        fail(site, "asynchronous copy of %zu bytes", bytes);
    check_aligned(to, bytes, site);
    check_aligned(from, bytes, site);
    const Block &block = *state.current->block;
    const auto offset = static_cast<char *>(to) - block.shared;
    const bool inside = offset >= 0 && std::size_t(offset) + bytes <= state.launch->shared;
    if (!inside) fail(site, "asynchronous copy: the target is not in dynamic shared memory");
    Thread &t = *state.current;
    const Frame frame(__builtin_return_address(0));
    Copy copy = {to, unsigned(bytes), t.copy_group, site, {}};
    std::memcpy(copy.data, from, bytes - zeros);
    std::memset(to, kGarbage, bytes);
    t.copies.push_back(copy);
}

void commit_copies() { ++state.current->copy_group; }

void wait_copies(unsigned newest) {
    Thread &t = *state.current;
    std::size_t kept = 0;
    const Frame frame(__builtin_return_address(0));
    for (const Copy &copy : t.copies) {
        // Copies that were never committed belong to the group still open.
        if (copy.group + newest < t.copy_group)
            std::memcpy(copy.to, copy.data, copy.bytes);
        else
            t.copies[kept++] = copy;
    }
    t.copies.resize(kept);
}

void check_copies(Thread &t) {
    if (!t.copies.empty())
        fail(t.copies[0].site, "nobody waited for the asynchronous copy made here");
}

// Fences are sequentially consistent: what came before one in some thread is seen by what comes
// after one in another, if an atomic after the first was seen by one before the second. Threads of
// a block may share the work: all fence, meet, one does the atomic; the other way round elsewhere.
// So what a block's fences came after travels with its atomics, by a courier that knows nothing
// else.
bool before_atomic(const void *address, std::size_t bytes, Site site) {
    check_aligned(address, bytes, site);
    if (++state.spins > kSpins) fail(site, "timeout: atomics all the time and nobody gets on");
    state.current->site = site;
    step_back();
#ifdef SIMT_TSAN
    Block &block = *state.current->block;
    __tsan_switch_to_fiber(block.courier, __tsan_switch_to_fiber_no_sync);
    order_acquire(&block.fence_order);
    order_release(const_cast<void *>(address));
    __tsan_switch_to_fiber(state.current->fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
    return in_shared(address);
}

void after_atomic(const void *address) {
    Block &block = *state.current->block;
    for (const void *known : block.atomics)
        if (known == address) return;
    block.atomics[block.atomic_count++ % std::size(block.atomics)] = address;
}

void fence() {
    Block &block = *state.current->block;
    for (const void *address : block.atomics)
        if (address) order_acquire(const_cast<void *>(address));
    order_release(&block.fence_order);
}

unsigned lane() { return state.current->lane; }
unsigned cluster_rank() { return state.launch->cooperative ? 0 : state.current->block->rank; }
unsigned cluster_size() { return unsigned(state.launch->cluster.count()); }

}  // namespace simt
