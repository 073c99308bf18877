//! A backend that counts, and on demand times, what another one does.
//!
//! The forward pass runs unchanged on [`Observed`]; each operation goes to the backend inside and
//! leaves what it cost with the [`Observer`]: bytes, multiply-adds, launches.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::cost::{self, Cost};
use super::observer::{Mode, Observer, Tally};
use crate::backend::{
    Activation, Activity, Backend, CacheBytes, CacheRows, CacheShape, DeviceInfo, Footprint,
    KernelTime, KeyValueCache, MatrixFormat, ModelPlan, Operations, ReadSpeed, Step, StreamShape,
    TensorFormat,
};
use crate::checkpoint::MatrixSource;
use crate::delta::{AttentionPolicy, CacheImage, Page, Phase};
use crate::error::Result;
use crate::formats::AttentionShape;
use crate::sampler::SampleStep;

/// A backend with an observer.
pub(crate) struct Observed<B> {
    inner: B,
    observer: Arc<Observer>,
}

impl<B> Observed<B> {
    pub(crate) fn new(inner: B, observer: Arc<Observer>) -> Self {
        Self { inner, observer }
    }
}

/// Weights with their shape.
pub(crate) struct Linear<T> {
    inner: T,
    rows: usize,
    cols: usize,
    format: MatrixFormat,
    /// Shape and format, for people.
    name: Arc<str>,
}

/// Activations with their shape.
pub(crate) struct Tensor<T> {
    inner: T,
    width: usize,
    format: TensorFormat,
    /// Rows that an operation has written.
    rows: usize,
}

impl<T> Tensor<T> {
    fn row_bytes(&self) -> u64 {
        cost::row_bytes(self.width, self.format)
    }

    /// Bytes of the live rows.
    fn live(&self) -> u64 {
        self.rows as u64 * self.row_bytes()
    }
}

/// A cache with what decides which part of it is read.
pub(crate) struct Cache<T> {
    inner: T,
    shape: AttentionShape,
    policy: AttentionPolicy,
    /// As they were when they were last asked for: counting pages takes time.
    rows: CacheRows,
    /// How often they are to be asked for: twice after a change, since a GPU tells of its pages a
    /// step later.
    due: u32,
}

impl<T: KeyValueCache> Cache<T> {
    fn refresh(&mut self) {
        if self.due > 0 {
            self.rows = self.inner.rows();
            self.due -= 1;
        }
    }
}

/// A stream with an observer.
pub(crate) struct Stream<B: Backend> {
    inner: B::Stream,
    observer: Arc<Observer>,
    mode: Mode,
    /// The tokens, position and phase of the step.
    step: (usize, usize, Phase),
    /// What was counted since it was handed to the observer.
    tally: Tally,
    /// The activity that was handed over.
    told: Activity,
    /// Operations whose launches the device times: name, detail and launches.
    waiting: Vec<(&'static str, Arc<str>, u64)>,
}

impl<B: Backend> Stream<B> {
    /// Runs an operation and takes note of what it costs.
    fn observe(
        &mut self,
        name: &'static str,
        detail: &Arc<str>,
        cost: Cost,
        run: impl FnOnce(&mut B::Stream) -> Result<()>,
    ) -> Result<()> {
        self.observe_product(name, (detail, MatrixFormat::F32), cost, run)
    }

    /// The same of one that multiplies weights of a format.
    fn observe_product(
        &mut self,
        name: &'static str,
        (detail, format): (&Arc<str>, MatrixFormat),
        cost: Cost,
        run: impl FnOnce(&mut B::Stream) -> Result<()>,
    ) -> Result<()> {
        self.tally.cost += cost;
        if self.mode == Mode::Count {
            return run(&mut self.inner);
        }
        let (start, before) = (Instant::now(), self.inner.activity().launches);
        run(&mut self.inner)?;
        let launches = self.inner.activity().launches - before;
        let operation = self.tally.operation(name, detail);
        operation.format = format;
        operation.calls += 1;
        operation.cost += cost;
        if self.mode == Mode::DeviceClock {
            self.waiting.push((name, Arc::clone(detail), launches));
        } else {
            self.inner.submit()?;
            self.inner.wait()?;
            operation.add("", launches.max(1), start.elapsed());
        }
        Ok(())
    }

    /// Gives each timed launch to its operation, and everything to the observer.
    fn report(&mut self) -> Result<()> {
        if !self.waiting.is_empty() {
            let mut times = self.inner.kernel_times()?.into_iter();
            for (name, detail, launches) in self.waiting.drain(..) {
                let operation = self.tally.operation(name, &detail);
                for KernelTime { kernel, time } in times.by_ref().take(launches as usize) {
                    operation.add(kernel, 1, time);
                }
            }
        }
        let now = self.inner.activity();
        self.tally.activity.launches += now.launches - self.told.launches;
        self.tally.activity.submissions += now.submissions - self.told.submissions;
        self.tally.activity.readback_bytes += now.readback_bytes - self.told.readback_bytes;
        self.told = now;
        self.observer.add(std::mem::take(&mut self.tally));
        Ok(())
    }
}

impl<T: Footprint> Footprint for Linear<T> {
    fn bytes(&self) -> u64 {
        self.inner.bytes()
    }
}

impl<T: Footprint> Footprint for Tensor<T> {
    fn bytes(&self) -> u64 {
        self.inner.bytes()
    }
}

impl<B: Backend> Footprint for Stream<B> {
    fn bytes(&self) -> u64 {
        self.inner.bytes()
    }
}

impl<T: KeyValueCache> KeyValueCache for Cache<T> {
    fn held(&self) -> CacheBytes {
        self.inner.held()
    }

    fn rows(&self) -> CacheRows {
        self.inner.rows()
    }
}

impl<B: Backend> Backend for Observed<B> {
    type Linear = Linear<B::Linear>;
    type Norm = B::Norm;
    type Rope = B::Rope;
    type Tensor = Tensor<B::Tensor>;
    type Cache = Cache<B::Cache>;
    type Stream = Stream<B>;

    fn device(&self) -> &DeviceInfo {
        self.inner.device()
    }

    fn held(&self) -> Option<u64> {
        self.inner.held()
    }

    fn announce(&self, plan: &ModelPlan) {
        self.inner.announce(plan);
    }

    fn vouch_for_model(&self, plan: &ModelPlan) -> Result<()> {
        self.inner.vouch_for_model(plan)
    }

    fn vouch_for_attention(&self, head_dim: usize, policy: &AttentionPolicy) -> Result<()> {
        self.inner.vouch_for_attention(head_dim, policy)
    }

    fn linear(&self, stack: &[MatrixSource]) -> Result<Self::Linear> {
        let inner = self.inner.linear(stack)?;
        let rows = stack.iter().map(MatrixSource::rows).sum();
        let first = stack.first().map(|matrix| (matrix.cols(), matrix.format()));
        let (cols, format) = first.unwrap_or((0, MatrixFormat::F32));
        let name = format!("{rows} x {cols} {}", format.name()).into();
        Ok(Linear { inner, rows, cols, format, name })
    }

    fn norm(&self, weight: &[f32], eps: f32) -> Result<Self::Norm> {
        self.inner.norm(weight, eps)
    }

    fn check_rope(&self, context: usize, head_dim: usize) -> Result<()> {
        self.inner.check_rope(context, head_dim)
    }

    fn rope(&self, table: &[[f32; 2]], head_dim: usize) -> Result<Self::Rope> {
        self.inner.rope(table, head_dim)
    }

    fn tensor(&self, rows: usize, width: usize, format: TensorFormat) -> Result<Self::Tensor> {
        let inner = self.inner.tensor(rows, width, format)?;
        Ok(Tensor { inner, width, format, rows: 0 })
    }

    fn cache(&self, shape: &CacheShape) -> Result<Self::Cache> {
        let inner = self.inner.cache(shape)?;
        let rows = inner.rows();
        Ok(Cache { inner, shape: shape.attention, policy: shape.policy, rows, due: 0 })
    }

    fn stream(&self, shape: &StreamShape) -> Result<Self::Stream> {
        let inner = self.inner.stream(shape)?;
        Ok(Stream {
            told: inner.activity(),
            inner,
            observer: Arc::clone(&self.observer),
            mode: Mode::Count,
            step: (0, 0, Phase::Decode),
            tally: Tally::default(),
            waiting: Vec::new(),
        })
    }

    fn write(&self, tensor: &mut Self::Tensor, values: &[f32]) -> Result<()> {
        tensor.rows = values.len() / tensor.width.max(1);
        self.inner.write(&mut tensor.inner, values)
    }

    fn write_int8(&self, tensor: &mut Self::Tensor, values: &[i8], scales: &[f32]) -> Result<()> {
        tensor.rows = scales.len();
        self.inner.write_int8(&mut tensor.inner, values, scales)
    }

    fn max_top_k(&self) -> usize {
        self.inner.max_top_k()
    }

    fn look_ahead(&self) -> usize {
        self.inner.look_ahead()
    }

    fn can_be_lost(&self) -> bool {
        self.inner.can_be_lost()
    }

    fn give_up(&self) {
        self.inner.give_up();
    }

    fn read_speed(&self, bytes: u64) -> Result<ReadSpeed> {
        self.inner.read_speed(bytes)
    }

    fn multiply_speed(&self, format: MatrixFormat) -> Result<f64> {
        self.inner.multiply_speed(format)
    }
}

impl<B: Backend> Operations<Observed<B>> for Stream<B> {
    fn begin(&mut self, step: &Step<'_>) -> Result<()> {
        let wanted = self.observer.mode();
        if wanted != self.mode {
            let timed = self.inner.time_kernels(wanted == Mode::DeviceClock)?;
            self.mode = match wanted {
                // The next best: the host's clock around each operation.
                Mode::DeviceClock if !timed => Mode::HostClock,
                mode => mode,
            };
        }
        self.step = (step.input.count(), step.position, step.phase);
        // What was done to the cache between steps is no part of one.
        self.told = self.inner.activity();
        self.inner.begin(step)
    }

    fn embed(&mut self, table: &Linear<B::Linear>, out: &mut Tensor<B::Tensor>) -> Result<()> {
        out.rows = self.step.0;
        let row = table.bytes() / table.rows.max(1) as u64;
        let cost =
            Cost { weights: out.rows as u64 * row, activations: out.live(), ..Cost::default() };
        self.observe("embed", &table.name, cost, |stream| {
            stream.embed(&table.inner, &mut out.inner)
        })
    }

    fn norm(
        &mut self,
        x: &Tensor<B::Tensor>,
        rows: Range<usize>,
        norm: &B::Norm,
        out: &mut Tensor<B::Tensor>,
    ) -> Result<()> {
        out.rows = rows.len();
        let cost = Cost {
            weights: norm.bytes(),
            activations: rows.len() as u64 * x.row_bytes() + out.live(),
            ..Cost::default()
        };
        self.observe("norm", &Arc::default(), cost, |stream| {
            stream.norm(&x.inner, rows, norm, &mut out.inner)
        })
    }

    fn linear(
        &mut self,
        x: &Tensor<B::Tensor>,
        weight: &Linear<B::Linear>,
        out: &mut Tensor<B::Tensor>,
    ) -> Result<()> {
        out.rows = x.rows;
        let cost = Cost {
            weights: weight.bytes(),
            activations: x.live() + out.live(),
            multiply_adds: (x.rows * weight.rows * weight.cols) as u64,
            ..Cost::default()
        };
        self.observe_product("linear", (&weight.name, weight.format), cost, |stream| {
            stream.linear(&x.inner, &weight.inner, &mut out.inner)
        })
    }

    fn linear_add(
        &mut self,
        x: &Tensor<B::Tensor>,
        weight: &Linear<B::Linear>,
        out: &mut Tensor<B::Tensor>,
    ) -> Result<()> {
        let cost = Cost {
            weights: weight.bytes(),
            activations: x.live() + 2 * out.live(),
            multiply_adds: (x.rows * weight.rows * weight.cols) as u64,
            ..Cost::default()
        };
        self.observe_product("linear_add", (&weight.name, weight.format), cost, |stream| {
            stream.linear_add(&x.inner, &weight.inner, &mut out.inner)
        })
    }

    fn rope_append(
        &mut self,
        qkv: &mut Tensor<B::Tensor>,
        rope: &B::Rope,
        cache: &mut Cache<B::Cache>,
    ) -> Result<()> {
        let rows = cache.rows;
        let table = cost::row_bytes(cache.shape.head_dim, TensorFormat::F32);
        let queries = cost::row_bytes(cache.shape.width(), TensorFormat::F32);
        let tokens = qkv.rows as u64;
        let cost = Cost {
            cache: tokens * (rows.key + rows.value),
            activations: qkv.live() + tokens * (table + queries),
            ..Cost::default()
        };
        self.observe("rope_append", &Arc::default(), cost, |stream| {
            stream.rope_append(&mut qkv.inner, rope, &mut cache.inner)
        })
    }

    fn encode_keys(&mut self, cache: &mut Cache<B::Cache>) -> Result<()> {
        cache.refresh();
        let (end, page) = (self.step.0 + self.step.1, cache.policy.page);
        let full = if cache.policy.is_dense() { 0 } else { (end / page) as u64 };
        let pages = full.saturating_sub(cache.rows.pages);
        if pages == 0 {
            // Nothing is done, which is not worth a line of a profile.
            return self.inner.encode_keys(&mut cache.inner);
        }
        let nothing = Arc::default();
        let inner = &mut cache.inner;
        self.observe("encode_keys", &nothing, Cost::default(), |s| s.encode_keys(inner))?;
        cache.due = 2;
        cache.refresh();
        // What the new pages take is known by now, or about as much as the others.
        let bytes = cost::encode(&cache.policy, cache.rows, pages);
        let cost = Cost { cache: bytes, ..Cost::default() };
        self.tally.cost += cost;
        if self.mode != Mode::Count {
            self.tally.operation("encode_keys", &nothing).cost += cost;
        }
        Ok(())
    }

    fn attention(
        &mut self,
        qkv: &Tensor<B::Tensor>,
        cache: &Cache<B::Cache>,
        out: &mut Tensor<B::Tensor>,
    ) -> Result<()> {
        out.rows = qkv.rows;
        let (_, position, phase) = self.step;
        let rule = cache.policy.rule(phase);
        let cost = cost::attention(&rule, &cache.shape, cache.rows, position, qkv.rows);
        self.observe("attention", &Arc::default(), cost, |stream| {
            stream.attention(&qkv.inner, &cache.inner, &mut out.inner)
        })
    }

    fn gate(
        &mut self,
        gate_up: &Tensor<B::Tensor>,
        activation: Activation,
        norm: Option<&B::Norm>,
        out: &mut Tensor<B::Tensor>,
    ) -> Result<()> {
        out.rows = gate_up.rows;
        let cost = Cost {
            weights: norm.map_or(0, Footprint::bytes),
            activations: gate_up.live() + out.live(),
            ..Cost::default()
        };
        self.observe("gate", &Arc::default(), cost, |stream| {
            stream.gate(&gate_up.inner, activation, norm, &mut out.inner)
        })
    }

    fn sample(&mut self, logits: &Tensor<B::Tensor>, step: &SampleStep<'_>) -> Result<()> {
        let cost = Cost { activations: logits.row_bytes(), ..Cost::default() };
        self.observe("sample", &Arc::default(), cost, |stream| stream.sample(&logits.inner, step))
    }

    fn truncate(&mut self, cache: &mut Cache<B::Cache>, length: usize) -> Result<()> {
        cache.due = 2;
        self.inner.truncate(&mut cache.inner, length)
    }

    fn pages(&mut self, cache: &Cache<B::Cache>) -> Result<Vec<Vec<Page>>> {
        self.inner.pages(&cache.inner)
    }

    fn save(&mut self, cache: &Cache<B::Cache>, exact_from: usize) -> Result<CacheImage> {
        self.inner.save(&cache.inner, exact_from)
    }

    fn restore(&mut self, cache: &mut Cache<B::Cache>, image: &CacheImage) -> Result<()> {
        cache.due = 2;
        self.inner.restore(&mut cache.inner, image)
    }

    fn submit(&mut self) -> Result<()> {
        self.inner.submit()?;
        self.report()
    }

    fn wait(&mut self) -> Result<()> {
        self.inner.wait()
    }

    fn token(&mut self) -> Result<u32> {
        let token = self.inner.token()?;
        self.report()?;
        Ok(token)
    }

    fn read(&mut self, tensor: &Tensor<B::Tensor>) -> Result<Vec<f32>> {
        let values = self.inner.read(&tensor.inner)?;
        self.report()?;
        Ok(values)
    }

    fn read_int8(&mut self, tensor: &Tensor<B::Tensor>) -> Result<(Vec<i8>, Vec<f32>)> {
        self.inner.read_int8(&tensor.inner)
    }

    fn activity(&self) -> Activity {
        self.inner.activity()
    }

    fn time_kernels(&mut self, on: bool) -> Result<bool> {
        self.inner.time_kernels(on)
    }

    fn kernel_times(&mut self) -> Result<Vec<KernelTime>> {
        self.inner.kernel_times()
    }
}
