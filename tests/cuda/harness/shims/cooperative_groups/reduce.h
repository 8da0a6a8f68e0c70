// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../cooperative_groups.h"

namespace cooperative_groups {

template <class T>
struct plus {
    T operator()(T a, T b) const { return a + b; }
};
template <class T>
struct less {
    T operator()(T a, T b) const { return b < a ? b : a; }
};
template <class T>
struct greater {
    T operator()(T a, T b) const { return a < b ? b : a; }
};

template <unsigned Size, class Parent, class T, class Operation>
T reduce(const thread_block_tile<Size, Parent> &tile, T value, Operation operation) {
    for (unsigned bits = Size / 2; bits; bits /= 2)
        value = operation(value, tile.shfl_xor(value, bits));
    return value;
}

}  // namespace cooperative_groups
