//! What the operations work on besides matrices: activations, norms, the rotary table.

use super::buffer::Buffer;
use super::device::Device;
use crate::backend::{Footprint, TensorFormat};
use crate::error::Result;

/// Elements that a row is padded to a multiple of: 16 bytes of int8.
const ROW_ELEMENTS: usize = 16;

/// Elements of a padded row.
pub(super) fn padded(width: usize) -> usize {
    width.next_multiple_of(ROW_ELEMENTS)
}

/// What the quantiser leaves beside each row of an int8 tensor.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct RowScale {
    pub scale: f32,
    /// Sum of the row's `i8`.
    pub sum: i32,
}

/// Activations `[rows, width]` on the device. The padding of a row is zero.
pub struct Tensor {
    pub(super) data: Buffer,
    /// A [`RowScale`] a row, for int8.
    pub(super) scales: Option<Buffer>,
    pub(super) format: TensorFormat,
    pub(super) width: usize,
    /// Rows that there is room for.
    pub(super) capacity: usize,
    /// Rows that an operation has written.
    pub(super) rows: usize,
}

impl Tensor {
    pub(super) fn new(
        device: &Device,
        rows: usize,
        width: usize,
        format: TensorFormat,
    ) -> Result<Self> {
        let elements = (rows * padded(width)) as u64;
        let (data, scales) = match format {
            TensorFormat::F32 => (device.storage("activations", elements * 4)?, None),
            TensorFormat::Int8 => {
                let scales = device.storage("scales of activations", rows as u64 * 8)?;
                (device.storage("activations", elements)?, Some(scales))
            }
        };
        Ok(Self { data, scales, format, width, capacity: rows, rows: 0 })
    }

    /// Elements of a padded row.
    pub(super) fn stride(&self) -> usize {
        padded(self.width)
    }
}

impl Footprint for Tensor {
    fn bytes(&self) -> u64 {
        self.data.size() + self.scales.as_ref().map_or(0, Buffer::size)
    }
}

/// An RMSNorm on the device.
pub struct Norm {
    /// `[width]` f32, padded with zeros.
    pub(super) weight: Buffer,
    pub(super) width: usize,
    pub(super) eps: f32,
}

impl Norm {
    pub(super) fn new(device: &Device, weight: &[f32], eps: f32) -> Result<Self> {
        let width = weight.len();
        let mut row = weight.to_vec();
        row.resize(padded(width), 0.0);
        Ok(Self { weight: device.storage_with("the weight of a norm", &row)?, width, eps })
    }
}

impl Footprint for Norm {
    fn bytes(&self) -> u64 {
        self.weight.size()
    }
}

/// The rotary table on the device.
pub struct Rope {
    /// `[positions, D / 2]` of (cosine, sine), f32.
    pub(super) table: Buffer,
    pub(super) head_dim: usize,
}

impl Rope {
    pub(super) fn check(device: &Device, context: usize, head_dim: usize) -> Result<()> {
        let bytes = (context as u64).saturating_mul(4 * head_dim as u64);
        let what = format!("a context of {context} tokens (a smaller one takes less)");
        device.check_size(&what, bytes)
    }

    pub(super) fn new(device: &Device, table: &[[f32; 2]], head_dim: usize) -> Result<Self> {
        Ok(Self { table: device.storage_with("the rotary table", table)?, head_dim })
    }
}

impl Footprint for Rope {
    fn bytes(&self) -> u64 {
        self.table.size()
    }
}
