//! Products of tiles of bytes, which some processors have a unit for: Intel's AMX.
//!
//! One of its instructions multiplies two tiles in sixteen cycles, 1024 products of bytes a cycle, where
//! vectors make 128. Rust has the instructions as assembly only.
#![cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "no such processor has the unit, so that none is ever found")
)]

use std::marker::PhantomData;

use bytemuck::{Pod, Zeroable};

/// Rows of a tile.
pub(in crate::cpu) const TILE_ROWS: usize = 16;

/// Columns of a product that a tile has.
pub(in crate::cpu) const TILE_COLS: usize = 64;

/// Either sixteen rows of 64 columns, or 64 columns of sixteen tokens: row `i` then has the columns from
/// `4 i` on, four for each token.
pub(in crate::cpu) type Tile = [[i8; TILE_COLS]; TILE_ROWS];

/// A product of tiles `[row][token]`.
pub(in crate::cpu) type TileSums = [[i32; TILE_ROWS]; TILE_ROWS];

/// Those of two tiles of rows with two of tokens, `[rows][tokens]`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(in crate::cpu) struct TileProducts(pub(in crate::cpu) [[TileSums; 2]; 2]);

impl TileProducts {
    pub(in crate::cpu) const ZERO: Self = Self([[[[0; TILE_ROWS]; TILE_ROWS]; 2]; 2]);
}

/// Exists only where this process may use the unit.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct TileUnit(());

impl TileUnit {
    /// The unit, where the processor has it and the system lets this process use it.
    pub(super) fn detect() -> Option<Self> {
        permitted().then_some(Self(()))
    }

    /// Sets the unit up on this thread, until what is returned is dropped.
    pub(in crate::cpu) fn begin(self) -> Tiles {
        configure();
        Tiles(PhantomData)
    }
}

/// The unit, set up on this thread, which it cannot leave.
pub(in crate::cpu) struct Tiles(PhantomData<*const ()>);

impl Tiles {
    /// Multiplies two by two rows of tiles, all equally many and not none: each of `rows` with each of
    /// `tokens`. They are added to `products` if `add`, and else take their place.
    ///
    /// # Panics
    /// If they are not.
    #[inline]
    pub(in crate::cpu) fn multiply(
        &self,
        rows: [&[Tile]; 2],
        tokens: [&[Tile]; 2],
        products: &mut TileProducts,
        add: bool,
    ) {
        let count = rows[0].len();
        let equal = [rows[1], tokens[0], tokens[1]].iter().all(|tiles| tiles.len() == count);
        assert!(equal && count > 0, "as many tiles of each, and not none");
        multiply(rows, tokens, products, add);
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        release();
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn permitted() -> bool {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid, __cpuid_count};

    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    const AMX_TILE_AND_INT8: u32 = 1 << 24 | 1 << 25;
    // SAFETY: every processor of 64 bits has the instruction.
    #[allow(unused_unsafe, reason = "safe in later versions of Rust")]
    let found = unsafe {
        __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & AMX_TILE_AND_INT8 == AMX_TILE_AND_INT8
    };
    if !found {
        return false;
    }
    let status: i64;
    // SAFETY: a call of the system that reads and writes no memory of ours; one that does not know it, or
    // does not permit it, answers with an error.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => status,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    status == 0
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn permitted() -> bool {
    false
}

/// All eight tiles of the unit have sixteen rows of 64 bytes.
#[cfg(target_arch = "x86_64")]
fn configure() {
    #[repr(C, align(64))]
    struct Configuration([u8; 64]);

    let mut all = Configuration([0; 64]);
    all.0[0] = 1;
    for tile in 0..8 {
        all.0[16 + 2 * tile] = TILE_COLS as u8;
        all.0[48 + tile] = TILE_ROWS as u8;
    }
    // SAFETY: a `TileUnit` is at hand, so that the instruction is there; it reads 64 bytes.
    unsafe { std::arch::asm!("ldtilecfg [{}]", in(reg) &all, options(nostack, readonly)) }
}

#[cfg(target_arch = "x86_64")]
fn release() {
    // SAFETY: as above.
    unsafe { std::arch::asm!("tilerelease", options(nostack, nomem)) }
}

/// Four sums stay in tiles while the columns pass by, so that each tile that is loaded is used twice:
/// loads take half the time of the products. Tokens come out of the second-level cache, and are asked for
/// two tiles ahead, or loads take all of it.
#[cfg(target_arch = "x86_64")]
fn multiply(rows: [&[Tile]; 2], tokens: [&[Tile]; 2], products: &mut TileProducts, add: bool) {
    /// A product, and four lines of what will be needed.
    macro_rules! product {
        ($sums:literal, $row:literal, $token:literal, $place:literal, $line:literal) => {
            concat!(
                concat!("tdpbssd ", $sums, ", ", $row, ", ", $token, "\n"),
                concat!("prefetcht0 [{", $place, "} + 2048 + ", $line, "]\n"),
                concat!("prefetcht0 [{", $place, "} + 2048 + ", $line, " + 64]\n"),
                concat!("prefetcht0 [{", $place, "} + 2048 + ", $line, " + 128]\n"),
                concat!("prefetcht0 [{", $place, "} + 2048 + ", $line, " + 192]\n"),
                concat!("prefetcht0 [{", $place, "} + 2048 + ", $line, " + 256]\n"),
                concat!("prefetcht0 [{", $place, "} + 2048 + ", $line, " + 320]\n"),
                concat!("prefetcht0 [{", $place, "} + 2048 + ", $line, " + 384]\n"),
                concat!("prefetcht0 [{", $place, "} + 2048 + ", $line, " + 448]\n"),
            )
        };
    }
    // SAFETY: the unit is set up on this thread. All four slices hold as many tiles of 1024 bytes as the
    // loop takes, which are not none, and `products` has the 4096 bytes that are read and written. A
    // prefetch may name any address.
    unsafe {
        std::arch::asm!(
            "test {add:e}, {add:e}",
            "jz 3f",
            "tileloadd tmm0, [{out} + {stride}*1]",
            "tileloadd tmm1, [{out} + {stride}*1 + 1024]",
            "tileloadd tmm2, [{out} + {stride}*1 + 2048]",
            "tileloadd tmm3, [{out} + {stride}*1 + 3072]",
            "jmp 2f",
            "3:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{a} + {stride}*1]",
            "tileloadd tmm6, [{x} + {stride}*1]",
            "tileloadd tmm5, [{b} + {stride}*1]",
            "tileloadd tmm7, [{y} + {stride}*1]",
            product!("tmm0", "tmm4", "tmm6", "x", 0),
            product!("tmm1", "tmm4", "tmm7", "x", 512),
            product!("tmm2", "tmm5", "tmm6", "y", 0),
            product!("tmm3", "tmm5", "tmm7", "y", 512),
            "add {a}, 1024",
            "add {b}, 1024",
            "add {x}, 1024",
            "add {y}, 1024",
            "dec {count}",
            "jnz 2b",
            "tilestored [{out} + {stride}*1], tmm0",
            "tilestored [{out} + {stride}*1 + 1024], tmm1",
            "tilestored [{out} + {stride}*1 + 2048], tmm2",
            "tilestored [{out} + {stride}*1 + 3072], tmm3",
            add = in(reg) u32::from(add),
            a = inout(reg) rows[0].as_ptr() => _,
            b = inout(reg) rows[1].as_ptr() => _,
            x = inout(reg) tokens[0].as_ptr() => _,
            y = inout(reg) tokens[1].as_ptr() => _,
            count = inout(reg) rows[0].len() => _,
            stride = in(reg) TILE_COLS,
            out = in(reg) products.0.as_mut_ptr(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn configure() {}

#[cfg(not(target_arch = "x86_64"))]
fn release() {}

#[cfg(not(target_arch = "x86_64"))]
use plain as multiply;

/// The same in plain Rust.
#[cfg(any(test, not(target_arch = "x86_64")))]
fn plain(rows: [&[Tile]; 2], tokens: [&[Tile]; 2], products: &mut TileProducts, add: bool) {
    if !add {
        *products = TileProducts::ZERO;
    }
    for (rows, products) in rows.into_iter().zip(&mut products.0) {
        for (tokens, sums) in tokens.into_iter().zip(products) {
            for (rows, tokens) in rows.iter().zip(tokens) {
                for (row, sums) in rows.iter().zip(&mut *sums) {
                    for (fours, row) in tokens.iter().zip(row.as_chunks::<4>().0) {
                        for (four, sum) in fours.as_chunks::<4>().0.iter().zip(&mut *sums) {
                            for (w, x) in row.iter().zip(four) {
                                *sum += i32::from(*w) * i32::from(*x);
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::Draws;

    /// The unit's way, where it is there, and the plain one, on tiles of noise and of extremes.
    #[test]
    fn tiles_are_multiplied_by_rows_and_columns() {
        let unit = TileUnit::detect().map(TileUnit::begin);
        let mut draws = Draws::new(9);
        let mut byte = || (256.0 * draws.draw()) as u8 as i8;
        let noise: Vec<Tile> =
            (0..4 * 7).map(|_| std::array::from_fn(|_| std::array::from_fn(|_| byte()))).collect();
        // Sums of 65536 columns.
        let lowest = vec![[[i8::MIN; TILE_COLS]; TILE_ROWS]; 1024];
        for plainly in [true, false] {
            let multiply = |rows: [&[Tile]; 2], tokens: [&[Tile]; 2], out: &mut _, add| match &unit
            {
                Some(unit) if !plainly => unit.multiply(rows, tokens, out, add),
                _ => plain(rows, tokens, out, add),
            };
            let mut found = TileProducts::ZERO;
            for (count, add) in [(1, false), (2, true), (7, false), (4, true), (3, true)] {
                let before = found;
                let at = |i: usize| &noise[7 * i..][..count];
                multiply([at(0), at(1)], [at(2), at(3)], &mut found, add);
                for (i, j, row, token) in [(0, 0, 0, 0), (0, 1, 3, 15), (1, 0, 15, 2), (1, 1, 8, 7)]
                {
                    let products = (0..count * TILE_COLS).map(|column| {
                        let (tile, column) = (column / TILE_COLS, column % TILE_COLS);
                        let x = at(2 + j)[tile][column / 4][4 * token + column % 4];
                        i32::from(at(i)[tile][row][column]) * i32::from(x)
                    });
                    let before = if add { before.0[i][j][row][token] } else { 0 };
                    let want = before + products.sum::<i32>();
                    assert_eq!(found.0[i][j][row][token], want, "{count} tiles");
                }
            }
            multiply([&lowest; 2], [&lowest; 2], &mut found, false);
            assert_eq!(found.0, [[[[1 << 30; TILE_ROWS]; TILE_ROWS]; 2]; 2]);
        }
    }
}
