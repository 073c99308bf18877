//! Brings weight matrices to the device.
//!
//! Matrices that share their input are stacked, and the stack is cut by rows into blocks of one
//! buffer each, because a binding may be as small as 128 MiB and the head of a model is larger.

use super::buffer::Buffer;
use super::device::Device;
use super::packing::{self, Packing};
use super::shader::Kernel;
use super::stream::Stream;
use super::tensor::{Tensor, padded};
use super::tuning::Tuning;
use crate::backend::{Footprint, MatrixFormat, Q8_BLOCK, TensorFormat};
use crate::checkpoint::MatrixSource;
use crate::error::{Error, Result};

/// Bytes that are encoded at a time.
const PIECE_BYTES: usize = 8 << 20;

/// Bytes that may wait in wgpu's staging memory until they are sent.
const STAGED_BYTES: usize = 32 << 20;

/// Rows of a block, so that a grid of workgroups that take two rows each stays below 65536.
const MAX_BLOCK_ROWS: usize = 65_535 * 2;

/// Matrices of a ternary stack: the kernels look a row's matrix up in a table of this length.
const MAX_SEGMENTS: usize = 4;

/// A tensor has few tokens up to here: then the kernels that read every weight once a token are
/// faster than the tiled ones, which compute whole tiles of tokens.
pub(super) const FEW_TOKENS: usize = 4;

/// One ternary matrix of a stack, or the part of it that lies in a block. As in `ternary.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
struct Segment {
    start: u32,
    count: u32,
    source: u32,
    apart: u32,
    rows: u32,
    offset: u32,
    scale: f32,
    unused: u32,
}

/// Some rows of a stack.
pub(super) struct Block {
    /// Storage rows, each padded to [`Linear::stride`] columns.
    pub(super) weights: Buffer,
    /// Q8 and Q4: `[rows, stride / 32]` f16.
    pub(super) scales: Option<Buffer>,
    /// Ternary: `[MAX_SEGMENTS]` of [`Segment`].
    pub(super) segments: Option<Buffer>,
    /// The block's first storage row in the stack.
    pub(super) first: usize,
    /// Its storage rows.
    pub(super) rows: usize,
}

/// A weight matrix `[out, in]` on the device, or several stacked over `out`.
pub struct Linear {
    pub(super) blocks: Vec<Block>,
    pub(super) format: MatrixFormat,
    /// Of ternary matrices.
    pub(super) packing: Packing,
    /// Output width.
    pub(super) rows: usize,
    /// Input width.
    pub(super) cols: usize,
    /// Columns of a padded row.
    pub(super) stride: usize,
}

impl Footprint for Linear {
    fn bytes(&self) -> u64 {
        let parts = |b: &Block| {
            let optional = [&b.scales, &b.segments];
            let optional = optional.iter().filter_map(|part| part.as_ref());
            b.weights.size() + optional.map(Buffer::size).sum::<u64>()
        };
        self.blocks.iter().map(parts).sum()
    }
}

impl Linear {
    /// `packing`: of ternary matrices.
    pub(super) fn new(device: &Device, stack: &[MatrixSource], packing: Packing) -> Result<Self> {
        let Some(first) = stack.first() else {
            return Err(device.fault("linear", "the stack has no matrix"));
        };
        let (format, cols) = (first.format(), first.cols());
        if let Some(odd) = stack.iter().find(|m| m.format() != format || m.cols() != cols) {
            let message = "the matrices of a stack differ in format or width";
            return Err(device.fault(odd.name(), message));
        }
        let ternary = format == MatrixFormat::Ternary;
        if ternary && stack.len() > MAX_SEGMENTS {
            let message =
                format!("{} ternary matrices; {MAX_SEGMENTS} can be stacked", stack.len());
            return Err(device.fault(first.name(), message));
        }
        let stride = match format {
            MatrixFormat::Q8 | MatrixFormat::Q4 => cols.next_multiple_of(2 * Q8_BLOCK),
            _ => padded(cols),
        };
        let row_bytes = format.bytes_of(stride);
        let fitting = (device.max_matrix_block / row_bytes.max(1) as u64) as usize;
        if fitting == 0 {
            return Err(Error::DeviceLimit {
                device: device.info.name.clone(),
                what: format!("a row of {}", first.name()),
                needed: row_bytes as u64,
                limit_name: "maxStorageBufferBindingSize",
                limit: device.max_matrix_block,
            });
        }
        let block_rows = fitting.min(MAX_BLOCK_ROWS);
        let storage_rows: usize = stack.iter().map(|matrix| packing.rows_of(matrix)).sum();
        let mut upload = Upload::new(device, packing, stride, row_bytes);
        let mut blocks = Vec::new();
        for first in (0..storage_rows).step_by(block_rows) {
            let rows = block_rows.min(storage_rows - first);
            blocks.push(upload.block(stack, first, rows)?);
        }
        upload.finish()?;
        let rows = stack.iter().map(MatrixSource::rows).sum();
        Ok(Self { blocks, format, packing, rows, cols, stride })
    }
}

/// The kernels of a format: those of many tokens, and of few.
pub(super) fn kernels(format: MatrixFormat, tuning: &Tuning) -> (Vec<Kernel>, Vec<Kernel>) {
    let (cut, tile) = (*tuning.cuts.of(format), *tuning.tiles.of(format));
    let adds = [false, true].into_iter();
    if format == MatrixFormat::Ternary {
        let packing = tuning.packing;
        // What is announced twice is compiled once.
        let tiles = move |add| {
            let tiles = [tile, tile.of_fewer_tokens(format)].into_iter();
            tiles.map(move |tile| Kernel::LinearTernaryTiled { packing, add, tile })
        };
        let few = adds.clone().map(|add| Kernel::LinearTernary { packing, add, cut });
        (adds.flat_map(tiles).collect(), few.collect())
    } else {
        let many = adds.clone().map(|add| Kernel::LinearFloatTiled { weights: format, add, tile });
        let few = adds.map(|add| Kernel::LinearFloat { weights: format, add, cut });
        (many.collect(), few.collect())
    }
}

/// Writes matrices to the device in bounded pieces.
struct Upload<'a> {
    device: &'a Device,
    packing: Packing,
    stride: usize,
    row_bytes: usize,
    staged: usize,
    values: Vec<u8>,
    scales: Vec<half::f16>,
}

impl<'a> Upload<'a> {
    fn new(device: &'a Device, packing: Packing, stride: usize, row_bytes: usize) -> Self {
        let (values, scales) = (Vec::new(), Vec::new());
        Self { device, packing, stride, row_bytes, staged: 0, values, scales }
    }

    /// Storage rows `first..first + rows` of the stack as a block.
    fn block(&mut self, stack: &[MatrixSource], first: usize, rows: usize) -> Result<Block> {
        let device = self.device;
        let name = stack[0].name();
        let weights = device.storage(name, (rows * self.row_bytes) as u64)?;
        let scaled = stack[0].format().has_block_scales();
        let scales_stride = if scaled { self.stride / Q8_BLOCK } else { 0 };
        let scales = match scaled {
            true => Some(device.storage(name, (rows * scales_stride * 2) as u64)?),
            false => None,
        };
        let mut segments = [Segment::default(); MAX_SEGMENTS];
        let mut segment_count = 0;
        // Where the current matrix starts: its storage rows in the stack, its columns in the output.
        let (mut stack_row, mut offset) = (0, 0);
        for matrix in stack {
            let height = self.packing.rows_of(matrix);
            let end = stack_row + height;
            let (from, to) = (first.max(stack_row), (first + rows).min(end));
            if from < to {
                if matrix.format() == MatrixFormat::Ternary {
                    segments[segment_count] = Segment {
                        start: (from - first) as u32,
                        count: (to - from) as u32,
                        source: (from - stack_row) as u32,
                        apart: height as u32,
                        rows: matrix.rows() as u32,
                        offset: offset as u32,
                        scale: matrix.scale(),
                        unused: 0,
                    };
                    segment_count += 1;
                }
                let piece_rows = (PIECE_BYTES / self.row_bytes.max(1)).max(1);
                let repacked = self.packing.changes(matrix);
                // Rows that lie in the file as they lie on the device go there straight from its map.
                let stride = self.row_bytes;
                let as_it_is = !repacked && matrix.row_bytes() == stride;
                let mapped = matrix.borrow().filter(|_| as_it_is);
                for row in (from..to).step_by(piece_rows) {
                    let count = piece_rows.min(to - row);
                    let source = row - stack_row..row - stack_row + count;
                    let at = row - first;
                    let place = (at * stride) as u64;
                    if let Some(bytes) = &mapped {
                        let rows = &bytes[source.start * stride..source.end * stride];
                        device.write(&weights, place, rows)?;
                        self.staged += rows.len();
                    } else {
                        let Self { values, scales, .. } = self;
                        values.clear();
                        scales.clear();
                        if repacked {
                            packing::five(matrix, source, stride, values)
                                .map_err(|message| device.fault(matrix.name(), message))?;
                        } else {
                            matrix.encode(source, stride, scales_stride, values, scales);
                        }
                        device.write(&weights, place, values)?;
                        self.staged += values.len();
                    }
                    if let Some(buffer) = &scales {
                        let bits: Vec<u16> = self.scales.iter().map(|s| s.to_bits()).collect();
                        let at = (at * scales_stride * 2) as u64;
                        device.write(buffer, at, bytemuck::cast_slice(&bits))?;
                    }
                    if self.staged > STAGED_BYTES {
                        self.finish()?;
                    }
                }
            }
            stack_row = end;
            offset += matrix.rows();
        }
        let segments = match segment_count {
            0 => None,
            _ => {
                let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
                let buffer = device.buffer(name, size_of_val(&segments) as u64, usage)?;
                device.write(&buffer, 0, bytemuck::cast_slice(&segments))?;
                Some(buffer)
            }
        };
        Ok(Block { weights, scales, segments, first, rows })
    }

    /// Sends what waits in staging memory, and waits until it has been taken.
    fn finish(&mut self) -> Result<()> {
        let submission = self.device.submit(None)?;
        self.staged = 0;
        self.device.wait(Some(submission))
    }
}

impl Stream {
    /// `out (+)= x W^T` with the kernel for the weight's format.
    pub(super) fn linear_any(
        &mut self,
        x: &Tensor,
        weight: &Linear,
        out: &mut Tensor,
        add: bool,
    ) -> Result<()> {
        let ternary = weight.format == MatrixFormat::Ternary;
        let input = if ternary { TensorFormat::Int8 } else { TensorFormat::F32 };
        self.expect("linear", x.format == input, || {
            format!("{:?} activations meet {} weights", x.format, weight.format.name())
        })?;
        self.expect("linear", x.width == weight.cols && out.width == weight.rows, || {
            let shape = [weight.rows, weight.cols];
            format!("weights {shape:?} between widths {} and {}", x.width, out.width)
        })?;
        let wrong = out.format != TensorFormat::F32 || x.rows > out.capacity;
        self.expect("linear", !wrong && (!add || out.rows == x.rows), || {
            format!("{} rows into {} of {:?}", x.rows, out.rows, out.format)
        })?;
        out.rows = x.rows;
        if ternary {
            self.linear_ternary(x, weight, out, add)
        } else {
            self.linear_float(x, weight, out, add)
        }
    }
}
