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
    /// Two bits a weight, four output rows in a byte; multiplies 8-bit activations only.
    Ternary,
}

/// Columns that share a scale in [`MatrixFormat::Q8`].
pub const Q8_BLOCK: usize = 32;

impl MatrixFormat {
    /// The format's name as the command line spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Q8 => "q8",
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
