// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "state.h"

namespace simt {

void allocate_shared(Block &block, std::size_t bytes);
void retire(std::vector<Copy> &copies);
void free_retired();  // what threads allocated, when the caller of the launch knows of all they did

// Variables declared __shared__: thread-local ones of the library that the kernel is in. Filled
// with NaNs before each block; put back after the launch, for what else may be among them.
class StaticShared {
 public:
    explicit StaticShared(const Launch &launch);
    ~StaticShared();
    void fill();
    bool touched() const;  // since fill()

 private:
    unsigned char *begin_ = nullptr;
    std::size_t size_ = 0;
    std::vector<unsigned char> before_;
};

}  // namespace simt
