// SPDX-License-Identifier: Apache-2.0
// What calls on one stream share: the head of the workspace.
#pragma once

namespace msdkern {

struct Tally {
    unsigned blocks;       // that are done; 0 between calls
    unsigned bad_label;    // 1 after a label out of range, until somebody clears it
    double rows, weights;  // valid rows and their labels' class weights, where counted beforehand
    unsigned bad_index;    // 1 after a row to copy that does not exist, until somebody clears it
};
constexpr int kTallyBytes = 64;

}  // namespace msdkern
