//! A weight matrix on its way from a file to a device: where its bytes lie, and how to bring them
//! into the format that a backend computes with, a few rows at a time.

use std::ops::{Deref, Range};
use std::sync::Arc;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::formats::{MatrixFormat, Q8_BLOCK};

/// Bytes of a file or a tensor: mapped, owned, or in the program itself. Cheap to clone.
///
/// Each tensor is mapped by itself, so that its pages leave the process's memory when the last
/// user of the tensor is gone.
#[derive(Clone)]
pub struct Bytes(Arc<dyn Deref<Target = [u8]> + Send + Sync>);

impl Bytes {
    /// Bytes that live in a file map.
    pub(crate) fn mapped(map: memmap2::Mmap) -> Self {
        Self(Arc::new(map))
    }

    /// `len` bytes of their own, on large pages where the system has them, zeros until `fill` writes
    /// them.
    pub(crate) fn filled(len: usize, fill: impl FnOnce(&mut [u8])) -> Self {
        match memmap2::MmapMut::map_anon(len) {
            Ok(mut map) => {
                #[cfg(target_os = "linux")]
                let _ = map.advise(memmap2::Advice::HugePage);
                fill(&mut map);
                Self(Arc::new(map))
            }
            Err(_) => {
                let mut bytes = vec![0; len];
                fill(&mut bytes);
                bytes.into()
            }
        }
    }

    /// The bytes in `range`, not copied.
    ///
    /// # Panics
    /// If the range ends behind the bytes.
    pub(crate) fn part(&self, range: Range<usize>) -> Self {
        assert!(range.end <= self.len(), "{range:?} of {} bytes", self.len());
        Self(Arc::new(Part { whole: self.clone(), range }))
    }
}

/// Some of the bytes of a larger whole.
struct Part {
    whole: Bytes,
    range: Range<usize>,
}

impl Deref for Part {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.whole[self.range.clone()]
    }
}

impl From<&'static [u8]> for Bytes {
    fn from(bytes: &'static [u8]) -> Self {
        Self(Arc::new(bytes))
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Arc::new(bytes))
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bytes({})", self.len())
    }
}

/// A float format of a checkpoint, little endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an `f32`.
    BF16,
}

impl FloatType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// Decodes `bytes` into `out`, one element each.
    ///
    /// Extra elements on either side are left alone.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        let two = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
        match self {
            Self::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            Self::F16 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = f16::from_bits(two(b)).to_f32();
                }
            }
            Self::BF16 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = bf16::from_bits(two(b)).to_f32();
                }
            }
        }
    }

    fn matrix_format(self) -> MatrixFormat {
        match self {
            Self::F32 => MatrixFormat::F32,
            Self::F16 => MatrixFormat::F16,
            Self::BF16 => MatrixFormat::BF16,
        }
    }
}

/// How the matrix lies in the file and what becomes of it.
#[derive(Clone, Debug)]
enum Storage {
    /// Floats that keep their format, or become F32, Q8 or Q4.
    Float { stored: FloatType, data: Bytes, target: MatrixFormat },
    /// Packed trits, `[ceil(rows / 4), cols]` bytes.
    Packed { data: Bytes, scale: f32 },
    /// Float master weights that are rounded to trits while they are read.
    Master {
        stored: FloatType,
        data: Bytes,
        /// `max(mean |W|, 1e-5)`: the scale of the result.
        scale: f32,
    },
}

/// One weight matrix `[rows, cols]` = `[out, in]`, with the bytes of its file and the format that
/// a backend is to compute with.
///
/// # Formats, as [`MatrixSource::encode`] and [`MatrixSource::borrow`] give them
/// - `F32`, `F16`, `BF16`: row-major, little endian.
/// - `Q8`: row-major `i8`; each [`Q8_BLOCK`] columns of a row share a scale
///   `f16(max |w| / 127)`, the last block of a row may be short.
/// - `Q4`: likewise in 4 bits, `ceil(cols / 2)` bytes a row, the even column in the lower bits. The
///   scale is `f16(w / -8)` of the `w` that is greatest in magnitude, so that this one is met; an
///   element stands for `(level - 8) * scale`. `cols` is a multiple of [`Q8_BLOCK`].
/// - `Ternary`: `storage_rows = ceil(rows / 4)` rows of `cols` bytes. Bits `2j, 2j + 1` of byte
///   `[r, c]` hold the weight of row `r + j * storage_rows`, column `c`, plus one (0, 1, 2 for
///   -1, 0, +1); the layout of microsoft/bitnet-b1.58-2B-4T. Fields of rows that do not exist
///   (`>= rows`) hold 1. The effective weight is trit times [`MatrixSource::scale`].
#[derive(Clone, Debug)]
pub struct MatrixSource {
    name: String,
    rows: usize,
    cols: usize,
    storage: Storage,
}

impl MatrixSource {
    /// A float matrix that keeps its stored format.
    ///
    /// # Panics
    /// If `data` is not `rows * cols` elements long: the reader of the file checks that.
    pub fn float(
        name: impl Into<String>,
        rows: usize,
        cols: usize,
        stored: FloatType,
        data: Bytes,
    ) -> Self {
        let name = name.into();
        assert_eq!(data.len(), rows * cols * stored.bytes(), "{name}: length");
        let target = stored.matrix_format();
        let storage = Storage::Float { stored, data, target };
        Self { name, rows, cols, storage }
    }

    /// A matrix of trits, packed as in the type's description; the product is multiplied by
    /// `scale`.
    ///
    /// # Panics
    /// If `data` is not `ceil(rows / 4) * cols` bytes long: the reader of the file checks that.
    pub fn packed(
        name: impl Into<String>,
        rows: usize,
        cols: usize,
        data: Bytes,
        scale: f32,
    ) -> Self {
        let name = name.into();
        assert_eq!(data.len(), rows.div_ceil(4) * cols, "{name}: length");
        let storage = Storage::Packed { data, scale };
        Self { name, rows, cols, storage }
    }

    /// Float master weights of a BitNet model, ternarised as they are read:
    /// `trit = clamp(round_half_even(w / m), -1, 1)` with `m = max(mean |W|, 1e-5)` over the whole
    /// matrix, which is also the scale of the product
    /// (absmean quantisation, <https://arxiv.org/abs/2402.17764>, equations 1 to 3). The scale is
    /// not finite where a weight is not.
    ///
    /// # Panics
    /// If `data` is not `rows * cols` elements long: the reader of the file checks that.
    pub fn master(
        name: impl Into<String>,
        rows: usize,
        cols: usize,
        stored: FloatType,
        data: Bytes,
    ) -> Self {
        let name = name.into();
        assert_eq!(data.len(), rows * cols * stored.bytes(), "{name}: length");
        let mean = absmean(stored, &data, cols);
        // `max` would hide NaN.
        let scale = if mean.is_nan() { mean } else { mean.max(1e-5) };
        let storage = Storage::Master { stored, data, scale };
        Self { name, rows, cols, storage }
    }

    /// The same matrix in 8 bits; ternary matrices stay as they are.
    #[must_use]
    pub fn into_q8(self) -> Self {
        self.into_format(MatrixFormat::Q8)
    }

    /// The same matrix in 4 bits, or in 8 where its rows are not whole blocks of [`Q8_BLOCK`];
    /// ternary matrices stay as they are.
    #[must_use]
    pub fn into_q4(self) -> Self {
        let whole = self.cols.is_multiple_of(Q8_BLOCK);
        self.into_format(if whole { MatrixFormat::Q4 } else { MatrixFormat::Q8 })
    }

    /// The same matrix in 32-bit floats, which hold every other float format exactly; ternary
    /// matrices stay as they are.
    #[must_use]
    pub fn into_f32(self) -> Self {
        self.into_format(MatrixFormat::F32)
    }

    fn into_format(mut self, format: MatrixFormat) -> Self {
        if let Storage::Float { target, .. } = &mut self.storage {
            *target = format;
        }
        self
    }

    /// The tensor's name in the checkpoint.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Output width.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input width.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The format that [`MatrixSource::encode`] writes.
    pub fn format(&self) -> MatrixFormat {
        match &self.storage {
            Storage::Float { target, .. } => *target,
            Storage::Packed { .. } | Storage::Master { .. } => MatrixFormat::Ternary,
        }
    }

    /// What the product is multiplied by: 1 but for ternary matrices.
    pub fn scale(&self) -> f32 {
        match &self.storage {
            Storage::Float { .. } => 1.0,
            Storage::Packed { scale, .. } | Storage::Master { scale, .. } => *scale,
        }
    }

    /// Rows of the encoded matrix: `rows`, or `ceil(rows / 4)` for ternary ones.
    pub fn storage_rows(&self) -> usize {
        match self.format() {
            MatrixFormat::Ternary => self.rows.div_ceil(4),
            _ => self.rows,
        }
    }

    /// Bytes of one encoded row without padding, scales not counted.
    pub fn row_bytes(&self) -> usize {
        self.format().bytes_of(self.cols)
    }

    /// Scales of one encoded row: one per [`Q8_BLOCK`] columns for Q8 and Q4, else none.
    pub fn row_scales(&self) -> usize {
        match self.format().has_block_scales() {
            true => self.cols.div_ceil(Q8_BLOCK),
            false => 0,
        }
    }

    /// The file's own bytes where they are already in [`MatrixSource::format`] without padding, so
    /// that a CPU can compute on the map itself.
    pub fn borrow(&self) -> Option<Bytes> {
        match &self.storage {
            Storage::Float { stored, data, target } if stored.matrix_format() == *target => {
                Some(data.clone())
            }
            Storage::Packed { data, .. } => Some(data.clone()),
            Storage::Float { .. } | Storage::Master { .. } => None,
        }
    }

    /// Appends storage rows `range` to `values`, each padded with zeros to `stride` bytes, and for
    /// Q8 and Q4 the rows' scales to `scales`, each row padded with zeros to `scale_stride` scales.
    ///
    /// A zero byte of padding in a ternary row means four weights of -1: it must meet activations
    /// of zero.
    ///
    /// # Panics
    /// If `range` is outside the storage rows or `stride` is below [`MatrixSource::row_bytes`].
    pub fn encode(
        &self,
        range: Range<usize>,
        stride: usize,
        scale_stride: usize,
        values: &mut Vec<u8>,
        scales: &mut Vec<f16>,
    ) {
        let (first, first_scale) = (values.len(), scales.len());
        values.resize(first + range.len() * stride, 0);
        scales.resize(first_scale + range.len() * scale_stride, f16::ZERO);
        let (values, scales) = (&mut values[first..], &mut scales[first_scale..]);
        self.encode_into(range, stride, scale_stride, values, scales);
    }

    /// The same in place: `values` of `stride` bytes for each row of `range`, and `scales` of
    /// `scale_stride`; what is padding there is left as it is.
    ///
    /// # Panics
    /// As [`MatrixSource::encode`], and if `values` or `scales` are of another length.
    pub fn encode_into(
        &self,
        range: Range<usize>,
        stride: usize,
        scale_stride: usize,
        values: &mut [u8],
        scales: &mut [f16],
    ) {
        assert!(range.end <= self.storage_rows(), "{}: rows {range:?}", self.name);
        assert!(stride >= self.row_bytes(), "{}: stride {stride}", self.name);
        let lengths = (range.len() * stride, range.len() * scale_stride);
        assert_eq!((values.len(), scales.len()), lengths, "{}: length", self.name);
        let rows = (range, stride, values);
        match &self.storage {
            Storage::Packed { data, .. } => self.copy_rows(data, rows),
            Storage::Float { stored, data, target } if stored.matrix_format() == *target => {
                self.copy_rows(data, rows);
            }
            Storage::Float { stored, data, target } if target.has_block_scales() => {
                let quantize = if *target == MatrixFormat::Q8 { quantize_q8 } else { quantize_q4 };
                self.encode_blocks(*stored, data, rows, scale_stride, scales, quantize);
            }
            Storage::Float { stored, data, .. } => self.encode_f32(*stored, data, rows),
            Storage::Master { stored, data, scale } => {
                self.ternarise(*stored, data, 1.0 / scale, rows);
            }
        }
    }

    /// Writes output row `row` of a ternary matrix, `[cols]`: trits plus one, a byte each. What a file
    /// has packed beside the three comes out as 3.
    ///
    /// # Panics
    /// If the matrix is not ternary, `row` is outside the rows, or `codes` is not `cols` long.
    pub fn codes(&self, row: usize, codes: &mut [u8]) {
        assert!(row < self.rows, "{}: row {row}", self.name);
        assert_eq!(codes.len(), self.cols, "{}: length", self.name);
        match &self.storage {
            Storage::Packed { data, .. } => {
                let quarter = self.storage_rows();
                let (field, packed_row) = (row / quarter, row % quarter);
                let packed = &data[packed_row * self.cols..][..self.cols];
                for (code, byte) in codes.iter_mut().zip(packed) {
                    *code = byte >> (2 * field) & 3;
                }
            }
            Storage::Master { stored, data, scale } => {
                let (bytes, inverse) = (stored.bytes(), 1.0 / scale);
                let row = &data[row * self.cols * bytes..][..self.cols * bytes];
                let mut floats = [0.0; 256];
                for (codes, row) in codes.chunks_mut(256).zip(row.chunks(256 * bytes)) {
                    stored.decode(row, &mut floats);
                    for (code, w) in codes.iter_mut().zip(floats) {
                        *code = trit_plus_one(w * inverse);
                    }
                }
            }
            Storage::Float { .. } => panic!("{}: it is not ternary", self.name),
        }
    }

    fn copy_rows(&self, data: &[u8], (range, stride, out): Rows<'_>) {
        let row_bytes = self.row_bytes();
        for (row, out) in range.zip(out.chunks_exact_mut(stride)) {
            out[..row_bytes].copy_from_slice(&data[row * row_bytes..][..row_bytes]);
        }
    }

    fn encode_f32(&self, stored: FloatType, data: &[u8], (range, stride, out): Rows<'_>) {
        let out = out.par_chunks_exact_mut(stride);
        range.into_par_iter().zip(out).for_each_init(
            || vec![0.0; self.cols],
            |floats, (row, out)| {
                self.decode_row(stored, data, row, floats);
                for (bytes, w) in out.chunks_exact_mut(4).zip(floats) {
                    bytes.copy_from_slice(&w.to_le_bytes());
                }
            },
        );
    }

    fn encode_blocks(
        &self,
        stored: FloatType,
        data: &[u8],
        (range, stride, out): Rows<'_>,
        scale_stride: usize,
        scales: &mut [f16],
        quantize: impl Fn(&[f32], &mut [u8], &mut [f16]) + Sync,
    ) {
        let out = out.par_chunks_exact_mut(stride).zip(scales.par_chunks_exact_mut(scale_stride));
        range.into_par_iter().zip(out).for_each_init(
            || vec![0.0; self.cols],
            |floats, (row, (levels, scales))| {
                self.decode_row(stored, data, row, floats);
                quantize(floats, levels, scales);
            },
        );
    }

    fn ternarise(
        &self,
        stored: FloatType,
        data: &[u8],
        inverse: f32,
        (range, stride, out): Rows<'_>,
    ) {
        let quarter = self.storage_rows();
        let out = out.par_chunks_exact_mut(stride);
        range.into_par_iter().zip(out).for_each_init(
            || vec![0.0; self.cols],
            |floats, (row, out)| {
                let packed = &mut out[..self.cols];
                // Four fields of 1, the trit 0.
                packed.fill(0b01_01_01_01);
                for field in 0..4 {
                    let source = row + field * quarter;
                    if source >= self.rows {
                        break;
                    }
                    self.decode_row(stored, data, source, floats);
                    for (byte, w) in packed.iter_mut().zip(&*floats) {
                        let code = trit_plus_one(w * inverse);
                        *byte = *byte & !(3 << (2 * field)) | code << (2 * field);
                    }
                }
            },
        );
    }

    fn decode_row(&self, stored: FloatType, data: &[u8], row: usize, out: &mut [f32]) {
        let row_bytes = self.cols * stored.bytes();
        stored.decode(&data[row * row_bytes..][..row_bytes], out);
    }
}

/// `round_half_even` and `clamp` in one: a half rounds to 0.
fn trit_plus_one(x: f32) -> u8 {
    1 + u8::from(x > 0.5) - u8::from(x < -0.5)
}

/// Storage rows to be encoded: which, their padded bytes, and where they go.
type Rows<'a> = (Range<usize>, usize, &'a mut [u8]);

/// Mean of |W| over a whole matrix `[rows, cols]`. Rows are summed in f64 and in order, so that the
/// number of threads does not matter.
fn absmean(stored: FloatType, data: &[u8], cols: usize) -> f32 {
    if data.is_empty() {
        return 0.0;
    }
    let sum_row = |floats: &mut Vec<f32>, row: &[u8]| {
        stored.decode(row, floats);
        floats.iter().map(|w| f64::from(w.abs())).sum::<f64>()
    };
    let rows = data.par_chunks_exact(cols * stored.bytes());
    let sums: Vec<f64> = rows.map_init(|| vec![0.0f32; cols], sum_row).collect();
    (sums.iter().sum::<f64>() / (data.len() / stored.bytes()) as f64) as f32
}

/// Symmetric 8 bits: `w ~ i8 * scale` with `scale = f16(max |w| / 127)` a block.
fn quantize_q8(row: &[f32], levels: &mut [u8], scales: &mut [f16]) {
    let blocks = row.chunks(Q8_BLOCK).zip(levels.chunks_mut(Q8_BLOCK)).zip(scales);
    for ((block, levels), scale) in blocks {
        // `max` would hide NaN; a scale that is not finite shows in whatever is made of it.
        let larger = |m: f32, w: &f32| if w.abs() > m || w.is_nan() { w.abs() } else { m };
        let max = block.iter().fold(0.0, larger);
        *scale = f16::from_f32(max / 127.0);
        let inverse = if *scale > f16::ZERO { 1.0 / scale.to_f32() } else { 0.0 };
        for (level, w) in levels.iter_mut().zip(block) {
            *level = round_half_even(w * inverse).clamp(-127.0, 127.0) as i8 as u8;
        }
    }
}

/// 4 bits, two columns a byte: `w ~ (level - 8) * scale` with `scale = f16(w / -8)` of the greatest `w`
/// of a block. The row is of whole blocks.
fn quantize_q4(row: &[f32], levels: &mut [u8], scales: &mut [f16]) {
    let blocks = row.chunks_exact(Q8_BLOCK).zip(levels.chunks_exact_mut(Q8_BLOCK / 2)).zip(scales);
    for ((block, levels), scale) in blocks {
        // As above: NaN stays.
        let larger = |m: f32, &w: &f32| if w.abs() > m.abs() || w.is_nan() { w } else { m };
        let greatest = block.iter().fold(0.0, larger);
        *scale = f16::from_f32(greatest / -8.0);
        let inverse = if *scale != f16::ZERO { 1.0 / scale.to_f32() } else { 0.0 };
        let level = |w: f32| (round_half_even(w * inverse) + 8.0).clamp(0.0, 15.0) as u8;
        for (byte, pair) in levels.iter_mut().zip(block.as_chunks::<2>().0) {
            *byte = level(pair[0]) | level(pair[1]) << 4;
        }
    }
}

/// `f32::round_ties_even` for |x| below 2^22. The standard one is a function call for each element
/// on x86-64, whose baseline has no instruction for it; this one is vectorised.
fn round_half_even(x: f32) -> f32 {
    // Floats from 2^23 to 2^24 are the whole numbers.
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT) - SHIFT
}
