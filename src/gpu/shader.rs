//! The table of all kernels, and how each is linked from the WGSL files under `shaders/`.
//!
//! A kernel is one file `shaders/<name>.wgsl` with one entry point `main`. Where kernels share
//! code, or differ in one thing only, that code stands in a snippet under `shaders/common/`; a
//! variant is the same kernel file with another snippet that defines the same functions. Linking is
//! concatenation: constants, snippets, kernel. WGSL does not mind the order.
//!
//! Products of many tokens are linked with another file, `shaders/linear_matrix.wgsl`, where a matrix
//! unit makes the tile: from outside it is the same kernel.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use super::cache::{PageKeys, PageKind, ValueStore};
use super::matrix_unit::MatrixUnit;
use super::packing::Packing;
use super::tile::Tile;
use super::tuning::Cut;
use super::{
    attention, embed, encode_keys, gate, linear_float, linear_ternary, multiply_speed, norm,
    read_speed, rope_append, sample,
};
use crate::backend::{Activation, CacheFormat, MatrixFormat, TensorFormat};
use crate::delta::{
    ChannelBits, DeltaFormat, DeltaKeys, KeyFormat, PageLayout, Reference, Threshold,
};

/// A file under `shaders/`, as text.
macro_rules! wgsl {
    ($path:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/", $path))
    };
}
pub(super) use wgsl;

/// Optional abilities of a device that kernels make use of. A kernel that gives wrong results is
/// linked without them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Abilities {
    /// Weights are loaded as f16 (WebGPU's `shader-f16`).
    pub f16: bool,
    /// Workgroups reduce by subgroup operations.
    pub subgroups: bool,
    /// Four products of 8 bits at once (`dot4I8Packed`). Every device has it; some compute it with
    /// other instructions.
    pub packed_dot: bool,
    /// Tiles whose tuning wants it are made by a matrix unit; only with subgroups.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub matrix_unit: Option<MatrixUnit>,
}

impl Abilities {
    /// Every choice of abilities from among these, the whole first and none of them last; a matrix unit
    /// is left out alone, and with whatever else is.
    pub fn plainer(self) -> impl Iterator<Item = Self> {
        let choice = move |without: u8| Self {
            matrix_unit: None,
            subgroups: self.subgroups && without & 1 == 0,
            f16: self.f16 && without & 2 == 0,
            packed_dot: self.packed_dot && without & 4 == 0,
        };
        let mut all = vec![self];
        all.extend([0, 1, 2, 4, 3, 5, 6, 7].map(choice));
        // Where one is missing anyway, choices fall together.
        let mut seen = Vec::new();
        all.retain(|choice| {
            !seen.contains(choice) && {
                seen.push(*choice);
                true
            }
        });
        all.into_iter()
    }

    /// Those that both have.
    pub(super) fn shared_with(self, other: Self) -> Self {
        Self {
            f16: self.f16 && other.f16,
            subgroups: self.subgroups && other.subgroups,
            packed_dot: self.packed_dot && other.packed_dot,
            matrix_unit: self.matrix_unit.filter(|unit| other.matrix_unit == Some(*unit)),
        }
    }

    /// The abilities by name; "plain" where there is none.
    pub fn names(self) -> String {
        let names = [
            (self.f16, "f16"),
            (self.subgroups, "subgroups"),
            (self.packed_dot, "packed dot"),
            (self.matrix_unit.is_some(), "matrix unit"),
        ];
        let names: Vec<_> = names.into_iter().filter(|name| name.0).map(|name| name.1).collect();
        if names.is_empty() { "plain".to_owned() } else { names.join(" + ") }
    }
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
        packing: Packing,
        add: bool,
        cut: Cut,
    },
    LinearTernaryTiled {
        packing: Packing,
        add: bool,
        tile: Tile,
    },
    LinearFloat {
        weights: MatrixFormat,
        add: bool,
        cut: Cut,
    },
    LinearFloatTiled {
        weights: MatrixFormat,
        add: bool,
        tile: Tile,
    },
    /// `compressed`: whether keys go to the ring of originals.
    RopeAppend {
        exact: CacheFormat,
        compressed: bool,
        values: ValueStore,
    },
    RopeAppendValues {
        values: ValueStore,
        head_dim: u32,
    },
    EncodeKeys {
        exact: CacheFormat,
        pages: PageKind,
        head_dim: u32,
    },
    /// `pages`: where keys are compressed.
    Attention {
        exact: CacheFormat,
        pages: Option<PageKind>,
        values: ValueStore,
        head_dim: u32,
    },
    AttentionMerge {
        head_dim: u32,
    },
    AttentionExpand {
        pages: PageKind,
        head_dim: u32,
    },
    /// `page`: the size of pages, where keys are compressed.
    AttentionTiled {
        exact: CacheFormat,
        page: Option<u32>,
        values: ValueStore,
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
    ReadSpeed,
    MultiplySpeed {
        bytes: bool,
    },
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
            Self::RopeAppendValues { .. } => "rope_append_values",
            Self::EncodeKeys { pages, .. } => match pages.keys {
                PageKeys::Int8 | PageKeys::Channel(_) => "encode_keys",
                PageKeys::Delta(..) => "encode_keys_delta",
            },
            Self::Attention { .. } => "attention",
            Self::AttentionMerge { .. } => "attention_merge",
            Self::AttentionExpand { .. } => "attention_expand",
            Self::AttentionTiled { .. } => "attention_tiled",
            Self::Gate { .. } => "gate",
            Self::SampleBest { .. } => "sample_best",
            Self::SampleTop { .. } => "sample_top",
            Self::SampleDraw => "sample_draw",
            Self::ReadSpeed => "read_speed",
            Self::MultiplySpeed { .. } => "multiply_speed",
        }
    }

    /// The kernel's parts for a device with these abilities.
    pub(super) fn program(self, abilities: Abilities) -> Program {
        match self {
            Self::Embed { table } => embed::program(table, abilities),
            Self::Norm { out } => norm::program(out, abilities),
            Self::LinearTernary { packing, add, cut } => {
                linear_ternary::program(packing, add, cut, abilities)
            }
            Self::LinearTernaryTiled { packing, add, tile } => {
                linear_ternary::tiled_program(packing, add, tile, abilities)
            }
            Self::LinearFloat { weights, add, cut } => {
                linear_float::program(weights, add, cut, abilities)
            }
            Self::LinearFloatTiled { weights, add, tile } => {
                linear_float::tiled_program(weights, add, tile, abilities)
            }
            Self::RopeAppend { exact, compressed, values } => {
                rope_append::program(exact, compressed, values)
            }
            Self::RopeAppendValues { values, head_dim } => {
                rope_append::values_program(values, head_dim, abilities)
            }
            Self::EncodeKeys { exact, pages, head_dim } => {
                encode_keys::program(exact, pages, head_dim)
            }
            Self::Attention { exact, pages, values, head_dim } => {
                attention::program(exact, pages, values, head_dim, abilities)
            }
            Self::AttentionMerge { head_dim } => attention::merge_program(head_dim),
            Self::AttentionExpand { pages, head_dim } => attention::expand_program(pages, head_dim),
            Self::AttentionTiled { exact, page, values, head_dim } => {
                attention::tiled_program(exact, page, values, head_dim)
            }
            Self::Gate { activation, norm, out, vec4 } => {
                gate::program(activation, norm, out, vec4, abilities)
            }
            Self::SampleBest { first } => sample::best_program(first),
            Self::SampleTop { first } => sample::top_program(first),
            Self::SampleDraw => sample::draw_program(),
            Self::ReadSpeed => read_speed::program(),
            Self::MultiplySpeed { bytes } => multiply_speed::program(bytes, abilities),
        }
    }

    /// Every kernel; those that depend on the size of a head for several sizes.
    fn all() -> Vec<Self> {
        let tensors = [TensorFormat::F32, TensorFormat::Int8];
        let floats = [
            MatrixFormat::F32,
            MatrixFormat::F16,
            MatrixFormat::BF16,
            MatrixFormat::Q8,
            MatrixFormat::Q4,
        ];
        let caches = [CacheFormat::F32, CacheFormat::F16];
        let mut all = Vec::new();
        for weights in floats {
            all.push(Self::Embed { table: weights });
            for add in [false, true] {
                all.extend(Cut::all(weights).map(|cut| Self::LinearFloat { weights, add, cut }));
                let tiles = tiles_both_ways(weights);
                all.extend(tiles.map(|tile| Self::LinearFloatTiled { weights, add, tile }));
            }
        }
        for packing in Packing::ALL {
            for add in [false, true] {
                let cuts = Cut::all(MatrixFormat::Ternary);
                all.extend(cuts.map(|cut| Self::LinearTernary { packing, add, cut }));
                let tiles = tiles_both_ways(MatrixFormat::Ternary);
                all.extend(tiles.map(|tile| Self::LinearTernaryTiled { packing, add, tile }));
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
        let exact = CacheFormat::F16;
        for head_dim in [2, 6, 64, 80, 96, 128, 256] {
            all.push(Self::AttentionMerge { head_dim });
            for values in ValueStore::ALL {
                let (pages, page) = (None, None);
                all.push(Self::Attention { exact, pages, values, head_dim });
                all.push(Self::AttentionTiled { exact, page, values, head_dim });
                if values.quantised().is_some() {
                    all.push(Self::RopeAppendValues { values, head_dim });
                }
            }
            for pages in PageKind::all() {
                all.push(Self::EncodeKeys { exact, pages, head_dim });
                let values = ValueStore::F16;
                all.push(Self::Attention { exact, pages: Some(pages), values, head_dim });
                all.push(Self::AttentionExpand { pages, head_dim });
            }
        }
        for exact in caches {
            for values in ValueStore::ALL {
                for compressed in [false, true] {
                    all.push(Self::RopeAppend { exact, compressed, values });
                    let pages = PageKind { keys: PageKeys::Int8, page: 64 };
                    let pages = compressed.then_some(pages);
                    all.push(Self::Attention { exact, pages, values, head_dim: 64 });
                    let page = compressed.then_some(16);
                    all.push(Self::AttentionTiled { exact, page, values, head_dim: 64 });
                }
            }
        }
        for first in [false, true] {
            all.extend([Self::SampleBest { first }, Self::SampleTop { first }]);
        }
        all.extend([Self::SampleDraw, Self::ReadSpeed]);
        all.extend([false, true].map(|bytes| Self::MultiplySpeed { bytes }));
        all
    }
}

/// Every tile of a format, by a matrix unit and not.
fn tiles_both_ways(format: MatrixFormat) -> impl Iterator<Item = Tile> {
    Tile::all(format).flat_map(|tile| [false, true].map(|matrix_unit| Tile { matrix_unit, ..tile }))
}

/// All abilities, with the matrix units that are known: of NVIDIA's and Intel's GPUs, of AMD's, of Apple's,
/// of llvmpipe.
const EVERYTHING: [Abilities; 4] = {
    const fn with(f16: Option<u32>, f32: Option<u32>, subgroup: u32) -> Abilities {
        let matrix_unit = Some(MatrixUnit { f16, f32, subgroup });
        Abilities { f16: true, subgroups: true, packed_dot: true, matrix_unit }
    }
    [
        with(Some(16), None, 32),
        with(Some(16), None, 64),
        with(Some(8), Some(8), 32),
        with(Some(8), None, 8),
    ]
};

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
        if self.parts.iter().any(|part| part.contains("coop_mat")) {
            text.push_str("enable wgpu_cooperative_matrix;\n");
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

/// The snippet of dot products of packed i8.
pub(super) fn dot(abilities: Abilities) -> &'static str {
    if abilities.packed_dot {
        wgsl!("common/dot_packed.wgsl")
    } else {
        wgsl!("common/dot_plain.wgsl")
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
        MatrixFormat::Q4 => (wgsl!("common/weights_q4.wgsl"), false),
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

/// The snippet of numbers rounded to f16.
pub(super) const HALF: &str = wgsl!("common/half.wgsl");

/// The snippet of numbers as levels.
pub(super) const LEVEL: &str = wgsl!("common/level.wgsl");

/// The snippet that reads original keys.
pub(super) fn key_read(format: CacheFormat) -> &'static str {
    match format {
        CacheFormat::F32 => wgsl!("common/keys_f32_read.wgsl"),
        CacheFormat::F16 => wgsl!("common/keys_f16_read.wgsl"),
    }
}

/// The snippet that writes original keys; it needs [`HALF`].
pub(super) fn key_write(format: CacheFormat) -> &'static str {
    match format {
        CacheFormat::F32 => wgsl!("common/keys_f32_write.wgsl"),
        CacheFormat::F16 => wgsl!("common/keys_f16_write.wgsl"),
    }
}

/// The snippet that says where the original key at a position lies.
pub(super) fn key_rows(compressed: bool) -> &'static str {
    if compressed { wgsl!("common/rows_recent.wgsl") } else { wgsl!("common/rows_plain.wgsl") }
}

/// The snippet that reads values.
pub(super) fn value_read(format: ValueStore) -> &'static str {
    match format {
        ValueStore::F32 => wgsl!("common/values_f32_read.wgsl"),
        ValueStore::F16 => wgsl!("common/values_f16_read.wgsl"),
        ValueStore::Int8 => wgsl!("common/values_int8_read.wgsl"),
        ValueStore::Int4 => wgsl!("common/values_int4_read.wgsl"),
    }
}

/// The snippet that writes values; it needs [`HALF`].
pub(super) fn value_write(format: ValueStore) -> &'static str {
    match format {
        ValueStore::F32 => wgsl!("common/values_f32_write.wgsl"),
        ValueStore::F16 => wgsl!("common/values_f16_write.wgsl"),
        ValueStore::Int8 | ValueStore::Int4 => wgsl!("common/values_elsewhere.wgsl"),
    }
}

impl PageKind {
    /// Every way to keep keys with a page of every size, though not each with each.
    fn all() -> Vec<Self> {
        let mut keys = vec![
            PageKeys::Int8,
            PageKeys::Channel(ChannelBits::Four),
            PageKeys::Channel(ChannelBits::Two),
        ];
        for reference in [Reference::Continuous, Reference::Anchored, Reference::Mean] {
            for deltas in [DeltaFormat::F16, DeltaFormat::Int8, DeltaFormat::Int4] {
                keys.push(PageKeys::Delta(reference, deltas));
            }
        }
        let pages = [64, 16, 128, 32].into_iter().cycle();
        keys.into_iter().zip(pages).map(|(keys, page)| Self { keys, page }).collect()
    }

    /// The layout of such pages. Kernels do not depend on a threshold.
    fn layout(self, head_dim: u32) -> PageLayout {
        let keys = match self.keys {
            PageKeys::Int8 => KeyFormat::Int8,
            PageKeys::Channel(bits) => KeyFormat::Channel(bits),
            PageKeys::Delta(reference, deltas) => {
                let threshold = Threshold::Absolute(0.0);
                KeyFormat::Delta(DeltaKeys { threshold, reference, deltas })
            }
        };
        PageLayout { keys, tokens: self.page as usize, head_dim: head_dim as usize }
    }

    /// Bits of a level or of a kept delta.
    fn bits(self) -> usize {
        match self.keys {
            PageKeys::Int8 => 8,
            PageKeys::Channel(bits) => bits.bits(),
            PageKeys::Delta(_, deltas) => deltas.bits(),
        }
    }

    /// Whether keys build on the keys before them.
    fn is_chain(self) -> bool {
        matches!(self.keys, PageKeys::Delta(Reference::Continuous | Reference::Anchored, _))
    }
}

/// Where things lie in a page.
pub(super) fn page_constants(pages: PageKind, head_dim: u32) -> Vec<(&'static str, u32)> {
    let layout = pages.layout(head_dim);
    let mut constants = vec![
        ("HEAD_DIM", head_dim),
        ("DIM4", head_dim.div_ceil(4)),
        ("PAGE", pages.page),
        ("BITS", pages.bits() as u32),
        ("HEADER", layout.header_words() as u32),
        ("SCALES", layout.scales() as u32),
        ("CHAIN", pages.is_chain().into()),
    ];
    if let PageKeys::Delta(reference, deltas) = pages.keys {
        constants.extend([
            ("MASKS", layout.masks() as u32),
            ("MASK_WORDS", layout.mask_words() as u32),
            ("OFFSETS", layout.offsets() as u32),
            ("TOTAL", layout.total() as u32),
            ("LEVEL_MAX", deltas.levels().unwrap_or(1) as u32),
            (
                "REFERENCE",
                match reference {
                    Reference::Continuous => 0,
                    Reference::Anchored => 1,
                    Reference::Mean => 2,
                },
            ),
        ]);
    } else {
        constants.extend([
            ("LEVELS", layout.levels() as u32),
            ("LEVEL_WORDS", layout.level_words() as u32),
        ]);
    }
    constants
}

/// The WGSL of one variant of a kernel, for tools that check or translate shaders.
#[derive(Clone, Debug)]
pub struct ShaderSource {
    /// The kernel's name and what the variant depends on.
    pub name: String,
    /// The linked module; its entry point is `main`.
    pub wgsl: String,
}

/// What all kernels are made of: their snippets, each once, and the constants of each.
pub(super) fn source_parts() -> (BTreeSet<&'static str>, Vec<(&'static str, u32)>) {
    let (mut parts, mut constants) = (BTreeSet::new(), Vec::new());
    for kernel in Kernel::all() {
        for abilities in EVERYTHING.into_iter().chain([Abilities::default()]) {
            let program = kernel.program(abilities);
            parts.extend(program.parts);
            constants.extend(program.constants);
        }
    }
    (parts, constants)
}

/// Every variant of every kernel, for devices with and without each optional ability.
pub fn shader_sources() -> Vec<ShaderSource> {
    let mut sources: Vec<ShaderSource> = Vec::new();
    for kernel in Kernel::all() {
        let first = sources.len();
        for abilities in EVERYTHING.into_iter().flat_map(Abilities::plainer) {
            let wgsl = kernel.program(abilities).wgsl();
            // Most kernels do not care for every ability.
            if sources[first..].iter().all(|source| source.wgsl != wgsl) {
                let name = format!("{} {kernel:?}, {}", kernel.name(), abilities.names());
                sources.push(ShaderSource { name, wgsl });
            }
        }
    }
    sources
}
