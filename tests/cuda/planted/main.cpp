// SPDX-License-Identifier: Apache-2.0
//     planted                      names of the cases
//     planted broken|correct|both NAME...   runs these, or all; exits with the worst outcome
// "both" runs the broken kernel first and then judges the correct one.
#include <cstdio>
#include <cstring>

#include "planted.h"

int main(int count, char **words) {
    using planted::Case;
    const bool broken = count > 1 && !strcmp(words[1], "broken");
    const bool both = count > 1 && !strcmp(words[1], "both");
    int worst = 0;
    for (const Case &c : Case::table()) {
        if (count == 1) puts(c.name);
        bool wanted = count == 2;
        for (int i = 2; i < count; ++i) wanted |= !strcmp(words[i], c.name);
        if (count == 1 || !wanted) continue;
        if (both) c.broken();
        const int outcome = broken ? c.broken() : c.correct();
        printf("%s %s\n", c.name,
               outcome == planted::kRight   ? "right"
               : outcome == planted::kWrong ? "wrong"
                                            : cudaGetErrorString(cudaGetLastError()));
        worst = outcome > worst ? outcome : worst;
    }
    return worst;
}
