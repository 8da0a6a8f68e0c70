// SPDX-License-Identifier: Apache-2.0
//     planted                      names of the cases
//     planted broken|correct NAME...   exits with the outcome of the last; 0: right
#include <cstdio>
#include <cstring>

#include "planted.h"

int main(int count, char **words) {
    using planted::Case;
    const bool broken = count > 1 && !strcmp(words[1], "broken");
    int worst = 0;
    for (const Case &c : Case::table()) {
        if (count == 1) puts(c.name);
        bool wanted = count == 2;
        for (int i = 2; i < count; ++i) wanted |= !strcmp(words[i], c.name);
        if (count == 1 || !wanted) continue;
        const int outcome = broken ? c.broken() : c.correct();
        printf("%s %s\n", c.name,
               outcome == planted::kRight   ? "right"
               : outcome == planted::kWrong ? "wrong"
                                            : cudaGetErrorString(cudaGetLastError()));
        worst = outcome > worst ? outcome : worst;
    }
    return worst;
}
