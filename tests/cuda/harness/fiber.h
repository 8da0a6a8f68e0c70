// SPDX-License-Identifier: Apache-2.0
// Stacks that take turns on one thread of the operating system.
#pragma once

#include <cstddef>

namespace simt {

struct Fiber {
    void *context = nullptr;  // where it goes on: a stack pointer, or a ucontext_t
    char *stack = nullptr;    // null for the fiber that the caller of a launch is
    std::size_t size = 0;
    void *tsan = nullptr;        // what the race detector calls a fiber
    void *fake_stack = nullptr;  // of the address sanitizer
};

// Makes `fiber`, on its own stack (allocated at the first call), begin with `entry`, which must
// leave by a switch and never return.
void prepare(Fiber &fiber, void (*entry)());
// Leaves `from` where it is and goes on with `to`. `finished`: nobody will come back to `from`.
void switch_fiber(Fiber &from, Fiber &to, bool finished = false);
// To be called first thing by an entry.
void arrived_in_fiber();
// Fills in what the sanitizers know about the stack that called a launch.
void adopt(Fiber &host);
void dispose(Fiber &fiber);

}  // namespace simt
