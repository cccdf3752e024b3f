/* Compares the sets of instructions that this CPU has with plain C; prints what agrees. */
#include <stdio.h>

int tp_sets(void);
int tp_set_runs(int set);
const char *tp_set_name(int set);
const char *tp_check(int set);

int main(void)
{
    for (int set = 1; set < tp_sets(); set++) {
        if (!tp_set_runs(set)) continue;
        const char *wrong = tp_check(set);
        printf(wrong ? "%s differs in %s\n" : "%s\n", tp_set_name(set), wrong);
        if (wrong) return 1;
    }
    return 0;
}
