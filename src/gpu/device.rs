//! Which adapters there are, how one is chosen and opened, and how its failures become errors.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::buffer::Buffer;
use super::fault::{Event, Fault, Faults};
use super::matrix_unit::MatrixUnit;
use super::pipeline::Pipeline;
use super::pipelines::Pipelines;
use super::sabotage::Sabotage;
use super::self_test::SelfTest;
use super::shader::{Abilities, Kernel};
use super::tuning::{MATRIX_UNIT, Tuning, Tunings};
use crate::backend::{DeviceInfo, DeviceKind};
use crate::error::{Error, Result};

/// Which adapter to take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Select {
    /// The first GPU of the fastest kind; never a software renderer, which would be slower than the CPU backend.
    #[default]
    Hardware,
    /// The adapter of this name, else the first whose name holds this text, in any case; a GPU before
    /// a software renderer.
    /// The empty text is in every name.
    Named(String),
}

/// How to open a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuOptions {
    /// Which adapter to take.
    pub select: Select,
    /// Load f16 weights natively where the adapter can (WebGPU's `shader-f16`).
    pub f16: bool,
    /// Reduce by subgroup operations where the adapter can.
    pub subgroups: bool,
    /// Ask for WebGPU's default limits and no features, whatever the adapter offers: the floor that
    /// every WebGPU device must stand on.
    pub floor_limits: bool,
    /// Ask for timestamps, which [`Operations::time_kernels`](crate::backend::Operations::time_kernels)
    /// needs, where the adapter has them.
    pub timestamps: bool,
    /// Cuts matrices into blocks of at most this many bytes, as on a device with smaller bindings.
    /// For tests.
    pub max_matrix_block: Option<u64>,
    /// Asks for buffers and bindings of at most this many bytes, as a smaller device has them. For
    /// tests.
    pub max_buffer: Option<u64>,
    /// How long one submission may take before the device counts as lost: a driver that hangs is an
    /// error then. A step of a long prompt is several submissions; one of decoding is one.
    pub time_limit: Duration,
    /// What was found out about devices.
    pub tunings: Tunings,
    /// Multiply packed 8-bit integers by `dot4I8Packed`.
    pub packed_dot: bool,
    /// Use a matrix unit where the device has one and its tuning asks for it. wgpu calls what that takes
    /// experimental: without such a tuning the device is opened without it.
    pub matrix_unit: bool,
    /// Whether a model and a session first ask the device for answers that are known, and what
    /// becomes of a kernel that gives a wrong one: see [`Findings`](super::Findings).
    pub self_test: bool,
    /// The file in which self-tests are remembered from process to process.
    pub findings: Option<PathBuf>,
    /// Kernels that are broken on purpose. For tests.
    pub sabotage: Sabotage,
    /// Faults that the device is to have. For tests.
    pub faults: Faults,
}

/// [`GpuOptions::time_limit`] by default. A submission takes 0.1 s on an integrated GPU; a software
/// adapter on an old CPU may need some hundred times as long.
const TIME_LIMIT: Duration = Duration::from_secs(60);

impl Default for GpuOptions {
    fn default() -> Self {
        Self {
            select: Select::Hardware,
            f16: true,
            subgroups: true,
            floor_limits: false,
            timestamps: false,
            max_matrix_block: None,
            max_buffer: None,
            time_limit: TIME_LIMIT,
            tunings: Tunings::default(),
            packed_dot: true,
            matrix_unit: true,
            self_test: true,
            findings: None,
            sabotage: Sabotage::default(),
            faults: Faults::default(),
        }
    }
}

/// A GPU, or a software renderer, that this machine has.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// The adapter's name, such as `llvmpipe (LLVM 15.0.6, 256 bits)`.
    pub name: String,
    /// What kind of processor it is.
    pub kind: DeviceKind,
    /// The interface it is reached by: `vulkan`, `metal`, `dx12`, or `gl` with that feature.
    pub backend: String,
    /// The driver and its version.
    pub driver: String,
    /// Whether shaders can compute with f16.
    pub f16: bool,
    /// The smallest and largest subgroup, in invocations, where shaders can use them.
    pub subgroups: Option<(u32, u32)>,
    /// The matrix unit, where it has one that is of use to [`tune`](super::tune).
    pub matrix_unit: Option<MatrixUnit>,
    /// Bytes of the largest buffer.
    pub max_buffer: u64,
    /// Bytes of the largest storage binding: a larger matrix is cut by rows.
    pub max_binding: u64,
    /// Bytes of memory that a workgroup shares.
    pub workgroup_memory: u32,
    raw: wgpu::Adapter,
}

impl Adapter {
    fn new(raw: wgpu::Adapter) -> Self {
        let info = raw.get_info();
        let (features, limits) = (raw.features(), raw.limits());
        let kind = match info.device_type {
            wgpu::DeviceType::IntegratedGpu => DeviceKind::IntegratedGpu,
            wgpu::DeviceType::DiscreteGpu => DeviceKind::DiscreteGpu,
            wgpu::DeviceType::VirtualGpu => DeviceKind::VirtualGpu,
            wgpu::DeviceType::Cpu => DeviceKind::SoftwareGpu,
            wgpu::DeviceType::Other => DeviceKind::OtherGpu,
        };
        let driver = [info.driver, info.driver_info].join(" ").trim().to_owned();
        let subgroups = features
            .contains(wgpu::Features::SUBGROUP)
            .then_some((info.subgroup_min_size, info.subgroup_max_size));
        Self {
            name: info.name,
            kind,
            backend: info.backend.to_str().to_owned(),
            driver,
            f16: features.contains(wgpu::Features::SHADER_F16),
            subgroups,
            matrix_unit: MatrixUnit::of(&raw),
            max_buffer: limits.max_buffer_size,
            max_binding: limits.max_storage_buffer_binding_size,
            workgroup_memory: limits.max_compute_workgroup_storage_size,
            raw,
        }
    }

    /// A device with these features and limits, and with a matrix unit where there is one; without it
    /// where the driver refuses.
    fn request(
        &self,
        features: wgpu::Features,
        limits: &wgpu::Limits,
        unit: &mut Option<MatrixUnit>,
    ) -> Result<(wgpu::Device, wgpu::Queue)> {
        let mut descriptor = wgpu::DeviceDescriptor {
            label: None,
            required_features: features,
            required_limits: limits.clone(),
            experimental_features: wgpu::ExperimentalFeatures::disabled(),
            memory_hints: wgpu::MemoryHints::Performance,
            trace: wgpu::Trace::Off,
        };
        let request = |descriptor: &wgpu::DeviceDescriptor| {
            pollster::block_on(self.raw.request_device(descriptor))
        };
        if unit.is_some() {
            descriptor.required_features |= wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
            // SAFETY: what is experimental may have bugs. Of it we use matrices alone, which kernels
            // load and store within workgroup memory, in control flow that is uniform in a subgroup. A
            // bug that is known makes wrong numbers at worst: barriers say nothing of memory where naga
            // declares Vulkan's memory model (gfx-rs/wgpu#8805). That is what `tune` and the self-test are
            // there for.
            descriptor.experimental_features = unsafe { wgpu::ExperimentalFeatures::enabled() };
            match request(&descriptor) {
                Ok(opened) => return Ok(opened),
                Err(error) => log::warn!("{} without its matrix unit: {error}", self.name),
            }
            *unit = None;
            descriptor.required_features = features;
            descriptor.experimental_features = wgpu::ExperimentalFeatures::disabled();
        }
        request(&descriptor).map_err(|error| Error::Device {
            device: self.name.clone(),
            what: "opening the device".to_owned(),
            message: error.to_string(),
        })
    }
}

/// The interfaces that adapters are looked for with.
const BACKENDS: wgpu::Backends = if cfg!(feature = "gl") {
    wgpu::Backends::PRIMARY.union(wgpu::Backends::GL)
} else {
    wgpu::Backends::PRIMARY
};

/// The adapters of this machine, the fastest kind first; of a kind, those of OpenGL last.
pub fn adapters() -> Vec<Adapter> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = BACKENDS;
    // A debug build would switch on validation layers where some are installed, which may be older
    // than what the shader compiler writes; wgpu validates every call itself.
    descriptor.flags = wgpu::InstanceFlags::empty();
    let instance = wgpu::Instance::new(descriptor);
    let found = pollster::block_on(instance.enumerate_adapters(BACKENDS));
    let mut adapters: Vec<_> = found.into_iter().map(Adapter::new).collect();
    adapters.sort_by_key(|adapter| {
        let kind = match adapter.kind {
            DeviceKind::DiscreteGpu => 0,
            DeviceKind::IntegratedGpu => 1,
            DeviceKind::VirtualGpu => 2,
            DeviceKind::OtherGpu => 3,
            DeviceKind::SoftwareGpu | DeviceKind::Cpu => 4,
        };
        (kind, adapter.backend == wgpu::Backend::Gl.to_str())
    });
    adapters
}

fn select(select: &Select, faults: &Faults) -> Result<Adapter> {
    let adapters = match faults.strike(Event::Opening) {
        Some(_) => Vec::new(),
        None => adapters(),
    };
    let position = match select {
        Select::Hardware => adapters.iter().position(|a| a.kind != DeviceKind::SoftwareGpu),
        Select::Named(name) => {
            let name = name.to_lowercase();
            // "RTX 3060" is part of the name of another card.
            let exactly = adapters.iter().position(|a| a.name.to_lowercase() == name);
            exactly.or_else(|| adapters.iter().position(|a| a.name.to_lowercase().contains(&name)))
        }
    };
    let found = adapters.iter().map(|a| format!("{} ({})", a.name, a.kind.name())).collect();
    let mut adapters = adapters;
    match position {
        Some(position) => Ok(adapters.swap_remove(position)),
        None => {
            let wanted = match select {
                Select::Hardware => "a hardware GPU".to_owned(),
                Select::Named(name) => format!("an adapter named {name:?}"),
            };
            Err(Error::NoAdapter { wanted, found })
        }
    }
}

/// The first failure that the driver reported outside any call.
#[derive(Debug)]
enum Failure {
    Lost(String),
    Other(String),
}

/// An open device and what all its users share.
pub(super) struct Device {
    pub raw: wgpu::Device,
    pub queue: wgpu::Queue,
    pub info: DeviceInfo,
    /// Bytes of the largest storage binding and buffer, so that one binding covers a buffer.
    pub max_binding: u64,
    /// Bytes of the largest block that a matrix is cut into.
    pub max_matrix_block: u64,
    held: Arc<AtomicU64>,
    failure: Arc<Mutex<Option<Failure>>>,
    /// Submissions that are done.
    pub finished: Arc<AtomicU64>,
    /// How long one may take.
    pub time_limit: Duration,
    faults: Faults,
    /// Whether a test has had a submission that does not end.
    pub hangs: AtomicBool,
    pub pipelines: Pipelines,
    pub tuning: Tuning,
    pub abilities: Abilities,
    pub self_test: SelfTest,
}

impl Device {
    /// Chooses an adapter and opens it; with its matrix unit `to_tune`, or where its tuning wants that.
    pub(super) fn open(options: &GpuOptions, to_tune: bool) -> Result<Self> {
        let adapter = select(&options.select, &options.faults)?;
        let mut features = wgpu::Features::empty();
        let mut limits = wgpu::Limits::default();
        if !options.floor_limits {
            features.set(wgpu::Features::SHADER_F16, options.f16);
            features.set(wgpu::Features::SUBGROUP, options.subgroups);
            features.set(wgpu::Features::TIMESTAMP_QUERY, options.timestamps);
            features &= adapter.raw.features();
            limits = adapter.raw.limits();
        }
        if let Some(most) = options.max_buffer {
            limits.max_buffer_size = most.min(limits.max_buffer_size);
            limits.max_storage_buffer_binding_size =
                most.min(limits.max_storage_buffer_binding_size);
        }
        let mut abilities = Abilities {
            f16: features.contains(wgpu::Features::SHADER_F16),
            subgroups: features.contains(wgpu::Features::SUBGROUP),
            packed_dot: options.packed_dot,
            matrix_unit: None,
        };
        let mut names = Vec::new();
        names.extend(abilities.f16.then(|| "f16".to_owned()));
        names.extend(abilities.subgroups.then(|| "subgroups".to_owned()));
        let mut info = DeviceInfo {
            name: adapter.name.clone(),
            kind: adapter.kind,
            backend: adapter.backend.clone(),
            driver: adapter.driver.clone(),
            features: names,
        };
        let tuning = options.tunings.of(&info);
        let tuning = tuning.unwrap_or_else(|| Tuning::default_of(info.kind));
        tuning.check()?;
        if options.matrix_unit && abilities.subgroups && (to_tune || tuning.wants_matrix_unit()) {
            let unit = adapter.matrix_unit;
            abilities.matrix_unit =
                if abilities.f16 { unit } else { unit.and_then(MatrixUnit::without_f16) };
        }
        let (raw, queue) = adapter.request(features, &limits, &mut abilities.matrix_unit)?;
        info.features.extend(abilities.matrix_unit.map(|_| MATRIX_UNIT.to_owned()));

        let failure = Arc::new(Mutex::new(None));
        let slot = Arc::clone(&failure);
        raw.set_device_lost_callback(move |_, message| keep(&slot, Failure::Lost(message)));
        let slot = Arc::clone(&failure);
        raw.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            keep(&slot, Failure::Other(error.to_string()));
        }));

        let self_test = SelfTest::new(options, &info, &tuning);
        let (compiler, sabotage) = (raw.clone(), options.sabotage.clone());
        let pipelines = Pipelines::new(abilities, self_test.plainer(), move |kernel, abilities| {
            scoped(&compiler, || Pipeline::new(&compiler, kernel, abilities, &sabotage))
                .map_err(|error| error.to_string())
        });
        let max_binding = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        Ok(Self {
            raw,
            queue,
            info,
            max_binding,
            max_matrix_block: options
                .max_matrix_block
                .map_or(max_binding, |max| max.min(max_binding)),
            held: options.faults.counter(),
            failure,
            finished: Arc::default(),
            time_limit: options.time_limit,
            faults: options.faults.clone(),
            hangs: AtomicBool::new(false),
            pipelines,
            tuning,
            abilities,
            self_test,
        })
    }

    /// Bytes of all buffers that are alive.
    pub(super) fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Fails where a buffer would be over the device's limits.
    pub(super) fn check_size(&self, what: &str, size: u64) -> Result<()> {
        if size <= self.max_binding {
            return Ok(());
        }
        Err(Error::DeviceLimit {
            device: self.info.name.clone(),
            what: what.to_owned(),
            needed: size,
            limit_name: "maxStorageBufferBindingSize",
            limit: self.max_binding,
        })
    }

    /// A zeroed buffer of at least `size` bytes; `what` says in errors what it is for.
    ///
    /// # Errors
    /// [`Error::DeviceLimit`] over the device's limits, [`Error::DeviceMemory`] without memory.
    pub(super) fn buffer(
        &self,
        what: &str,
        size: u64,
        usage: wgpu::BufferUsages,
    ) -> Result<Buffer> {
        // Nothing can be bound that is empty or no multiple of four.
        let size = size.next_multiple_of(16).max(16);
        self.check_size(what, size)?;
        let descriptor =
            wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
        let raw = match self.faults.strike(Event::Allocation) {
            Some(_) => Err(self.out_of_memory(what, size)),
            None => self
                .scoped(|| self.raw.create_buffer(&descriptor))
                .map_err(|error| self.refused(what, size, &error)),
        }?;
        Ok(Buffer::new(raw, size, Arc::clone(&self.held)))
    }

    /// A buffer that shaders read and write.
    pub(super) fn storage(&self, what: &str, size: u64) -> Result<Buffer> {
        use wgpu::BufferUsages as Usage;
        self.buffer(what, size, Usage::STORAGE | Usage::COPY_DST | Usage::COPY_SRC)
    }

    /// A storage buffer with contents.
    pub(super) fn storage_with<T: bytemuck::Pod>(&self, what: &str, data: &[T]) -> Result<Buffer> {
        let buffer = self.storage(what, size_of_val(data) as u64)?;
        self.write(&buffer, 0, bytemuck::cast_slice(data))?;
        Ok(buffer)
    }

    /// Writes bytes, a multiple of four, before the next submission.
    pub(super) fn write(&self, buffer: &Buffer, offset: u64, bytes: &[u8]) -> Result<()> {
        if !bytes.is_empty() {
            let needed = bytes.len() as u64;
            self.scoped(|| self.queue.write_buffer(buffer.raw(), offset, bytes))
                .map_err(|error| self.refused("writing to the device", needed, &error))?;
        }
        self.check()
    }

    /// Submits commands, or only what was written so far.
    ///
    /// # Errors
    /// What is wrong with these commands: that of other sessions is told to them.
    pub(super) fn submit(
        &self,
        commands: Option<wgpu::CommandEncoder>,
    ) -> Result<wgpu::SubmissionIndex> {
        let mut commands = commands;
        if let Some(fault) = self.faults.strike(Event::Submission) {
            self.suffer(fault, &mut commands);
        }
        let submit = || self.queue.submit(commands.map(wgpu::CommandEncoder::finish));
        let submission =
            self.scoped(submit).map_err(|error| self.refused("a submission", 0, &error))?;
        let finished = Arc::clone(&self.finished);
        self.queue.on_submitted_work_done(move || {
            finished.fetch_add(1, Ordering::Relaxed);
        });
        self.check()?;
        Ok(submission)
    }

    /// Does to the device, or to commands that are about to be submitted, what a test has asked for.
    fn suffer(&self, fault: Fault, commands: &mut Option<wgpu::CommandEncoder>) {
        match fault {
            Fault::Lost => {
                self.raw.destroy();
                self.count_as_lost("a test has asked for it".to_owned());
            }
            Fault::LostUnnoticed => self.raw.destroy(),
            Fault::Invalid => {
                let new = || self.raw.create_command_encoder(&Default::default());
                // There is no group to be left.
                commands.get_or_insert_with(new).pop_debug_group();
            }
            Fault::Hangs => self.hangs.store(true, Ordering::Relaxed),
            Fault::OutOfMemory | Fault::Gone => {}
        }
    }

    /// Has kernels compiled that will be needed; returns at once.
    pub(super) fn announce(&self, kernels: impl IntoIterator<Item = Kernel>) {
        self.pipelines.announce(kernels);
    }

    /// The pipeline of a kernel, compiled now unless it was announced early enough.
    pub(super) fn pipeline(&self, kernel: Kernel) -> Result<Arc<Pipeline>> {
        self.pipelines.get(kernel).map_err(|message| self.lost_or(kernel.name(), message))
    }

    /// Whatever wgpu reports while `f` runs becomes an error.
    pub(super) fn scoped<T>(&self, f: impl FnOnce() -> T) -> Result<T, wgpu::Error> {
        scoped(&self.raw, f)
    }

    /// Fails once the device was lost or the driver reported an error outside any call.
    pub(super) fn check(&self) -> Result<()> {
        let slot = || self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if slot().is_none() {
            return Ok(());
        }
        // Calls fail before the news of a lost device arrives, which comes with a poll.
        let _ = self.poll(wgpu::PollType::Poll);
        let mut slot = slot();
        match &*slot {
            None => Ok(()),
            Some(Failure::Lost(message)) => {
                Err(Error::DeviceLost { device: self.info.name.clone(), message: message.clone() })
            }
            Some(Failure::Other(message)) => {
                let message = message.clone();
                // A lost device stays lost; another failure is reported once.
                *slot = None;
                drop(slot);
                Err(self.lost_or("a command", message))
            }
        }
    }

    /// Has every call fail from now on.
    pub(super) fn count_as_lost(&self, message: String) {
        keep(&self.failure, Failure::Lost(message));
    }

    /// Gives the device up: what lies on it is freed, and whoever uses it fails.
    pub(super) fn lose(&self) {
        self.raw.destroy();
    }

    /// The error for a call that wgpu or the driver has refused; `needed` bytes were asked for.
    fn refused(&self, what: &str, needed: u64, error: &wgpu::Error) -> Error {
        match error {
            // A driver without memory for a submission loses the device with it.
            wgpu::Error::OutOfMemory { .. } => match self.check() {
                Err(lost @ Error::DeviceLost { .. }) => lost,
                _ => self.out_of_memory(what, needed),
            },
            other => self.lost_or(what, other.to_string()),
        }
    }

    fn out_of_memory(&self, what: &str, needed: u64) -> Error {
        let (device, what) = (self.info.name.clone(), what.to_owned());
        Error::DeviceMemory { device, what, needed, held: self.held() }
    }

    /// An [`Error::Device`].
    pub(super) fn fault(&self, what: &str, message: impl Into<String>) -> Error {
        let device = self.info.name.clone();
        Error::Device { device, what: what.to_owned(), message: message.into() }
    }
}

/// Whatever wgpu reports while `f` runs becomes an error. The scopes belong to this thread.
fn scoped<T>(device: &wgpu::Device, f: impl FnOnce() -> T) -> Result<T, wgpu::Error> {
    use wgpu::ErrorFilter::{Internal, OutOfMemory, Validation};
    let scopes = [Internal, OutOfMemory, Validation].map(|kind| device.push_error_scope(kind));
    let result = f();
    let mut first = None;
    for scope in scopes.into_iter().rev() {
        let error = pollster::block_on(scope.pop());
        first = first.or(error);
    }
    first.map_or(Ok(result), Err)
}

fn keep(slot: &Mutex<Option<Failure>>, failure: Failure) {
    let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
    // What came first is the cause, but nothing outweighs the loss of the device.
    if slot.is_none() || matches!(failure, Failure::Lost(_)) {
        *slot = Some(failure);
    }
}
