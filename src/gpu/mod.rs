//! The operations on GPUs, in WGSL through wgpu: Vulkan, Metal and DX12.
//!
//! | file | what |
//! |---|---|
//! | `device` | adapters, opening one, its failures as errors |
//! | `wait` | waiting for one, with a limit |
//! | `fault` | failures on demand, for tests |
//! | `buffer`, `tensor`, `linear`, `cache` | what lies on the device |
//! | `image` | a cache read back, and restored |
//! | `shader`, `pipeline`, `pipelines` | the table of kernels, linking them, and compiling them ahead |
//! | `tuning`, `tile`, `tune`, `trial` | how work is cut for a device, and finding that out |
//! | `packing` | how ternary weights lie on a device |
//! | `matrix_unit` | what multiplies small matrices at once, and how it shares out a tile |
//! | `self_test`, `findings` | known answers before a device is trusted, and remembering them |
//! | `doctor`, `sabotage` | all known answers in every variant; kernels broken on purpose |
//! | `recorder`, `stream` | a session's operations, submitted once a step |
//! | `timer`, `read_speed` | what benchmarks need: times of kernels, the speed of memory |
//! | one for each operation | its parameters and grid; the kernel is `shaders/<operation>.wgsl` |
//!
//! Everything runs on WebGPU's default limits without optional features. Where a device offers
//! f16 or subgroups, kernels are linked with other snippets and do less work for the same result.

mod attention;
mod buffer;
mod cache;
mod device;
mod doctor;
mod embed;
mod encode_keys;
mod fault;
mod findings;
mod gate;
mod image;
mod linear;
mod linear_float;
mod linear_ternary;
mod matrix_unit;
mod multiply_speed;
mod norm;
mod packing;
mod pipeline;
mod pipelines;
mod read_speed;
mod recorder;
mod rope_append;
mod sabotage;
mod sample;
mod self_test;
mod shader;
mod stream;
mod tensor;
mod tile;
mod timer;
mod trial;
mod tune;
mod tuning;
mod wait;

use std::sync::Arc;

pub use cache::Cache;
pub use device::{Adapter, GpuOptions, Select, adapters};
pub use doctor::{Answer, Diagnosis, Verdict, diagnose};
pub use fault::{Fault, Faults};
pub use findings::{Finding, Findings};
pub use linear::Linear;
pub use matrix_unit::MatrixUnit;
pub use packing::Packing;
pub use recorder::Counters;
pub use sabotage::Sabotage;
pub use shader::{Abilities, ShaderSource, shader_sources};
pub use stream::Stream;
pub use tensor::{Norm, Rope, Tensor};
pub use tile::Tile;
pub use tune::{Measurement, Tuned, tune};
pub use tuning::{Cut, Formats, Tuning, Tunings};

use crate::backend::{
    Backend, CacheShape, DeviceInfo, Footprint, MatrixFormat, ModelPlan, ReadSpeed, StreamShape,
    TensorFormat,
};
use crate::checkpoint::MatrixSource;
use crate::conformance::known;
use crate::delta::AttentionPolicy;
use crate::error::Result;
use shader::Kernel;
use tensor::{RowScale, padded};

/// An open GPU. Cheap to clone: clones share the device.
#[derive(Clone)]
pub struct Gpu {
    device: Arc<device::Device>,
    /// Of the ternary matrices that are brought to it from now on.
    packing: Packing,
}

impl Gpu {
    /// Opens an adapter.
    ///
    /// # Errors
    /// [`Error::NoAdapter`](crate::Error::NoAdapter) with what there is where none fits;
    /// [`Error::Device`](crate::Error::Device) where the driver refuses.
    pub fn open(options: &GpuOptions) -> Result<Self> {
        Self::open_with(options, false)
    }

    /// Opens an adapter with its matrix unit, where it has one, whatever its tuning wants.
    fn open_to_tune(options: &GpuOptions) -> Result<Self> {
        Self::open_with(options, true)
    }

    fn open_with(options: &GpuOptions, to_tune: bool) -> Result<Self> {
        let device = Arc::new(device::Device::open(options, to_tune)?);
        Ok(Self { packing: device.tuning.packing, device })
    }

    /// The same device, to which ternary matrices are brought packed like this.
    fn packed(&self, packing: Packing) -> Self {
        Self { packing, ..self.clone() }
    }

    /// Which device this is.
    pub fn info(&self) -> &DeviceInfo {
        &self.device.info
    }

    /// Kernels that were needed and never announced.
    #[cfg(test)]
    pub(crate) fn missed_kernels(&self) -> Vec<&'static str> {
        self.device.pipelines.missed()
    }

    /// Gives the device up, as if its driver had lost it: whatever uses it from now on fails with
    /// [`Error::DeviceLost`](crate::Error::DeviceLost). For tests.
    pub fn lose(&self) {
        self.device.lose();
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Gpu").field(self.info()).finish()
    }
}

/// Bytes of all buffers of this device that are alive, whoever owns them.
impl Footprint for Gpu {
    fn bytes(&self) -> u64 {
        self.device.held()
    }
}

impl Backend for Gpu {
    type Linear = Linear;
    type Norm = Norm;
    type Rope = Rope;
    type Tensor = Tensor;
    type Cache = Cache;
    type Stream = Stream;

    fn device(&self) -> &DeviceInfo {
        self.info()
    }

    fn held(&self) -> Option<u64> {
        Some(self.bytes())
    }

    fn announce(&self, plan: &ModelPlan) {
        self.device.announce(kernels_of(plan, &self.device.tuning));
    }

    fn vouch_for_model(&self, plan: &ModelPlan) -> Result<()> {
        self_test::ask(self, &known::of_model(plan))
    }

    fn vouch_for_attention(&self, head_dim: usize, policy: &AttentionPolicy) -> Result<()> {
        self_test::ask(self, &known::of_attention(head_dim, policy))
    }

    fn linear(&self, stack: &[MatrixSource]) -> Result<Linear> {
        Linear::new(&self.device, stack, self.packing)
    }

    fn norm(&self, weight: &[f32], eps: f32) -> Result<Norm> {
        Norm::new(&self.device, weight, eps)
    }

    fn check_rope(&self, context: usize, head_dim: usize) -> Result<()> {
        Rope::check(&self.device, context, head_dim)
    }

    fn rope(&self, table: &[[f32; 2]], head_dim: usize) -> Result<Rope> {
        Rope::new(&self.device, table, head_dim)
    }

    fn tensor(&self, rows: usize, width: usize, format: TensorFormat) -> Result<Tensor> {
        Tensor::new(&self.device, rows, width, format)
    }

    fn cache(&self, shape: &CacheShape) -> Result<Cache> {
        Cache::new(&self.device, shape)
    }

    fn stream(&self, shape: &StreamShape) -> Result<Stream> {
        Stream::new(Arc::clone(&self.device), shape)
    }

    /// The values arrive before the next submission of any stream.
    fn write(&self, tensor: &mut Tensor, values: &[f32]) -> Result<()> {
        let rows = self.rows_of(tensor, TensorFormat::F32, values.len())?;
        let mut padded = vec![0.0; rows * tensor.stride()];
        copy_rows(values, &mut padded, tensor);
        tensor.rows = rows;
        self.device.write(&tensor.data, 0, bytemuck::cast_slice(&padded))
    }

    /// The values arrive before the next submission of any stream.
    fn write_int8(&self, tensor: &mut Tensor, values: &[i8], scales: &[f32]) -> Result<()> {
        let rows = self.rows_of(tensor, TensorFormat::Int8, values.len())?;
        let Some(buffer) = &tensor.scales else {
            return Err(self.device.fault("write_int8", "not an Int8 tensor"));
        };
        if scales.len() != rows {
            let message = format!("{} scales for {rows} rows", scales.len());
            return Err(self.device.fault("write_int8", message));
        }
        let sums = values.chunks_exact(tensor.width.max(1));
        let sums = sums.map(|row| row.iter().map(|&x| i32::from(x)).sum());
        let rows_of_scales: Vec<_> =
            scales.iter().zip(sums).map(|(&scale, sum)| RowScale { scale, sum }).collect();
        self.device.write(buffer, 0, bytemuck::cast_slice(&rows_of_scales))?;
        let mut padded = vec![0; rows * tensor.stride()];
        copy_rows(values, &mut padded, tensor);
        tensor.rows = rows;
        self.device.write(&tensor.data, 0, bytemuck::cast_slice(&padded))
    }

    fn max_top_k(&self) -> usize {
        sample::MAX_TOP_K
    }

    fn read_speed(&self, bytes: u64) -> Result<ReadSpeed> {
        read_speed::measure(&self.device, bytes)
    }

    fn multiply_speed(&self, format: MatrixFormat) -> Result<f64> {
        multiply_speed::measure(&self.device, format)
    }

    /// One: the device has work while the host reads a token, turns it into text and records the
    /// next step. More would only be thrown away at the end of a text.
    fn look_ahead(&self) -> usize {
        1
    }

    fn can_be_lost(&self) -> bool {
        true
    }

    fn give_up(&self) {
        self.device.lose();
    }
}

/// What a model runs but for its attention, which each session's caches announce: what a prompt
/// needs first comes first.
fn kernels_of(plan: &ModelPlan, tuning: &Tuning) -> Vec<Kernel> {
    let ModelPlan { embedding, body, head, activation, intermediate } = *plan;
    let ternary = body[0] == MatrixFormat::Ternary;
    let projected = if ternary { TensorFormat::Int8 } else { TensorFormat::F32 };
    let mut kernels = vec![Kernel::Embed { table: embedding }, Kernel::Norm { out: projected }];
    // What is announced twice is compiled once.
    let linears = body.map(|format| linear::kernels(format, tuning));
    kernels.extend(linears.iter().flat_map(|(many, _)| many));
    kernels.push(Kernel::Gate {
        activation,
        norm: ternary,
        out: projected,
        vec4: intermediate.is_multiple_of(4),
    });
    kernels.push(Kernel::Norm { out: TensorFormat::F32 });
    kernels.push(Kernel::LinearFloat { weights: head, add: false, cut: *tuning.cuts.of(head) });
    for first in [true, false] {
        kernels.extend([Kernel::SampleBest { first }, Kernel::SampleTop { first }]);
    }
    kernels.push(Kernel::SampleDraw);
    kernels.extend(linears.iter().flat_map(|(_, few)| few));
    kernels
}

impl Gpu {
    /// Rows that `count` values make in a tensor.
    fn rows_of(&self, tensor: &Tensor, format: TensorFormat, count: usize) -> Result<usize> {
        let rows = count / tensor.width.max(1);
        if tensor.format != format || rows * tensor.width != count || rows > tensor.capacity {
            let shape = [tensor.capacity, tensor.width];
            let message = format!("{count} {format:?} values for {shape:?} {:?}", tensor.format);
            return Err(self.device.fault("writing a tensor", message));
        }
        Ok(rows)
    }
}

/// Copies rows of `tensor.width` values to padded rows.
fn copy_rows<T: Copy>(values: &[T], rows: &mut [T], tensor: &Tensor) {
    let stride = padded(tensor.width).max(1);
    for (row, values) in rows.chunks_exact_mut(stride).zip(values.chunks_exact(tensor.width.max(1)))
    {
        row[..tensor.width].copy_from_slice(values);
    }
}
