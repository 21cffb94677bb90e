/* exp_steps.h - the constants of exp_fast in activations.c, which every level uses. */
#ifndef PYENGINE_EXP_STEPS_H
#define PYENGINE_EXP_STEPS_H

#define LOG2_E 0x1.71547652b82fep+0
#define LN2_HI 0x1.62e42feep-1         /* 32 bits: LN2_HI * k is exact for |k| < 2^21 */
#define LN2_REST 0x1.a39ef35793c76p-33 /* ln 2 - LN2_HI */
#define ROUND_TO_INTEGER 0x1.8p52      /* v + this - this is v rounded to an integer, |v| < 2^51 */

/* The Taylor series of e^r: 1/13!, then 1/12!, ..., 1/2!. */
#define INVERSE_FACTORIAL_13 (1.0 / 6227020800.0)
#define INVERSE_FACTORIALS                                                                         \
    {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0,                         \
     1.0 / 40320.0,     1.0 / 5040.0,     1.0 / 720.0,     1.0 / 120.0,                            \
     1.0 / 24.0,        1.0 / 6.0,        1.0 / 2.0}
#define N_INVERSE_FACTORIALS 11

#endif
