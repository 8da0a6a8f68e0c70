// SPDX-License-Identifier: Apache-2.0
#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SIMT_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace simt {
namespace {

// Sanitizers make frames several times larger.
#if defined(SIMT_ASAN) || defined(SIMT_TSAN)
constexpr std::size_t kStack = 256 << 10;
#else
constexpr std::size_t kStack = 64 << 10;
#endif
constexpr std::size_t kGuard = 4096;  // an overflow ends in a fault, not in another stack

void (*begin)() = nullptr;  // one entry serves all fibers of a launch
#ifdef SIMT_ASAN
Fiber *left = nullptr;  // the fiber last switched from
#endif

}  // namespace

// The switch keeps what the calling convention asks a callee to keep; no signal mask, which is what
// makes ucontext eight times slower.
#if defined(__x86_64__)
extern "C" void simt_switch(void **save, void *load);
asm(R"(
.pushsection .text
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size simt_switch, .-simt_switch
.popsection
)");
static void *fresh_context(Fiber &fiber) {
    // Six registers, the entry to return into, and its own return address. Entries find a stack
    // pointer that is 8 modulo 16, as after a call.
    auto **top = reinterpret_cast<void **>(fiber.stack + fiber.size) - 8;
    for (int i = 0; i < 8; ++i) top[i] = nullptr;
    top[6] = reinterpret_cast<void *>(begin);
    return top;
}
#elif defined(__aarch64__)
extern "C" void simt_switch(void **save, void *load);
asm(R"(
.pushsection .text
.globl simt_switch
.hidden simt_switch
.type simt_switch, %function
simt_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size simt_switch, .-simt_switch
.popsection
)");
static void *fresh_context(Fiber &fiber) {
    auto **top = reinterpret_cast<void **>(fiber.stack + fiber.size) - 20;
    for (int i = 0; i < 20; ++i) top[i] = nullptr;
    top[11] = reinterpret_cast<void *>(begin);  // x30
    return top;
}
#else
#include <ucontext.h>
static void simt_switch(void **save, void *load) {
    ucontext_t here;
    *save = &here;
    swapcontext(&here, static_cast<ucontext_t *>(load));
}
static void *fresh_context(Fiber &fiber) {
    auto *context = reinterpret_cast<ucontext_t *>(fiber.stack);
    getcontext(context);
    context->uc_stack.ss_sp = fiber.stack + sizeof *context;
    context->uc_stack.ss_size = fiber.size - sizeof *context;
    makecontext(context, begin, 0);
    return context;
}
#endif

void prepare(Fiber &fiber, void (*entry)()) {
    begin = entry;
    if (!fiber.stack) {
        void *memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) std::abort();
        mprotect(memory, kGuard, PROT_NONE);
        fiber.stack = static_cast<char *>(memory) + kGuard;
        fiber.size = kStack;
    }
#ifdef SIMT_ASAN
    __asan_unpoison_memory_region(fiber.stack, fiber.size);  // of frames that were abandoned
#endif
#ifdef SIMT_TSAN
    if (!fiber.tsan) fiber.tsan = __tsan_create_fiber(0);
#endif
    fiber.context = fresh_context(fiber);
}

void switch_fiber(Fiber &from, Fiber &to, bool finished) {
#ifdef SIMT_ASAN
    left = &from;
    __sanitizer_start_switch_fiber(finished ? nullptr : &from.fake_stack, to.stack, to.size);
#endif
#ifdef SIMT_TSAN
    __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
    (void)finished;
    simt_switch(&from.context, to.context);
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void arrived_in_fiber() {
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void adopt(Fiber &host) {
#ifdef SIMT_TSAN
    host.tsan = __tsan_get_current_fiber();
#endif
#ifdef SIMT_ASAN
    pthread_attr_t attributes;
    void *stack = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &host.size);
    pthread_attr_destroy(&attributes);
    host.stack = static_cast<char *>(stack);
#else
    (void)host;
#endif
}

void dispose(Fiber &fiber) {
#ifdef SIMT_TSAN
    if (fiber.tsan) __tsan_destroy_fiber(fiber.tsan);
#endif
    if (fiber.stack) munmap(fiber.stack - kGuard, fiber.size + kGuard);
    fiber = Fiber();
}

}  // namespace simt
