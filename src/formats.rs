//! Shapes and number formats that files and devices share.
//!
//! They are public as part of [`crate::backend`].

/// The shape of the attention of every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionShape {
    /// Query heads, `H`.
    pub heads: usize,
    /// Key and value heads, `G`; divides `heads`. Query head `h` reads KV head `h / (H / G)`.
    pub kv_heads: usize,
    /// Elements of a head, `D`; even.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Width of the stacked q, k, v projection: `(H + 2 G) D`.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Width of all heads together: `H D`.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all keys, or all values: `G D`.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// The activation between gate and up projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x * sigmoid(x)` (Llama).
    Silu,
    /// `max(x, 0)^2` (BitNet b1.58 2B4T, <https://arxiv.org/abs/2504.12285>).
    Relu2,
}

/// The number format of a weight matrix on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MatrixFormat {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an `f32`.
    BF16,
    /// `i8` in blocks of [`Q8_BLOCK`] columns of a row, one `f16` scale a block.
    Q8,
    /// Four bits in blocks of [`Q8_BLOCK`] columns of a row, two columns a byte with the lower bits
    /// first, one `f16` scale a block: `(level - 8) * scale`. Widths are whole blocks.
    Q4,
    /// Two bits a weight, four output rows in a byte; multiplies 8-bit activations only. A GPU may pack
    /// [five](crate::gpu::Packing).
    Ternary,
}

/// Columns that share a scale in [`MatrixFormat::Q8`] and [`MatrixFormat::Q4`].
pub const Q8_BLOCK: usize = 32;

/// Columns that share a scale in [fixed point](crate::backend::Backend::fixed_point).
pub const FIXED_COLS: usize = 512;

/// The step between activations in fixed point, as a share of the largest that share a scale: levels are
/// two bytes, both signed, where only bytes are multiplied, and at most `127 * 256 + 127`.
pub const ACTIVATION_STEP: f32 = 1.0 / 32639.0;

/// The same of weights.
pub const WEIGHT_STEP: f32 = 1.0 / 2047.0;

/// Tokens from which weights may be in fixed point as well as activations.
pub const FIXED_TOKENS: usize = 8;

impl MatrixFormat {
    /// Bytes of `elements` of a row, scales not counted; of whole blocks for Q4. A row of ternary
    /// bytes stands for four rows.
    pub(crate) fn bytes_of(self, elements: usize) -> usize {
        match self {
            Self::F32 => 4 * elements,
            Self::F16 | Self::BF16 => 2 * elements,
            Self::Q8 | Self::Ternary => elements,
            Self::Q4 => elements / 2,
        }
    }

    /// Whether blocks of a row have scales.
    pub(crate) fn has_block_scales(self) -> bool {
        matches!(self, Self::Q8 | Self::Q4)
    }

    /// The format's name as the command line spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
            Self::Ternary => "ternary",
        }
    }
}

/// The number format of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum CacheFormat {
    /// 32-bit floats: for comparing with other engines.
    F32,
    /// IEEE half precision, rounded to nearest even.
    #[default]
    F16,
}

impl CacheFormat {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
}
