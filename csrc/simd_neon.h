/* simd_neon.h - the few steps on vectors that several NEON files need. */
#ifndef PYENGINE_SIMD_NEON_H
#define PYENGINE_SIMD_NEON_H

#include "kernels.h"

#include <arm_neon.h>

/* Eight float32 at p. */
PE_INLINE float32x4x2_t load8(const float *p)
{
    return (float32x4x2_t){{vld1q_f32(p), vld1q_f32(p + 4)}};
}

/* Eight float32 as float64, in order. */
PE_INLINE void widen8(float32x4x2_t v, float64x2_t wide[4])
{
    wide[0] = vcvt_f64_f32(vget_low_f32(v.val[0]));
    wide[1] = vcvt_high_f64_f32(v.val[0]);
    wide[2] = vcvt_f64_f32(vget_low_f32(v.val[1]));
    wide[3] = vcvt_high_f64_f32(v.val[1]);
}

/* The tree of sum8; sum[k] is accumulators 2 k and 2 k + 1. */
PE_INLINE double tree8(const float64x2_t sum[4])
{
    return vpaddd_f64(vaddq_f64(vaddq_f64(sum[0], sum[2]), vaddq_f64(sum[1], sum[3])));
}

#endif
