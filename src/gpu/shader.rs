//! The table of all kernels, and how each is linked from the WGSL files under `shaders/`.
//!
//! A kernel is one file `shaders/<name>.wgsl` with one entry point `main`. Where kernels share
//! code, or differ in one thing only, that code stands in a snippet under `shaders/common/`; a
//! variant is the same kernel file with another snippet that defines the same functions. Linking is
//! concatenation: constants, snippets, kernel. WGSL does not mind the order.

use std::fmt::Write as _;

use super::{attention, embed, gate, linear_float, linear_ternary, norm, rope_append, sample};
use crate::backend::{Activation, CacheFormat, MatrixFormat, TensorFormat};

/// A file under `shaders/`, as text.
macro_rules! wgsl {
    ($path:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/", $path))
    };
}
pub(super) use wgsl;

/// Optional abilities of a device that kernels make use of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Abilities {
    pub f16: bool,
    pub subgroups: bool,
}

/// How a buffer is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Binding {
    Uniform,
    Read,
    Write,
}

/// Every kernel, with what its code depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    Embed {
        table: MatrixFormat,
    },
    Norm {
        out: TensorFormat,
    },
    LinearTernary {
        add: bool,
    },
    /// `tokens`: a register block, an eighth of the tile.
    LinearTernaryTiled {
        add: bool,
        tokens: u32,
    },
    LinearFloat {
        weights: MatrixFormat,
        add: bool,
    },
    LinearFloatTiled {
        weights: MatrixFormat,
        add: bool,
    },
    RopeAppend {
        cache: CacheFormat,
    },
    Attention {
        cache: CacheFormat,
        head_dim: u32,
    },
    AttentionMerge {
        head_dim: u32,
    },
    AttentionTiled {
        cache: CacheFormat,
        head_dim: u32,
    },
    Gate {
        activation: Activation,
        norm: bool,
        out: TensorFormat,
        vec4: bool,
    },
    /// `first`: whether the candidates are the logits themselves.
    SampleBest {
        first: bool,
    },
    SampleTop {
        first: bool,
    },
    SampleDraw,
}

impl Kernel {
    /// The name of the kernel's file.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Embed { .. } => "embed",
            Self::Norm { .. } => "norm",
            Self::LinearTernary { .. } => "linear_ternary",
            Self::LinearTernaryTiled { .. } => "linear_ternary_tiled",
            Self::LinearFloat { .. } => "linear_float",
            Self::LinearFloatTiled { .. } => "linear_float_tiled",
            Self::RopeAppend { .. } => "rope_append",
            Self::Attention { .. } => "attention",
            Self::AttentionMerge { .. } => "attention_merge",
            Self::AttentionTiled { .. } => "attention_tiled",
            Self::Gate { .. } => "gate",
            Self::SampleBest { .. } => "sample_best",
            Self::SampleTop { .. } => "sample_top",
            Self::SampleDraw => "sample_draw",
        }
    }

    /// The kernel's parts for a device with these abilities.
    pub(super) fn program(self, abilities: Abilities) -> Program {
        match self {
            Self::Embed { table } => embed::program(table, abilities),
            Self::Norm { out } => norm::program(out, abilities),
            Self::LinearTernary { add } => linear_ternary::program(add, abilities),
            Self::LinearTernaryTiled { add, tokens } => linear_ternary::tiled_program(add, tokens),
            Self::LinearFloat { weights, add } => linear_float::program(weights, add, abilities),
            Self::LinearFloatTiled { weights, add } => {
                linear_float::tiled_program(weights, add, abilities)
            }
            Self::RopeAppend { cache } => rope_append::program(cache),
            Self::Attention { cache, head_dim } => attention::program(cache, head_dim, abilities),
            Self::AttentionMerge { head_dim } => attention::merge_program(head_dim),
            Self::AttentionTiled { cache, head_dim } => attention::tiled_program(cache, head_dim),
            Self::Gate { activation, norm, out, vec4 } => {
                gate::program(activation, norm, out, vec4, abilities)
            }
            Self::SampleBest { first } => sample::best_program(first),
            Self::SampleTop { first } => sample::top_program(first),
            Self::SampleDraw => sample::draw_program(),
        }
    }

    /// Every kernel; those that depend on the size of a head for several sizes.
    fn all() -> Vec<Self> {
        let tensors = [TensorFormat::F32, TensorFormat::Int8];
        let floats = [MatrixFormat::F32, MatrixFormat::F16, MatrixFormat::BF16, MatrixFormat::Q8];
        let caches = [CacheFormat::F32, CacheFormat::F16];
        let mut all = Vec::new();
        for weights in floats {
            all.push(Self::Embed { table: weights });
            for add in [false, true] {
                all.push(Self::LinearFloat { weights, add });
                all.push(Self::LinearFloatTiled { weights, add });
            }
        }
        for add in [false, true] {
            all.push(Self::LinearTernary { add });
            for tokens in linear_ternary::TILE_TOKENS {
                all.push(Self::LinearTernaryTiled { add, tokens });
            }
        }
        for out in tensors {
            all.push(Self::Norm { out });
            for activation in [Activation::Silu, Activation::Relu2] {
                for norm in [false, true] {
                    let vec4 = [false, true];
                    all.extend(vec4.map(|vec4| Self::Gate { activation, norm, out, vec4 }));
                }
            }
        }
        for head_dim in [2, 6, 64, 80, 96, 128, 256] {
            all.push(Self::AttentionMerge { head_dim });
            for cache in caches {
                all.push(Self::Attention { cache, head_dim });
                all.push(Self::AttentionTiled { cache, head_dim });
            }
        }
        all.extend(caches.map(|cache| Self::RopeAppend { cache }));
        for first in [false, true] {
            all.extend([Self::SampleBest { first }, Self::SampleTop { first }]);
        }
        all.push(Self::SampleDraw);
        all
    }
}

/// A kernel's parts.
pub(super) struct Program {
    /// Generated `const NAME: u32` lines.
    pub constants: Vec<(&'static str, u32)>,
    /// The kernel's file and its snippets.
    pub parts: Vec<&'static str>,
    /// Bindings of the buffers, in the order that the operation passes them. Binding 0 is always
    /// the parameters.
    pub bindings: Vec<(u32, Binding)>,
    /// Whether a snippet computes with f16.
    pub f16: bool,
}

impl Program {
    pub(super) fn wgsl(&self) -> String {
        let mut text = String::new();
        if self.f16 {
            text.push_str("enable f16;\n");
        }
        for (name, value) in &self.constants {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "const {name}: u32 = {value}u;");
        }
        for part in &self.parts {
            text.push('\n');
            text.push_str(part);
        }
        text
    }
}

/// The snippet of sums and maxima over a workgroup. It needs the constant `WORKGROUP`.
pub(super) fn reduce(abilities: Abilities) -> &'static str {
    if abilities.subgroups {
        wgsl!("common/reduce_subgroup.wgsl")
    } else {
        wgsl!("common/reduce_workgroup.wgsl")
    }
}

/// The snippet of divisions and roots to the nearest float.
pub(super) const PRECISE: &str = wgsl!("common/precise.wgsl");

/// The snippet that reads a float matrix, and whether it computes with f16.
pub(super) fn weights(format: MatrixFormat, abilities: Abilities) -> (&'static str, bool) {
    match format {
        MatrixFormat::F16 if abilities.f16 => (wgsl!("common/weights_f16_native.wgsl"), true),
        MatrixFormat::F16 => (wgsl!("common/weights_f16.wgsl"), false),
        MatrixFormat::BF16 => (wgsl!("common/weights_bf16.wgsl"), false),
        MatrixFormat::Q8 => (wgsl!("common/weights_q8.wgsl"), false),
        // Ternary matrices never come here: they have kernels of their own.
        MatrixFormat::F32 | MatrixFormat::Ternary => (wgsl!("common/weights_f32.wgsl"), false),
    }
}

/// The snippet that writes rows of a tensor.
pub(super) fn finish(out: TensorFormat) -> &'static str {
    match out {
        TensorFormat::F32 => wgsl!("common/finish_f32.wgsl"),
        TensorFormat::Int8 => wgsl!("common/finish_int8.wgsl"),
    }
}

/// The snippet that reads the cache.
pub(super) fn cache_read(format: CacheFormat) -> &'static str {
    match format {
        CacheFormat::F32 => wgsl!("common/cache_f32_read.wgsl"),
        CacheFormat::F16 => wgsl!("common/cache_f16_read.wgsl"),
    }
}

/// The snippet that writes to the cache.
pub(super) fn cache_write(format: CacheFormat) -> &'static str {
    match format {
        CacheFormat::F32 => wgsl!("common/cache_f32_write.wgsl"),
        CacheFormat::F16 => wgsl!("common/cache_f16_write.wgsl"),
    }
}

/// The WGSL of one variant of a kernel, for tools that check or translate shaders.
#[derive(Clone, Debug)]
pub struct ShaderSource {
    /// The kernel's name and what the variant depends on.
    pub name: String,
    /// The linked module; its entry point is `main`.
    pub wgsl: String,
}

/// Every variant of every kernel, for devices with and without each optional ability.
pub fn shader_sources() -> Vec<ShaderSource> {
    let mut sources: Vec<ShaderSource> = Vec::new();
    for kernel in Kernel::all() {
        let first = sources.len();
        for (f16, subgroups) in [(false, false), (true, false), (false, true), (true, true)] {
            let wgsl = kernel.program(Abilities { f16, subgroups }).wgsl();
            // Most kernels do not care for every ability.
            if sources[first..].iter().all(|source| source.wgsl != wgsl) {
                let name = format!("{} {kernel:?} f16={f16} subgroups={subgroups}", kernel.name());
                sources.push(ShaderSource { name, wgsl });
            }
        }
    }
    sources
}
