//! How the weights of a product with one token are read: once, and as fast as memory gives them.

use super::simd::{LINE, Simd};

/// How far ahead of a product its weights are asked for, where that pays: what a core reads in about
/// half a microsecond, so that no line is late, and little beside a second-level cache.
const AHEAD: usize = 16 * 1024;

/// How far ahead rows side by side are asked for, each: what a core reads of one of them in a tenth
/// of a microsecond, and little beside the nearest cache even where four are read.
const NEAR: usize = 2 * 1024;

/// The order in which the rows of a strip are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// One row after the other, in one long stream, which most processors foresee.
    InTurn,
    /// As many rows at once as registers hold the sums of, from as many places of the strip, each asked
    /// for a little ahead.
    ///
    /// Where a processor does not foresee enough, as Intel's do not beyond a page of 4 KB, lines that
    /// are asked for in time and from several pages twice the speed (measured in
    /// benches/runs/2026-11-29-xeon-cpu).
    SideBySide,
}

impl Reading {
    /// What suits this processor: those of Intel were measured to gain by rows side by side, those of
    /// AMD by rows in turn.
    pub(super) fn of_this_processor() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            // SAFETY: every processor of 64 bits has the instruction.
            #[allow(unused_unsafe, reason = "safe in later versions of Rust")]
            let vendor = unsafe { std::arch::x86_64::__cpuid(0) };
            let words = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
            if words.as_flattened() == b"GenuineIntel" {
                return Self::SideBySide;
            }
        }
        Self::InTurn
    }

    /// Rows at once.
    #[inline(always)]
    pub(super) fn rows<S: Simd>(self) -> usize {
        match self {
            Self::InTurn => 1,
            Self::SideBySide => S::TILE,
        }
    }
}

/// Row `i` of the next `R` that are read at once, `group` groups of them having been read: each is of
/// another `R`-th of the first `rows`, a multiple of `R`.
#[inline(always)]
pub(super) fn side_by_side<const R: usize>(rows: usize, group: usize, i: usize) -> usize {
    i * (rows / R) + group
}

/// Asks for what follows `blocks` of one of several rows that are read at once.
#[inline(always)]
pub(super) fn ask_near<S: Simd, Raw: AsRef<[u8]>, const N: usize>(simd: S, blocks: &[Raw; N]) {
    for line in (0..size_of_val(blocks)).step_by(LINE) {
        simd.prefetch(blocks[0].as_ref(), NEAR + line);
    }
}

/// Whether a product with a few tokens is to [`ask_ahead`]: their activations, which pass by with each
/// row, take so many bytes.
///
/// Weights are one long stream, which each processor foresees. But where activations do not fit the
/// nearest cache beside it, they are a stream as well, out of the next cache, and the two hinder each
/// other: rows of 8192 columns were read at half the speed of short ones. Where activations do fit,
/// asking costs a little and gains nothing.
pub(super) fn crowds(bytes: usize) -> bool {
    bytes >= 12 * 1024
}

/// Asks for what follows `blocks` at some distance, in the second-level cache: in the nearest it would
/// drive the activations out.
#[inline(always)]
pub(super) fn ask_ahead<S: Simd, Raw: AsRef<[u8]>, const N: usize>(simd: S, blocks: &[Raw; N]) {
    for line in (0..size_of_val(blocks)).step_by(LINE) {
        simd.prefetch_second(blocks[0].as_ref(), AHEAD + line);
    }
}
